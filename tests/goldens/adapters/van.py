"""Visual Attention Network: large kernel attention, its block and the whole networks."""

import torch
from case import GoldenCase, Result
from segmentation_heads import run_head
from torch import nn

from gridattn.layers.large_kernel import LargeKernelAttention, VisualAttentionBlock, convert_official
from gridattn.models import create_model
from gridattn.systems.segment import SemanticFPNHead


def _run(layer: nn.Module, case: GoldenCase) -> Result:
    layer.load_state_dict(convert_official(case.state), strict=True)
    x = case.leaf("x")
    y = layer.eval()(x.movedim(1, -1)).movedim(-1, 1)
    (grad,) = torch.autograd.grad((y * case.inputs["cotangent"]).sum(), x)
    return {"out.y": y, "grad.x": grad}


def large_kernel(case: GoldenCase) -> Result:
    return _run(LargeKernelAttention(case.config["dim"]), case)


def block(case: GoldenCase) -> Result:
    return _run(VisualAttentionBlock(case.config["dim"], mlp_ratio=case.config["mlp_ratio"]), case)


def classifier(case: GoldenCase) -> Result:
    model = create_model("van_b0", **case.config)
    model.load_official(case.state)
    x = case.leaf("x")
    y = model.eval()(x)
    (grad,) = torch.autograd.grad(y, x, case.inputs["cotangent"])
    return {"out.y": y, "grad.x": grad}


def dense(case: GoldenCase) -> Result:
    model = create_model("van_b0", features_only=True, **case.config)
    model.load_official(case.state)
    x = case.leaf("x")
    maps = model.eval()(x)
    (grad,) = torch.autograd.grad(maps, x, [case.inputs[f"cotangent.y{i}"] for i in range(len(maps))])
    return {"grad.x": grad} | {f"out.y{i}": y for i, y in enumerate(maps)}


def semantic_fpn(case: GoldenCase) -> Result:
    config = dict(case.config)
    head = SemanticFPNHead(
        config["in_channels"],
        config["num_classes"],
        reductions=config["feature_strides"],
        fpn_channels=config["fpn_channels"],
        channels=config["channels"],
    )
    return run_head(head, case)


ADAPTERS = {
    "LKA": large_kernel,
    "Block": block,
    "VAN": classifier,
    "VAN(dense backbone)": dense,
    "FPN + FPNHead": semantic_fpn,
}
DISPUTED = {
    ("tiny_seg", "grad.x"): (
        "the stored gradient is uncorrelated with ours (-0.02), which agrees with finite differences in float64, while "
        "all outputs agree; no choice of cotangents gives it at the stored input"
    )
}

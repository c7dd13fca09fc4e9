"""Visual Attention Network: large kernel attention and its block."""

import torch
from case import GoldenCase, Result
from torch import nn

from gridattn.layers.large_kernel import LargeKernelAttention, VisualAttentionBlock, convert_official


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


ADAPTERS = {"LKA": large_kernel, "Block": block}
PENDING = {
    "VAN": "the classifier is a whole model",
    "VAN(dense backbone)": "the backbone is a whole model",
    "FPN + FPNHead": "the segmentation head belongs to a system",
}

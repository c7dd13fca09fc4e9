"""Polarized self-attention: the official layers, those that follow the paper, and networks around them."""

from functools import partial

import torch
from case import GoldenCase, Result

from gridattn.layers.polarized import PolarizedSelfAttention, convert_official
from gridattn.models import Backbone, PolarizedHRNet, PoseHRNet, PoseResNet
from gridattn.models.polarized_ocr import MultiScaleObjectContextNet


def layer(case: GoldenCase, *, layout: str, variant: str, channels: str) -> Result:
    module = PolarizedSelfAttention(case.config[channels], layout=layout, variant=variant)
    module.load_state_dict(convert_official(case.state), strict=True)
    x = case.leaf("x")
    y = module.eval()(x.movedim(1, -1)).movedim(-1, 1)
    (grad,) = torch.autograd.grad((y * case.inputs["cotangent"]).sum(), x)
    return {"out.y": y, "grad.x": grad}


def _pose(model: Backbone, case: GoldenCase) -> Result:
    model.load_official(case.state)
    x = case.leaf("x")
    heatmaps = model.eval()(x)
    (grad,) = torch.autograd.grad((heatmaps * case.inputs["cotangent"]).sum(), x)
    return {"out.heatmaps": heatmaps, "grad.x": grad}


def pose_hrnet(case: GoldenCase) -> Result:
    config = case.config
    model = PoseHRNet(
        config["width"],
        depths=(config["layer1_blocks"], *config["modules"]),
        blocks=config["blocks"],
        layout=LAYOUT[config["layout"]],
        bottleneck_attention="Bottleneck" in config["psa_in"],
        num_classes=config["num_joints"],
    )
    return _pose(model, case)


def pose_resnet(case: GoldenCase) -> Result:
    config = case.config
    model = PoseResNet(
        config["blocks"],
        config["bottleneck_planes"],
        config["stem"],
        layout=LAYOUT[config["layout"]],
        deconv_dims=config["deconv_filters"],
        deconv_kernels=config["deconv_kernels"],
        num_classes=config["num_joints"],
    )
    return _pose(model, case)


def segmentation(case: GoldenCase) -> Result:
    config = case.config
    body = PolarizedHRNet(
        config["width"],
        depths=(_count(case, "backbone.layer1."), *config["modules"]),
        blocks=config["blocks_per_stage"],
        layout=LAYOUT[config["layout"]],
        bottleneck_width=config["stage1_channels"],
        num_classes=0,
    )
    model = MultiScaleObjectContextNet(
        body, config["num_classes"], config["ocr_mid"], config["ocr_key"], config["attn_bottleneck"]
    )
    model.load_official(case.state)
    x = case.leaf("x")
    result = model.eval()(x, config["scales"])
    (grad,) = torch.autograd.grad((result["pred"] * case.inputs["cotangent"]).sum(), x)
    return {f"out.{name}": tensor for name, tensor in result.items()} | {"grad.x": grad}


def _count(case: GoldenCase, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in case.state if name.startswith(prefix)})


LAYOUT = {"p": "parallel", "s": "sequential", None: None}
ADAPTERS = {
    "PoseHighResolutionNet+PSA": pose_hrnet,
    "PoseResNet+PSA": pose_resnet,
    "MscaleOCR": segmentation,
    "PSA_p": partial(layer, layout="parallel", variant="official", channels="planes"),
    "PSA_s": partial(layer, layout="sequential", variant="official", channels="planes"),
    "ParallelPolarizedSelfAttention": partial(layer, layout="parallel", variant="paper", channels="channel"),
    "SequentialPolarizedSelfAttention": partial(layer, layout="sequential", variant="paper", channels="channel"),
}
PENDING = {
    "RMILoss": "the loss belongs to the segmentation system",
    "codec": "heatmap coding belongs to the pose system",
    "oks_ap": "the metric belongs to the pose system",
}

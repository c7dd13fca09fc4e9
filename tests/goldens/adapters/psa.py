"""Polarized self-attention: the official layers and those that follow the paper."""

from functools import partial

import torch
from case import GoldenCase, Result

from gridattn.layers.polarized import PolarizedSelfAttention, convert_official


def layer(case: GoldenCase, *, layout: str, variant: str, channels: str) -> Result:
    module = PolarizedSelfAttention(case.config[channels], layout=layout, variant=variant)
    module.load_state_dict(convert_official(case.state), strict=True)
    x = case.leaf("x")
    y = module.eval()(x.movedim(1, -1)).movedim(-1, 1)
    (grad,) = torch.autograd.grad((y * case.inputs["cotangent"]).sum(), x)
    return {"out.y": y, "grad.x": grad}


ADAPTERS = {
    "PSA_p": partial(layer, layout="parallel", variant="official", channels="planes"),
    "PSA_s": partial(layer, layout="sequential", variant="official", channels="planes"),
    "ParallelPolarizedSelfAttention": partial(layer, layout="parallel", variant="paper", channels="channel"),
    "SequentialPolarizedSelfAttention": partial(layer, layout="sequential", variant="paper", channels="channel"),
}
PENDING = {
    "PoseHighResolutionNet+PSA": "the pose network is a whole model",
    "PoseResNet+PSA": "the pose network is a whole model",
    "MscaleOCR": "the segmentation network is a whole system",
    "RMILoss": "the loss belongs to the segmentation system",
    "codec": "heatmap coding belongs to the pose system",
    "oks_ap": "the metric belongs to the pose system",
}

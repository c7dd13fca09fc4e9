"""DaViT: the spatial and the channel block."""

import torch
from case import GoldenCase

from gridattn.layers.channel import ChannelAttention
from gridattn.layers.dual import DualAttentionBlock, PaddedWindowAttention

PENDING = {
    "DaVit": "a whole model",
    "DaViT": "a whole model",
    "DaViT(dense backbone)": "a whole model",
    "FCNHead": "a segmentation head",
    "UPerHead": "a segmentation head",
}


def run(block: DualAttentionBlock, case: GoldenCase) -> dict[str, torch.Tensor]:
    block.load_state_dict(case.state)
    x = case.leaf("x")
    y = block.eval()(x.movedim(1, -1)).movedim(-1, 1)
    (grad,) = torch.autograd.grad(y, x, case.inputs["cotangent"])
    return {"out.y": y, "grad.x": grad}


def spatial(case: GoldenCase) -> dict[str, torch.Tensor]:
    config = case.config
    attention = PaddedWindowAttention(
        config["dim"],
        config["num_heads"],
        window_size=config.get("window_size", 7),
        bias=False,
        qkv_bias=config.get("qkv_bias", True),
    )
    return run(DualAttentionBlock(attention, config.get("mlp_ratio", 4.0)), case)


def channel(case: GoldenCase) -> dict[str, torch.Tensor]:
    config = case.config
    attention = ChannelAttention(
        config["dim"],
        config["num_heads"],
        qkv_bias=config.get("qkv_bias", True),
        dynamic_scale=config.get("v2", False),
    )
    return run(DualAttentionBlock(attention, config.get("mlp_ratio", 4.0)), case)


ADAPTERS = {"SpatialBlock": spatial, "ChannelBlock": channel}

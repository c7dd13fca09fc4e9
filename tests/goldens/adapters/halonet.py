"""HaloNet: the halo attention layer."""

import torch
from case import GoldenCase

from gridattn.layers.halo import HaloAttention, halo_state_from_official

PENDING = {"timm ByobNet": "a whole model"}


def build(case: GoldenCase, *, mask_padding: bool) -> HaloAttention:
    config = case.config
    layer = HaloAttention(
        config["dim"],
        config.get("num_heads", 8),
        block_size=config.get("block_size", 8),
        halo_size=config.get("halo_size", 3),
        stride=config.get("stride", 1),
        dim_out=config.get("dim_out"),
        head_dim=config.get("dim_head"),
        qk_ratio=config.get("qk_ratio", 1.0),
        qkv_bias=config.get("qkv_bias", False),
        average_pool=config.get("avg_down", False),
        scale_relative=config.get("scale_pos_embed", False),
        mask_padding=mask_padding,
    )
    layer.load_state_dict(halo_state_from_official(case.state))
    return layer.eval()


def layer(case: GoldenCase) -> dict[str, torch.Tensor]:
    x = case.leaf("x")
    y = build(case, mask_padding=False)(x.movedim(1, -1)).movedim(-1, 1)
    result = {"out.y": y}
    if "cotangent" in case.inputs:
        (result["grad.x"],) = torch.autograd.grad(y, x, case.inputs["cotangent"])
    return result


def masked_and_unmasked(case: GoldenCase) -> dict[str, torch.Tensor]:
    x = case.inputs["x"].movedim(1, -1)
    return {
        f"out.y_{name}": build(case, mask_padding=masked)(x).movedim(-1, 1)
        for name, masked in (("masked", True), ("unmasked", False))
    }


ADAPTERS = {"timm.layers.HaloAttn": layer, "hand": masked_and_unmasked}

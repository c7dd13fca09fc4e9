"""HaloNet: the halo attention layer and whole models."""

import torch
from case import GoldenCase

from gridattn.layers.halo import HaloAttention, halo_state_from_official
from gridattn.models import HaloNet


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


def model(case: GoldenCase) -> dict[str, torch.Tensor]:
    config, state = case.config, case.state
    stages, attention = config["stages"], config["self_attn"]
    gates = [key for key in state if ".attn." in key]
    final = state.get("final_conv.conv.weight")
    built = HaloNet(
        depths=[stage["d"] for stage in stages],
        widths=[stage["c"] for stage in stages],
        strides=[stage["s"] for stage in stages],
        halo_blocks=[
            [j for j in range(stage["d"]) if f"stages.{i}.{j}.self_attn.q.weight" in state]
            for i, stage in enumerate(stages)
        ],
        bottleneck_ratio=[stage.get("br", 0.25) for stage in stages],
        num_heads=attention.get("num_heads", 8),
        block_size=attention.get("block_size", 8),
        halo_size=attention.get("halo_size", 3),
        head_dim=attention.get("dim_head"),
        qk_ratio=attention.get("qk_ratio", 1.0),
        stem=config["stem"],
        stem_width=config["stem_chs"],
        stem_pool=bool(config.get("stem_pool")),
        activation=config.get("act", "relu"),
        group_width=next((stage["gs"] for stage in stages if stage.get("gs")), None),
        channel_attention=None if not gates else "se" if ".fc" in gates[0] else "eca",
        squeeze_ratio=config.get("attn_kwargs", {}).get("rd_ratio", 1 / 16),
        final_width=None if final is None else len(final),
        num_classes=config["num_classes"],
    )
    built.load_official(state)
    x = case.leaf("x")
    features = built.eval().forward_features(x)
    logits = built.forward_head(features)
    (grad,) = torch.autograd.grad(logits, x, case.inputs["cotangent"])
    return {"out.features": features.movedim(-1, 1), "out.logits": logits, "grad.x": grad}


ADAPTERS = {"timm.layers.HaloAttn": layer, "hand": masked_and_unmasked, "timm ByobNet": model}

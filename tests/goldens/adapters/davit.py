"""DaViT: the spatial and the channel block, and the whole networks."""

import torch
from case import GoldenCase
from segmentation_heads import run_head

from gridattn.layers.channel import ChannelAttention
from gridattn.layers.dual import DualAttentionBlock, PaddedWindowAttention
from gridattn.models import create_model
from gridattn.systems.segment import FCNHead, UPerHead


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


def classifier(case: GoldenCase) -> dict[str, torch.Tensor]:
    model = create_model("davit_tiny", **_options(case))
    model.load_official(case.state)
    x = case.leaf("x")
    y = model.eval()(x)
    (grad,) = torch.autograd.grad(y, x, case.inputs["cotangent"])
    return {"out.y": y, "grad.x": grad}


def dense(case: GoldenCase) -> dict[str, torch.Tensor]:
    model = create_model("davit_tiny", features_only=True, **_options(case))
    model.load_official(case.state)
    x = case.leaf("x")
    maps = model.eval()(x)
    (grad,) = torch.autograd.grad(maps, x, [case.inputs[f"cotangent.y{i}"] for i in range(len(maps))])
    return {"grad.x": grad} | {f"out.y{i}": y for i, y in enumerate(maps)}


def upernet(case: GoldenCase) -> dict[str, torch.Tensor]:
    config = case.config
    options = {"channels": config["channels"], "pool_scales": config["pool_scales"]}
    return run_head(UPerHead(config["in_channels"], config["num_classes"], **options), case)


def auxiliary(case: GoldenCase) -> dict[str, torch.Tensor]:
    config = case.config
    return run_head(FCNHead(config["in_channels"], config["num_classes"], channels=config["channels"]), case)


def variant_call(name: str, config: dict) -> tuple[str, dict]:
    body = name.removesuffix("_dense_backbone")
    return body, {} if body == name else {"features_only": True}


def _options(case: GoldenCase) -> dict:
    return {key: value for key, value in case.config.items() if key != "named_blocks"}


ADAPTERS = {
    "SpatialBlock": spatial,
    "ChannelBlock": channel,
    "DaVit": classifier,
    "DaViT": classifier,
    "DaViT(dense backbone)": dense,
    "UPerHead": upernet,
    "FCNHead": auxiliary,
}

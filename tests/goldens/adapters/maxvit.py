"""MaxViT: the attention sub-layers, the MBConv block and whole models."""

import torch
from case import GoldenCase
from torch import nn

from gridattn.layers.maxvit import PartitionAttentionBlock, partition_state_from_official
from gridattn.layers.mbconv import MbConv, mbconv_options, mbconv_state_from_official
from gridattn.layers.window import WindowAttention
from gridattn.models import MaxViT


def run(block: nn.Module, x: torch.Tensor, case: GoldenCase, channels: int) -> dict[str, torch.Tensor]:
    y = block.eval()(x.movedim(channels, -1)).movedim(-1, channels)
    (grad,) = torch.autograd.grad(y, x, case.inputs["cotangent"])
    return {"out.y": y, "grad.x": grad}


def partition(case: GoldenCase) -> dict[str, torch.Tensor]:
    config = case.config
    is_tf = config.get("variant", "tf") == "tf"
    heads = config["dim"] // config.get("dim_head", 32)
    window = config["partition_size"]
    attention = WindowAttention(config["dim"], heads, window_size=window, partition=config["partition"])
    mlp_ratio = case.state["mlp.fc1.weight"].shape[0] / config["dim"]
    block = PartitionAttentionBlock(attention, mlp_ratio, norm_eps=1e-5 if is_tf else 1e-6, tanh_gelu=is_tf)
    block.load_state_dict(partition_state_from_official(case.state, heads, window))
    return run(block, case.leaf("x"), case, channels=-1)


def mbconv(case: GoldenCase) -> dict[str, torch.Tensor]:
    config = case.config
    dim, dim_out = config["in_chs"], config["out_chs"]
    options = mbconv_options(config.get("variant", "tf"), dim)
    block = MbConv(dim, dim_out, stride=config.get("stride", 1), **options)
    block.load_state_dict(mbconv_state_from_official(case.state))
    return run(block, case.leaf("x"), case, channels=1)


def model(case: GoldenCase) -> dict[str, torch.Tensor]:
    config = case.config
    tables = any(key.endswith("relative_position_bias_table") for key in case.state)
    gammas = [tensor for key, tensor in case.state.items() if key.endswith("ls1.gamma")]
    built = MaxViT(
        config["embed_dim"],
        config["depths"],
        config["stem_width"],
        config["variant"],
        config.get("dim_head", 32),
        config.get("head_hidden_size"),
        "table" if tables else "mlp",
        1.0 if gammas else None,
        any(".attn.attn_block." in key for key in case.state),
        img_size=config["img_size"],
        partition_ratio=config.get("partition_ratio", 32),
        window_size=config.get("window"),
        num_classes=config["num_classes"],
    )
    built.load_official(case.state)
    x = case.leaf("x")
    stem, *maps = [y.movedim(-1, 1) for y in built.eval().forward_maps(x)]
    logits = built.forward_head(built.norm(maps[-1].movedim(1, -1)))
    (grad,) = torch.autograd.grad(logits, x, case.inputs["cotangent"])
    return {f"out.stage{i}": y for i, y in enumerate(maps)} | {"out.stem": stem, "out.logits": logits, "grad.x": grad}


ADAPTERS = {
    "MaxxVit": model,
    "PartitionAttentionCl(block)": partition,
    "PartitionAttentionCl(grid)": partition,
    "MbConvBlock": mbconv,
}

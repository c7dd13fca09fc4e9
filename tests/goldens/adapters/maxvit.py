"""MaxViT: the attention sub-layers and the MBConv block."""

import torch
from case import GoldenCase
from torch import nn

from gridattn.layers.maxvit import PartitionAttentionBlock, partition_state_from_official
from gridattn.layers.mbconv import MbConv, mbconv_options, mbconv_state_from_official
from gridattn.layers.window import WindowAttention

PENDING = {"MaxxVit": "a whole model"}


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


ADAPTERS = {
    "PartitionAttentionCl(block)": partition,
    "PartitionAttentionCl(grid)": partition,
    "MbConvBlock": mbconv,
}

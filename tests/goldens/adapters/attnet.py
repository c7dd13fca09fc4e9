"""Attentive convolution and the block of AttNet."""

import torch
from case import GoldenCase, Result
from torch import nn

from gridattn.layers.attentive_conv import AttentiveConv, AttentiveConvBlock, convert_official


def _run(module: nn.Module, case: GoldenCase) -> Result:
    module.load_state_dict(convert_official(case.state), strict=True)
    x = case.leaf("x")
    y = module.eval()(x.movedim(1, -1)).movedim(-1, 1)
    (grad,) = torch.autograd.grad((y * case.inputs["cotangent"]).sum(), x)
    return {"out.y": y, "grad.x": grad}


def attentive_conv(case: GoldenCase) -> Result:
    config = case.config
    return _run(AttentiveConv(config["dim"], kernel_size=config["kernel_size"], qkv_bias=config["bias"]), case)


def block(case: GoldenCase) -> Result:
    config = case.config
    module = AttentiveConvBlock(
        config["dim"],
        kernel_size=config["kernel_size"],
        expansion=config["exp_rate"],
        layer_scale=1e-6 if config["use_layer_scale"] else None,
        conv=config["glu_dconv"],
        norm=config["glu_norm"],
    )
    return _run(module, case)


ADAPTERS = {"ATConv": attentive_conv, "Block": block}
PENDING = {"AttNet": "the classifier is a whole model", "SiT": "the diffusion transformer is a whole model"}

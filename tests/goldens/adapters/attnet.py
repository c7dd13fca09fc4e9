"""Attentive convolution, the block of AttNet, and the network."""

import torch
from case import GoldenCase, Result
from torch import nn

from gridattn.layers.attentive_conv import AttentiveConv, AttentiveConvBlock, convert_official
from gridattn.models import AttNet


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


def network(case: GoldenCase) -> Result:
    config = case.config
    model = AttNet(
        config["dims"],
        depths=config["depths"],
        mlp_ratios=config["exp_rates"],
        kernel_sizes=config["kernel_sizes"],
        feed_forward_conv=config["glu_dconv"],
        feed_forward_norm=config["glu_norm"],
        layer_scale=1e-6 if config["use_layer_scale"] else None,
        num_classes=config["num_classes"],
    )
    model.load_official(case.state)
    x = case.leaf("x")
    y = model.eval()(x)
    (grad,) = torch.autograd.grad((y * case.inputs["cotangent"]).sum(), x)
    return {"out.y": y, "grad.x": grad}


ADAPTERS = {"ATConv": attentive_conv, "Block": block, "AttNet": network}
PENDING = {"SiT": "the diffusion transformer is a whole system"}

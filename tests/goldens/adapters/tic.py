"""MSA-Conv: the operator, the released layer, and hand-worked cases of shift and pooling."""

import torch
from case import GoldenCase, Result
from torch import Tensor

from gridattn.layers.msa_conv import MSAConvLayer, convert_official
from gridattn.ops.msa_conv import inter_pool, msa_conv, window_logits


def _one_head(x: Tensor) -> Tensor:
    return x.movedim(1, -1).unsqueeze(-2)


def _channels_first(x: Tensor) -> Tensor:
    return x.squeeze(-2).movedim(-1, 1)


def operator(case: GoldenCase) -> Result:
    config = case.config
    window = {"kernel_size": tuple(config["kernel_size"]), "dilation": config["dilation"]}
    leaves = {name: case.leaf(name) for name in "qkv"}
    q, k, v = (_one_head(leaf) for leaf in leaves.values())
    logits = window_logits(q, k, **window)
    y = _channels_first(msa_conv(q, k, v, scale=config["scale"], **window))
    result = {
        "out.logits": _channels_first(logits),
        "out.attn": _channels_first((config["scale"] * logits).softmax(-1)),
        "out.y": y,
    }
    if case.grads:
        grads = torch.autograd.grad((y * case.inputs["cotangent"]).sum(), list(leaves.values()))
        result |= {f"grad.{name}": grad for name, grad in zip(leaves, grads)}
    return result


def layer(case: GoldenCase) -> Result:
    config = case.config
    module = MSAConvLayer(
        config["input_channel"],
        config["output_channel"],
        **{key: config[key] for key in ("kernel_size", "stride", "dilation", "padding", "bias")},
    )
    module.load_state_dict(convert_official(case.state), strict=True)
    x = case.leaf("x")
    y = module.eval()(x.movedim(1, -1)).movedim(-1, 1)
    (grad,) = torch.autograd.grad((y * case.inputs["cotangent"]).sum(), x)
    return {"out.y": y, "grad.x": grad}


def hand(case: GoldenCase) -> Result:
    if case.config.get("kind") == "interpool":
        return {"out.y": inter_pool(case.inputs["x"].movedim(1, -1)).movedim(-1, 1)}
    shift = case.config.get("shift", [0, 0])
    rolled = GoldenCase(**{**vars(case), "inputs": {n: t.roll(shift, (2, 3)) for n, t in case.inputs.items()}})
    return {name: tensor.roll([-s for s in shift], (2, 3)) for name, tensor in operator(rolled).items()}


ADAPTERS = {"msa_conv_functional": operator, "MSA_Conv_2d": layer, "hand": hand}

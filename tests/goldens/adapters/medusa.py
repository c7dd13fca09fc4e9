"""MEDUSA: the attention head and the encoder-decoder body."""

import torch
from case import GoldenCase, Result

from gridattn.layers.encoder_decoder import (
    EncoderDecoderMap,
    MapGain,
    convolution_from_tensorflow,
    load_official_map,
)
from gridattn.ops.legacy_resize import legacy_bilinear_resize


def _head(case: GoldenCase) -> Result:
    head = MapGain(case.config["channels"])
    weights = {("weight" if key.endswith("kernel") else "bias"): tensor for key, tensor in case.state.items()}
    head.gain.load_state_dict({key: convolution_from_tensorflow(tensor) for key, tensor in weights.items()})
    x, attention = case.leaf("x"), case.leaf("map")
    y = head(x, attention)
    grads = torch.autograd.grad(y, (x, attention), case.inputs["cotangent"])
    resized = legacy_bilinear_resize(attention, x.shape[-2:])
    return {"out.y": y, "out.resized_map": resized, "grad.x": grads[0], "grad.map": grads[1]}


def _body(case: GoldenCase) -> Result:
    x = case.leaf("x")
    body = EncoderDecoderMap(x.shape[1], case.config.get("unet_width_divisor", 1))
    body.load_state_dict(load_official_map(case.state))
    y = body(x)
    (grad,) = torch.autograd.grad(y, x, case.inputs["cotangent"])
    return {"out.map": y, "grad.x": grad}


ADAPTERS = {"apply_attention": _head, "build_UNet2D_4L": _body}
PENDING = {"ResNet50_1 + build_UNet2D_4L": "the classification system is not built yet"}

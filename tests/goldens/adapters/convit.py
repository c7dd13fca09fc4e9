"""ConViT: gated positional attention, dense attention, the locality initialisation and the whole network."""

import torch
from case import GoldenCase

from gridattn.layers.gated_positional import GatedPositionalAttention, attention_distances, mean_attention
from gridattn.layers.global_attention import GlobalAttention
from gridattn.models import create_model
from gridattn.ops.gated_positional import positional_weights, relative_coordinates


def run(layer: GatedPositionalAttention | GlobalAttention, case: GoldenCase) -> dict[str, torch.Tensor]:
    layer.load_state_dict(case.state)
    layer.eval()
    tokens = case.leaf("x")
    x = tokens.unflatten(1, case.config["grid"])
    y = layer(x).flatten(1, 2)
    (grad,) = torch.autograd.grad(y, tokens, case.inputs["cotangent"])
    return {
        "out.y": y,
        "out.attn_mean": mean_attention(layer, x),
        "out.nonlocality": attention_distances(layer, x),
        "grad.x": grad,
    }


def gated(case: GoldenCase) -> dict[str, torch.Tensor]:
    config = case.config
    return run(
        GatedPositionalAttention(config["dim"], config["num_heads"], qkv_bias=config.get("qkv_bias", False)), case
    )


def dense(case: GoldenCase) -> dict[str, torch.Tensor]:
    config = case.config
    return run(GlobalAttention(config["dim"], config["num_heads"], qkv_bias=config.get("qkv_bias", False)), case)


def local_init(case: GoldenCase) -> dict[str, torch.Tensor]:
    result = {"out.rel_indices.3x3": relative_coordinates((3, 3)).float()}
    for num_heads, strength in case.config["cases"]:
        layer = GatedPositionalAttention(4 * num_heads, num_heads, locality_strength=strength)
        taps = int(num_heads**0.5) ** 2
        weight = layer.pos_proj.weight[:taps].detach()
        name = f"h{num_heads}_a{strength}"
        result[f"out.pos_proj_weight.{name}"] = weight
        result[f"out.pos_attn.{name}"] = positional_weights(case.config["grid"], weight)
        result[f"out.v_weight_is_eye.{name}"] = torch.tensor(
            [float(torch.equal(layer.v.weight, torch.eye(4 * num_heads)))]
        )
    return result


def classifier(case: GoldenCase) -> dict[str, torch.Tensor]:
    model = create_model("convit_tiny", **case.config)
    model.load_official(case.state)
    x = case.leaf("x")
    y = model.eval()(x)
    (grad,) = torch.autograd.grad(y, x, case.inputs["cotangent"])
    return {"out.y": y, "grad.x": grad}


ADAPTERS = {"GPSA": gated, "MHSA": dense, "GPSA.local_init": local_init, "VisionTransformer": classifier}

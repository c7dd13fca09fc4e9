"""PPMA: the log masks, both forms of the attention layer, and the whole networks."""

from typing import Any

import torch
from case import GoldenCase, Result

from gridattn.layers.path_mask import PathDecay, PolylinePathAttention, convert_official, raster_rotation
from gridattn.models import create_model
from gridattn.ops.path_mask import axis_log_masks, path_log_mask


def masks(case: GoldenCase) -> Result:
    decay = PathDecay(case.config["embed_dim"], case.config["nheads"])
    decay.load_state_dict(case.state)
    x = case.leaf("x")
    log_decay = decay(x)
    columns, rows = axis_log_masks(log_decay)
    outputs = {"log_mask_w": rows, "log_mask_h": columns, "log_mask_full": path_log_mask(log_decay)}
    cotangents = [case.inputs[f"cotangent_{name}"] for name in outputs]
    (grad,) = torch.autograd.grad(list(outputs.values()), x, cotangents)
    return {**{f"out.{name}": mask for name, mask in outputs.items()}, "grad.x": grad}


def attention(decomposed: bool):
    def run(case: GoldenCase) -> Result:
        layer = PolylinePathAttention(case.config["embed_dim"], case.config["num_heads"], decomposed=decomposed)
        layer.load_state_dict(convert_official(case.state))
        x = case.leaf("x")
        y = layer.eval()(x)
        (grad,) = torch.autograd.grad(y, x, case.inputs["cotangent"])
        rotation = raster_rotation(x.shape[1:-1], layer.dim // layer.num_heads)
        sin, cos = (t.repeat_interleave(2, -1) for t in rotation)
        return {"out.y": y, "grad.x": grad, "out.rope_sin": sin, "out.rope_cos": cos}

    return run


def classifier(case: GoldenCase) -> Result:
    model = create_model("ppma_t", **_options(case))
    model.load_official(case.state)
    x = case.leaf("x")
    y = model.eval()(x)
    (grad,) = torch.autograd.grad(y, x, case.inputs["cotangent"])
    return {"out.y": y, "grad.x": grad}


def dense(case: GoldenCase) -> Result:
    model = create_model("ppma_t", features_only=True, **_options(case))
    model.load_official(case.state)
    x = case.leaf("x")
    maps = model.eval()(x)
    names = sorted(case.outputs)
    (grad,) = torch.autograd.grad(maps, x, [case.inputs[f"cotangent_{name}"] for name in names])
    return {"grad.x": grad} | {f"out.{name}": y for name, y in zip(names, maps)}


def _options(case: GoldenCase) -> dict[str, Any]:
    options = dict(case.config)
    initial = options.pop("layer_init_values", 1e-6)
    renamed = {"decomposed": options.pop("chunkwise_recurrents", None)}
    if "layerscales" in options:
        renamed["layer_scale"] = [initial if scaled else None for scaled in options.pop("layerscales")]
    return options | {name: value for name, value in renamed.items() if value is not None}


ADAPTERS = {
    "PathEmbeding2D": masks,
    "MambaAttentionAllDouble": attention(decomposed=False),
    "MambaAttentionChunkDouble": attention(decomposed=True),
    "PPMAViT": classifier,
    "Backbone_PPMAViT": dense,
}

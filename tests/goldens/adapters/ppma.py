"""PPMA: the log masks and both forms of the attention layer."""

import torch
from case import GoldenCase, Result

from gridattn.layers.path_mask import PathDecay, PolylinePathAttention, convert_official, raster_rotation
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


ADAPTERS = {
    "PathEmbeding2D": masks,
    "MambaAttentionAllDouble": attention(decomposed=False),
    "MambaAttentionChunkDouble": attention(decomposed=True),
}
PENDING = {"PPMAViT": "the whole model is not built yet", "Backbone_PPMAViT": "the whole model is not built yet"}

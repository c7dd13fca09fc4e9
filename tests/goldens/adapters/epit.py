"""EPIT: the transformer of an epipolar plane and the alternating filter."""

import torch
from case import GoldenCase, Result
from einops import rearrange

from gridattn.layers.epipolar import AlternatingFilter, EpipolarTransformer, load_official_epipolar


def _plane(case: GoldenCase) -> Result:
    c, buffer = case.config, case.leaf("buffer")
    layer = EpipolarTransformer(c["channels"], c["spa_dim"], c["num_heads"], c["mask_field"]).eval()
    layer.load_state_dict(load_official_epipolar(case.state))
    planes = layer(rearrange(buffer, "b c n a p -> (b n) a p c"))
    y = rearrange(planes, "(b n) a p c -> b c n a p", b=buffer.shape[0])
    (grad,) = torch.autograd.grad(y, buffer, case.inputs["cotangent"])
    return {"out.y": y, "out.allowed": layer.visible(*buffer.shape[-2:]).to(torch.uint8), "grad.buffer": grad}


def _filter(case: GoldenCase) -> Result:
    c, buffer = case.config, case.leaf("buffer")
    layer = AlternatingFilter(c["channels"], c["mask_field"], c.get("num_heads", 8)).eval()
    layer.load_state_dict(load_official_epipolar(case.state))
    y = layer(rearrange(buffer, "b c (u v) h w -> b u v h w c", u=c["angRes"]))
    y = rearrange(y, "b u v h w c -> b c (u v) h w")
    (grad,) = torch.autograd.grad(y, buffer, case.inputs["cotangent"])
    return {"out.y": y, "grad.buffer": grad}


ADAPTERS = {"BasicTrans": _plane, "AltFilter": _filter}
PENDING = {
    "get_model": "the super-resolution system is not built yet",
    "LF_Bicubic, LF_rgb2ycbcr, LF_ycbcr2rgb, LF_interpolate, LF_divide_integrate, cal_metrics": (
        "the super-resolution system is not built yet"
    ),
}

"""EPIT: the transformer of an epipolar plane, the alternating filter, the network, and what stands around it."""

import torch
from case import GoldenCase, Result
from einops import rearrange

from gridattn.layers.epipolar import AlternatingFilter, EpipolarTransformer, load_official_epipolar
from gridattn.systems.epit.convert import convert_official
from gridattn.systems.epit.fields import bicubic_down, bicubic_up, rgb_to_ycbcr, ycbcr_to_rgb
from gridattn.systems.epit.metrics import view_psnr, view_ssim
from gridattn.systems.epit.model import build_epit
from gridattn.systems.epit.tiles import divide, integrate


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


def _network(case: GoldenCase) -> Result:
    c, lr = case.config, case.leaf("lr")
    network = build_epit(c["scale_factor"], c["channels"], c["blocks"], c.get("num_heads", 8)).eval()
    network.load_state_dict(convert_official(case.state))
    y = network(lr)
    (grad,) = torch.autograd.grad(y, lr, case.inputs["cotangent"])
    return {"out.SR": y, "grad.lr": grad}


def _around(case: GoldenCase) -> Result:
    c, field = case.config, case.inputs["lf"]
    tile, stride, scale = c["patch"], c["stride"], c["scale"]
    low = bicubic_down(field, scale)
    ycbcr, up = rgb_to_ycbcr(field), bicubic_up(low, scale)
    patches = torch.cat([divide(one, tile, stride) for one in low])
    size = (field.shape[-2], field.shape[-1])
    done = bicubic_up(patches, scale).chunk(len(low))
    integrated = torch.stack([integrate(one, size, stride * scale) for one in done])
    y, truth = (rgb_to_ycbcr(one)[0, 0] for one in (integrated, field))
    downs = {f"out.bicubic_x{s}": bicubic_down(field, s) for s in range(2, 9)}
    return downs | {
        f"out.up_x{scale}": up,
        "out.ycbcr": ycbcr,
        "out.rgb_back": ycbcr_to_rgb(ycbcr),
        "out.patches": patches,
        "out.integrated": integrated,
        "out.psnr": view_psnr(y, truth),
        "out.ssim_range1": view_ssim(y, truth, 1.0),
        "out.ssim_range2": view_ssim(y, truth, 2.0),
    }


ADAPTERS = {
    "BasicTrans": _plane,
    "AltFilter": _filter,
    "get_model": _network,
    "LF_Bicubic, LF_rgb2ycbcr, LF_ycbcr2rgb, LF_interpolate, LF_divide_integrate, cal_metrics": _around,
}

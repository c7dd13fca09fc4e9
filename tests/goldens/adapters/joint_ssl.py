"""Joint 2-D/3-D self-supervision: deformable attention along one axis."""

import torch
from case import GoldenCase, Result

from gridattn.layers.deformable_1d import DeformableAttention1d, deformable_1d_state_from_official

PENDING = {
    "ResNet_Trans(ResNet, EncoderModel, MultiPrototypes)": "a whole model",
    "EncoderDecoderModel": "a part of the self-supervision system",
    "cluster_memory, deepcluster-v2 loss, distributed_sinkhorn, SwAV loss": "losses of the self-supervision system",
}


def _deformable_1d(case: GoldenCase) -> Result:
    c = case.config
    layer = DeformableAttention1d(
        c["dim"],
        c["heads"],
        head_dim=c["dim_head"],
        stride=c["downsample_factor"],
        kernel_size=c["offset_kernel_size"],
        offset_scale=c["offset_scale"],
        legacy_grid=c["legacy_grid"],
    ).eval()
    layer.load_state_dict(deformable_1d_state_from_official(case.state))
    x = case.leaf("x")
    tokens = x.movedim(1, -1)
    y = layer(tokens).movedim(-1, 1)
    (grad,) = torch.autograd.grad(y, x, case.inputs["cotangent"])
    return {"out.y": y, "out.vgrid": layer.sample_positions(tokens).flatten(0, 1), "grad.x": grad}


ADAPTERS = {"DeformableAttention1D (lucidrains)": _deformable_1d}

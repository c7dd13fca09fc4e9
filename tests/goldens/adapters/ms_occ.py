"""MS-Occ: multi-scale deformable attention with its residual."""

import torch
from case import GoldenCase, Result

from gridattn.layers.deformable import MultiScaleDeformableAttention

PENDING = {
    "hand": "modules of the occupancy system",
    "VisFuser + CustomResNet3D-18 + FPN3D": "a part of the occupancy system",
    "Lift-splat + depth losses": "a part of the occupancy system",
    "occupancy losses and metrics": "a part of the occupancy system",
    "OccHead (coarse + cascade)": "a part of the occupancy system",
}


def _deformable(case: GoldenCase) -> Result:
    c = case.config
    layer = MultiScaleDeformableAttention(c["embed_dims"], c["num_heads"], c["num_levels"], c["num_points"]).eval()
    star = layer.sampling_offsets.bias.detach().clone()
    layer.load_state_dict(case.state)
    query, value = case.leaf("query"), case.leaf("value")
    shapes, padding = case.inputs["spatial_shapes"].tolist(), case.inputs.get("key_padding_mask")
    y = layer(query, case.inputs["reference_points"], value, shapes, padding) + query
    grads = torch.autograd.grad(y, (query, value), case.inputs["cotangent"])
    return {"out.output": y, "out.init_offset_bias": star, "grad.query": grads[0], "grad.value": grads[1]}


ADAPTERS = {"MultiScaleDeformableAttention": _deformable}

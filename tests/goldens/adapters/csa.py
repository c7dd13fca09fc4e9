"""Class semantics-based attention."""

import torch
from case import GoldenCase, Result

from gridattn.layers.class_semantics import ClassSemanticsAttention


def _gates(case: GoldenCase) -> Result:
    c = case.config
    layer = ClassSemanticsAttention(
        c["c_f"],
        grid=(c["T"],),
        semantic_dim=c["c_r"],
        reduction=c["reduction"],
        hidden=c["temporal_hidden"],
        fuse=c["fuse"],
    ).double()
    layer.load_state_dict(case.state)
    features, semantics = case.leaf("F"), case.leaf("R")
    out = layer(features.mT, semantics.mT).mT
    channel, temporal = layer.gates(semantics)
    grads = torch.autograd.grad(out, (features, semantics), case.inputs["cotangent"])
    return {
        "out.F_att": out,
        "out.channel_att": channel.squeeze(-1),
        "out.temporal_att": temporal,
        "grad.F": grads[0],
        "grad.R": grads[1],
    }


ADAPTERS = {"hand": _gates}
PENDING = {
    "BMN": "the action detection system is not built yet",
    "BMN (mmaction2 layout)": "the action detection system is not built yet",
    "post_processing+evaluation": "the action detection system is not built yet",
}

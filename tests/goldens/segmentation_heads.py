"""Runs a golden of a segmentation head: maps y0, y1, ... in, scores y out."""

import torch
from case import GoldenCase, Result

from gridattn.systems.segment.convert import convert_heads
from gridattn.systems.segment.heads import FCNHead


def run_head(head: torch.nn.Module, case: GoldenCase) -> Result:
    """Loads the published state, strictly, and gives the scores and the gradients of every map."""
    single = isinstance(head, FCNHead)
    prefix = "auxiliary_head." if single else "" if "neck.lateral_convs.0.conv.weight" in case.state else "decode_head."
    ours = convert_heads({prefix + name: tensor for name, tensor in case.state.items()})
    head.load_state_dict({name.split(".", 1)[1]: tensor for name, tensor in ours.items()}, strict=True)
    maps = {name: case.leaf(name) for name in sorted(case.inputs) if name != "cotangent"}
    y = head.eval()(next(iter(maps.values())) if single else list(maps.values()))
    grads = torch.autograd.grad(y, list(maps.values()), case.inputs["cotangent"])
    return {"out.y": y} | {f"grad.{name}": grad for name, grad in zip(maps, grads)}

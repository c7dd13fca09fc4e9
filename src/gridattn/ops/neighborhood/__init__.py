"""Generalized neighborhood attention: per-axis kernel size, stride, dilation and causality on grids of rank 1 to 3."""

from gridattn.ops.neighborhood.api import BACKENDS, available_backends, neighborhood_attention
from gridattn.ops.neighborhood.merge import merge_attentions
from gridattn.ops.neighborhood.plan import AxisPlan, Plan, make_plan

__all__ = [
    "BACKENDS",
    "AxisPlan",
    "Plan",
    "available_backends",
    "make_plan",
    "merge_attentions",
    "neighborhood_attention",
]

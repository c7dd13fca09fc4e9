"""Generalized neighborhood attention: per-axis kernel size, stride, dilation and causality on grids of rank 1 to 3."""

from gridattn.ops.neighborhood.api import BACKENDS, available_backends, neighborhood_attention
from gridattn.ops.neighborhood.in_layout import neighborhood_attention_in_layout
from gridattn.ops.neighborhood.layout import TileLayout
from gridattn.ops.neighborhood.merge import merge_attentions
from gridattn.ops.neighborhood.mixed import neighborhood_attention_mixed
from gridattn.ops.neighborhood.packed import neighborhood_attention_packed
from gridattn.ops.neighborhood.plan import AxisPlan, Plan, make_plan
from gridattn.ops.neighborhood.positions import neighborhood_attention_at
from gridattn.ops.neighborhood.stream_sources import GridReader
from gridattn.ops.neighborhood.streamed import neighborhood_attention_streamed

__all__ = [
    "BACKENDS",
    "AxisPlan",
    "GridReader",
    "Plan",
    "TileLayout",
    "available_backends",
    "make_plan",
    "merge_attentions",
    "neighborhood_attention",
    "neighborhood_attention_at",
    "neighborhood_attention_in_layout",
    "neighborhood_attention_mixed",
    "neighborhood_attention_packed",
    "neighborhood_attention_streamed",
]

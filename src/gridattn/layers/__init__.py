"""Attention layers: one interface, `(B, *grid, C)` in and `(B, *grid, C)` out."""

from gridattn.layers.common import GridAttention
from gridattn.layers.global_attention import GlobalAttention
from gridattn.layers.registry import AttentionInfo, attention_info, create_attention, list_attentions

__all__ = [
    "AttentionInfo",
    "GlobalAttention",
    "GridAttention",
    "attention_info",
    "create_attention",
    "list_attentions",
]

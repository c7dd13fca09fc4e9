"""Attention layers: one interface, `(B, *grid, C)` in and `(B, *grid, C)` out."""

from gridattn.layers.channel import ChannelAttention
from gridattn.layers.alibi import AlibiAttention, CrossAlibiAttention
from gridattn.layers.common import GridAttention
from gridattn.layers.dual import DualAttention
from gridattn.layers.global_attention import GlobalAttention
from gridattn.layers.halo import HaloAttention
from gridattn.layers.large_kernel import LargeKernelAttention, VisualAttention
from gridattn.layers.neighborhood import NeighborhoodAttention
from gridattn.layers.polarized import PolarizedSelfAttention
from gridattn.layers.registry import AttentionInfo, attention_info, create_attention, list_attentions
from gridattn.layers.ulsam import UltraLightweightSubspaceAttention
from gridattn.layers.window import WindowAttention

__all__ = [
    "AlibiAttention",
    "CrossAlibiAttention",
    "AttentionInfo",
    "ChannelAttention",
    "DualAttention",
    "GlobalAttention",
    "GridAttention",
    "HaloAttention",
    "LargeKernelAttention",
    "NeighborhoodAttention",
    "PolarizedSelfAttention",
    "UltraLightweightSubspaceAttention",
    "VisualAttention",
    "WindowAttention",
    "attention_info",
    "create_attention",
    "list_attentions",
]

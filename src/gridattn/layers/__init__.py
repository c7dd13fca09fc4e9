"""Attention layers: one interface, `(B, *grid, C)` in and `(B, *grid, C)` out."""

from gridattn.layers.agent import AgentAttention
from gridattn.layers.agent_window import AgentWindowAttention, CrossWindowAttention
from gridattn.layers.alibi import AlibiAttention, CrossAlibiAttention
from gridattn.layers.attentive_conv import AttentiveConv
from gridattn.layers.channel import ChannelAttention
from gridattn.layers.class_semantics import ClassSemanticsAttention
from gridattn.layers.common import GridAttention
from gridattn.layers.deformable import DeformableAttention
from gridattn.layers.deformable_1d import DeformableAttention1d
from gridattn.layers.dual import DualAttention
from gridattn.layers.encoder_decoder import EncoderDecoderAttention
from gridattn.layers.epipolar import EpipolarAttention
from gridattn.layers.gated_positional import GatedPositionalAttention
from gridattn.layers.global_attention import GlobalAttention
from gridattn.layers.global_local import GlobalLocalAttention
from gridattn.layers.group import GroupAttention
from gridattn.layers.halo import HaloAttention
from gridattn.layers.hybrid_scale import HybridScaleAttention
from gridattn.layers.large_kernel import LargeKernelAttention, VisualAttention
from gridattn.layers.maxvit import MultiAxisAttention
from gridattn.layers.msa_conv import MSAConv
from gridattn.layers.neighborhood import NeighborhoodAttention
from gridattn.layers.oriented_pooling import OrientedPoolingAttention
from gridattn.layers.path_mask import PolylinePathAttention
from gridattn.layers.polarized import PolarizedSelfAttention
from gridattn.layers.registry import AttentionInfo, attention_info, create_attention, list_attentions
from gridattn.layers.routing import RoutingAttention
from gridattn.layers.scan import LaMambaBlock, ScanWindowAttention, SelectiveScan
from gridattn.layers.self_guided import SelfGuidedAttention
from gridattn.layers.ulsam import UltraLightweightSubspaceAttention
from gridattn.layers.window import WindowAttention

__all__ = [
    "AgentAttention",
    "AgentWindowAttention",
    "AlibiAttention",
    "AttentionInfo",
    "AttentiveConv",
    "ChannelAttention",
    "ClassSemanticsAttention",
    "CrossAlibiAttention",
    "CrossWindowAttention",
    "DeformableAttention",
    "DeformableAttention1d",
    "DualAttention",
    "EncoderDecoderAttention",
    "EpipolarAttention",
    "GatedPositionalAttention",
    "GlobalAttention",
    "GlobalLocalAttention",
    "GridAttention",
    "GroupAttention",
    "HaloAttention",
    "HybridScaleAttention",
    "LaMambaBlock",
    "LargeKernelAttention",
    "MSAConv",
    "MultiAxisAttention",
    "NeighborhoodAttention",
    "OrientedPoolingAttention",
    "PolarizedSelfAttention",
    "PolylinePathAttention",
    "RoutingAttention",
    "ScanWindowAttention",
    "SelectiveScan",
    "SelfGuidedAttention",
    "UltraLightweightSubspaceAttention",
    "VisualAttention",
    "WindowAttention",
    "attention_info",
    "create_attention",
    "list_attentions",
]

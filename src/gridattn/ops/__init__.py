"""Pure functions on tensors: the mathematics of each mechanism, without parameters or state."""

from gridattn.ops.neighborhood import (
    GridReader,
    TileLayout,
    merge_attentions,
    neighborhood_attention,
    neighborhood_attention_at,
    neighborhood_attention_in_layout,
    neighborhood_attention_mixed,
    neighborhood_attention_packed,
    neighborhood_attention_streamed,
)
from gridattn.ops.token_permutation import token_permute, token_unpermute

__all__ = [
    "GridReader",
    "TileLayout",
    "merge_attentions",
    "neighborhood_attention",
    "neighborhood_attention_at",
    "neighborhood_attention_in_layout",
    "neighborhood_attention_mixed",
    "neighborhood_attention_packed",
    "neighborhood_attention_streamed",
    "token_permute",
    "token_unpermute",
]

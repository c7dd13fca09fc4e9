"""Attentions for sequences on grids of more axes, whose positions they read in row-major order."""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from gridattn.layers.common import GridAttention
from gridattn.layers.registry import attention_info, create_attention


class RasterAttention(GridAttention):
    """A layer for sequences, run on a grid whose positions are its sequence, row by row.

    Args:
        sequence_attention: a layer (B, N, C) -> (B, N, C).
        rank: number of grid axes.

    Raises:
        ValueError: a layer that takes more than one grid axis.

    Example:
        >>> import torch
        >>> from gridattn.layers import create_attention
        >>> layer = RasterAttention(create_attention("class_semantics", 16, grid=(12,)), rank=2)
        >>> layer(torch.randn(2, 3, 4, 16)).shape
        torch.Size([2, 3, 4, 16])
    """

    def __init__(self, sequence_attention: GridAttention, rank: int) -> None:
        super().__init__(sequence_attention.dim, rank)
        if sequence_attention.rank != 1:
            raise ValueError(f"sequence_attention has {sequence_attention.rank} grid axes; one is allowed")
        self.sequence_attention = sequence_attention
        self.exact_map = sequence_attention.exact_map

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        return self.sequence_attention(x.flatten(1, -2)).reshape(x.shape)

    def macs(self, grid: Sequence[int]) -> int:
        return self.sequence_attention.macs((prod(grid),))

    def memory(self, grid: Sequence[int], bytes_per_element: int = 4) -> int:
        return self.sequence_attention.memory((prod(grid),), bytes_per_element)

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        index = 0
        for position, size in zip(self.check_query(x, query), x.shape[1:-1]):
            index = index * size + position
        return self.sequence_attention.attention_map(x.flatten(1, -2), (index,)).unflatten(-1, x.shape[1:-1])


def runs_on(name: str, rank: int) -> bool:
    """Whether a registered attention runs on grids of `rank` axes, in row-major order where it is for sequences only.

    Example:
        >>> runs_on("class_semantics", 2), runs_on("agent_cross_window", 3)
        (True, False)
    """
    ranks = attention_info(name).ranks
    return rank in ranks or ranks == (1,)


def create_on_grid(name: str, dim: int, num_heads: int, *, grid: Sequence[int], **options: Any) -> GridAttention:
    """`create_attention`, with attentions for sequences wrapped in a `RasterAttention` where the grid has more axes.

    Example:
        >>> create_on_grid("class_semantics", 16, 4, grid=(3, 4)).rank
        2
    """
    if attention_info(name).ranks != (1,) or len(grid) == 1:
        return create_attention(name, dim, num_heads, grid=grid, **options)
    return RasterAttention(create_attention(name, dim, num_heads, grid=(prod(grid),), **options), len(grid))

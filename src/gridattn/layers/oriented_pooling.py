"""Attention after oriented pooling: one axis is averaged away, the positions that remain attend to each other."""

from collections.abc import Sequence
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, split_heads, value_gradient_map
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels


@register_attention(
    "oriented_pooling",
    summary="averages one axis away and attends among what remains (for sensors over time: among sensors)",
    source="arXiv 2406.16913",
    ranks=(2, 3),
)
class OrientedPoolingAttention(GridAttention):
    """Multi-head self-attention among the positions that remain when one axis is pooled.

    H = mean of x along `pool_axis`, y = softmax(Q K^T / sqrt(d)) V with Q, K, V projections of H, repeated along the
    axis. For signals on a grid (sensors, time) with the time axis pooled, every sensor attends to all sensors, whatever
    the time. There is no position code.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid; only its length, the rank, is used.
        pool_axis: the axis that is averaged, counted as in indexing; the last one by default.
        qkv_bias: bias in the query/key/value projection.
        scale: factor of the logits; head_dim ** -0.5 when None.

    Source: Ortigoso-Narro et al., L-SFAN, arXiv 2406.16913.

    Example:
        >>> import torch
        >>> OrientedPoolingAttention(16, num_heads=4, grid=(30, 45))(torch.randn(2, 30, 45, 16)).shape
        torch.Size([2, 30, 45, 16])
    """

    exact_map = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        pool_axis: int = -1,
        qkv_bias: bool = True,
        scale: float | None = None,
    ) -> None:
        check_channels(dim, num_heads)
        rank = len(grid)
        if rank not in (2, 3):
            raise ValueError(f"grid={tuple(grid)} has {rank} axes; 2 or 3 are allowed")
        if isinstance(pool_axis, bool) or not isinstance(pool_axis, int) or not -rank <= pool_axis < rank:
            raise ValueError(
                f"pool_axis={pool_axis!r} is not an axis of a grid of {rank}; {-rank} to {rank - 1} is allowed"
            )
        super().__init__(dim, rank)
        self.num_heads, self.pool_axis, self.scale = num_heads, pool_axis % rank, scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        pooled = x.mean(dim=1 + self.pool_axis, keepdim=True)
        return self.proj(self._attend(*self._project(pooled)).flatten(-2)).expand_as(x).contiguous()

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return split_heads(self.qkv(x), 3, self.num_heads)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return out.transpose(1, 2).reshape(value.shape)

    def macs(self, grid: Sequence[int]) -> int:
        kept = prod(grid) // grid[self.pool_axis]
        return 4 * kept * self.dim**2 + 2 * kept**2 * self.dim

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        position = self.check_query(x, query)
        axis = 1 + self.pool_axis
        q, k, _ = self._project(x.mean(dim=axis, keepdim=True))
        _, _, v = self._project(x)

        def attend(value: Tensor) -> Tensor:
            return self._attend(q, k, value.mean(dim=axis, keepdim=True)).expand_as(value)

        return value_gradient_map(attend, v, position)

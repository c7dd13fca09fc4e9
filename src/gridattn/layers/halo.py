"""Blocked local attention with halos and relative embeddings."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, value_gradient_map
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels, per_axis
from gridattn.ops.halo import CHUNK_OF_LOGITS, halo_attention


@register_attention(
    "halo",
    summary="blocks of queries see their block and a halo of keys around it",
    source="arXiv 2103.12731",
    linear_cost=True,
)
class HaloAttention(GridAttention):
    """Blocked local attention: every block of b queries an axis sees a window of b + 2h keys around it.

    The logits are scale * q . k plus, per axis, q . (a learned vector for the offset between the places of key and
    query). As in the paper there is no output projection.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim_out`.
        grid: the nominal grid; only its length, the rank, is used.
        block_size: b, per axis.
        halo_size: h, per axis.
        stride: 1, or 2 for an output of ceil(grid / 2).
        dim_out: channels of the output; `dim` when None.
        head_dim: channels of a query and a key in each head; when None, `qk_ratio * dim_out` rounded to a multiple of
            8 and divided by the heads.
        qk_ratio: total query channels over output channels.
        qkv_bias: bias in the projections.
        bias: learned relative vectors.
        scale: factor of the logits; head_dim ** -0.5 when None.
        scale_relative: multiply the relative term by `scale` too.
        mask_padding: leave the positions outside the map out of the softmax. The published networks have False: such
            positions count as zero keys and values.
        average_pool: with stride 2, attend at full resolution and average 2 x 2 outputs; always so for an odd
            `block_size`. Otherwise the queries themselves stand at every second position.

    Source: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, arXiv 2103.12731.

    Example:
        >>> import torch
        >>> HaloAttention(32, num_heads=4, block_size=4, halo_size=2)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    exact_map = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        block_size: Any = 8,
        halo_size: Any = 3,
        stride: int = 1,
        dim_out: int | None = None,
        head_dim: int | None = None,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        bias: bool = True,
        scale: float | None = None,
        scale_relative: bool = False,
        mask_padding: bool = True,
        average_pool: bool = False,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_channels(dim, 1)
        self.dim_out = dim if dim_out is None else dim_out
        self.value_dim = check_channels(self.dim_out, num_heads)
        if stride not in (1, 2):
            raise ValueError(f"stride={stride!r} is not allowed; 1 or 2 is")
        self.num_heads = num_heads
        self.head_dim = _multiple_of_8(self.dim_out * qk_ratio) // num_heads if head_dim is None else head_dim
        if self.head_dim < 1:
            raise ValueError(f"head_dim={head_dim} with qk_ratio={qk_ratio} leaves no channel; at least 1 is allowed")
        self.block_size = per_axis(block_size, self.rank, "block_size")
        self.halo_size = per_axis(halo_size, self.rank, "halo_size", minimum=0)
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.scale_relative = scale_relative
        self.mask_padding = mask_padding
        pooled = stride > 1 and (average_pool or any(b % stride for b in self.block_size))
        self.pool = stride if pooled else 1
        self.query_stride = 1 if pooled else stride

        self.query = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.key_value = nn.Linear(dim, num_heads * (self.head_dim + self.value_dim), bias=qkv_bias)
        lengths = [2 * (b + 2 * h) - 1 for b, h in zip(self.block_size, self.halo_size)]
        self.relative = (
            nn.ParameterList([nn.Parameter(torch.empty(n, self.head_dim)) for n in lengths]) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the projections with a standard deviation of dim ** -0.5, the relative vectors with one of `scale`."""
        for linear in (self.query, self.key_value):
            nn.init.trunc_normal_(linear.weight, std=self.dim**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for table in self.relative or ():
            nn.init.trunc_normal_(table, std=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *ceil(grid / stride), dim_out)."""
        self.check_input(x)
        query, key, value = self._project(x)
        out = self._attend(query, key, value).flatten(-2)
        return _average_pool(out, self.pool) if self.pool > 1 else out

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = (slice(None), *[slice(None, None, self.query_stride)] * self.rank)
        query = self.query(x[kept]).unflatten(-1, (self.num_heads, self.head_dim))
        key_value = self.key_value(x).unflatten(-1, (self.num_heads, self.head_dim + self.value_dim))
        key, value = key_value.split([self.head_dim, self.value_dim], -1)
        return query, key, value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tables = None if self.relative is None else list(self.relative)
        if tables and self.scale_relative:
            tables = [table * self.scale for table in tables]
        return halo_attention(
            query,
            key,
            value,
            self.block_size,
            self.halo_size,
            stride=self.query_stride,
            relative=tables,
            scale=self.scale,
            mask_padding=self.mask_padding,
        )

    def macs(self, grid: Sequence[int]) -> int:
        query_grid = [-(-size // self.query_stride) for size in grid]
        project = self.dim * (prod(query_grid) * self.query.out_features + prod(grid) * self.key_value.out_features)
        windows, queries = self._sizes(grid)
        relative = queries * self.head_dim * sum(2 * w - 1 for w in windows) if self.relative is not None else 0
        return project + relative + queries * prod(windows) * (self.head_dim + self.value_dim)

    def memory(self, grid: Sequence[int], bytes_per_element: int = 4) -> int:
        """Input, query, key, value, output, the keys and values of all windows, and a chunk of logits and weights."""
        windows, queries = self._sizes(grid)
        keys = self.num_heads * prod(-(-size // b) * w for size, b, w in zip(grid, self.block_size, windows))
        stored = 2 * min(queries * prod(windows), CHUNK_OF_LOGITS) + keys * (self.head_dim + self.value_dim)
        return super().memory(grid, bytes_per_element) + bytes_per_element * stored

    def _sizes(self, grid: Sequence[int]) -> tuple[list[int], int]:
        """Window per axis, and the number of queries of all blocks and heads."""
        windows = [b + 2 * h for b, h in zip(self.block_size, self.halo_size)]
        padded = [-(-size // b) * b // self.query_stride for size, b in zip(grid, self.block_size)]
        return windows, self.num_heads * prod(padded)

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """Weights of one query, (B, heads, *grid); with strided queries, of the one whose s positions hold `query`."""
        position = tuple(place // self.query_stride for place in self.check_query(x, query))
        q, k, v = self._project(x)
        return value_gradient_map(lambda value: self._attend(q, k, value), v, position)


def halo_state_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of a convolutional halo layer (`q`, `kv`, `pos_embed`) to those of `HaloAttention`.

    Args:
        state: q.weight (heads * head_dim, C, 1, 1), kv.weight, their biases if any, pos_embed.height_rel and
            .width_rel.
    """
    names = {"q": "query", "kv": "key_value", "pos_embed.height_rel": "relative.0", "pos_embed.width_rel": "relative.1"}
    renamed = {}
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        renamed[names[key] if key in names else f"{names[layer]}.{kind}"] = (
            tensor.flatten(1) if tensor.ndim > 1 else tensor
        )
    return renamed


def _multiple_of_8(value: float) -> int:
    """The multiple of 8 nearest to `value`, but at least 8 and at least 0.9 of it."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


def _average_pool(x: Tensor, stride: int) -> Tensor:
    """Means over blocks of `stride` positions an axis; a last block that the grid cuts off has fewer."""
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[x.ndim - 2]
    pooled = pool(x.movedim(-1, 1), stride, stride, ceil_mode=True, count_include_pad=False)
    return pooled.movedim(1, -1)

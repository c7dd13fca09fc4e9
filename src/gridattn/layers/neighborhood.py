"""Neighborhood attention: every query sees a window of keys around it, of the same size everywhere."""

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, value_gradient_map
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels, check_choice, check_probability, per_axis, per_axis_flag
from gridattn.ops.neighborhood import make_plan, neighborhood_attention
from gridattn.ops.relative_bias import crop_relative_bias


@register_attention(
    "neighborhood",
    summary="every query sees the window of keys around it; optional stride, dilation and causality per axis",
    source="arXiv 2204.07143",
    causal=True,
    linear_cost=True,
)
@register_attention(
    "dilated_neighborhood",
    summary="every query sees every second key around it: twice the reach at the same cost",
    source="arXiv 2209.15001",
    causal=True,
    linear_cost=True,
    dilation=2,
)
class NeighborhoodAttention(GridAttention):
    """Multi-head neighborhood attention, softmax(Q K^T / sqrt(d) + B) V over the window of each query.

    B is a learned entry per head and per offset, key minus query, inside the window. Windows at a border are pushed
    back inside, so every query of a non-causal axis sees exactly `kernel_size` keys along it.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid; only its length, the rank, is used.
        kernel_size: keys per window, at least 2, one int or one per axis.
        stride: queries that share one window, 1 to `kernel_size`.
        dilation: step between the keys of a window.
        is_causal: axes along which a query sees only itself and keys before it.
        bias: learned relative position bias.
        qkv_bias: bias in the query/key/value projection.
        scale: factor of the logits; head_dim ** -0.5 when None.
        projection_dropout: dropout probability of the output.
        small_grid: what to do where an axis is shorter than `kernel_size * dilation`. `"shrink"` cuts the window, then
            the dilation, to the axis; `"pad"` appends zeros to the input, which are attended to like any position (the
            layout that published NAT and DiNAT weights were trained with); `"error"` refuses.
        backend: implementation of `gridattn.ops.neighborhood_attention`.

    Raises:
        ValueError: `dim` not divisible by `num_heads`, or a setting outside its range.

    Sources: Hassani et al., Neighborhood Attention Transformer, arXiv 2204.07143; Hassani and Shi, Dilated Neighborhood
    Attention Transformer, arXiv 2209.15001; stride and causality: Generalized Neighborhood Attention, arXiv 2504.16922.

    Example:
        >>> layer = NeighborhoodAttention(32, num_heads=4, kernel_size=(7, 5), dilation=(1, 2))
        >>> layer(torch.randn(2, 14, 12, 32)).shape
        torch.Size([2, 14, 12, 32])
    """

    exact_map = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        kernel_size: int | Sequence[int] = 7,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        bias: bool = True,
        qkv_bias: bool = True,
        scale: float | None = None,
        projection_dropout: float = 0.0,
        small_grid: Literal["shrink", "pad", "error"] = "shrink",
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_channels(dim, num_heads)
        check_probability("projection_dropout", projection_dropout)
        check_choice("small_grid", small_grid, ("shrink", "pad", "error"))
        self.num_heads = num_heads
        self.kernel_size = per_axis(kernel_size, self.rank, "kernel_size", minimum=2)
        self.stride = per_axis(stride, self.rank, "stride")
        self.dilation = per_axis(dilation, self.rank, "dilation")
        self.is_causal = per_axis_flag(is_causal, self.rank, "is_causal")
        make_plan(self._span(), self.kernel_size, self.stride, self.dilation, self.is_causal)
        self.scale = scale
        self.small_grid = small_grid
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.relative_position_bias = (
            nn.Parameter(
                nn.init.trunc_normal_(torch.empty(num_heads, *(2 * k - 1 for k in self.kernel_size)), std=0.02)
            )
            if bias
            else None
        )
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(projection_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        grid = self.check_input(x)
        query, key, value = self._project(x)
        out = self._attend(query, key, value)[(slice(None), *(slice(0, size) for size in grid))]
        return self.proj_drop(self.proj(out.flatten(-2)))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.small_grid == "pad":
            missing = [max(0, span - size) for span, size in zip(self._span(), x.shape[1:-1])]
            x = F.pad(x, [0, 0] + [amount for pad in reversed(missing) for amount in (0, pad)])
        return rearrange(self.qkv(x), "... (three h d) -> three ... h d", three=3, h=self.num_heads).unbind(0)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention on the axes that hold more than one position; along the others there is nothing to choose."""
        kernel, stride, dilation, causal = self._settings(value.shape[1:-2])
        if not kernel:
            return value
        q, k, v = (_squeeze_grid(t) for t in (query, key, value))
        bias = self.relative_position_bias
        if bias is not None:
            axes = [axis for axis, size in enumerate(value.shape[1:-2]) if size > 1]
            cropped = iter(kernel)
            bias = crop_relative_bias(bias, [next(cropped) if axis in axes else 1 for axis in range(self.rank)])
            bias = bias.reshape(self.num_heads, *(2 * k - 1 for k in kernel))
        out = neighborhood_attention(
            q, k, v, kernel, stride, dilation, causal, scale=self.scale, bias=bias, backend=self.backend
        )
        assert isinstance(out, Tensor)
        return out.reshape(value.shape)

    def _settings(self, grid: Sequence[int]) -> tuple[tuple, ...]:
        """(kernel_size, stride, dilation, is_causal) on the axes of `grid` that hold more than one position."""
        axes = []
        for size, kernel, stride, dilation, causal in zip(
            grid, self.kernel_size, self.stride, self.dilation, self.is_causal
        ):
            if kernel * dilation > size:
                if self.small_grid == "error":
                    raise ValueError(
                        f"kernel_size={self.kernel_size} with dilation={self.dilation} exceeds the grid {tuple(grid)}; "
                        "kernel_size * dilation <= size is allowed on every axis, or small_grid='shrink' or 'pad'"
                    )
                kernel = min(kernel, size)
                stride, dilation = min(stride, kernel), size // kernel
            if size > 1:
                axes.append((kernel, stride, dilation, causal))
        return tuple(zip(*axes)) if axes else ((), (), (), ())

    def _span(self) -> tuple[int, ...]:
        return tuple(k * d for k, d in zip(self.kernel_size, self.dilation))

    def _padded(self, grid: Sequence[int]) -> tuple[int, ...]:
        return tuple(map(max, grid, self._span())) if self.small_grid == "pad" else tuple(grid)

    def macs(self, grid: Sequence[int]) -> int:
        padded = self._padded(grid)
        kernel, stride, dilation, causal = self._settings(padded)
        pairs = 0
        if kernel:
            pairs = make_plan([s for s in padded if s > 1], kernel, stride, dilation, causal).num_visible
        return (3 * prod(padded) + prod(grid)) * self.dim**2 + 2 * pairs * self.dim

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        position = self.check_query(x, query)
        q, k, v = self._project(x)
        weights = value_gradient_map(lambda value: self._attend(q, k, value), v, position)
        return weights[(..., *(slice(0, size) for size in x.shape[1:-1]))]


def _squeeze_grid(x: Tensor) -> Tensor:
    """(B, *grid, heads, head_dim) without the grid axes of size one."""
    return x.reshape(x.shape[0], *(size for size in x.shape[1:-2] if size > 1), *x.shape[-2:])

"""Neighborhood attention: every query sees a window of keys around it, of the same size everywhere."""

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, split_heads, value_gradient_map
from gridattn.layers.dropout import Dropout
from gridattn.layers.linear import apply_linear
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels, check_choice, check_probability, per_axis, per_axis_flag
from gridattn.ops.neighborhood import (
    TileLayout,
    make_plan,
    neighborhood_attention,
    neighborhood_attention_at,
    neighborhood_attention_in_layout,
    neighborhood_attention_mixed,
)
from gridattn.ops.neighborhood.checks import check_positions, check_window_choice
from gridattn.ops.padding import pad_grid
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
        token_kernel_sizes: window sizes, each at most `kernel_size`, among which `forward(x, choice=...)` picks one per
            token; smaller windows read the middle of the table of position biases.
        backend: implementation of `gridattn.ops.neighborhood_attention`.

    Raises:
        ValueError: `dim` not divisible by `num_heads`, or a setting outside its range.

    Sources: Hassani et al., Neighborhood Attention Transformer, arXiv 2204.07143; Hassani and Shi, Dilated Neighborhood
    Attention Transformer, arXiv 2209.15001; stride and causality: Generalized Neighborhood Attention, arXiv 2504.16922.

    Example:
        >>> layer = NeighborhoodAttention(32, num_heads=4, kernel_size=(7, 5), dilation=(1, 2))
        >>> layer(torch.randn(2, 14, 12, 32)).shape
        torch.Size([2, 14, 12, 32])
        >>> layer(torch.randn(2, 14, 12, 32), positions=torch.tensor([[0, 3], [13, 11]])).shape
        torch.Size([2, 2, 32])
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
        token_kernel_sizes: Sequence[int | Sequence[int]] = (),
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
        self.token_kernel_sizes = self._check_token_kernel_sizes(token_kernel_sizes)
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
        self.proj_drop = Dropout(projection_dropout)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        choice: Tensor | None = None,
        layout: TileLayout | None = None,
    ) -> Tensor:
        """Attends at every position, or at some of them, or with a window size per token.

        Args:
            x: (B, *grid, C), or (B, layout.tokens, C) with `layout`.
            positions: (M, rank) or (B, M, rank) integers; attend at these positions only.
            choice: integers that pick one of `token_kernel_sizes` for every token: (*grid), (B, *grid) or
                (1 or B, *grid, 1 or heads).
            layout: the tile order that the tokens of `x` are in, and that those of the result will be in.

        Returns:
            (B, *grid, C), (B, M, C) with `positions`, or (B, layout.tokens, C) with `layout`.

        Raises:
            ValueError: positions outside the grid, a choice of another shape or among no sizes, an input that is not in
                the layout, or more than one of the three.
        """
        if layout is not None:
            if positions is not None or choice is not None:
                raise ValueError("layout is given together with positions or choice; one of the three is allowed")
            return self._forward_in_layout(x, layout)
        grid = self.check_input(x)
        if positions is not None:
            if choice is not None:
                raise ValueError("positions and choice are both given; one of them is allowed")
            positions = check_positions(positions, len(x), grid, x.device)
            query, key, value = self._project(x)
            out = self._attend_at(query, key, value, positions)
        elif choice is not None:
            if not self.token_kernel_sizes:
                raise ValueError("choice is given but token_kernel_sizes is empty; there is nothing to choose from")
            sizes = len(self.token_kernel_sizes)
            choice = check_window_choice(choice, len(x), grid, self.num_heads, sizes, x.device)
            query, key, value = self._project(x)
            out = self._attend_mixed(query, key, value, choice)[_inside(grid)]
        else:
            query, key, value = self._project(x)
            out = self._attend(query, key, value)[_inside(grid)]
        return self.proj_drop(apply_linear(self.proj, out.flatten(-2)))

    def _forward_in_layout(self, x: Tensor, layout: TileLayout) -> Tensor:
        if len(layout.grid) != self.rank:
            raise ValueError(f"layout has the grid {layout.grid}; {type(self).__name__} takes {self.rank} grid axes")
        layout.check(x, "x")
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; (batch, tokens, {self.dim} channels) is allowed")
        kernel, stride, dilation, causal = self._settings(self._padded(layout.grid))
        if 1 in layout.grid or self._padded(layout.grid) != layout.grid:  # appended positions would be in no tile
            return layout.to_tiles(self(layout.to_grid(x)))
        q, k, v = self._heads(x)
        bias = self._bias(kernel, layout.grid)
        out = neighborhood_attention_in_layout(
            q, k, v, layout, kernel, stride, dilation, causal, scale=self.scale, bias=bias, backend=self.backend
        )
        return self.proj_drop(apply_linear(self.proj, out.flatten(-2)))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.small_grid == "pad":
            x = pad_grid(x, [(0, max(0, span - size)) for span, size in zip(self._span(), x.shape[1:-1])])
        return self._heads(x)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return split_heads(apply_linear(self.qkv, x), 3, self.num_heads)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention on the axes that hold more than one position; along the others there is nothing to choose."""
        kernel, stride, dilation, causal = self._settings(value.shape[1:-2])
        if not kernel:
            return value
        q, k, v = (_squeeze_grid(t) for t in (query, key, value))
        bias = self._bias(kernel, value.shape[1:-2])
        out = neighborhood_attention(
            q, k, v, kernel, stride, dilation, causal, scale=self.scale, bias=bias, backend=self.backend
        )
        return out.reshape(value.shape)

    def _attend_at(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """`_attend` at (1 or B, M, rank) positions: (B, M, heads, head_dim)."""
        grid = value.shape[1:-2]
        kernel, stride, dilation, causal = self._settings(grid)
        positions = positions.expand(len(value), -1, -1)
        sample = torch.arange(len(value), device=value.device)[:, None]
        at = (sample, *positions.unbind(-1))
        if not kernel:
            return value[at]
        positions = positions[..., [axis for axis, size in enumerate(grid) if size > 1]]
        k, v = (_squeeze_grid(t) for t in (key, value))
        bias = self._bias(kernel, grid)
        backend = "reference" if self.backend == "reference" else "auto"
        return neighborhood_attention_at(
            query[at], k, v, positions, kernel, stride, dilation, causal, scale=self.scale, bias=bias, backend=backend
        )

    def _attend_mixed(self, query: Tensor, key: Tensor, value: Tensor, choice: Tensor) -> Tensor:
        """`_attend` with the windows that `choice`, (1 or B, *grid, 1 or heads), picks."""
        grid = value.shape[1:-2]
        kernel, stride, dilation, causal = self._settings(grid)
        if not kernel:
            return value
        choice = pad_grid(choice, [(0, size - own) for size, own in zip(grid, choice.shape[1:-1])])
        axes = [axis for axis, size in enumerate(grid) if size > 1]
        sizes = [[min(own[axis], most) for axis, most in zip(axes, kernel)] for own in self.token_kernel_sizes]
        bias = self._bias([max(along) for along in zip(*sizes)], grid)
        q, k, v = (_squeeze_grid(t) for t in (query, key, value))
        choice = choice.reshape(len(choice), *q.shape[1:-2], choice.shape[-1])
        out = neighborhood_attention_mixed(
            q, k, v, sizes, choice, stride, dilation, causal, scale=self.scale, bias=bias, backend=self.backend
        )
        return out.reshape(value.shape)

    def _bias(self, kernel: Sequence[int], grid: Sequence[int]) -> Tensor | None:
        """The table of position biases for windows of `kernel` on the axes of `grid` with more than one position."""
        if self.relative_position_bias is None:
            return None
        of_axis = iter(kernel)
        cropped = crop_relative_bias(self.relative_position_bias, [next(of_axis) if n > 1 else 1 for n in grid])
        return cropped.reshape(self.num_heads, *(2 * k - 1 for k in kernel))

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

    def _check_token_kernel_sizes(self, sizes: Sequence[int | Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        checked = tuple(per_axis(size, self.rank, "token_kernel_sizes", minimum=2) for size in sizes)
        for size in checked:
            if any(own > most or own < step for own, most, step in zip(size, self.kernel_size, self.stride)):
                raise ValueError(
                    f"token_kernel_sizes={tuple(sizes)} has {size}; from stride={self.stride} to "
                    f"kernel_size={self.kernel_size} is allowed"
                )
        return checked

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


def _inside(grid: Sequence[int]) -> tuple[slice, ...]:
    """The grid as an index of a (B, *larger grid, ...) tensor."""
    return slice(None), *(slice(0, size) for size in grid)


def _squeeze_grid(x: Tensor) -> Tensor:
    """(B, *grid, heads, head_dim) without the grid axes of size one."""
    return x.reshape(x.shape[0], *(size for size in x.shape[1:-2] if size > 1), *x.shape[-2:])

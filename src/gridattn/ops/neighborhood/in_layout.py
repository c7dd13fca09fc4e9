"""Neighborhood attention on tokens that stay in tile order: nothing is reordered before and after it."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal, overload

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from gridattn.ops.common import check_choice
from gridattn.ops.constants import constant_in_traces, to_tensors
from gridattn.ops.neighborhood import flex, tiled
from gridattn.ops.neighborhood.api import (
    BACKENDS,
    _attend_everywhere,
    _choose,
    _make_plan,
    _no_autocast,
    attend_planned,
    to_autocast_dtype,
)
from gridattn.ops.neighborhood.checks import check_additional, check_bias, check_mask, check_tensors, check_visible
from gridattn.ops.neighborhood.layout import TileLayout
from gridattn.ops.neighborhood.merge import merge_attentions
from gridattn.ops.neighborhood.plan import Plan
from gridattn.ops.neighborhood.slots import AxisSlots, flat_slots, spread
from gridattn.ops.neighborhood.tables import AxisKey, axis_keys


@overload
def neighborhood_attention_in_layout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TileLayout,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def neighborhood_attention_in_layout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TileLayout,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def neighborhood_attention_in_layout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TileLayout,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`neighborhood_attention` of tokens that a `TileLayout` ordered, in and out.

    The windows are those of the grid; only the order of the tokens differs. Padded tokens are seen by no query,
    whatever they hold, and give 0 and an lse of -inf.

    Args:
        query: (B, layout.tokens, Hq, D).
        key: (B, layout.tokens, Hkv, D).
        value: (B, layout.tokens, Hkv, Dv).
        layout: the order of the tokens, and their grid.
        kernel_size, stride, dilation, is_causal, scale, bias: as in `neighborhood_attention`.
        key_mask: (B, layout.tokens) bool; only keys with True may be seen. What it says of padded tokens does not
            count.
        additional_keys, additional_values, return_lse: as in `neighborhood_attention`.
        backend: "tiled" and "flex" read the tokens where they are, "flex" where a tile holds a power of two of at least
            128 tokens; every other backend of `neighborhood_attention` works on the grid: the tokens are brought to it
            and the results are brought back.

    Returns:
        (B, layout.tokens, Hq, Dv); with `return_lse` also (B, layout.tokens, Hq).

    Raises:
        ValueError: what `neighborhood_attention` refuses, or tensors that are not in this layout.

    Example:
        >>> from gridattn.ops import neighborhood_attention
        >>> layout = TileLayout((12, 9), (4, 4))
        >>> q, k, v = torch.randn(3, 2, 12, 9, 4, 16)
        >>> out = neighborhood_attention_in_layout(*map(layout.to_tiles, (q, k, v)), layout, kernel_size=5)
        >>> torch.allclose(layout.to_grid(out), neighborhood_attention(q, k, v, kernel_size=5), atol=1e-6)
        True
    """
    check_choice("backend", backend, ("auto", *BACKENDS))
    query, key, value = (to_autocast_dtype(t) for t in (query, key, value))
    extra_keys, extra_values = (t if t is None else to_autocast_dtype(t) for t in (additional_keys, additional_values))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        layout.check(tensor, name)
    check_tensors(query, key, value)
    check_additional(key, value, extra_keys, extra_values)
    plan = _make_plan(layout.grid, kernel_size, stride, dilation, is_causal)
    check_bias(bias, query, plan)
    if key_mask is not None:
        check_mask(key_mask, tuple(query.shape[:2]), query.device, "batch, tokens")
        if extra_keys is None or extra_keys.shape[1] == 0:
            check_visible(layout.to_grid(key_mask), plan)

    name = _choose_in_layout(backend, query, key, value, layout, plan)
    problem = (plan, scale, bias, key_mask, (extra_keys, extra_values), return_lse, name)
    out, lse = (_attend_in_place if name in IN_PLACE else _attend_on_grid)(query, key, value, layout, *problem)
    if layout.is_padded:
        padding = ~_held(layout.tile, layout.dilation, layout.grid, query.device)[0]
        out = out.masked_fill(padding[:, None, None], 0.0)
        lse = lse.masked_fill(padding[:, None], -torch.inf) if return_lse else lse
    return (out, lse) if return_lse else out


def _choose_in_layout(backend: str, query: Tensor, key: Tensor, value: Tensor, layout: TileLayout, plan: Plan) -> str:
    """The backend asked for; for "auto", on the CPU the grid's fastest, elsewhere the first that reorders nothing."""
    if backend == "auto" and query.device.type != "cpu" and not torch.compiler.is_exporting():
        fits = flex.supports_layout(layout, plan) is None and flex.supports(query, key, value, plan) is None
        return "flex" if fits else "tiled"
    name = _choose(backend, query, key, value, plan)
    reason = flex.supports_layout(layout, plan) if name == "flex" else None
    if reason is not None:
        raise ValueError(f"backend='flex' cannot run this problem: {reason}")
    return name


def _attend_on_grid(
    query: Tensor, key: Tensor, value: Tensor, layout: TileLayout, plan: Plan, scale: float | None,
    bias: Tensor | None, key_mask: Tensor | None, extra: tuple[Tensor | None, Tensor | None], need_lse: bool, name: str,
) -> tuple[Tensor, Any]:  # fmt: skip
    q, k, v = (layout.to_grid(t) for t in (query, key, value))
    kept = None if key_mask is None else layout.to_grid(key_mask)
    out, lse = attend_planned(q, k, v, plan, scale, bias, kept, extra, need_lse, name)
    return layout.to_tiles(out), layout.to_tiles(lse) if need_lse else None


def _attend_in_place(
    query: Tensor, key: Tensor, value: Tensor, layout: TileLayout, plan: Plan, scale: float | None,
    bias: Tensor | None, key_mask: Tensor | None, extra: tuple[Tensor | None, Tensor | None], need_lse: bool, name: str,
) -> tuple[Tensor, Any]:  # fmt: skip
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    with _no_autocast(query.device.type):
        problem = (query, key, value, layout, plan, factor, bias, key_mask)
        if extra[0] is None or extra[1] is None:
            return IN_PLACE[name](*problem, need_lse)
        parts = IN_PLACE[name](*problem, True), _attend_everywhere(query, extra[0], extra[1], factor)
        return merge_attentions(*zip(*parts))


def _attend_tiled(
    query: Tensor, key: Tensor, value: Tensor, layout: TileLayout, plan: Plan, scale: float,
    bias: Tensor | None, key_mask: Tensor | None, need_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`tiled.attend` with its tables of positions in the order of the layout."""
    batch = len(query)
    q, k, v = (rearrange(t, "b i h d -> i b h d").contiguous() for t in (query, key, value))
    kept = None if key_mask is None else key_mask.T
    *tables, row = _tables(axis_keys(plan), layout.tile, layout.dilation, query.device)
    sizes = tiled._tiling_sizes(axis_keys(plan))
    step = tiled.chunk_step(q, k, v, sizes, broadcast=not need_lse and bias is None and kept is None)
    tiles = tiled.Tiles(tables, *sizes, step, kept, scale, need_lse or batch == 0)
    out, lse = tiled.attend_tiles(tiles, q, k, v, bias)
    out = rearrange(out.index_select(0, row), "i b h d -> b i h d")
    return out, None if lse is None or not need_lse else rearrange(lse.index_select(0, row), "i b h 1 -> b i h")


IN_PLACE: dict[str, Callable[..., tuple[Tensor, Any]]] = {
    "tiled": _attend_tiled,
    "flex": flex.attend_in_layout,
}
"""Backends that read the tokens where the layout put them."""


@constant_in_traces
def _tables(
    axes: tuple[AxisKey, ...], tile: tuple[int, ...], dilation: tuple[int, ...], device: torch.device
) -> tuple[Tensor, ...]:
    """As `tiled._tiling_tables`, with the positions of queries and keys, and the last table, in the layout's order."""
    return to_tensors(_build_tables, device, axes, tile, dilation)


def _build_tables(
    axes: tuple[AxisKey, ...], tile: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
    grid = tuple(length for length, *_ in axes)
    slots = _slots(grid, tile, dilation)
    *tables, row = tiled._tables(axes)
    for place in (1, 2):  # of the queries and of the keys among an axis's tables
        steps = [prod(grid[axis + 1 :]) for axis in range(len(axes))]
        own = [axis.slot[tables[5 * n + place] // step] for n, (axis, step) in enumerate(zip(slots, steps))]
        for n, term in enumerate(flat_slots(slots, own)):
            tables[5 * n + place] = term
    return *tables, row[np.ravel_multi_index(tuple(spread(slots, [axis.index for axis in slots])), grid)]


@constant_in_traces
def _held(
    tile: tuple[int, ...], dilation: tuple[int, ...], grid: tuple[int, ...], device: torch.device
) -> tuple[Tensor, ...]:
    """(tokens,) bool: which tokens of a layout are not padding."""
    return to_tensors(_build_held, device, tile, dilation, grid)


def _build_held(tile: tuple[int, ...], dilation: tuple[int, ...], grid: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    slots = _slots(grid, tile, dilation)
    return (np.logical_and.reduce(spread(slots, [axis.holds for axis in slots])),)


def _slots(grid: tuple[int, ...], tile: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[AxisSlots, ...]:
    return tuple(AxisSlots(*axis) for axis in zip(grid, tile, dilation))

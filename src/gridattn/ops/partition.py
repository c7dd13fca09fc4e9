"""Cutting a grid into windows of equal size and putting it together again; an axis that they do not fill is padded.

Two layouts, along each axis of length X with windows of w positions, after padding X to n * w:

* `"block"`: window j holds the neighbours j * w ... j * w + w - 1;
* `"grid"`: window j holds the positions j, j + n, j + 2n, ...: w positions spread evenly over the axis.

Padding is zero and must not be seen: `window_mask` says which positions of a window may see each other.
Sources: arXiv 2103.14030 (blocks and their cyclic shift), arXiv 2204.01697 (the dilated grid).
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Literal

import torch
from torch import Tensor

from gridattn.ops.padding import pad_grid, to_multiple

Layout = Literal["block", "grid"]


def partition_windows(
    x: Tensor, window: Sequence[int], layout: Layout = "block", shift: Sequence[int] | None = None
) -> Tensor:
    """Cuts a grid into windows.

    Args:
        x: (B, *grid, *features); the first `len(window)` axes after the batch are the grid.
        window: positions per window and axis.
        layout: `"block"` or `"grid"`.
        shift: moves the padded grid cyclically towards its start by so many positions before the cut; none by default.

    Returns:
        (B, windows, prod(window), *features): windows in row-major order, positions in row-major order inside each.

    Example:
        >>> x = torch.arange(6).view(1, 6)
        >>> partition_windows(x, (3,)).tolist(), partition_windows(x, (3,), "grid").tolist()
        ([[[0, 1, 2], [3, 4, 5]]], [[[0, 2, 4], [1, 3, 5]]])
    """
    shapes = _cut_shapes if torch.compiler.is_compiling() else _kept_cut_shapes
    missing, apart, order, cut = shapes(x.shape, tuple(window), layout)
    x = pad_grid(x, missing)
    if shift is not None and any(shift):
        x = x.roll(tuple(-s for s in shift), tuple(range(1, 1 + len(window))))
    return x.reshape(apart).permute(order).reshape(cut)


def merge_windows(
    windows: Tensor,
    window: Sequence[int],
    grid: Sequence[int],
    layout: Layout = "block",
    shift: Sequence[int] | None = None,
) -> Tensor:
    """Undoes `partition_windows`: (B, windows, prod(window), *features) -> (B, *grid, *features); padding is cut off.

    Example:
        >>> x = torch.randn(2, 5, 7, 8)
        >>> windows = partition_windows(x, (3, 2), "grid")
        >>> torch.equal(merge_windows(windows, (3, 2), (5, 7), "grid"), x)
        True
    """
    shapes = _merged_shapes if torch.compiler.is_compiling() else _kept_merged_shapes
    apart, order, filled, surplus = shapes(windows.shape, tuple(window), tuple(grid), layout)
    x = windows.view(apart).permute(order).reshape(filled)
    if shift is not None and any(shift):
        x = x.roll(tuple(shift), tuple(range(1, 1 + len(window))))
    return pad_grid(x, surplus)


def regroup_axes(x: Tensor, groups: Sequence[int]) -> Tensor:
    """Brings positions of a grid that are equally far into their group together: lattices become blocks, or back.

    Args:
        x: (B, *grid, *features).
        groups: number of groups of neighbours per axis; it divides the axis. With w groups the lattices of w positions
            become blocks of w neighbours; size // w groups undo it.

    Returns:
        A tensor of the same shape.

    Example:
        >>> x = torch.arange(6).view(1, 6)
        >>> blocks = regroup_axes(x, (3,))
        >>> blocks.tolist(), torch.equal(regroup_axes(blocks, (2,)), x)
        ([[0, 2, 4, 1, 3, 5]], True)
    """
    rank = len(groups)
    parts = [part for size, n in zip(x.shape[1 : 1 + rank], groups) for part in (n, size // n)]
    apart = x.reshape(x.shape[0], *parts, *x.shape[1 + rank :])
    order = [axis for a in range(rank) for axis in (2 + 2 * a, 1 + 2 * a)]
    return apart.permute(0, *order, *range(1 + 2 * rank, apart.ndim)).reshape(x.shape)


def window_mask(
    grid: Sequence[int],
    window: Sequence[int],
    layout: Layout = "block",
    shift: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Tensor | None:
    """Which positions of a window may see each other.

    Padding sees padding only, so that no row is empty and nothing of it reaches a real position. After a cyclic shift,
    positions that came together from the two ends of an axis do not see each other.

    Returns:
        (windows, prod(window), prod(window)) bool, True where the key (last axis) is visible; None where everything is.

    Example:
        >>> window_mask((4, 4), (2, 2)) is None
        True
        >>> window_mask((3,), (2,)).int().tolist()
        [[[1, 1], [1, 1]], [[1, 0], [0, 1]]]
    """
    padding = _padding(grid, window)
    shift = (0,) * len(window) if shift is None else tuple(shift)
    if _all_zero(padding) and not any(shift):
        return None
    region = torch.zeros((1,) * len(window), dtype=torch.int64, device=device)
    real = torch.ones((1,) * len(window), dtype=torch.bool, device=device)
    for axis, (size, pad) in enumerate(zip(grid, padding)):
        index = torch.arange(size + pad, device=device).view([-1 if a == axis else 1 for a in range(len(window))])
        region = 2 * region + (index < shift[axis])
        real = real & (index < size)
    label = partition_windows(torch.where(real, region, -1).unsqueeze(0), window, layout, shift)[0]
    return label.unsqueeze(-1) == label.unsqueeze(-2)


Amounts = tuple[tuple[int, int], ...]
"""Zeros before and after each grid axis."""


def _cut_shapes(
    shape: torch.Size, window: tuple[int, ...], layout: Layout
) -> tuple[Amounts, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """What (B, *grid, *features) lacks; its axes split; the order that brings windows together; cut."""
    batch, features = shape[0], shape[1 + len(window) :]
    counts = [(size + w - 1) // w for size, w in zip(shape[1:], window)]
    missing = tuple((0, pad) for pad in _padding(shape[1:], window))
    pairs = (part for n, w in zip(counts, window) for part in _in_layout(n, w, layout))
    cut = batch, prod(counts), prod(window), *features
    return missing, (batch, *pairs, *features), _axes_cut(len(window), len(features), layout), cut


def _merged_shapes(
    shape: torch.Size, window: tuple[int, ...], grid: tuple[int, ...], layout: Layout
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], Amounts]:
    """(B, windows, prod(window), *features) split; the order of the grid; merged; what is cut off."""
    batch, features = shape[0], shape[3:]
    counts = [(size + w - 1) // w for size, w in zip(grid, window)]
    filled = batch, *(n * w for n, w in zip(counts, window)), *features
    surplus = tuple((0, -pad) for pad in _padding(grid, window))
    return (batch, *counts, *window, *features), _axes_merged(len(window), len(features), layout), filled, surplus


_kept_cut_shapes, _kept_merged_shapes = lru_cache(256)(_cut_shapes), lru_cache(256)(_merged_shapes)


def _axes_cut(rank: int, features: int, layout: Layout) -> tuple[int, ...]:
    """Axes of a grid with all its axes split, in the order of cut windows: their numbers, then the places inside."""
    numbers, places = zip(*(_in_layout(1 + 2 * a, 2 + 2 * a, layout) for a in range(rank)))
    return 0, *numbers, *places, *range(1 + 2 * rank, 1 + 2 * rank + features)


def _axes_merged(rank: int, features: int, layout: Layout) -> tuple[int, ...]:
    """The inverse of `_axes_cut`."""
    order = _axes_cut(rank, features, layout)
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _in_layout(number: int, place: int, layout: Layout) -> tuple[int, int]:
    """What stands for a window's number and for a place inside it, in the order of the grid; its own inverse."""
    return (number, place) if layout == "block" else (place, number)


def _padding(grid: Sequence[int], window: Sequence[int]) -> list[int]:
    return [to_multiple(size, w) for size, w in zip(grid, window)]


def _all_zero(padding: list[int]) -> bool:
    # A symbolic size, met while a graph with dynamic sizes is exported, counts as padded: one graph serves all sizes.
    return all(isinstance(pad, int) and pad == 0 for pad in padding)

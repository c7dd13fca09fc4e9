"""What the Triton kernels need to know of a problem: shapes of tiles, which tiles visit which, and the windows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import numpy as np
import torch
from torch import Tensor

from gridattn.ops.constants import to_tensors
from gridattn.ops.neighborhood.plan import AxisPlan, Plan
from gridattn.ops.neighborhood.slots import AxisSlots, AxisView, Visits, visits

Tile = tuple[int, int, int]


@dataclass(frozen=True)
class Tables:
    """A problem cut into tiles of queries and tiles of keys, on three axes.

    Attributes:
        q_tile, k_tile: shapes of the tiles.
        q_tiles, k_tiles: tiles along each axis, of all dilation groups.
        q_per_group, k_per_group: tiles along each axis of one dilation group.
        first, stop: (sum of the grid's axes,) int32: first and last position, exclusive, in its dilation group that a
            query sees along an axis; the axes one after the other.
        starts, partials, columns: which key tiles each query tile visits: those from `starts[i]` to `partials[i]`
            without a mask, those up to `starts[i + 1]` with one.
        by_key: the same three, which query tiles visit each key tile.
    """

    q_tile: Tile
    k_tile: Tile
    q_tiles: Tile
    k_tiles: Tile
    q_per_group: Tile
    k_per_group: Tile
    first: Tensor
    stop: Tensor
    starts: Tensor
    partials: Tensor
    columns: Tensor
    by_key: tuple[Tensor, Tensor, Tensor]


def three_axes(plan: Plan) -> tuple[AxisPlan, ...]:
    """The axes of a plan after as many of length one as make three."""
    return (*(AxisPlan(1, 1) for _ in range(3 - plan.rank)), *plan.axes)


@lru_cache(maxsize=256)
def make_tables(plan: Plan, q_tokens: int, k_tokens: int, device: torch.device) -> Tables:
    """Tables for tiles of so many queries and keys, of the shapes with the fewest pairs to compute."""
    axes = three_axes(plan)
    q_tile, k_tile = _best_tiles(axes, q_tokens, k_tokens)
    views = _views(axes, q_tile, k_tile)
    q_slots, k_slots = [view.queries for view in views], [view.keys for view in views]
    first, stop, *lists = to_tensors(_build, device, axes, q_tile, k_tile)
    return Tables(
        q_tile,
        k_tile,
        _three(slots.tiles for slots in q_slots),
        _three(slots.tiles for slots in k_slots),
        _three(slots.tiles // slots.groups for slots in q_slots),
        _three(slots.tiles // slots.groups for slots in k_slots),
        first,
        stop,
        lists[0],
        lists[1],
        lists[2],
        (lists[3], lists[4], lists[5]),
    )


def _best_tiles(axes: Sequence[AxisPlan], q_tokens: int, k_tokens: int) -> tuple[Tile, Tile]:
    """Shapes of powers of two along each axis with the fewest visits over the grid; the squarest among equals."""
    sides = [1 << n for n in range(max(q_tokens, k_tokens).bit_length())]
    counts = [{pair: _count(axis, *pair) for pair in product(sides, repeat=2)} for axis in axes]
    best, cost = None, (np.inf, np.inf)
    for q_tile in _shapes(sides, q_tokens):
        for k_tile in _shapes(sides, k_tokens):
            total = prod(count[pair] for count, pair in zip(counts, zip(q_tile, k_tile)))
            if (total, max(q_tile) + max(k_tile)) < cost:
                best, cost = (q_tile, k_tile), (total, max(q_tile) + max(k_tile))
    assert best is not None
    return best


def _shapes(sides: list[int], tokens: int) -> list[Tile]:
    return [shape for shape in product(sides, repeat=3) if prod(shape) == tokens]  # type: ignore[misc]


@lru_cache(maxsize=4096)
def _count(axis: AxisPlan, q_tile: int, k_tile: int) -> int:
    """Visits along one axis."""
    first, stop = _view(axis, q_tile, k_tile).visited
    return int((stop - first).sum())


def _view(axis: AxisPlan, q_tile: int, k_tile: int) -> AxisView:
    queries, keys = (AxisSlots(axis.length, tile, axis.dilation) for tile in (q_tile, k_tile))
    return AxisView(axis, queries, keys)


def _views(axes: Sequence[AxisPlan], q_tile: Tile, k_tile: Tile) -> tuple[AxisView, ...]:
    return tuple(_view(*axis) for axis in zip(axes, q_tile, k_tile))


def _build(axes: tuple[AxisPlan, ...], q_tile: Tile, k_tile: Tile) -> tuple[np.ndarray, ...]:
    first = [axis.start // axis.dilation for axis in axes]
    stop = [start + axis.count for start, axis in zip(first, axes)]
    pairs = visits(_views(axes, q_tile, k_tile))
    tables = (np.concatenate(first), np.concatenate(stop), *_lists(pairs), *_lists(pairs.transposed))
    return tuple(table.astype(np.int32) for table in tables)


def _lists(pairs: Visits) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return pairs.start, pairs.partial_start, pairs.column


def _three(values) -> Tile:
    a, b, c = values
    return a, b, c

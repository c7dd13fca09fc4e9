"""Analytical speed-up of neighborhood attention on tiled kernels: how many key tiles a query tile must visit.

A tiled attention kernel gives each worker one tile of queries and walks over the key tiles that hold at least one
visible key. With the worst query tile visiting V of the D key tiles of the grid, no kernel with these tiles can beat
dense attention by more than D / V; the arithmetic alone would allow prod(grid) / prod(kernel_size). The two agree where
no visited tile needs a mask ("fully block-sparse"). Everything factorises over the axes, so a problem costs O(sum of
the axes' lengths).

Source: Generalized Neighborhood Attention, arXiv 2504.16922, section 3.2 and appendices A.3, B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import Any, Literal

import numpy as np

from gridattn.ops.common import check_choice, per_axis
from gridattn.ops.neighborhood.plan import AxisPlan, Plan, make_plan

KeyTiling = Literal["static", "dynamic"]


@dataclass(frozen=True)
class AxisVisits:
    """Tile visits along one axis, over all its dilation groups.

    Attributes:
        worst: most key tiles that any query tile visits.
        total: key tiles visited, summed over query tiles.
        query_tiles: number of query tiles.
        block_sparse: no visited key tile needs a mask.
        kernel_predicate: NATTEN's own, slightly different test for the same (static tiling; False where the axis is
            causal).
    """

    worst: int
    total: int
    query_tiles: int
    block_sparse: bool
    kernel_predicate: bool


@dataclass(frozen=True)
class Simulation:
    """What a setting costs in tiles, and the speed-up over dense attention that this bounds.

    Attributes:
        dense_tiles: key tiles of the whole grid.
        max_visited: key tiles that the worst query tile visits.
        per_axis_max: the same along each axis (empty for flat tiles).
        total_visited: key tiles visited, summed over all query tiles and dilation groups.
        query_tiles: number of query tiles in all dilation groups.
        fully_block_sparse: no visited tile needs a mask.
        kernel_predicate: NATTEN's closed-form test of the same.
        flop_speedup: prod(grid) / prod(kernel_size), what counting arithmetic promises.
    """

    dense_tiles: int
    max_visited: int
    per_axis_max: tuple[int, ...]
    total_visited: int
    query_tiles: int
    fully_block_sparse: bool
    kernel_predicate: bool
    flop_speedup: Fraction

    @property
    def speedup(self) -> Fraction:
        """Upper bound of the speed-up over dense attention: all workers wait for the slowest."""
        return Fraction(self.dense_tiles, self.max_visited)

    @property
    def mean_speedup(self) -> Fraction:
        """The bound if the workers' load were perfectly balanced."""
        return Fraction(self.dense_tiles * self.query_tiles, self.total_visited)


def simulate(
    grid: Sequence[int],
    kernel_size: Any,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    *,
    query_tile: Any,
    key_tile: Any,
    key_tiling: KeyTiling = "static",
    flat_tiles: bool = False,
    additional_keys: int = 0,
) -> Simulation:
    """Counts the tiles that neighborhood attention visits.

    Args:
        grid: sizes of 1 to 3 axes, in tokens.
        kernel_size, stride, dilation, is_causal: the setting, one value or one per axis.
        query_tile, key_tile: tile sizes per axis; with `flat_tiles` one int each, tokens in row-major order.
        key_tiling: "static" tiles start at multiples of the tile size (kernels that load by TMA); "dynamic" ones at
            the first key needed.
        flat_tiles: tiles are runs of the flattened grid, as in a kernel that knows only sequences.
        additional_keys: extra keys that every query sees; they fill further key tiles, dense or not.

    Raises:
        ValueError: a setting that `neighborhood_attention` refuses, a tile below 1, or flat tiles with dynamic tiling.

    Example:
        >>> found = simulate((30, 48, 80), (18, 24, 24), query_tile=(4, 8, 8), key_tile=(2, 8, 8))
        >>> found.max_visited, found.dense_tiles, round(float(found.speedup), 2)
        (275, 900, 3.27)
    """
    plan = make_plan(grid, kernel_size, stride, dilation, is_causal)
    check_choice("key_tiling", key_tiling, ("static", "dynamic"))
    if isinstance(additional_keys, bool) or not isinstance(additional_keys, int) or additional_keys < 0:
        raise ValueError(f"additional_keys={additional_keys!r} is not allowed; it must be an int of at least 0")
    if flat_tiles:
        (q_tile,), (k_tile,) = per_axis(query_tile, 1, "query_tile"), per_axis(key_tile, 1, "key_tile")
        if key_tiling != "static":
            raise ValueError(f"key_tiling={key_tiling!r} is not allowed with flat_tiles; only 'static' is")
        found = _simulate_flat(plan, q_tile, k_tile)
        extra = ceil(additional_keys / k_tile)
    else:
        q_tiles, k_tiles = per_axis(query_tile, plan.rank, "query_tile"), per_axis(key_tile, plan.rank, "key_tile")
        found = combine_axes(
            plan, k_tiles, [axis_visits(*axis, key_tiling) for axis in zip(plan.axes, q_tiles, k_tiles)]
        )
        extra = ceil(additional_keys / prod(k_tiles))
    if not extra:
        return found
    return Simulation(
        found.dense_tiles + extra,
        found.max_visited + extra,
        found.per_axis_max,
        found.total_visited + extra * found.query_tiles,
        found.query_tiles,
        found.fully_block_sparse,
        found.kernel_predicate,
        Fraction(prod(plan.grid) + additional_keys, prod(plan.kernel_size) + additional_keys),
    )


def combine_axes(plan: Plan, key_tile: tuple[int, ...], visits: Sequence[AxisVisits]) -> Simulation:
    """The counts of a grid from those of its axes; `key_tile` has one size per axis."""
    return Simulation(
        dense_tiles=prod(ceil(size / tile) for size, tile in zip(plan.grid, key_tile)),
        max_visited=prod(axis.worst for axis in visits),
        per_axis_max=tuple(axis.worst for axis in visits),
        total_visited=prod(axis.total for axis in visits),
        query_tiles=prod(axis.query_tiles for axis in visits),
        fully_block_sparse=all(axis.block_sparse for axis in visits),
        kernel_predicate=all(axis.kernel_predicate for axis in visits),
        flop_speedup=Fraction(prod(plan.grid), prod(plan.kernel_size)),
    )


@lru_cache(maxsize=65536)
def axis_visits(axis: AxisPlan, query_tile: int, key_tile: int, key_tiling: KeyTiling = "static") -> AxisVisits:
    """Tile visits along one axis. Each dilation group is an axis of its own, undilated; groups have at most two
    lengths."""
    short, longer = divmod(axis.length, axis.dilation)
    groups = [(short + 1, longer), (short, axis.dilation - longer)]
    found = [
        (
            number,
            _group_visits(AxisPlan(length, axis.kernel, axis.stride, 1, axis.causal), query_tile, key_tile, key_tiling),
        )
        for length, number in groups
        if number
    ]
    return AxisVisits(
        worst=max(group.worst for _, group in found),
        total=sum(number * group.total for number, group in found),
        query_tiles=sum(number * group.query_tiles for number, group in found),
        block_sparse=all(group.block_sparse for _, group in found),
        kernel_predicate=all(group.kernel_predicate for _, group in found),
    )


def _group_visits(group: AxisPlan, query_tile: int, key_tile: int, key_tiling: KeyTiling) -> AxisVisits:
    first = np.arange(0, group.length, query_tile)
    start, stop = group.start, group.start + group.count
    low, high = np.minimum.reduceat(start, first), np.maximum.reduceat(stop, first)
    shared = (low == np.maximum.reduceat(start, first)) & (high == np.minimum.reduceat(stop, first))
    if key_tiling == "static":
        visited = -(-high // key_tile) - low // key_tile
        aligned = (low % key_tile == 0) & ((high % key_tile == 0) | (high == group.length))
    else:
        visited = -(-(high - low) // key_tile)
        aligned = ((high - low) % key_tile == 0) | (high == group.length)
    return AxisVisits(
        int(visited.max()),
        int(visited.sum()),
        len(first),
        bool((shared & aligned).all()),
        _kernel_predicate(group, query_tile, key_tile),
    )


def _kernel_predicate(group: AxisPlan, query_tile: int, key_tile: int) -> bool:
    length, kernel, stride = group.length, group.kernel, group.stride
    if group.causal:
        return False
    if kernel == length:
        return True
    if stride % query_tile or kernel % key_tile:
        return False
    if length % stride and int(group.start[-1]) % key_tile:
        return False
    centred = (kernel // 2 - stride // 2) % key_tile == 0
    two_runs = length % key_tile == 0 and ceil(length / stride) == 2 and stride + stride // 2 >= length - kernel
    return centred or two_runs


def _simulate_flat(plan: Plan, query_tile: int, key_tile: int) -> Simulation:
    """Tiles are runs of the row-major order; a key tile is visited if it holds a key of any query of the tile.

    Queries that differ only along the last axis share the rows that they see, so their keys are (rows) x (union along
    that axis).
    """
    *lead, last = plan.axes
    width, tokens = last.length, prod(plan.grid)
    row_strides = [prod(plan.grid[i + 1 : -1]) for i in range(len(lead))]
    visited, needs_mask = [], False
    for first in range(0, tokens, query_tile):
        queries = range(first, min(first + query_tile, tokens))
        tiles, pairs = [], []
        for row in range(queries[0] // width, queries[-1] // width + 1):
            begin, end = max(queries[0] - row * width, 0), min(queries[-1] - row * width + 1, width)
            index = np.unravel_index(row, plan.grid[:-1]) if lead else ()
            seen = [axis.visible(int(i)) for axis, i in zip(lead, index)]
            rows = np.array([sum(s * i for s, i in zip(row_strides, keys)) for keys in product(*seen)])
            keys = np.flatnonzero(last.mask[begin:end].any(0))
            tiles.append(np.unique((rows[:, None] * width + keys) // key_tile))
            pairs.append(len(rows) * int(last.count[begin:end].sum()))
        hit = np.unique(np.concatenate(tiles))
        visited.append(len(hit))
        in_range = int(np.minimum((hit + 1) * key_tile, tokens).sum() - (hit * key_tile).sum())
        needs_mask |= sum(pairs) != in_range * len(queries)
    return Simulation(
        dense_tiles=ceil(tokens / key_tile),
        max_visited=max(visited),
        per_axis_max=(),
        total_visited=sum(visited),
        query_tiles=len(visited),
        fully_block_sparse=not needs_mask,
        kernel_predicate=False,
        flop_speedup=Fraction(tokens, prod(plan.kernel_size)),
    )


def permutation_bytes(grid: Sequence[int], heads: int, head_dim: int, *, batch: int = 1, element_size: int = 2) -> int:
    """Bytes that move when tiled kernels want the tokens of a tile side by side: Q, K, V and the output, read and
    written once each. Divided by the memory bandwidth it is a time that no simulated speed-up contains.

    Example:
        >>> round(permutation_bytes((16, 44, 80), heads=32, head_dim=128, batch=2) / 2**30, 1)
        6.9
    """
    return 2 * 4 * batch * prod(grid) * heads * head_dim * element_size


def end_to_end(speedup: float | Fraction, attention_share: float, step_fraction: float = 1.0) -> float:
    """Speed-up of a whole model whose attention becomes `speedup` times faster: 1 / (1 - f r (1 - 1 / speedup)).

    Args:
        speedup: of the attention, at least 1 for a gain.
        attention_share: f, the share of the run time that is self-attention, in [0, 1].
        step_fraction: r, the share of the steps that use the sparse attention, in [0, 1].

    Example:
        >>> round(end_to_end(10, 0.607), 2)
        2.2
    """
    for name, value in (("attention_share", attention_share), ("step_fraction", step_fraction)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value!r} is not allowed; it must lie in [0, 1]")
    if speedup <= 0:
        raise ValueError(f"speedup={speedup!r} is not allowed; it must be positive")
    return float(1 / (1 - attention_share * step_fraction * (1 - 1 / speedup)))

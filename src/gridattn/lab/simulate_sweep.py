"""Which stride, and which window: the tile model of `simulate` over all of them.

The tiles visited are a product over the axes, so that strides and windows of each axis are looked at on their own and
then combined: a sweep over all strides of a window costs O(sum of kernel sizes) problems of one axis.

Source: Generalized Neighborhood Attention, arXiv 2504.16922, section 4.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gridattn.lab.simulate import AxisVisits, KeyTiling, Simulation, axis_visits, combine_axes
from gridattn.ops.common import check_choice, per_axis
from gridattn.ops.neighborhood.plan import AxisPlan, Plan, make_plan

MAX_WINDOWS = 16
"""Window sizes per axis that a sweep looks at unless it is told which."""


@dataclass(frozen=True)
class StrideChoice:
    """One stride of a sweep with its simulation."""

    stride: tuple[int, ...]
    simulation: Simulation


@dataclass(frozen=True)
class WindowChoice:
    """One window of a sweep with its fastest stride.

    Attributes:
        kernel_size: the window.
        stride: the smallest stride per axis with which no other is faster.
        simulation: with that stride.
        unstrided: with stride 1.
        on_front: no other window with as many visible tokens is faster, and none as fast shows more tokens.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    simulation: Simulation
    unstrided: Simulation
    on_front: bool

    @property
    def visible(self) -> int:
        """Tokens that a query sees."""
        return prod(self.kernel_size)


@dataclass(frozen=True)
class AxisTable:
    """Speed-up along one axis for some windows and strides; that of a grid is the product over its axes.

    Attributes:
        length: of the axis.
        windows: kernel sizes, one a row.
        strides: one a column.
        speedup: (windows, strides), NaN where the stride exceeds the window.
        block_sparse: (windows, strides) bool, no visited tile needs a mask on account of this axis.
    """

    length: int
    windows: tuple[int, ...]
    strides: tuple[int, ...]
    speedup: NDArray[np.floating]
    block_sparse: NDArray[np.bool_]


def sweep_strides(
    grid: Sequence[int],
    kernel_size: Any,
    dilation: Any = 1,
    is_causal: Any = False,
    *,
    query_tile: Any,
    key_tile: Any,
    key_tiling: KeyTiling = "static",
) -> list[StrideChoice]:
    """The strides worth trying for a window: a stride is dropped where another one, no larger on any axis, is at
    least as fast.

    Arguments are those of `simulate`. Returns the remaining strides, slowest first; the last one is the fastest.

    Example:
        >>> sweep_strides((32768,), 2048, query_tile=128, key_tile=128)[-1].stride
        (256,)
    """
    plan = make_plan(grid, kernel_size, 1, dilation, is_causal)
    q_tiles, k_tiles = _check_tiles(plan.rank, query_tile, key_tile, key_tiling)
    tables = [
        [axis_visits(_with(axis, stride=stride), q, k, key_tiling) for stride in range(1, axis.kernel + 1)]
        for axis, q, k in zip(plan.axes, q_tiles, k_tiles)
    ]
    visited = np.ones((), dtype=np.int64)
    for table in tables:
        visited = visited[..., None] * np.array([entry.worst for entry in table])
    kept = np.argwhere(visited < _best_of_smaller(visited))
    choices = [
        StrideChoice(
            tuple(int(i) + 1 for i in index),
            combine_axes(plan, k_tiles, [table[i] for table, i in zip(tables, index)]),
        )
        for index in kept
    ]
    return sorted(choices, key=lambda choice: (choice.simulation.speedup, [-s for s in choice.stride]))


def _best_of_smaller(visited: np.ndarray) -> np.ndarray:
    """For each stride, the fewest visits of any other stride that is no larger on every axis."""
    running = visited
    for axis in range(visited.ndim):
        running = np.minimum.accumulate(running, axis=axis)
    best = np.full_like(visited, np.iinfo(np.int64).max)
    for axis in range(visited.ndim):
        shifted = np.roll(running, 1, axis=axis)
        shifted[(slice(None),) * axis + (0,)] = np.iinfo(np.int64).max
        best = np.minimum(best, shifted)
    return best


def best_stride(
    grid: Sequence[int],
    kernel_size: Any,
    dilation: Any = 1,
    is_causal: Any = False,
    *,
    query_tile: Any,
    key_tile: Any,
    key_tiling: KeyTiling = "static",
) -> StrideChoice:
    """The fastest stride for a window; of several, the one that is smallest on every axis.

    Arguments are those of `simulate`. Where it is fully block-sparse, no stride and no kernel with these tiles can do
    better: what is visited is what is seen.

    Example:
        >>> best = best_stride((30, 48, 80), (18, 24, 24), query_tile=(4, 8, 8), key_tile=(2, 8, 8))
        >>> best.stride, best.simulation.fully_block_sparse
        ((16, 8, 8), True)
    """
    plan = make_plan(grid, kernel_size, 1, dilation, is_causal)
    q_tiles, k_tiles = _check_tiles(plan.rank, query_tile, key_tile, key_tiling)
    strides, visits = zip(*(_best_on_axis(*axis, key_tiling) for axis in zip(plan.axes, q_tiles, k_tiles)))
    return StrideChoice(strides, combine_axes(plan, k_tiles, visits))


def _best_on_axis(axis: AxisPlan, query_tile: int, key_tile: int, key_tiling: KeyTiling) -> tuple[int, AxisVisits]:
    fewest = ceil(axis.kernel / key_tile)  # some query sees so many tiles whatever the stride
    best, found = 1, axis_visits(_with(axis, stride=1), query_tile, key_tile, key_tiling)
    for stride in range(2, axis.kernel + 1):
        if found.worst == fewest:
            break
        visits = axis_visits(_with(axis, stride=stride), query_tile, key_tile, key_tiling)
        if visits.worst < found.worst:
            best, found = stride, visits
    return best, found


def sweep_windows(
    grid: Sequence[int],
    dilation: Any = 1,
    is_causal: Any = False,
    *,
    query_tile: Any,
    key_tile: Any,
    key_tiling: KeyTiling = "static",
    windows: Sequence[Sequence[int]] | None = None,
) -> list[WindowChoice]:
    """Windows of a grid, each with its fastest stride.

    Args:
        grid, dilation, is_causal, query_tile, key_tile, key_tiling: as in `simulate`.
        windows: the sizes to combine, a list per axis; `default_windows` of each axis when None.

    Returns:
        Every combination, fewest visible tokens first.

    Example:
        >>> found = sweep_windows((64, 64), query_tile=(8, 8), key_tile=(8, 8))
        >>> best = next(choice for choice in found if choice.on_front)
        >>> best.kernel_size, best.stride, float(best.simulation.speedup)
        ((8, 8), (8, 8), 64.0)
    """
    sizes, plan = _windows(grid, dilation, is_causal, key_tile, windows)
    q_tiles, k_tiles = _check_tiles(plan.rank, query_tile, key_tile, key_tiling)
    options = []
    for axis, q, k, of_axis in zip(plan.axes, q_tiles, k_tiles, sizes):
        axes = [_with(axis, kernel=kernel) for kernel in of_axis]
        options.append([(a, *_best_on_axis(a, q, k, key_tiling), axis_visits(a, q, k, key_tiling)) for a in axes])
    found = []
    for chosen in product(*options):
        axes, strides, best, unstrided = zip(*chosen)
        kernel, plan = tuple(axis.kernel for axis in axes), Plan(axes)
        found.append((kernel, strides, combine_axes(plan, k_tiles, best), combine_axes(plan, k_tiles, unstrided)))
    front, fastest = set(), 0
    for kernel, _, simulation, _ in sorted(found, key=lambda f: (-prod(f[0]), -f[2].speedup)):
        if simulation.speedup > fastest:
            fastest = simulation.speedup
            front.add((prod(kernel), fastest))
    choices = [
        WindowChoice(kernel, stride, best, unstrided, (prod(kernel), best.speedup) in front)
        for kernel, stride, best, unstrided in found
    ]
    return sorted(choices, key=lambda choice: (choice.visible, -choice.simulation.speedup, choice.kernel_size))


def default_windows(length: int, key_tile: int, count: int = MAX_WINDOWS) -> tuple[int, ...]:
    """Up to `count` windows of an axis: whole key tiles, evenly spread, and the axis itself.

    Example:
        >>> default_windows(30, 8), default_windows(256, 8, count=4)
        ((8, 16, 24, 30), (64, 128, 192, 256))
    """
    sizes = sorted({size for size in range(key_tile, length, key_tile) if size > 1} | {length})
    every = ceil(len(sizes) / count)
    return tuple(sizes[::-1][::every][::-1])


def axis_tables(
    grid: Sequence[int],
    dilation: Any = 1,
    is_causal: Any = False,
    *,
    query_tile: Any,
    key_tile: Any,
    key_tiling: KeyTiling = "static",
    windows: Sequence[Sequence[int]] | None = None,
) -> list[AxisTable]:
    """Speed-up along each axis against window and stride, at strides that are powers of two.

    Arguments are those of `sweep_windows`.

    Example:
        >>> (table,) = axis_tables((64,), query_tile=8, key_tile=8, windows=[(16, 32)])
        >>> table.strides, table.speedup.round(2).tolist()[0]
        ((1, 2, 4, 8, 16, 32), [2.67, 2.67, 2.67, 2.67, 4.0, nan])
    """
    sizes, plan = _windows(grid, dilation, is_causal, key_tile, windows)
    q_tiles, k_tiles = _check_tiles(plan.rank, query_tile, key_tile, key_tiling)
    tables = []
    for axis, q, k, of_axis in zip(plan.axes, q_tiles, k_tiles, sizes):
        strides = tuple(2**i for i in range(max(of_axis).bit_length()))
        speedup = np.full((len(of_axis), len(strides)), np.nan)
        block_sparse = np.zeros(speedup.shape, dtype=bool)
        for (i, kernel), (j, stride) in product(enumerate(of_axis), enumerate(strides)):
            if stride <= kernel:
                visits = axis_visits(_with(axis, kernel=kernel, stride=stride), q, k, key_tiling)
                speedup[i, j], block_sparse[i, j] = ceil(axis.length / k) / visits.worst, visits.block_sparse
        tables.append(AxisTable(axis.length, tuple(of_axis), strides, speedup, block_sparse))
    return tables


def _windows(
    grid: Sequence[int], dilation: Any, is_causal: Any, key_tile: Any, windows: Sequence[Sequence[int]] | None
) -> tuple[list[Sequence[int]], Plan]:
    """The windows to look at along each axis, and the plan of the smallest of them."""
    rank = len(tuple(grid))
    steps, tiles = per_axis(dilation, rank, "dilation"), per_axis(key_tile, rank, "key_tile")
    if windows is None:
        short = [axis for axis, (length, step) in enumerate(zip(grid, steps)) if length // step < 2]
        if short:
            raise ValueError(
                f"grid={tuple(grid)} with dilation={steps} leaves no window on axis {short[0]}; 2 * dilation <= grid "
                "is allowed"
            )
        windows = [default_windows(length // step, tile) for length, step, tile in zip(grid, steps, tiles)]
    if len(windows) != rank or not all(windows):
        raise ValueError(f"windows={windows!r} is not allowed; {rank} lists of kernel sizes are, one per axis")
    smallest, largest = ([of(sizes) for sizes in windows] for of in (min, max))
    make_plan(grid, largest, 1, dilation, is_causal)
    return list(windows), make_plan(grid, smallest, 1, dilation, is_causal)


def _check_tiles(
    rank: int, query_tile: Any, key_tile: Any, key_tiling: KeyTiling
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    check_choice("key_tiling", key_tiling, ("static", "dynamic"))
    return per_axis(query_tile, rank, "query_tile"), per_axis(key_tile, rank, "key_tile")


def _with(axis: AxisPlan, *, kernel: int | None = None, stride: int = 1) -> AxisPlan:
    return AxisPlan(axis.length, axis.kernel if kernel is None else kernel, stride, axis.dilation, axis.causal)

"""How the CPU kernels cut a neighborhood attention problem into tiles and blocks, as integer tables.

A *tile* is up to LANES queries that are processed together, one per vector lane, against the smallest box of keys that
holds all their windows. A *block* is a box of neighbouring tiles; its keys are copied once into a buffer that stays in
cache. Tiles and blocks are products of ranges along the axes, and such a range never mixes dilation groups: a group is
an axis of its own whose neighbours lie `dilation` apart. Tiles whose windows lie the same way inside their boxes share
one *pattern*; a *run* is the tiles of one block that share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import ceil, prod

import numpy as np

from gridattn.ops.neighborhood.plan import AxisPlan, Plan

LANES = 16
TILE_OVERHEAD = 32  # cost of a tile beside its keys, as a number of keys
BLOCK_BYTES = 2 * 1024 * 1024  # copied keys and values of one block, measured: less costs more copies than cache misses
MIN_ITEMS = 16  # wanted blocks x batch x heads: enough to keep the threads evenly busy


@dataclass(frozen=True)
class Tiling:
    """Tables of a problem on a grid of rank 3 (missing axes have length 1); a table's first index is the axis."""

    step: np.ndarray  # (3,): dilation
    kernel: np.ndarray  # (3,): kernel size
    shape: np.ndarray  # (3,): queries of a tile
    tiles: np.ndarray  # (3, n, 4): first query on the grid, queries, first key inside the block, keys
    runs: np.ndarray  # (3, n, 3): first tile, last tile + 1, pattern
    blocks: np.ndarray  # (3, n, 4): first run, last run + 1, first key on the grid, keys
    patterns: np.ndarray  # (3, n, 3, LANES): first visible key of the box, last + 1, offset from key to bias entry
    capacity: np.ndarray  # (2,): most keys of a tile, most keys of a block
    phases: tuple[
        np.ndarray, ...
    ]  # (n, 3) each: blocks as their index along each axis; those of one phase share no key

    @property
    def tables(self) -> tuple[np.ndarray, ...]:
        """What the kernels read, in the order of their arguments."""
        return self.step, self.kernel, self.shape, self.tiles, self.runs, self.blocks, self.patterns, self.capacity

    @cached_property
    def items(self) -> np.ndarray:
        """(n, 3): the blocks of all phases."""
        return np.concatenate(self.phases)


def _group_ranges(axis: AxisPlan, size: int) -> list[np.ndarray]:
    """Ranges of `size` queries of each dilation group, (n, 4) positions: first query, queries, first key, keys."""
    groups = []
    for group in range(min(axis.dilation, axis.length)):
        first_key = axis.start[group :: axis.dilation] // axis.dilation
        last_key = first_key + axis.count[group :: axis.dilation]
        first = np.arange(0, len(first_key), size)
        last = np.minimum(first + size, len(first_key))
        groups.append(np.stack([first, last - first, first_key[first], last_key[last - 1] - first_key[first]], axis=1))
    return groups


def _tile_shape(axes: tuple[AxisPlan, ...]) -> tuple[int, ...]:
    """The tile for which the fewest (tile, key) pairs have to be visited."""
    costs = []
    for axis in axes:
        ranges = {size: np.concatenate(_group_ranges(axis, size)) for size in range(1, min(LANES, axis.length) + 1)}
        costs.append({size: (int(table[:, 3].sum()), len(table)) for size, table in ranges.items()})

    def cost(shape: tuple[int, ...]) -> int:
        keys, tiles = zip(*(sizes[size] for sizes, size in zip(costs, shape)))
        return prod(keys) + TILE_OVERHEAD * prod(tiles)

    return min(
        (shape for shape in product(*costs) if prod(shape) <= LANES), key=lambda shape: (cost(shape), -shape[-1])
    )


def block_splits(
    axes: tuple[AxisPlan, ...], shape: tuple[int, ...], row_bytes: int, min_blocks: int
) -> tuple[int, ...]:
    """Into how many blocks a dilation group is cut along each axis: the longest first, until the keys fit."""
    tiles = [ceil(ceil(axis.length / axis.dilation) / size) for axis, size in zip(axes, shape)]
    groups = prod(min(axis.dilation, axis.length) for axis in axes)
    splits = [1] * len(axes)
    while True:
        queries = [ceil(n / split) * size for n, split, size in zip(tiles, splits, shape)]
        keys = prod(min(q + axis.kernel - 1, ceil(axis.length / axis.dilation)) for q, axis in zip(queries, axes))
        if keys * row_bytes <= BLOCK_BYTES and groups * prod(splits) >= min_blocks:
            return tuple(splits)
        longest = max((i for i in range(len(axes)) if splits[i] < tiles[i]), key=lambda i: queries[i], default=None)
        if longest is None:
            return tuple(splits)
        splits[longest] += 1


def _axis_tables(
    axis: AxisPlan, size: int, own_lane: np.ndarray, splits: int
) -> tuple[list, list, list, np.ndarray, list]:
    """Tiles, runs, blocks, patterns, phase of each block along an axis; `own_lane` is each lane's query along it."""
    groups = _group_ranges(axis, size)
    ranges = np.concatenate([np.column_stack([np.full(len(table), g), table]) for g, table in enumerate(groups)])
    group, first, queries, first_key, keys = ranges.T

    # What a tile's lanes see of its box of keys; lanes without a query see nothing.
    query = group[:, None] + axis.dilation * (first[:, None] + np.minimum(own_lane, queries[:, None] - 1))
    begin = axis.start[query] // axis.dilation - first_key[:, None]
    end = np.where(own_lane < queries[:, None], begin + axis.count[query], begin)
    lanes = np.stack([begin, end, axis.bias_start[query] - begin], axis=1)
    same = np.concatenate([lanes.reshape(len(lanes), -1), queries[:, None], keys[:, None]], axis=1)
    _, examples, pattern = np.unique(same, axis=0, return_index=True, return_inverse=True)
    pattern = pattern.reshape(-1)

    tiles, runs, blocks, phases = [], [], [], []
    for g in range(len(groups)):
        members = np.flatnonzero(group == g)
        ends_of_phase: list[int] = []
        for block in np.array_split(members, min(splits, len(members))):
            key_begin, key_end = first_key[block[0]], first_key[block[-1]] + keys[block[-1]]
            block = block[np.argsort(pattern[block], kind="stable")]
            first_run = len(runs)
            for run in np.split(block, np.flatnonzero(np.diff(pattern[block])) + 1):
                runs.append((len(tiles), len(tiles) + len(run), pattern[run[0]]))
                tiles.extend(
                    zip(
                        g + axis.dilation * first[run], queries[run], first_key[run] - key_begin, keys[run], strict=True
                    )
                )
            blocks.append((first_run, len(runs), g + axis.dilation * key_begin, key_end - key_begin))
            phase = next((i for i, end in enumerate(ends_of_phase) if end <= key_begin), len(ends_of_phase))
            ends_of_phase[phase : phase + 1] = [key_end]
            phases.append(phase)
    return tiles, runs, blocks, lanes[examples], phases


def stack_tables(tables: Sequence) -> np.ndarray:
    """One int64 array of tables that differ in length, filled up with zeros."""
    arrays = [np.asarray(table, dtype=np.int64) for table in tables]
    stacked = np.zeros((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), dtype=np.int64)
    for target, table in zip(stacked, arrays):
        target[: len(table)] = table
    return stacked


@lru_cache(maxsize=256)
def make_tiling(plan: Plan, row_bytes: int, heads: int) -> Tiling:
    """Cuts a problem into tiles and blocks.

    Args:
        plan: the problem.
        row_bytes: bytes of one key and one value as the kernels copy them.
        heads: number of (sample, key head) pairs, each of which is worked on separately.
    """
    axes = (AxisPlan(1, 1),) * (3 - plan.rank) + plan.axes
    shape = _tile_shape(axes)
    splits = block_splits(axes, shape, row_bytes, ceil(MIN_ITEMS / heads))
    lane = np.arange(LANES)
    own_lane = np.array(np.unravel_index(np.minimum(lane, prod(shape) - 1), shape))
    own_lane[:, lane >= prod(shape)] = LANES
    tables = [_axis_tables(axis, size, own, cuts) for axis, size, own, cuts in zip(axes, shape, own_lane, splits)]
    tiles, runs, blocks, patterns, axis_phases = zip(*tables)
    by_phase: dict[tuple[int, ...], list] = {}
    for block in product(*(range(len(table)) for table in blocks)):
        by_phase.setdefault(tuple(phases[i] for phases, i in zip(axis_phases, block)), []).append(block)
    most_keys = [prod(max(row[-1] for row in table) for table in axis_tables) for axis_tables in (tiles, blocks)]
    return Tiling(
        step=np.array([axis.dilation for axis in axes]),
        kernel=np.array([axis.kernel for axis in axes]),
        shape=np.array(shape),
        tiles=stack_tables(tiles),
        runs=stack_tables(runs),
        blocks=stack_tables(blocks),
        patterns=stack_tables(patterns),
        capacity=np.array(most_keys),
        phases=tuple(np.array(members) for _, members in sorted(by_phase.items())),
    )

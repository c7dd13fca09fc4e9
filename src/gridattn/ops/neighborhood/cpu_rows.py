"""How the row kernel cuts a neighborhood attention problem, as integer tables.

Along the last axis, ROW_LANES neighbouring queries of one dilation group make a *vector*, and vectors make a *segment*.
Along the axis before it, two neighbouring queries make a *pair*. A *block* is a segment times some pairs times some
planes; its keys are copied once.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil, prod

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from gridattn.ops.neighborhood.cpu_tiles import block_splits, stack_tables
from gridattn.ops.neighborhood.plan import AxisPlan, Plan

ROW_LANES = 8
SHAPE = (1, 2, ROW_LANES)


@dataclass(frozen=True)
class RowTiling:
    """Tables of a problem on a grid of rank 3 (missing axes have length 1); a table's first index is the axis."""

    step: np.ndarray  # (3,): dilation
    kernel: np.ndarray  # (3,): kernel size
    blocks: np.ndarray  # (3, n, 4): first key on the grid, keys, first and last + 1 of its planes, pairs or vectors
    planes: np.ndarray  # (n, 3): query on the grid, its first key in the block, entry of the bias table of that key
    pairs: np.ndarray  # (n, 6): the same of two queries; the first number of the second one is -1 where there is none
    vectors: np.ndarray  # (n, 4): first query on the grid, queries, first key in the block, least bias entry
    lanes: np.ndarray  # (n, 2 * ROW_LANES) int32: of each lane, its first key and bias entry, counted from those
    capacity: np.ndarray  # (2,): most rows of a block's keys, and the room for a row
    items: np.ndarray  # (n, 3): every block as its index along each axis

    @property
    def tables(self) -> tuple[np.ndarray, ...]:
        """What the kernel reads, in the order of its arguments."""
        own = self.step, self.kernel, self.blocks, self.planes, self.pairs, self.vectors, self.lanes, self.capacity
        return (*own, self.items)


@lru_cache(maxsize=256)
def fits_rows(plan: Plan) -> bool:
    """Whether the row kernel can take a problem on this machine.

    Every query must see a full window, and the windows of the queries of a vector must begin less than ROW_LANES keys
    apart, as a permutation of one vector of keys has to reach them all.
    """
    from gridattn.ops.neighborhood.cpu_row_products import HAS_PERMUTE

    if not HAS_PERMUTE or any(axis.causal for axis in plan.axes):
        return False
    axis = plan.axes[-1]
    for group in range(min(axis.dilation, axis.length)):
        for offset in (axis.start[group :: axis.dilation] // axis.dilation, axis.bias_start[group :: axis.dilation]):
            ends = sliding_window_view(offset, min(ROW_LANES, len(offset)))
            if (ends.max(axis=1) - ends.min(axis=1)).max() >= ROW_LANES:
                return False
    return True


def row_pitch(positions: int) -> int:
    """Room for a row of positions: loads may reach past the last one, and rows must not share few sets of the cache."""
    return (ceil((positions + ROW_LANES) / ROW_LANES) // 2 * 2 + 1) * ROW_LANES


@lru_cache(maxsize=256)
def make_rows(plan: Plan, row_bytes: int, heads: int, min_items: int) -> RowTiling:
    """Cuts a problem that `fits_rows`.

    Args:
        plan: the problem.
        row_bytes: bytes of one key and one value as the kernel copies them.
        heads: number of (sample, key head) pairs, each of which is worked on separately.
        min_items: wanted blocks x heads.
    """
    axes = (AxisPlan(1, 1),) * (3 - plan.rank) + plan.axes
    splits = block_splits(axes, SHAPE, row_bytes, ceil(min_items / heads))
    blocks, parts = zip(*(_axis_tables(axis, size, cuts) for axis, size, cuts in zip(axes, SHAPE, splits)))
    planes = [(first, start, bias) for first, _, start, bias, *_ in parts[0]]
    vectors = [part[:4] for part in parts[2]]
    most = [max(row[1] for row in table) for table in blocks]
    return RowTiling(
        step=np.array([axis.dilation for axis in axes]),
        kernel=np.array([axis.kernel for axis in axes]),
        blocks=stack_tables(blocks),
        planes=np.array(planes, dtype=np.int64),
        pairs=np.array([_pair(axes[1], *part) for part in parts[1]], dtype=np.int64),
        vectors=np.array(vectors, dtype=np.int64),
        lanes=np.array([part[4] for part in parts[2]], dtype=np.int32),
        capacity=np.array([prod(most[:2]), row_pitch(most[2])]),
        items=np.array(list(product(*(range(len(table)) for table in blocks)))),
    )


def _axis_tables(axis: AxisPlan, size: int, splits: int) -> tuple[list, list]:
    """Blocks of an axis and their parts of up to `size` queries.

    A part is: first query on the grid, queries, first key in the block, least entry of the bias table, and the first
    key and bias entry of each of ROW_LANES queries, counted from those (the last query's once more where there are
    fewer).
    """
    blocks, parts = [], []
    for group in range(min(axis.dilation, axis.length)):
        start = axis.start[group :: axis.dilation] // axis.dilation
        bias = axis.bias_start[group :: axis.dilation]
        firsts = np.arange(0, len(start), size)
        if len(start) > size:
            firsts = np.minimum(firsts, len(start) - size) if size == ROW_LANES else firsts
        for block in np.array_split(firsts, min(splits, len(firsts))):
            last = min(block[-1] + size, len(start)) - 1
            first_key, keys = start[block[0]], start[last] + axis.kernel - start[block[0]]
            blocks.append((group + axis.dilation * first_key, keys, len(parts), len(parts) + len(block)))
            for first in block:
                queries = min(size, len(start) - first)
                lane = first + np.minimum(np.arange(ROW_LANES), queries - 1)
                least = bias[lane].min()
                lanes = [*(start[lane] - start[first]), *(bias[lane] - least)]
                parts.append((group + axis.dilation * first, queries, start[first] - first_key, least, lanes))
    return blocks, parts


def _pair(axis: AxisPlan, first: int, queries: int, start: int, least: int, lanes: list[int]) -> tuple[int, ...]:
    bias = [least + lanes[ROW_LANES + i] for i in range(2)]
    if queries == 1:
        return first, start, bias[0], -1, start + axis.kernel, bias[0]
    return first, start, bias[0], first + axis.dilation, start + lanes[1], bias[1]

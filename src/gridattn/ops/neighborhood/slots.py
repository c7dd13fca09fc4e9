"""Tokens kept in tiles: which place each position of an axis takes, and which tiles see which. Integers only.

An axis is cut into tiles of t slots. Its indices fill the slots in order, or residue by residue of a dilation, every
residue starting a tile of its own; slots that are left over hold no token. The tiles of a grid are the product of its
axes' tiles, numbered row by row, and so are the slots inside a tile.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from gridattn.ops.neighborhood.plan import AxisPlan


@dataclass(frozen=True)
class AxisSlots:
    """The slots of one axis.

    Attributes:
        length: number of indices.
        tile: slots in a tile.
        groups: residues that lie one after the other: the dilation of the windows, or 1 for indices in order.
    """

    length: int
    tile: int
    groups: int = 1

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.groups * self._per_group

    @cached_property
    def slot(self) -> np.ndarray:
        """(length,): where each index stands."""
        index = np.arange(self.length)
        return index % self.groups * self._per_group * self.tile + index // self.groups

    @cached_property
    def index(self) -> np.ndarray:
        """(tiles * tile,): which index each slot holds; one without a token names the last index of its residue."""
        group, place = np.divmod(np.arange(self.tiles * self.tile), self._per_group * self.tile)
        last = -(-(self.length - group) // self.groups) - 1
        return np.minimum(place, last) * self.groups + group

    @cached_property
    def holds(self) -> np.ndarray:
        """(tiles * tile,) bool: whether the slot holds a token."""
        return self.slot[self.index] == np.arange(self.tiles * self.tile)

    @property
    def _per_group(self) -> int:
        longest = -(-self.length // self.groups)
        return -(-longest // self.tile)


@dataclass(frozen=True)
class AxisView:
    """What the queries in the slots of one axis see of the keys in its slots.

    Attributes:
        axis: the windows.
        queries: slots of the queries.
        keys: slots of the keys, in groups of the windows' dilation or in order.
    """

    axis: AxisPlan
    queries: AxisSlots
    keys: AxisSlots

    @property
    def step(self) -> int:
        """Slots between neighbouring keys of a window."""
        return self.axis.dilation // self.keys.groups

    @cached_property
    def first(self) -> np.ndarray:
        """(query slots,): slot of the first key that each query sees."""
        return self.keys.slot[self.axis.start[self.queries.index]]

    @cached_property
    def stop(self) -> np.ndarray:
        """(query slots,): one past the slot of the last key that each query sees."""
        return self.first + self.step * (self.axis.count[self.queries.index] - 1) + 1

    @cached_property
    def visited(self) -> tuple[np.ndarray, np.ndarray]:
        """(query tiles,) both: first and last, exclusive, of the key tiles from the first to the last key seen."""
        first = self.first.reshape(-1, self.queries.tile).min(axis=1) // self.keys.tile
        return first, -(-self.stop.reshape(-1, self.queries.tile).max(axis=1) // self.keys.tile)

    @cached_property
    def full(self) -> tuple[np.ndarray, np.ndarray]:
        """(query tiles,) both: first and last, exclusive, of the key tiles of which every query sees every slot."""
        first = -(-self.first.reshape(-1, self.queries.tile).max(axis=1) // self.keys.tile)
        last = self.stop.reshape(-1, self.queries.tile).min(axis=1) // self.keys.tile
        return first, np.maximum(first, last) if self.step == 1 else first


@dataclass(frozen=True)
class Visits:
    """Pairs of a query tile and a key tile that it visits, tile by tile, those that need no mask first.

    Attributes:
        row: (pairs,), ascending: the tile.
        column: (pairs,): the tile on the other side.
        full: (pairs,) bool: whether every query sees every key.
        rows: number of tiles.
        columns: number of tiles on the other side.
    """

    row: np.ndarray
    column: np.ndarray
    full: np.ndarray
    rows: int
    columns: int

    @property
    def transposed(self) -> "Visits":
        """The same pairs by key tile."""
        return _sorted(self.column, self.row, self.full, self.columns, self.rows)

    @cached_property
    def start(self) -> np.ndarray:
        """(rows + 1,): where the pairs of each tile begin."""
        return np.searchsorted(self.row, np.arange(self.rows + 1))

    @cached_property
    def partial_start(self) -> np.ndarray:
        """(rows,): where the pairs of each tile that need a mask begin."""
        return self.start[:-1] + np.bincount(self.row, weights=self.full, minlength=self.rows).astype(np.int64)


def visits(axes: tuple[AxisView, ...]) -> Visits:
    """Which tiles of a grid visit which: the product of its axes' intervals, without a look at single tokens."""
    shape = tuple(view.queries.tiles for view in axes)
    tile = np.unravel_index(np.arange(prod(shape)), shape)
    counts = [(view.visited[1] - view.visited[0])[of_axis] for view, of_axis in zip(axes, tile)]
    total = np.prod(counts, axis=0, dtype=np.int64)
    row = np.repeat(np.arange(len(total)), total)
    rest = np.arange(len(row)) - np.repeat(np.cumsum(total) - total, total)
    column, full, step = np.zeros_like(row), np.ones(len(row), dtype=bool), 1
    for view, of_axis, count in reversed(list(zip(axes, tile, counts))):
        rest, offset = np.divmod(rest, count[row])
        of_axis = of_axis[row]
        other = view.visited[0][of_axis] + offset
        column += other * step
        full &= (other >= view.full[0][of_axis]) & (other < view.full[1][of_axis])
        step *= view.keys.tiles
    return _sorted(row, column, full, len(total), step)


def flat_slots(axes: tuple[AxisSlots, ...], of_axes: list[np.ndarray]) -> list[np.ndarray]:
    """Slots of each axis as terms whose sum over the axes is the slot in the grid."""
    terms, tile_step, place_step = [], prod(axis.tile for axis in axes), 1
    for axis, slots in reversed(list(zip(axes, of_axes))):
        tile, place = np.divmod(slots, axis.tile)
        terms.append(tile * tile_step + place * place_step)
        tile_step, place_step = tile_step * axis.tiles, place_step * axis.tile
    return terms[::-1]


def spread(axes: tuple[AxisSlots, ...], tables: list[np.ndarray]) -> list[np.ndarray]:
    """One table of (slots of the axis,) an axis -> one of (slots of the grid,) an axis, in the grid's order."""
    rank, spread = len(axes), []
    for number, (axis, table) in enumerate(zip(axes, tables)):
        shape = [1] * (2 * rank)
        shape[number], shape[rank + number] = axis.tiles, axis.tile
        whole = [axis.tiles for axis in axes] + [axis.tile for axis in axes]
        spread.append(np.broadcast_to(table.reshape(shape), whole).reshape(-1))
    return spread


def _sorted(row: np.ndarray, column: np.ndarray, full: np.ndarray, rows: int, columns: int) -> Visits:
    order = np.argsort(2 * row + ~full, kind="stable")
    return Visits(row[order], column[order], full[order], rows, columns)

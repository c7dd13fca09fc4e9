"""How blocks of queries cover a grid, and which keys each block needs: integers only.

A tile is a box of t neighbouring queries per axis, all of one dilation group. The union of their windows is
contiguous in the group, so a tile needs one box of u keys per axis (its halo). Tiles in the interior of a grid differ
by a shift only.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import numpy as np

from gridattn.ops.neighborhood.plan import AxisPlan

# Cost of a tile in units of one (query, key) pair: gathering a token, and starting a block of small matrix products.
TOKEN_COST = 20
TILE_COST = 1000
MAX_PAIRS = 1 << 20
"""Pairs in one tile at most, to bound the memory of its logits, where one query has not already more."""


@dataclass(frozen=True)
class AxisTiling:
    """Tiles along one axis: `groups * per_group` tiles of `tile` queries and `halo` keys."""

    axis: AxisPlan
    tile: int

    @cached_property
    def query(self) -> np.ndarray:
        """(tiles, tile): index of each query; a tile that reaches over the end of its group repeats the last one."""
        per_group = -(-self._group_length[0] // self.tile)
        position = np.arange(per_group * self.tile).reshape(1, per_group, self.tile)
        group = np.arange(self.axis.dilation).reshape(-1, 1, 1)
        position = np.minimum(position, self._group_length.reshape(-1, 1, 1) - 1)
        return (position * self.axis.dilation + group).reshape(-1, self.tile)

    @cached_property
    def halo(self) -> int:
        """Number of keys of the tile that needs most."""
        return int((self._last - self._first).max())

    @cached_property
    def key(self) -> np.ndarray:
        """(tiles, halo): index of each key. Halos are pushed back into their group; a larger one repeats a key."""
        group = self.query[:, :1] % self.axis.dilation
        length = self._group_length[group]
        first = np.clip(self._first[:, None], 0, np.maximum(length - self.halo, 0))
        return np.minimum(first + np.arange(self.halo), length - 1) * self.axis.dilation + group

    @cached_property
    def visible(self) -> np.ndarray:
        """(tiles, tile, halo) bool: whether the query sees the key."""
        step = self._step
        seen = (step >= 0) & (step < self.axis.count[self.query][:, :, None])
        seen[:, :, 1:] &= (np.diff(self.key, axis=1) > 0)[:, None, :]
        return seen

    @cached_property
    def bias_index(self) -> np.ndarray:
        """(tiles, tile, halo): entry of a table of relative position biases; 0 where the key is not visible."""
        return np.where(self.visible, self._step + self.axis.bias_start[self.query][:, :, None], 0)

    @cached_property
    def pattern(self) -> np.ndarray:
        """(tiles,): equal numbers mark tiles with equal `visible` and `bias_index`."""
        both = np.concatenate([self.visible, self.bias_index], axis=1).reshape(len(self.query), -1)
        return np.unique(both, axis=0, return_inverse=True)[1].reshape(-1)

    @cached_property
    def _step(self) -> np.ndarray:
        start = self.axis.start[self.query][:, :, None]
        return (self.key[:, None, :] - start) // self.axis.dilation

    @cached_property
    def _group_length(self) -> np.ndarray:
        return -(-(self.axis.length - np.arange(self.axis.dilation)) // self.axis.dilation)

    @cached_property
    def _first(self) -> np.ndarray:
        return (self.axis.start // self.axis.dilation)[self.query].min(axis=1)

    @cached_property
    def _last(self) -> np.ndarray:
        return (self.axis.start // self.axis.dilation + self.axis.count)[self.query].max(axis=1)


@dataclass(frozen=True)
class Tiling:
    """Tiles of a grid: the product of its axes' tilings, ordered so that those of the commonest pattern come first."""

    axes: tuple[AxisTiling, ...]

    @property
    def queries(self) -> int:
        """Queries in a tile."""
        return prod(axis.tile for axis in self.axes)

    @property
    def keys(self) -> int:
        """Keys in the halo of a tile."""
        return prod(axis.halo for axis in self.axes)

    @property
    def tiles(self) -> int:
        return prod(len(axis.query) for axis in self.axes)

    @cached_property
    def alike(self) -> int:
        """How many tiles, from the first on, share one pattern."""
        return int((self._pattern == self._pattern[self.order[0]]).sum())

    @cached_property
    def is_full(self) -> bool:
        """Whether those tiles' queries see all keys of their halo."""
        tile = np.unravel_index(self.order[0], self._shape)
        return all(bool(axis.visible[t].all()) for axis, t in zip(self.axes, tile))

    @cached_property
    def order(self) -> np.ndarray:
        """(tiles,): the tiles, numbered row by row over the grid, in the order in which they are computed."""
        commonest = np.bincount(self._pattern).argmax()
        return np.argsort(self._pattern != commonest, kind="stable")

    @cached_property
    def slot(self) -> np.ndarray:
        """(positions,): where each grid position, row by row, stands among the queries of all tiles."""
        tile_of, place_of = np.zeros((), np.int64), np.zeros((), np.int64)
        for axis in self.axes:
            index = np.arange(axis.axis.length)
            group, position = index % axis.axis.dilation, index // axis.axis.dilation
            per_group = len(axis.query) // axis.axis.dilation
            tile_of = tile_of[..., None] * len(axis.query) + group * per_group + position // axis.tile
            place_of = place_of[..., None] * axis.tile + position % axis.tile
        rank_of = np.empty_like(self.order)
        rank_of[self.order] = np.arange(len(self.order))
        return (rank_of[tile_of] * self.queries + place_of).reshape(-1)

    @cached_property
    def _pattern(self) -> np.ndarray:
        pattern = np.zeros((), np.int64)
        for axis in self.axes:
            pattern = pattern[..., None] * (int(axis.pattern.max()) + 1) + axis.pattern
        return pattern.reshape(-1)

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(len(axis.query) for axis in self.axes)


@lru_cache(maxsize=128)
def make_tiling(axes: tuple[AxisPlan, ...]) -> Tiling:
    """The cheapest tiling of a problem.

    The cost of a tile counts its (query, key) pairs, visible or not, its tokens, and a constant.
    """
    options = [_axis_options(axis) for axis in axes]
    count = _outer([[len(o.query) for o in axis] for axis in options])
    queries = _outer([[o.tile for o in axis] for axis in options])
    keys = _outer([[o.halo for o in axis] for axis in options])
    cost = count * (queries * keys + TOKEN_COST * (queries + keys) + TILE_COST)
    cost[(queries * keys > MAX_PAIRS) & (queries > queries.min())] = np.inf
    best = np.unravel_index(cost.argmin(), cost.shape)
    return Tiling(tuple(axis[i] for axis, i in zip(options, best)))


def _axis_options(axis: AxisPlan) -> list[AxisTiling]:
    """Tilings that cut the longest dilation group into equal parts, in whole runs of queries that share a window."""
    length = -(-axis.length // axis.dilation)
    parts = [n for n in range(1, length + 1) if n < 16 or -(-length // n) <= 64]
    tiles = {min(-(-length // (n * axis.stride)) * axis.stride, length) for n in parts}
    return [AxisTiling(axis, tile) for tile in sorted(tiles)]


def _outer(values: list[list[int]]) -> np.ndarray:
    product = np.ones(())
    for axis in values:
        product = product[..., None] * np.asarray(axis, dtype=np.float64)
    return product

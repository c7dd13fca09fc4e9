"""Geometry of generalized neighborhood attention, as integers: which keys each query of each axis sees.

Along one axis of length X with kernel k, stride s, dilation d:

1. Dilation splits the axis into d groups of every d-th index; index i is position p = i // d of group i mod d, whose
   length is L = ceil((X - i mod d) / d). Keys outside the group are never visible.
2. Stride splits a group into runs of s positions that share one window, placed around their leader: the run's centre
   (the right one of two), or its last position where the axis is causal, and never past the group's end.
3. The window is the k positions around the leader, pushed back inside the group at its borders. A causal window starts
   k - 1 before the leader (at 0 at the earliest) and ends at the query itself.

The visible set on a grid is the product of its axes' sets. Source: arXiv 2504.16922 (GNA), arXiv 2209.15001 (dilation).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import numpy as np

from gridattn.ops.common import per_axis, per_axis_flag


@dataclass(frozen=True)
class AxisPlan:
    """Windows along one axis.

    Index i sees the keys `start[i] + dilation * j` for j in range(count[i]); their offsets into a table of relative
    position biases (2k - 1 entries, entry k - 1 is the query itself) are `bias_start[i] + j`.
    """

    length: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    @cached_property
    def start(self) -> np.ndarray:
        """(length,) int64: index of the first visible key of each query."""
        return self._first_position * self.dilation + self._group

    @cached_property
    def count(self) -> np.ndarray:
        """(length,) int64: number of visible keys of each query; k everywhere unless the axis is causal."""
        if self.causal:
            return self._position - self._first_position + 1
        return np.full(self.length, self.kernel, dtype=np.int64)

    @cached_property
    def bias_start(self) -> np.ndarray:
        """(length,) int64: entry of the relative position table that belongs to the first visible key."""
        return self._first_position - self._position + self.kernel - 1

    def windows(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`start` and `count` of some queries, without the tables of the whole axis.

        Args:
            index: (n,) integers, the queries.

        Returns:
            (n,) int64 each.
        """
        first = self._first_position_of(index)
        count = index // self.dilation - first + 1 if self.causal else np.full(len(index), self.kernel, dtype=np.int64)
        return first * self.dilation + index % self.dilation, count

    @cached_property
    def _group(self) -> np.ndarray:
        return np.arange(self.length) % self.dilation

    @cached_property
    def _position(self) -> np.ndarray:
        return np.arange(self.length) // self.dilation

    @cached_property
    def _first_position(self) -> np.ndarray:
        return self._first_position_of(np.arange(self.length))

    def _first_position_of(self, index: np.ndarray) -> np.ndarray:
        group, position = index % self.dilation, index // self.dilation
        group_length = -(-(self.length - group) // self.dilation)
        run_start = position // self.stride * self.stride
        ahead = self.stride - 1 if self.causal else self.stride // 2
        leader = np.minimum(run_start + ahead, group_length - 1)
        if self.causal:
            return np.maximum(leader - self.kernel + 1, 0)
        return np.clip(leader - self.kernel // 2, 0, group_length - self.kernel)

    def visible(self, index: int) -> np.ndarray:
        """Indices of the keys that one query sees, in ascending order."""
        return self.start[index] + self.dilation * np.arange(self.count[index])

    @cached_property
    def mask(self) -> np.ndarray:
        """(length, length) bool: row i marks the keys visible to query i."""
        offset = np.arange(self.length)[None, :] - self.start[:, None]
        return (offset >= 0) & (offset < (self.count * self.dilation)[:, None]) & (offset % self.dilation == 0)


@dataclass(frozen=True)
class Plan:
    """One neighborhood attention problem: the axes of a grid, hashable so that what derives from it can be cached."""

    axes: tuple[AxisPlan, ...]

    @cached_property
    def _hash(self) -> int:
        return hash(self.axes)

    def __hash__(self) -> int:  # of all axes, which takes long, but once
        return self._hash

    @property
    def rank(self) -> int:
        return len(self.axes)

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(axis.length for axis in self.axes)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return tuple(axis.kernel for axis in self.axes)

    @property
    def stride(self) -> tuple[int, ...]:
        return tuple(axis.stride for axis in self.axes)

    @property
    def dilation(self) -> tuple[int, ...]:
        return tuple(axis.dilation for axis in self.axes)

    @property
    def is_causal(self) -> tuple[bool, ...]:
        return tuple(axis.causal for axis in self.axes)

    @property
    def is_dense(self) -> bool:
        """Whether every query sees the whole grid."""
        return all(axis.kernel == axis.length and not axis.causal for axis in self.axes)

    @cached_property
    def num_visible(self) -> int:
        """Number of (query, key) pairs over the whole grid."""
        return prod(int(axis.count.sum()) for axis in self.axes)


@lru_cache(maxsize=1024)
def _plan(grid: tuple, kernel: tuple, stride: tuple, dilation: tuple, causal: tuple) -> Plan:
    return Plan(tuple(AxisPlan(*axis) for axis in zip(grid, kernel, stride, dilation, causal)))


def make_plan(
    grid: Sequence[int],
    kernel_size: Any,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
) -> Plan:
    """Checks the settings of a problem and returns its plan; settings are one value or one per axis.

    Args:
        grid: sizes of the grid's axes, 1 to 3 of them.
        kernel_size: window size, at least 2.
        stride: queries that share a window, between 1 and the kernel size.
        dilation: step between the keys of a window.
        is_causal: axes along which a query sees only itself and keys before it.

    Raises:
        ValueError: a wrong type or length, a kernel below 2, a stride above the kernel, or a dilated kernel larger
        than the grid.

    Example:
        >>> make_plan((10,), 5, stride=3).axes[0].visible(4).tolist()
        [2, 3, 4, 5, 6]
    """
    settings = (tuple(int(size) for size in grid), kernel_size, stride, dilation, is_causal)
    # One value for all axes is most common, and a plan must not take longer than a small problem.
    alike = not any(isinstance(setting, Sequence) for setting in settings[1:])
    return _plan_of_values(*settings) if alike else _checked_plan(*settings)


def _checked_plan(grid: tuple[int, ...], kernel_size: Any, stride: Any, dilation: Any, is_causal: Any) -> Plan:
    rank = len(grid)
    if rank not in (1, 2, 3):
        raise ValueError(f"grid={grid} has {rank} axes; 1, 2 or 3 are allowed")
    kernel = per_axis(kernel_size, rank, "kernel_size", minimum=2)
    strides = per_axis(stride, rank, "stride")
    dilations = per_axis(dilation, rank, "dilation")
    causal = per_axis_flag(is_causal, rank, "is_causal")
    for axis in range(rank):
        if strides[axis] > kernel[axis]:
            raise ValueError(
                f"stride={strides} exceeds kernel_size={kernel} on axis {axis}; at most the kernel size is allowed"
            )
        if kernel[axis] * dilations[axis] > grid[axis]:
            span = kernel[axis] * dilations[axis]
            raise ValueError(
                f"kernel_size={kernel} with dilation={dilations} spans {span} positions and exceeds the grid {grid} on "
                f"axis {axis}; kernel_size * dilation <= {grid[axis]} is allowed there"
            )
    return _plan(grid, kernel, strides, dilations, causal)


_plan_of_values = lru_cache(maxsize=1024, typed=True)(_checked_plan)

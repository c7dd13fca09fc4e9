"""Geometry of a part of a grid: which keys a range of queries needs, and the smaller problem that gives their windows.

Windows depend on where the borders are, on the phase of the stride and on the residue of the dilation. A cropped axis
[low, high) with the same kernel, stride, dilation and causality gives a query the window that it has on the whole axis
if

1. low is a multiple of stride * dilation, so that groups and runs of the crop are those of the whole;
2. the crop holds the query's window, so that a window which touches a border of the crop touches one of the whole;
3. high is a multiple of stride * dilation or the end of the whole, so that no run loses its leader;
4. the crop is no shorter than kernel * dilation.

Other queries of the crop may see other windows; their results mean nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from torch import Tensor

from gridattn.ops.neighborhood.plan import AxisPlan, Plan
from gridattn.ops.padding import pad_grid


@dataclass(frozen=True)
class AxisCrop:
    """The part of an axis that the queries `first` to `last`, exclusive, need.

    Example:
        >>> crop = AxisCrop(AxisPlan(100, kernel=5), first=40, last=50)
        >>> crop.need, crop.span
        ((38, 52), (38, 52))
        >>> AxisCrop(AxisPlan(100, kernel=5, stride=2, dilation=4), first=0, last=10).span
        (0, 24)
    """

    axis: AxisPlan
    first: int
    last: int

    @cached_property
    def need(self) -> tuple[int, int]:
        """Range from the first to the last key, exclusive, that the queries see; it holds the queries themselves."""
        start, count = self._windows
        return int(start.min()), int((start + (count - 1) * self.axis.dilation).max()) + 1

    @cached_property
    def span(self) -> tuple[int, int]:
        """Range [low, high) of the crop: `need`, widened until the crop is exact."""
        axis, (low, high) = self.axis, self.need
        step, shortest = axis.stride * axis.dilation, axis.kernel * axis.dilation
        low -= low % step
        high = min(-(-max(high, low + shortest) // step) * step, axis.length)
        if high - low < shortest:
            low = (axis.length - shortest) // step * step
        return low, high

    @property
    def plan(self) -> AxisPlan:
        """The problem on the crop."""
        low, high = self.span
        axis = self.axis
        return AxisPlan(high - low, axis.kernel, axis.stride, axis.dilation, axis.causal)

    @cached_property
    def keys(self) -> np.ndarray:
        """Indices of the keys that at least one of the queries sees, in ascending order."""
        low, high = self.need
        dilation = self.axis.dilation
        start, count = self._windows
        # +1 where a window starts and -1 behind its end: running sums along each residue count the windows on a key.
        change = np.zeros((-(-(high - low) // dilation) + 1) * dilation, dtype=np.int64)
        np.add.at(change, start - low, 1)
        np.add.at(change, start - low + count * dilation, -1)
        windows = change.reshape(-1, dilation).cumsum(axis=0).reshape(-1)
        return low + np.flatnonzero(windows)

    @cached_property
    def _windows(self) -> tuple[np.ndarray, np.ndarray]:
        return self.axis.windows(np.arange(self.first, self.last))


@dataclass(frozen=True)
class Crop:
    """The part of a grid that a box of queries needs: the product of its axes' crops."""

    axes: tuple[AxisCrop, ...]

    @property
    def plan(self) -> Plan:
        """The problem on the crop."""
        return Plan(tuple(axis.plan for axis in self.axes))

    @property
    def queries(self) -> tuple[slice, ...]:
        """The queries' box, in indices of the whole grid."""
        return tuple(slice(axis.first, axis.last) for axis in self.axes)

    @property
    def need(self) -> tuple[slice, ...]:
        """The box of the keys that they see, in indices of the whole grid."""
        return tuple(slice(*axis.need) for axis in self.axes)

    @property
    def inside(self) -> tuple[slice, ...]:
        """The queries' box, in indices of the crop."""
        return tuple(slice(axis.first - axis.span[0], axis.last - axis.span[0]) for axis in self.axes)

    @property
    def positions(self) -> int:
        """Grid positions of the crop."""
        return prod(high - low for low, high in (axis.span for axis in self.axes))

    def pad_queries(self, tensor: Tensor) -> Tensor:
        """(B, *sizes of `queries`, ...) -> (B, *sizes of the crop, ...), with zeros around."""
        return self._pad(tensor, [(axis.first, axis.last) for axis in self.axes])

    def pad_keys(self, tensor: Tensor) -> Tensor:
        """(B, *sizes of `need`, ...) -> (B, *sizes of the crop, ...), with zeros around."""
        return self._pad(tensor, [axis.need for axis in self.axes])

    def _pad(self, tensor: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        sides = [(low - axis.span[0], axis.span[1] - high) for (low, high), axis in zip(ranges, self.axes)]
        return pad_grid(tensor, sides)


def crop_plan(plan: Plan, queries: Sequence[tuple[int, int]]) -> Crop:
    """The part of a grid that the queries of a box need.

    Args:
        plan: the whole problem.
        queries: per axis, first and last (exclusive) index of the box; not empty.

    Example:
        >>> from gridattn.ops.neighborhood import make_plan
        >>> crop = crop_plan(make_plan((100, 64), 5, dilation=(1, 3)), [(0, 10), (30, 40)])
        >>> crop.need, crop.plan.grid
        ((slice(0, 12, None), slice(24, 46, None)), (12, 24))
    """
    return Crop(tuple(AxisCrop(axis, *bounds) for axis, bounds in zip(plan.axes, queries)))

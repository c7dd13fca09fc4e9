"""Tables of integers as tensors, made once a problem; a trace (torch.compile, torch.export) takes them as constants."""

from math import prod

import numpy as np
import torch
from torch import Tensor

from gridattn.ops.constants import constant_in_traces, to_tensors
from gridattn.ops.neighborhood.plan import AxisPlan, Plan

AxisKey = tuple[int, int, int, int, bool]
"""(length, kernel, stride, dilation, causal): an axis in plain values, which a trace can pass on as a constant."""


def axis_keys(plan: Plan) -> tuple[AxisKey, ...]:
    """The axes of a plan in plain values."""
    return tuple((axis.length, axis.kernel, axis.stride, axis.dilation, axis.causal) for axis in plan.axes)


@constant_in_traces
def window_tables(axes: tuple[AxisKey, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The window of every query, flat.

    Returns:
        With N positions and K = prod(kernel_size), each (N, K): int64 flat index of the key, bool whether the entry is
        a key at all (a causal window may be shorter), int64 flat entry of a (2k - 1)-shaped table of relative
        position biases.
    """
    return to_tensors(_windows, device, axes)


@constant_in_traces
def axis_window_tables(axes: tuple[AxisKey, ...], device: torch.device, step: int) -> tuple[Tensor, ...]:
    """The window of every position of each axis: three tables an axis.

    Args:
        axes: the axes.
        device: where the tables are wanted.
        step: rows between neighbouring positions of the last axis.

    Returns:
        Per axis of length L and kernel k: (L, k) key, in rows; (L, 1, k) whether the entry is a key; (L, 1, k) entry of
        a table of relative position biases. Summed over the axes, rows and entries are the flat ones.
    """
    return to_tensors(_axis_windows, device, axes, step)


def _axis_windows(axes: tuple[AxisKey, ...], step: int) -> tuple[np.ndarray, ...]:
    tables, entry_step = [], 1
    for plan in [AxisPlan(*axis) for axis in reversed(axes)]:
        offset = np.arange(plan.kernel)
        keys = np.minimum(plan.start[:, None] + plan.dilation * offset, plan.length - 1)
        visible, entries = offset < plan.count[:, None], plan.bias_start[:, None] + offset
        tables = [keys * step, visible[:, None], entries[:, None] * entry_step, *tables]
        step, entry_step = step * plan.length, entry_step * (2 * plan.kernel - 1)
    return tuple(tables)


def _windows(axes: tuple[AxisKey, ...]) -> tuple[np.ndarray, ...]:
    plans = [AxisPlan(*axis) for axis in axes]
    rank = len(plans)
    index = np.zeros((1,) * (2 * rank), dtype=np.int64)
    bias_index, visible = index, np.ones_like(index, dtype=bool)
    for axis, plan in enumerate(plans):
        offset = np.arange(plan.kernel)
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = plan.length, plan.kernel
        keys = np.minimum(plan.start[:, None] + plan.dilation * offset, plan.length - 1)
        index = index * plan.length + keys.reshape(shape)
        visible = visible & (offset < plan.count[:, None]).reshape(shape)
        bias_index = bias_index * (2 * plan.kernel - 1) + (plan.bias_start[:, None] + offset).reshape(shape)
    flat = prod(plan.length for plan in plans), prod(plan.kernel for plan in plans)
    return tuple(table.reshape(flat) for table in (index, visible, bias_index))

"""Tables of relative position biases: one entry per head and per offset, key minus query, along each axis.

A table for windows of w positions per axis has the shape (heads, 2w - 1, ...); entry w - 1 is the query itself.
"""

from collections.abc import Sequence
from math import prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gridattn.ops.constants import constant_in_traces, to_tensors
from gridattn.ops.resize import resize_table


def crop_relative_bias(table: Tensor, window: Sequence[int]) -> Tensor:
    """The centre of a table, as a smaller window needs it: (heads, 2w - 1, ...) -> (heads, 2 * window - 1, ...).

    Example:
        >>> import torch
        >>> crop_relative_bias(torch.arange(7.0).view(1, 7), (2,)).tolist()
        [[2.0, 3.0, 4.0]]
    """
    for axis, size in enumerate(window, start=1):
        if table.shape[axis] == 2 * size - 1:
            continue
        centre = table.shape[axis] // 2
        table = table.narrow(axis, centre - (size - 1), 2 * size - 1)
    return table


def expand_relative_bias(table: Tensor, window: Sequence[int]) -> Tensor:
    """The bias of every pair of positions in one window: bias[h, q, k] = table[h, k - q + window - 1].

    Args:
        table: (heads, 2 * window - 1 per axis).
        window: positions per axis.

    Returns:
        (heads, prod(window), prod(window)): query, then key, both in row-major order.

    Example:
        >>> import torch
        >>> expand_relative_bias(torch.tensor([[-1.0, 0.0, 1.0]]), (2,)).tolist()
        [[[0.0, 1.0], [-1.0, 0.0]]]
    """
    entries = _entries_of_pairs(tuple(window), table.device)
    return table.flatten(1).index_select(1, entries).view(-1, prod(window), prod(window))


@constant_in_traces
def _entries_of_pairs(window: tuple[int, ...], device: torch.device) -> Tensor:
    """(prod(window)^2,) flat table entries of all pairs of positions, query before key."""
    return to_tensors(_pairs, device, window)[0]


def _pairs(window: tuple[int, ...]) -> tuple[np.ndarray]:
    positions = np.indices(window).reshape(len(window), -1)
    offset = positions[:, None, :] - positions[:, :, None] + np.array(window)[:, None, None] - 1
    return (np.ravel_multi_index(tuple(offset), [2 * w - 1 for w in window]).reshape(-1),)


def resize_relative_bias(table: Tensor, window: Sequence[int], mode: Literal["cubic", "linear"] = "cubic") -> Tensor:
    """Interpolates a table for another window; `mode` is that of `resize_table`.

    Example:
        >>> import torch
        >>> resize_relative_bias(torch.randn(4, 13, 13), (11, 11)).shape
        torch.Size([4, 21, 21])
    """
    return resize_table(table, [2 * w - 1 for w in window], mode)

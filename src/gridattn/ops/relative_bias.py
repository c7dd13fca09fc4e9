"""Tables of relative position biases: one entry per head and per offset, key minus query, along each axis.

A table for windows of w positions per axis has the shape (heads, 2w - 1, ...); entry w - 1 is the query itself.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

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
    rank = len(window)
    for axis, size in enumerate(window, start=1):
        table = table.unfold(axis, size, 1)  # entry w - 1 - q of the axis starts the biases that query q needs
    return table.flip([axis + 1 for axis in range(rank)]).flatten(1 + rank).flatten(1, rank)


def resize_relative_bias(table: Tensor, window: Sequence[int], mode: Literal["cubic", "linear"] = "cubic") -> Tensor:
    """Interpolates a table for another window; `mode` is that of `resize_table`.

    Example:
        >>> import torch
        >>> resize_relative_bias(torch.randn(4, 13, 13), (11, 11)).shape
        torch.Size([4, 21, 21])
    """
    return resize_table(table, [2 * w - 1 for w in window], mode)

"""Adaptive average pooling: means over a fixed number of cells, whatever the grid."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def adaptive_average(x: Tensor, size: Sequence[int]) -> Tensor:
    """Means over cells: of X positions along an axis, cell i of p holds floor(i X / p) to ceil((i + 1) X / p) - 1.

    Cells overlap where p does not divide X. In an exported graph this is one matrix product an axis, for which the
    grid may be of any size; PyTorch's own pooling is written out for the size of the trace, and has no ONNX form on
    three axes.

    Args:
        x: (B, C, *grid), 1 to 3 grid axes.
        size: cells per axis.

    Returns:
        (B, C, *size).

    Example:
        >>> adaptive_average(torch.tensor([[[0.0, 1.0, 2.0, 3.0, 4.0]]]), (2,)).tolist()
        [[[1.0, 3.0]]]
    """
    if not torch.compiler.is_exporting():
        return _POOLS[len(size)](x, tuple(size))
    for axis, cells in enumerate(size, start=2):
        shares = cell_shares(x.shape[axis], cells, x)
        x = (x.movedim(axis, -1) @ shares).movedim(-1, axis)
    return x


def cell_shares(positions: int, cells: int, like: Tensor) -> Tensor:
    """(positions, cells), the share of each position in the mean of each cell; dtype and device are those of `like`.

    Example:
        >>> cell_shares(3, 2, torch.empty(0)).tolist()
        [[0.5, 0.0], [0.5, 0.5], [0.0, 0.5]]
    """
    cell = torch.arange(cells, device=like.device)
    first = cell * positions // cells
    last = ((cell + 1) * positions + cells - 1) // cells
    position = torch.arange(positions, device=like.device)[:, None]
    inside = (position >= first) & (position < last)
    return inside.to(like.dtype) / (last - first).to(like.dtype)

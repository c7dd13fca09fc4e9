"""Interpolation of tables over positions: position embeddings and relative position biases for another size."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gridattn.ops.common import check_choice

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
CUBIC = LINEAR | {2: "bicubic"}


def resize_table(table: Tensor, size: Sequence[int], mode: Literal["cubic", "linear"] = "cubic") -> Tensor:
    """Interpolates the last axes of a table, with half-pixel centres and without antialiasing.

    Args:
        table: (..., *grid) floating point; half precision is computed with in float32.
        size: new sizes of the last `len(size)` axes, 1 to 3 of them.
        mode: `"cubic"` is bicubic on two axes, and linear on one or three, for which PyTorch has no cubic form;
            `"linear"` is linear along every axis.

    Returns:
        (..., *size) in the dtype of the table; the table itself where it has that size already.

    Raises:
        ValueError: another number of sizes, more sizes than axes, a size below 1, or an unknown mode.

    Example:
        >>> resize_table(torch.tensor([[0.0, 2.0, 4.0, 6.0]]), (2,)).tolist()
        [[1.0, 5.0]]
        >>> resize_table(torch.ones(8, 14, 14), (20, 9)).shape
        torch.Size([8, 20, 9])
    """
    rank = len(size)
    check_choice("mode", mode, ("cubic", "linear"))
    if rank not in LINEAR or rank > table.ndim or any(n < 1 for n in size):
        raise ValueError(f"size={tuple(size)} is not allowed for a table of shape {tuple(table.shape)}")
    lead, grid = table.shape[:-rank], table.shape[-rank:]
    # A symbolic size, met while a graph with dynamic sizes is exported, is never taken for the table's own.
    if all(isinstance(n, int) and n == own for n, own in zip(size, grid)):
        return table
    wide = table.to(torch.promote_types(table.dtype, torch.float32)).reshape(1, -1, *grid)
    kind = (CUBIC if mode == "cubic" else LINEAR)[rank]
    return F.interpolate(wide, size=tuple(size), mode=kind, align_corners=False).view(*lead, *size).to(table.dtype)

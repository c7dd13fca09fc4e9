"""The bilinear resize of TensorFlow 1: source coordinates without the half-pixel shift and without antialiasing."""

from collections.abc import Sequence

import torch
from torch import Tensor


def legacy_bilinear_resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes the last axes bilinearly with the corner convention of TensorFlow 1.

    Output index j reads source coordinate j * in / out: between floor and floor + 1 (the last sample at the end), one
    axis after the other. `torch.nn.functional.interpolate` has no such mode.

    Args:
        x: (..., *grid) floating point.
        size: new sizes of the last `len(size)` axes.

    Returns:
        (..., *size).

    Raises:
        ValueError: a size below 1, or more sizes than axes.

    Example:
        >>> legacy_bilinear_resize(torch.tensor([0.0, 2.0, 4.0, 6.0]), (2,)).tolist()
        [0.0, 4.0]
    """
    if len(size) > x.ndim or any(n < 1 for n in size):
        raise ValueError(f"size={tuple(size)} is not allowed for a tensor of shape {tuple(x.shape)}")
    for axis, out in enumerate(size, start=x.ndim - len(size)):
        length = x.shape[axis]
        if out == length:
            continue
        source = torch.arange(out, device=x.device, dtype=torch.float32) * (length / out)
        low = source.floor().long().clamp_max(length - 1)
        weight = (source - low).to(x.dtype).view(-1, *[1] * (x.ndim - axis - 1))
        high = (low + 1).clamp_max(length - 1)
        start = x.index_select(axis, low)
        x = start + weight * (x.index_select(axis, high) - start)
    return x

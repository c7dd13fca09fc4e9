"""Sine position codes of points and of padded images."""

from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor


def sine_code(angle: Tensor, dim: int, temperature: float) -> Tensor:
    """Code of a number: c[2i] = sin(a / T ** (2i / dim)), c[2i + 1] = cos(a / T ** (2i / dim)).

    Args:
        angle: (...), the number, in radians.
        dim: even number of channels of the code.
        temperature: T, the ratio of the slowest period to the fastest.

    Returns:
        (..., dim).

    Raises:
        ValueError: an odd `dim`.

    Source: Group Pose, arXiv 2308.07313, after DETR, arXiv 2005.12872.

    Example:
        >>> sine_code(torch.zeros(3), 4, 20.0)[0].tolist()
        [0.0, 1.0, 0.0, 1.0]
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim={dim} is not allowed; it must be even and at least 2")
    exponent = torch.arange(0, dim, 2, dtype=angle.dtype, device=angle.device) / dim
    phase = angle.unsqueeze(-1) / temperature**exponent
    return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(-2)


def point_code(points: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Sine code of points (x, y) in [0, 1]: dim / 2 channels for y, then as many for x, one turn from 0 to 1.

    Args:
        points: (..., 2), x then y.
        dim: channels, a multiple of 4.
        temperature: see `sine_code`.

    Returns:
        (..., dim).

    Source: Group Pose, arXiv 2308.07313.

    Example:
        >>> point_code(torch.rand(5, 2), 32).shape
        torch.Size([5, 32])
    """
    x, y = (2 * pi * points).unbind(-1)
    return torch.cat([sine_code(y, dim // 2, temperature), sine_code(x, dim // 2, temperature)], dim=-1)


def grid_code(grid: Sequence[int], dim: int, temperature: float = 10000.0) -> Tensor:
    """Sine code of the places (y, x) of a picture's grid, numbered from 0: dim / 2 channels for x, then as many for y.

    Each half holds the sines of p / T ** (k / (dim / 4)), k = 0 ... dim / 4 - 1, and after them the cosines.

    Args:
        grid: height and width.
        dim: channels, a multiple of 4.
        temperature: T.

    Returns:
        (*grid, dim), float32.

    Raises:
        ValueError: another number of channels.

    Source: SG-Former, arXiv 2308.12216, after MAE, arXiv 2111.06377.

    Example:
        >>> grid_code((5, 7), 8)[0, 0].tolist()
        [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    """
    if dim < 4 or dim % 4:
        raise ValueError(f"dim={dim} is not allowed; it must be a multiple of 4")
    y, x = (_sines_then_cosines(torch.arange(size, dtype=torch.float32), dim // 2, temperature) for size in grid)
    return torch.cat([x.expand(grid[0], -1, -1), y.unsqueeze(1).expand(-1, grid[1], -1)], dim=-1)


def _sines_then_cosines(angle: Tensor, dim: int, temperature: float) -> Tensor:
    return sine_code(angle, dim, temperature).unflatten(-1, (-1, 2)).mT.flatten(-2)


def image_code(padding: Tensor, dim: int, temperature: Sequence[float] = (20.0, 20.0)) -> Tensor:
    """Sine code of the pixels of padded images; each image's own height and width make one turn.

    A pixel's angle is 2 pi times its number along the axis, counted from 1 over the unpadded pixels, over the last
    number of its line (plus 1e-6).

    Args:
        padding: (B, H, W) bool, True where an image is padded.
        dim: channels, a multiple of 4: dim / 2 for y, then as many for x.
        temperature: of y and of x, see `sine_code`.

    Returns:
        (B, H, W, dim), float32.

    Source: Group Pose, arXiv 2308.07313.

    Example:
        >>> image_code(torch.zeros(1, 4, 6, dtype=torch.bool), 32).shape
        torch.Size([1, 4, 6, 32])
    """
    shown = (~padding).to(torch.float32)
    y, x = shown.cumsum(1), shown.cumsum(2)
    y = y / (y[:, -1:] + 1e-6) * 2 * pi
    x = x / (x[:, :, -1:] + 1e-6) * 2 * pi
    return torch.cat([sine_code(y, dim // 2, temperature[0]), sine_code(x, dim // 2, temperature[1])], dim=-1)

"""Colour, scale and slope of light fields: the fixed operations around the network.

A light field is a tensor (..., 3, U, V, H, W): U rows and V columns of views of H x W pixels, RGB in 0..1.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_TO_YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))
_OFFSET = (16.0, 128.0, 128.0)


def rgb_to_ycbcr(rgb: Tensor) -> Tensor:
    """Y, Cb, Cr of ITU-R BT.601 in studio range, all over 255: (M rgb + (16, 128, 128)) / 255.

    Args:
        rgb: (..., 3, U, V, H, W), floating point.

    Returns:
        (..., 3, U, V, H, W), the same dtype.

    Example:
        >>> [round(255 * v) for v in rgb_to_ycbcr(torch.ones(3, 1, 1, 1, 1)).flatten().tolist()]
        [235, 128, 128]
    """
    matrix = torch.tensor(_TO_YCBCR, dtype=torch.float64) / 255
    return _mix(rgb, matrix) + _column(rgb, torch.tensor(_OFFSET, dtype=torch.float64) / 255)


def ycbcr_to_rgb(ycbcr: Tensor) -> Tensor:
    """The inverse of `rgb_to_ycbcr`; shapes and dtypes as there."""
    inverse = torch.linalg.inv(torch.tensor(_TO_YCBCR, dtype=torch.float64))
    return _mix(ycbcr, 255 * inverse) - _column(ycbcr, inverse @ torch.tensor(_OFFSET, dtype=torch.float64))


def _mix(field: Tensor, matrix: Tensor) -> Tensor:
    """Applies a 3 x 3 matrix to the colour axis; products and sums, since autocast would round a matrix product."""
    first, second, third = (_column(field, column) for column in matrix.T)
    channels = field.unbind(-5)
    return (
        first * channels[0][..., None, :, :, :, :]
        + second * channels[1][..., None, :, :, :, :]
        + (third * channels[2][..., None, :, :, :, :])
    )


def _column(field: Tensor, values: Tensor) -> Tensor:
    return values.to(field.device, field.dtype).view(3, 1, 1, 1, 1)


@lru_cache(maxsize=64)
def bicubic_matrix(size: int, scale: int) -> Tensor:
    """Weights of MATLAB's `imresize` by 1 / scale along one axis: bicubic, a = -0.5, stretched against aliasing.

    Output x (from 1) lies at u = x s + (1 - s) / 2 and takes the inputs from floor(u - 2 s) on, 4 s + 2 of them, with
    the weights k((u - i) / s) normalised to a sum of 1; inputs beyond the border count for the border.

    Args:
        size: inputs N.
        scale: s.

    Returns:
        (ceil(N / s), N), float64.

    Raises:
        ValueError: a size or scale below 1.

    Example:
        >>> bicubic_matrix(8, 2).sum(1).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    if size < 1 or scale < 1:
        raise ValueError(f"size={size} with scale={scale} is not allowed; both must be at least 1")
    centre = torch.arange(1, math.ceil(size / scale) + 1, dtype=torch.float64) * scale + 0.5 * (1 - scale)
    taps = (centre - 2 * scale).floor()[:, None] + torch.arange(4 * scale + 2, dtype=torch.float64)
    x = ((centre[:, None] - taps) / scale).abs()
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = torch.where(x <= 1, near, torch.where(x <= 2, far, 0.0))
    weights = weights / weights.sum(1, keepdim=True)
    matrix = torch.zeros(len(centre), size, dtype=torch.float64)
    return matrix.scatter_add_(1, (taps.long() - 1).clamp(0, size - 1), weights)


def bicubic_down(field: Tensor, scale: int) -> Tensor:
    """Every view 1 / scale as large, by `bicubic_matrix` along both axes.

    Args:
        field: (..., H, W), floating point.
        scale: s.

    Returns:
        (..., ceil(H / s), ceil(W / s)), the same dtype.

    Example:
        >>> bicubic_down(torch.ones(1, 3, 5, 5, 16, 24), 4).shape
        torch.Size([1, 3, 5, 5, 4, 6])
    """
    rows, columns = (bicubic_matrix(size, scale).to(field) for size in field.shape[-2:])
    return rows @ field @ columns.T


def bicubic_up(field: Tensor, scale: int) -> Tensor:
    """Every view `scale` times as large: bicubic, a = -0.75, half-pixel centres.

    Args:
        field: (..., H, W), floating point.
        scale: s.

    Returns:
        (..., s H, s W).
    """
    height, width = field.shape[-2:]
    up = F.interpolate(field.reshape(-1, 1, height, width), scale_factor=scale, mode="bicubic", align_corners=False)
    return up.view(*field.shape[:-2], scale * height, scale * width)


def central_views(field: Tensor, views: int) -> Tensor:
    """The `views` x `views` views in the middle of (..., U, V, H, W).

    Raises:
        ValueError: more views than there are.
    """
    rows, columns = field.shape[-4:-2]
    if not 1 <= views <= min(rows, columns):
        raise ValueError(f"ang_res={views!r} is not allowed for {rows} x {columns} views; 1 to {min(rows, columns)} is")
    top, left = (rows - views) // 2, (columns - views) // 2
    return field[..., top : top + views, left : left + views, :, :]


def shear(field: Tensor, pixels: int) -> Tensor:
    """Adds `pixels` per view to all disparities, exactly: whole pixels are moved and the incomplete border is cut.

    View (u, v) is read at (y + p (u - uc), x + p (v - vc)), where uc = (U - 1) / 2 and vc = (V - 1) / 2.

    Args:
        field: (..., U, V, H, W) with odd U and V (or even p).
        pixels: p, whole.

    Returns:
        (..., U, V, H - |p| (U - 1), W - |p| (V - 1)).

    Raises:
        ValueError: shifts that are not whole, or views too small for them.

    Example:
        >>> shear(torch.zeros(3, 5, 5, 32, 40), 2).shape
        torch.Size([3, 5, 5, 24, 32])
    """
    rows, columns, height, width = field.shape[-4:]
    if not float(pixels).is_integer() or any(int(pixels) * (n - 1) % 2 for n in (rows, columns)):
        raise ValueError(
            f"shear={pixels!r} does not move the {rows} x {columns} views by whole pixels; "
            "whole numbers are allowed, even ones where the number of views is even"
        )
    pixels = int(pixels)
    margins = abs(pixels) * (rows - 1) // 2, abs(pixels) * (columns - 1) // 2
    size = height - 2 * margins[0], width - 2 * margins[1]
    if min(size) < 1:
        raise ValueError(f"shear={pixels} leaves nothing of views of {height} x {width} pixels")
    out = field.new_empty(*field.shape[:-2], *size)
    for u in range(rows):
        for v in range(columns):
            y = margins[0] + pixels * (2 * u - rows + 1) // 2
            x = margins[1] + pixels * (2 * v - columns + 1) // 2
            out[..., u, v, :, :] = field[..., u, v, y : y + size[0], x : x + size[1]]
    return out

"""Attention inside epipolar planes: all views, and the pixels within a band around the query, cut at the borders.

A plane of a light field has an angular axis (views) and a spatial axis (pixels). A scene point draws a line through it
whose slope is its disparity, so the pixels that match a query lie in every view, within a band as wide as the largest
disparity allows.

Source: Liang et al., Learning Non-Local Spatial-Angular Correlation for Light Field Image Super-Resolution,
arXiv 2302.08058.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gridattn.ops.common import per_axis
from gridattn.ops.neighborhood import neighborhood_attention
from gridattn.ops.padding import pad_grid


def band_mask(grid: Sequence[int], field: int | Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Which positions see which: i sees i' iff i - f // 2 <= i' < i + f - f // 2 on every axis.

    Args:
        grid: sizes of the axes.
        field: size of the field of view per axis.
        device: where the mask is made.

    Returns:
        (N, N) bool in row-major order, row = query.

    Example:
        >>> band_mask((4,), 2).int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    mask = torch.ones(1, 1, dtype=torch.bool, device=device)
    for size, reach in zip(grid, per_axis(field, len(grid), "field")):
        index = torch.arange(size, device=device)
        offset = index[None, :] - index[:, None]
        axis = (offset >= -(reach // 2)) & (offset < reach - reach // 2)
        mask = (mask[:, None, :, None] & axis[None, :, None, :]).reshape(len(mask) * size, -1)
    return mask


def epipolar_attention(
    query: Tensor, key: Tensor, value: Tensor, field: int | Sequence[int], *, scale: float | None = None
) -> Tensor:
    """Softmax attention over a field of view that is cut, not shifted, at the borders.

    An axis whose field covers it from every position is attended to as a whole; along the others the cost is linear. It
    is computed as neighborhood attention on a grid padded with hidden keys.

    Args:
        query: (B, *grid, heads, head_dim), grid of rank 1 to 3; for a plane (views, pixels).
        key: (B, *grid, heads, head_dim).
        value: (B, *grid, heads, value_dim).
        field: size of the field of view per axis; position i sees i - field // 2 to i + field - field // 2 - 1.
        scale: factor of the products; head_dim ** -0.5 when None.

    Returns:
        (B, *grid, heads, value_dim).

    Raises:
        ValueError: a field below 2, or what `neighborhood_attention` refuses.

    Example:
        >>> x = torch.randn(1, 5, 32, 8, 16)
        >>> epipolar_attention(x, x, x, field=(10, 11)).shape
        torch.Size([1, 5, 32, 8, 16])
    """
    grid = tuple(query.shape[1:-2])
    fields = per_axis(field, len(grid), "field", minimum=2)
    long = [axis for axis, size in enumerate(grid) if size > 1]  # axes of one position have no neighbours
    if not long:
        return value.clone()
    q, k, v = (t.reshape(t.shape[0], *(grid[axis] for axis in long), *t.shape[-2:]) for t in (query, key, value))
    kernel, margins = zip(*(_kernel_and_margin(grid[axis], fields[axis]) for axis in long))
    key_mask = None
    if any(sum(margin) for margin in margins):
        key_mask = pad_grid(torch.ones(q.shape[:-2], dtype=torch.bool, device=query.device), margins)
        q, k, v = (pad_grid(t, margins) for t in (q, k, v))
    out = neighborhood_attention(q, k, v, kernel, scale=scale, key_mask=key_mask)
    for axis, (before, _) in enumerate(margins):
        out = out.narrow(axis + 1, before, grid[long[axis]])
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _kernel_and_margin(size: int, field: int) -> tuple[int, tuple[int, int]]:
    """Window along one axis, and the hidden positions before and after that keep it from being pushed back."""
    before, after = field // 2, field - field // 2 - 1
    if min(before, after) >= size - 1:
        return size, (0, 0)
    return field, (before, after)

"""Super-resolution of light fields of any size: overlapping tiles whose middles make up the result."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

TILE, STRIDE = 32, 16


def _symmetric(size: int, before: int, after: int) -> Tensor:
    """Indices that mirror an axis at its borders with the border pixels repeated, as often as needed."""
    index = torch.arange(-before, size + after) % (2 * size)
    return torch.where(index < size, index, 2 * size - 1 - index)


def tile_counts(size: tuple[int, int], stride: int = STRIDE) -> tuple[int, int]:
    """Tiles along the height and the width: ceil(size / stride)."""
    return -(-size[0] // stride), -(-size[1] // stride)


def check_tiling(tile: int, stride: int) -> None:
    """Raises ValueError for tiles whose middles do not cover the light field."""
    if stride < 1 or tile < stride or (tile - stride) % 2:
        raise ValueError(
            f"tile={tile} with stride={stride} is not allowed; a tile must be a stride and twice a border wide"
        )


def divide(field: Tensor, tile: int = TILE, stride: int = STRIDE) -> Tensor:
    """Cuts a light field into tiles, row by row; its borders are mirrored.

    Args:
        field: (C, U, V, h, w).
        tile: height and width of the tiles.
        stride: step between tiles.

    Returns:
        (n m, C, U, V, tile, tile), where n, m = `tile_counts`.

    Raises:
        ValueError: tiles that leave gaps.

    Example:
        >>> divide(torch.zeros(3, 5, 5, 40, 20)).shape
        torch.Size([6, 3, 5, 5, 32, 32])
    """
    check_tiling(tile, stride)
    border = (tile - stride) // 2
    for axis in (3, 4):
        index = _symmetric(field.shape[axis], border, border + stride - 1)
        field = field.index_select(axis, index.to(field.device))
    tiles = field.unfold(3, tile, stride).unfold(4, tile, stride)
    return rearrange(tiles, "c u v n m h w -> (n m) c u v h w")


def integrate(tiles: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """Lays the middles of tiles side by side.

    Args:
        tiles: (n m, C, U, V, t, t), in the order of `divide`.
        size: height H and width W of the result.
        stride: step between the tiles, in their own pixels.

    Returns:
        (C, U, V, H, W).
    """
    border = (tiles.shape[-1] - stride) // 2
    middles = tiles[..., border : border + stride, border : border + stride]
    rows, _ = tile_counts(size, stride)
    field = rearrange(middles, "(n m) c u v h w -> c u v (n h) (m w)", n=rows)
    return field[..., : size[0], : size[1]]


def super_resolve(
    network: Callable[[Tensor], Tensor],
    field: Tensor,
    scale: int,
    *,
    tile: int = TILE,
    stride: int = STRIDE,
    batch_size: int = 8,
) -> Tensor:
    """Super-resolves one light field tile by tile, or whole where `tile` is 0.

    Args:
        network: (B, C, U, V, h, w) -> (B, C, U, V, s h, s w).
        field: (C, U, V, h, w).
        scale: s.
        tile: height and width of the tiles; 0 gives the network the whole light field.
        stride: step between tiles.
        batch_size: tiles at a time.

    Returns:
        (C, U, V, s h, s w).

    Raises:
        ValueError: tiles that leave gaps.
    """
    if not tile:
        return network(field[None])[0]
    tiles = divide(field, tile, stride)
    done = torch.cat([network(part) for part in tiles.split(batch_size)])
    return integrate(done, (scale * field.shape[-2], scale * field.shape[-1]), scale * stride)

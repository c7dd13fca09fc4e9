"""Reorders the tokens of a grid so that each tile, and each dilation group, becomes contiguous; and back."""

from collections.abc import Sequence
from math import prod
from typing import Any

from einops import rearrange
from torch import Tensor

from gridattn.ops.common import per_axis
from gridattn.ops.padding import pad_grid


def token_permute(
    tensor: Tensor, tile_shape: Sequence[int], dilation: Any = None, flip_tiled_dims: bool = True
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Turns tokens on a grid into sequences in which the tokens of one tile follow each other.

    Each axis is zero-padded on the right to a multiple of tile * dilation and read as (rest, tile, dilation). Dilation
    groups go to the batch (batch outermost), so that each row is an undilated problem; tiles follow one another:

        (B, X1 .. Xn, H, D) -> (B * d1 .. dn, rest1 .. restn * tile1 .. tilen, H, D)

    Args:
        tensor: (B, *grid, heads, head_dim), any dtype.
        tile_shape: size of a tile, one int per grid axis; its length is the grid's rank.
        dilation: step between the tokens of a group, an int or one per axis; 1 when None.
        flip_tiled_dims: list the axes in reverse order inside each of the three groups (dilation, rest, tile).

    Returns:
        The sequences; the grid; and the padded grid of one dilation group, ceil(X / (tile * dilation)) * tile per axis.

    Raises:
        ValueError: sizes that are not positive ints, or a tensor of another rank.

    Source: token permutation of Generalized Neighborhood Attention, arXiv 2504.16922.

    Example:
        >>> import torch
        >>> permuted, grid, padded = token_permute(torch.arange(6.0).view(1, 6, 1, 1), (2,), dilation=2)
        >>> permuted.flatten(1).tolist(), grid, padded
        ([[0.0, 2.0, 4.0, 0.0], [1.0, 3.0, 5.0, 0.0]], (6,), (4,))
    """
    tile, dilations = _check_tiling(tile_shape, dilation)
    if tensor.ndim != len(tile) + 3:
        raise ValueError(
            f"tensor has shape {tuple(tensor.shape)}; "
            f"tile_shape={tile} takes (batch, {len(tile)} grid axes, heads, head_dim)"
        )
    grid = tuple(tensor.shape[1:-2])
    rest = _rest(grid, tile, dilations)
    padded = tuple(r * t * d for r, t, d in zip(rest, tile, dilations))
    filled = pad_grid(tensor, [(0, full - size) for size, full in zip(grid, padded)])
    on_grid, as_sequences, sizes = _patterns(rest, tile, dilations, flip_tiled_dims)
    permuted = rearrange(filled, f"{on_grid} -> {as_sequences}", **sizes)
    return permuted, grid, tuple(r * t for r, t in zip(rest, tile))


def token_unpermute(
    tensor: Tensor,
    token_layout_shape: Sequence[int],
    tile_shape: Sequence[int],
    dilation: Any = None,
    flip_tiled_dims: bool = True,
) -> Tensor:
    """Inverse of `token_permute`: puts the tokens back on their grid and drops the padding.

    Args:
        tensor: (B * prod(dilation), N, heads, head_dim), as `token_permute` returned it.
        token_layout_shape: the grid that `token_permute` returned.
        tile_shape: as given to `token_permute`.
        dilation: as given to `token_permute`.
        flip_tiled_dims: as given to `token_permute`.

    Returns:
        (B, *grid, heads, head_dim).

    Raises:
        ValueError: sizes that are not positive ints, or a tensor whose shape does not belong to them.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 7, 10, 1, 4)
        >>> permuted, grid, _ = token_permute(x, (2, 5), dilation=(2, 1))
        >>> torch.equal(token_unpermute(permuted, grid, (2, 5), dilation=(2, 1)), x)
        True
    """
    tile, dilations = _check_tiling(tile_shape, dilation)
    grid = per_axis(tuple(token_layout_shape), len(tile), "token_layout_shape")
    rest = _rest(grid, tile, dilations)
    on_grid, as_sequences, sizes = _patterns(rest, tile, dilations, flip_tiled_dims)
    groups, tokens = prod(dilations), prod(rest) * prod(tile)
    if tensor.ndim != 4 or tensor.shape[0] % groups or tensor.shape[1] != tokens:
        raise ValueError(
            f"tensor has shape {tuple(tensor.shape)}; token_layout_shape={grid} with tile_shape={tile} "
            f"and dilation={dilations} takes (a multiple of {groups}, {tokens}, heads, head_dim)"
        )
    restored = rearrange(tensor, f"{as_sequences} -> {on_grid}", **sizes)
    return restored[(slice(None), *(slice(size) for size in grid))]


def _check_tiling(tile_shape: Sequence[int], dilation: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rank = len(tile_shape)
    if rank not in (1, 2, 3):
        raise ValueError(f"tile_shape={tile_shape!r} has {rank} entries; 1, 2 or 3 are allowed, one per grid axis")
    tile = per_axis(tuple(tile_shape), rank, "tile_shape")
    return tile, per_axis(1 if dilation is None else dilation, rank, "dilation")


def _rest(grid: tuple[int, ...], tile: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """Number of tiles of one dilation group along each axis."""
    return tuple(-(-size // (t * d)) for size, t, d in zip(grid, tile, dilation))


def _patterns(
    rest: tuple[int, ...], tile: tuple[int, ...], dilation: tuple[int, ...], flip: bool
) -> tuple[str, str, dict[str, int]]:
    """The two layouts as einops patterns (r: rest, t: tile, d: dilation, numbered by axis) and their axes' sizes."""
    axes = range(len(tile))
    order = axes[::-1] if flip else axes
    on_grid = "b " + " ".join(f"(r{i} t{i} d{i})" for i in axes) + " h c"
    groups, rests, tiles = (" ".join(f"{name}{i}" for i in order) for name in "drt")
    sizes = {f"{name}{i}": size for name, values in zip("rtd", (rest, tile, dilation)) for i, size in enumerate(values)}
    return on_grid, f"(b {groups}) ({rests} {tiles}) h c", sizes

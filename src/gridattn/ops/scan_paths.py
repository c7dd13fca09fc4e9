"""Orders in which a scan visits the positions of a grid: raster lines or snakes, along every axis, both ways."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from gridattn.ops.common import check_choice

KINDS = ("continuous", "cross")

# Snakes by rank: the axes from the slowest to the fastest, and the axes that are walked from their end.
_SNAKES = {
    1: (((0,), ()), ((0,), (0,))),
    2: (((0, 1), ()), ((0, 1), (0,)), ((1, 0), (0,)), ((1, 0), (0, 1))),
    3: (
        ((0, 1, 2), ()),
        ((0, 1, 2), (0,)),
        ((1, 2, 0), ()),
        ((1, 2, 0), (1,)),
        ((2, 0, 1), ()),
        ((2, 0, 1), (2,)),
    ),
}


def scan_paths(grid: Sequence[int], kind: str = "continuous", device: torch.device | None = None) -> Tensor:
    """Permutations of the positions of a grid, two for every axis.

    `"continuous"`: snakes, whose successive positions are neighbours on the grid. On two axes:

    0. rows from top to bottom, the first from left to right, then alternating;
    1. rows from bottom to top, the bottom row from left to right;
    2. columns from left to right, the first from bottom to top;
    3. columns from right to left, the last column from bottom to top.

    `"cross"`: raster orders with each axis in turn as the fastest, the last axis first (on two axes: row-major, then
    column-major), then the same orders reversed.

    Args:
        grid: sizes of 1 to 3 axes.
        kind: "continuous" or "cross".
        device: of the result.

    Returns:
        (2 * rank, N) int64, row-major indices in the order of the scan.

    Raises:
        ValueError: an unknown kind, more than three axes.

    Source: LaMamba-Diff, arXiv 2408.02615.

    Example:
        >>> scan_paths((2, 3))[0].tolist(), scan_paths((2, 3), "cross")[1].tolist()
        ([0, 1, 2, 5, 4, 3], [0, 3, 1, 4, 2, 5])
    """
    check_choice("kind", kind, KINDS)
    rank = len(grid)
    if rank not in _SNAKES:
        raise ValueError(f"grid={tuple(grid)} has {rank} axes; 1 to 3 are allowed")
    if kind == "continuous":
        return torch.stack([_snake(grid, order, ends, device) for order, ends in _SNAKES[rank]])
    index = torch.arange(prod(grid), device=device).view(*grid)
    raster = torch.stack([index.movedim(axis, -1).flatten() for axis in reversed(range(rank))])
    return torch.cat([raster, raster.flip(-1)])


def inverse_paths(paths: Tensor) -> Tensor:
    """The permutations that undo `paths`, inverse[k][paths[k]] = 0 ... N - 1; (K, N) -> (K, N).

    Example:
        >>> inverse_paths(torch.tensor([[2, 0, 1]])).tolist()
        [[1, 2, 0]]
    """
    steps = torch.arange(paths.shape[-1], device=paths.device).expand_as(paths)
    return torch.zeros_like(paths).scatter(-1, paths, steps)


def _snake(grid: Sequence[int], order: Sequence[int], from_end: Sequence[int], device: torch.device | None) -> Tensor:
    """An axis turns round whenever a slower one has taken a step (reflected counting)."""
    step = torch.arange(prod(grid), device=device)
    index = torch.zeros_like(step)
    run = prod(grid)
    for axis in order:
        sweeps, run = step // run, run // grid[axis]
        place = step // run % grid[axis]
        backwards = (sweeps + (axis in from_end)) % 2 == 1
        index = index + torch.where(backwards, grid[axis] - 1 - place, place) * prod(grid[axis + 1 :])
    return index

"""Tile shapes of published kernels for neighborhood attention, and those of our own CPU kernels."""

from itertools import product
from math import prod
from typing import NamedTuple

from gridattn.lab.simulate import Simulation, axis_visits, combine_axes
from gridattn.ops.common import check_choice
from gridattn.ops.neighborhood.cpu import rows_are_faster
from gridattn.ops.neighborhood.cpu_rows import SHAPE
from gridattn.ops.neighborhood.cpu_tiles import make_tiling
from gridattn.ops.neighborhood.plan import Plan

Tile = tuple[int, ...]


class TilePair(NamedTuple):
    """Sizes per axis of a kernel's query tile and key tile."""

    query: Tile
    key: Tile


def _pairs(queries: list[Tile], keys: list[Tile]) -> list[TilePair]:
    return [TilePair(*pair) for pair in product(queries, keys)]


# Forward kernels of NATTEN 0.21 for 16-bit numbers; a number behind the name is the head dimension, 128 without.
KERNELS = {
    "hopper": [
        *_pairs([(128,)], [(128,)]),
        *_pairs([(16, 8)], [(16, 8)]),
        *_pairs([(4, 4, 8)], [(4, 4, 8)]),
        *_pairs([(2, 8, 8)], [(2, 8, 8)]),
    ],
    "hopper-64": [
        *_pairs([(64,)], [(128,)]),
        *_pairs([(8, 8)], [(16, 8), (8, 16)]),
        *_pairs([(4, 4, 4)], [(4, 4, 8), (2, 8, 8)]),
    ],
    "hopper-256": [
        *_pairs([(128,)], [(64,)]),
        *_pairs([(16, 8), (8, 16)], [(8, 8)]),
        *_pairs([(4, 4, 8), (2, 8, 8)], [(4, 4, 4)]),
    ],
    "blackwell": [
        *_pairs([(256,)], [(128,)]),
        *_pairs([(16, 16)], [(16, 8), (8, 16)]),
        *_pairs([(8, 32)], [(8, 16), (4, 32)]),
        *_pairs([(8, 4, 8), (2, 8, 16)], [(4, 4, 8), (2, 8, 8)]),
        *_pairs([(4, 4, 16)], [(2, 4, 16)]),
        *_pairs([(2, 16, 8)], [(2, 8, 8)]),
        *_pairs([(4, 8, 8)], [(2, 8, 8)]),
    ],
    "flex": [
        *_pairs([(64,)], [(64,)]),
        *_pairs([(8, 8)], [(8, 8)]),
        *_pairs([(4, 16)], [(4, 16), (8, 8)]),
        *_pairs([(4, 4, 4)], [(4, 4, 4)]),
        *_pairs([(2, 4, 8)], [(2, 4, 8), (4, 4, 4)]),
    ],
}


def tile_pairs(kernels: str, rank: int) -> list[TilePair]:
    """Tile shapes of a family of GPU kernels.

    Args:
        kernels: "hopper", "hopper-64" (head dimensions 32 and 64), "hopper-256", "blackwell" or "flex".
        rank: axes of the grid.

    Raises:
        ValueError: an unknown family.

    Example:
        >>> tile_pairs("hopper", 2)
        [TilePair(query=(16, 8), key=(16, 8))]
    """
    check_choice("kernels", kernels, list(KERNELS))
    return [pair for pair in KERNELS[kernels] if len(pair.query) == rank]


def simulate_cpu(plan: Plan) -> tuple[str, Simulation]:
    """What the forward pass of our CPU backend visits: the kernel that it chooses, and the counts for its tiles.

    Keys are counted one by one. The tile kernel visits, for up to 16 queries at once, the smallest box of keys that
    holds their windows; its tiles depend on the stride. In the row kernel every query visits its own window, so that
    the time of 16 such queries compares with one of its tiles.

    Args:
        plan: the problem.

    Returns:
        "rows" or "tiles", and the simulation.

    Example:
        >>> from gridattn.ops.neighborhood.plan import make_plan
        >>> kernel, found = simulate_cpu(make_plan((64, 64), 7, stride=4))
        >>> kernel, found.per_axis_max, found.query_tiles
        ('tiles', (7, 7), 256)
    """
    rows = rows_are_faster(plan)
    shape = (1,) * plan.rank if rows else make_tiling(plan, row_bytes=1, heads=1).shape[-plan.rank :]
    visits = [axis_visits(axis, int(size), 1, "dynamic") for axis, size in zip(plan.axes, shape)]
    return "rows" if rows else "tiles", combine_axes(plan, (1,) * plan.rank, visits)


def cpu_cost(plan: Plan) -> int:
    """Keys that the CPU backend visits, counted once for 16 queries: what its time should be proportional to."""
    kernel, found = simulate_cpu(plan)
    return found.total_visited // prod(SHAPE) if kernel == "rows" else found.total_visited

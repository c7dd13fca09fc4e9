"""How a grid is cut into slabs over the devices of a mesh."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

_SIGNATURE = 12  # numbers that describe a slab when processes compare theirs: rank, sizes, zeros


@dataclass(frozen=True)
class Shard:
    """One axis of a grid, cut into slabs over a group of processes.

    Attributes:
        axis: grid axis.
        group: the processes along this axis.
        rank: number of this process among them.
        sizes: positions of each process's slab.
    """

    axis: int
    group: Any
    rank: int
    sizes: tuple[int, ...]

    @property
    def length(self) -> int:
        """Positions of the whole axis."""
        return sum(self.sizes)

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Where the slabs begin, and where the last one ends."""
        return (0, *accumulate(self.sizes))

    @property
    def first(self) -> int:
        return self.bounds[self.rank]

    @property
    def last(self) -> int:
        return self.bounds[self.rank + 1]


def even_slabs(length: int, parts: int) -> tuple[int, ...]:
    """Sizes of slabs that differ by one position at most.

    Raises:
        ValueError: fewer positions than parts.

    Example:
        >>> even_slabs(10, 4)
        (3, 3, 2, 2)
    """
    if length < parts:
        raise ValueError(f"an axis of {length} positions cannot be cut into {parts} slabs; one position each is needed")
    return tuple(length // parts + (part < length % parts) for part in range(parts))


def check_shard_axes(mesh: DeviceMesh, shard_axes: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """The grid axis that each dimension of the mesh cuts; the first ones when None.

    Raises:
        ValueError: not one axis a dimension of the mesh, an axis twice, or one that the grid does not have.
    """
    axes = shard_axes if shard_axes is not None else range(mesh.ndim)
    axes = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    if len(axes) != mesh.ndim:
        raise ValueError(
            f"shard_axes={shard_axes!r} names {len(axes)} axes, but the mesh has {mesh.ndim} dimensions; one grid axis "
            "a dimension is allowed (take a part of a larger mesh by mesh['name'])"
        )
    if len(set(axes)) != len(axes) or any(type(axis) is not int or not 0 <= axis < rank for axis in axes):
        raise ValueError(f"shard_axes={axes} is not allowed; different grid axes from 0 to {rank - 1} are")
    return axes


def make_shards(
    mesh: DeviceMesh,
    shard_axes: int | Sequence[int] | None,
    shape: Sequence[int],
    rank: int,
    slabs: Sequence[Sequence[int]] | None = None,
) -> tuple[Shard, ...]:
    """The shards of a grid, of which this process holds a slab.

    Args:
        mesh: one dimension an axis that is cut.
        shard_axes: the axes.
        shape: shape of the slab, (B, *grid, ...).
        rank: number of grid axes.
        slabs: per dimension of the mesh, the sizes of all slabs; the processes tell each other theirs when None.

    Raises:
        ValueError: axes that do not fit, `slabs` that do not fit the mesh or the slab, or slabs whose other sizes
            differ between processes.
    """
    axes = check_shard_axes(mesh, shard_axes, rank)
    if slabs is None:
        return tuple(_ask(mesh, dim, axis, shape) for dim, axis in enumerate(axes))
    sizes = tuple(tuple(int(size) for size in of_axis) for of_axis in slabs)
    if [len(of_axis) for of_axis in sizes] != list(mesh.shape) or any(min(of_axis) < 1 for of_axis in sizes):
        raise ValueError(
            f"slabs={slabs!r} is not allowed; for each dimension of the mesh {tuple(mesh.shape)}, as many sizes of at "
            "least 1 as it has processes"
        )
    for dim, axis in enumerate(axes):
        here = sizes[dim][mesh.get_local_rank(dim)]
        if shape[1 + axis] != here:
            raise ValueError(
                f"the slab has {shape[1 + axis]} positions on axis {axis}, but slabs={slabs!r} says {here}"
            )
    return tuple(_shard(mesh, dim, axis, sizes[dim]) for dim, axis in enumerate(axes))


def whole_grid(grid: Sequence[int], shards: Sequence[Shard]) -> tuple[int, ...]:
    """Sizes of the whole grid, from those of a slab."""
    lengths = {shard.axis: shard.length for shard in shards}
    return tuple(lengths.get(axis, size) for axis, size in enumerate(grid))


def even_shards(
    mesh: DeviceMesh,
    shard_axes: int | Sequence[int] | None,
    shape: Sequence[int],
    slabs: Sequence[Sequence[int]] | None,
) -> tuple[Shard, ...]:
    """The shards of a whole grid of shape (B, *grid, ...): as even as possible, or of the sizes `slabs`."""
    axes = check_shard_axes(mesh, shard_axes, len(shape) - 1)
    shards = []
    for dim, axis in enumerate(axes):
        sizes = even_slabs(shape[1 + axis], mesh.size(dim)) if slabs is None else tuple(slabs[dim])
        if len(sizes) != mesh.size(dim) or min(sizes) < 1 or sum(sizes) != shape[1 + axis]:
            raise ValueError(
                f"slabs={slabs!r} is not allowed; {mesh.size(dim)} sizes of at least 1 with the sum {shape[1 + axis]} "
                f"are needed for axis {axis}"
            )
        shards.append(_shard(mesh, dim, axis, sizes))
    return tuple(shards)


def _shard(mesh: DeviceMesh, dim: int, axis: int, sizes: tuple[int, ...]) -> Shard:
    return Shard(axis, mesh.get_group(dim), mesh.get_local_rank(dim), sizes)


def _ask(mesh: DeviceMesh, dim: int, axis: int, shape: Sequence[int]) -> Shard:
    """The shard of an axis whose slab sizes the processes tell each other."""
    if mesh.size(dim) == 1:
        return _shard(mesh, dim, axis, (shape[1 + axis],))
    mine = [len(shape), *shape, *[0] * (_SIGNATURE - 1 - len(shape))]
    signature = torch.tensor(mine, dtype=torch.int64, device=mesh.device_type)
    gathered = [torch.empty_like(signature) for _ in range(mesh.size(dim))]
    dist.all_gather(gathered, signature, group=mesh.get_group(dim))
    all_shapes = [tuple(row[1 : 1 + row[0]]) for row in torch.stack(gathered).tolist()]
    others = {(*slab[: 1 + axis], *slab[2 + axis :]) for slab in all_shapes}
    if len(others) != 1 or any(slab[1 + axis] < 1 for slab in all_shapes):
        raise ValueError(
            f"the slabs of the processes along axis {axis} are {all_shapes}; they must be equal but for that axis, and "
            "hold at least one position each"
        )
    return _shard(mesh, dim, axis, tuple(slab[1 + axis] for slab in all_shapes))

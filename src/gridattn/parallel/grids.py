"""From a whole grid to the slabs of a mesh of devices, and back."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from gridattn.parallel.exchange import sum_over, to_bytes
from gridattn.parallel.slabs import Shard, even_shards, make_shards


def shard_grid(
    tensor: Tensor,
    mesh: DeviceMesh,
    shard_axes: int | Sequence[int] | None = None,
    slabs: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """The slab of a whole grid that belongs to this process.

    Gradients flow back to the whole grid of every process.

    Args:
        tensor: (B, *grid, ...), the same on every process; at least the part that becomes the slab.
        mesh: one dimension an axis that is cut.
        shard_axes: the grid axis that each dimension of the mesh cuts; the first ones when None.
        slabs: per dimension of the mesh the sizes of the slabs; as even as possible when None, the larger ones first.

    Returns:
        (B, *slab, ...).

    Raises:
        ValueError: axes or slabs that do not fit the mesh or the grid.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = dist.init_device_mesh("cpu", (1,))
        >>> shard_grid(torch.zeros(2, 9, 8, 3), mesh, shard_axes=1).shape
        torch.Size([2, 9, 8, 3])
        >>> dist.destroy_process_group()
    """
    return _Shard.apply(tensor, even_shards(mesh, shard_axes, tensor.shape, slabs))


def gather_grid(
    tensor: Tensor,
    mesh: DeviceMesh,
    shard_axes: int | Sequence[int] | None = None,
    slabs: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """The whole grid, on every process, from the slabs of all.

    The gradient of a slab is the sum over the processes of their gradients of its part: where every process computes
    the same loss of the whole grid, count it once, or divide it by the number of processes.

    Args:
        tensor: (B, *slab, ...), this process's slab.
        mesh, shard_axes: as in `shard_grid`.
        slabs: per dimension of the mesh the sizes of the slabs; the processes tell each other theirs when None.

    Returns:
        (B, *grid, ...).

    Raises:
        ValueError: axes or slabs that do not fit the mesh, or slabs that do not fit each other.
    """
    return _Gather.apply(tensor, make_shards(mesh, shard_axes, tensor.shape, tensor.ndim - 1, slabs))


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shards: tuple[Shard, ...]) -> Tensor:
        ctx.shards = shards
        return _slab(tensor, shards).clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.shards), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shards: tuple[Shard, ...]) -> Tensor:
        ctx.shards = shards
        return _gather(tensor, shards)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = sum_over(grad, [shard.group for shard in ctx.shards])
        return _slab(total, ctx.shards).contiguous(), None


def _slab(tensor: Tensor, shards: Sequence[Shard]) -> Tensor:
    for shard in shards:
        tensor = tensor.narrow(1 + shard.axis, shard.first, shard.sizes[shard.rank])
    return tensor


def _gather(tensor: Tensor, shards: Sequence[Shard]) -> Tensor:
    for shard in shards:
        dim, largest = 1 + shard.axis, max(shard.sizes)
        front = tensor.movedim(dim, 0)
        padded = F.pad(front, [0, 0] * (tensor.ndim - 1) + [0, largest - len(front)]).contiguous()
        mine = to_bytes(padded)
        parts = [torch.empty_like(mine) for _ in shard.sizes]
        if mine.numel():
            dist.all_gather(parts, mine, group=shard.group)
        slabs = [part.view(tensor.dtype).view(padded.shape)[:size] for part, size in zip(parts, shard.sizes)]
        tensor = torch.cat(slabs).movedim(0, dim)
    return tensor.contiguous()

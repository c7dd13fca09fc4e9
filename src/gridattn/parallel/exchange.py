"""What processes tell each other: the rows around their slabs, and sums of gradients."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gridattn.ops.neighborhood.crop import AxisCrop
from gridattn.ops.neighborhood.plan import AxisPlan
from gridattn.parallel.slabs import Shard


@dataclass
class ExchangeCount:
    """Bytes of keys, values and masks (`forward`) and of their gradients (`backward`) that this process received."""

    forward: int = 0
    backward: int = 0


_counts: list[ExchangeCount] = []


@contextmanager
def count_exchange() -> Iterator[ExchangeCount]:
    """Counts the bytes of halos that this process receives inside the block.

    Example:
        >>> with count_exchange() as count:
        ...     pass
        >>> count
        ExchangeCount(forward=0, backward=0)
    """
    count = ExchangeCount()
    _counts.append(count)
    try:
        yield count
    finally:
        _counts[:] = [other for other in _counts if other is not count]


@dataclass(frozen=True, eq=False)
class AxisHalo:
    """What one process gives and gets along one axis.

    Attributes:
        crop: the keys that its queries need.
        gives: other process -> rows of its own slab that this one needs.
        gets: other process -> how many of its rows it needs.
    """

    crop: AxisCrop
    gives: Mapping[int, np.ndarray]
    gets: Mapping[int, int]


@lru_cache(maxsize=256)
def axis_halo(axis: AxisPlan, sizes: tuple[int, ...], rank: int) -> AxisHalo:
    """The halo of the slab number `rank` among slabs of these sizes."""
    bounds = np.cumsum((0, *sizes))
    crops = [AxisCrop(axis, int(low), int(high)) for low, high in pairwise(bounds)]

    def owned(keys: np.ndarray, owner: int) -> np.ndarray:
        return keys[(keys >= bounds[owner]) & (keys < bounds[owner + 1])] - bounds[owner]

    others = [other for other in range(len(sizes)) if other != rank]
    gives = {other: rows for other in others if len(rows := owned(crops[other].keys, rank))}
    gets = {other: len(rows) for other in others if len(rows := owned(crops[rank].keys, other))}
    return AxisHalo(crops[rank], gives, gets)


def add_halo(tensors: Sequence[Tensor], halo: AxisHalo, shard: Shard) -> tuple[Tensor, ...]:
    """Slabs (B, *grid, ...) with the rows of other slabs that their queries need, in the order of the whole axis.

    Gradients of those rows flow back to the processes that own them. All processes of the group must take part, in the
    backward pass too.
    """
    if not halo.gives and not halo.gets:
        return tuple(tensors)
    return _AddHalo.apply(halo, shard, *tensors)


class _AddHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, halo: AxisHalo, shard: Shard, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.halo, ctx.shard, ctx.own = halo, shard, [tensor.shape[1 + shard.axis] for tensor in tensors]
        dim = 1 + shard.axis
        outgoing = {other: [_take(t, dim, rows) for t in tensors] for other, rows in halo.gives.items()}
        shapes = {other: [_resized(t, dim, count) for t in tensors] for other, count in halo.gets.items()}
        received = _swap(outgoing, shapes, tensors[0], shard.group)
        _note("forward", received)
        before, after = ([o for o in sorted(received) if (o < shard.rank) is side] for side in (True, False))
        return tuple(
            torch.cat([*(received[o][i] for o in before), tensor, *(received[o][i] for o in after)], dim)
            for i, tensor in enumerate(tensors)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        halo, shard, dim = ctx.halo, ctx.shard, 1 + ctx.shard.axis
        lengths = dict(halo.gets)
        order = sorted([*lengths, shard.rank])
        parts = [
            dict(zip(order, grad.split([lengths.get(other, own) for other in order], dim)))
            for grad, own in zip(grads, ctx.own)
        ]
        outgoing = {other: [part[other] for part in parts] for other in lengths}
        own = [part[shard.rank] for part in parts]
        shapes = {other: [_resized(t, dim, len(rows)) for t in own] for other, rows in halo.gives.items()}
        received = _swap(outgoing, shapes, grads[0], shard.group)
        _note("backward", received)
        totals = []
        for i, grad in enumerate(own):
            total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
            for other in sorted(received):
                rows = torch.from_numpy(halo.gives[other]).to(grad.device)
                total.index_add_(dim, rows, received[other][i].to(total.dtype))
            totals.append(total.to(grad.dtype))
        return None, None, *totals


def sum_over(tensor: Tensor, groups: Sequence[Any]) -> Tensor:
    """The sum of the tensors of all processes of a mesh, given its groups, one a dimension; in float32 at least."""
    groups = [group for group in groups if dist.get_world_size(group) > 1]
    if not groups:
        return tensor
    total = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True).contiguous()
    for group in groups:
        dist.all_reduce(total, group=group)
    return total.to(tensor.dtype)


def replicated(tensor: Tensor | None, groups: Sequence[Any]) -> Tensor | None:
    """A tensor that all processes hold alike: its gradient becomes the sum of theirs."""
    return None if tensor is None else _Replicated.apply(tensor, groups)


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, groups: Sequence[Any]) -> Tensor:
        ctx.groups = groups
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over(grad, ctx.groups), None


def to_bytes(tensor: Tensor) -> Tensor:
    """The memory of a tensor as (bytes,) uint8: every back end carries those, whatever the dtype."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _swap(
    outgoing: Mapping[int, Sequence[Tensor]],
    shapes: Mapping[int, Sequence[tuple[int, ...]]],
    like: Tensor,
    group: Any,
) -> dict[int, list[Tensor]]:
    """Sends tensors to other processes of the group and receives tensors of known shapes, one message each way."""
    sent = {other: torch.cat([to_bytes(tensor) for tensor in tensors]) for other, tensors in outgoing.items()}
    counts = {other: [int(np.prod(shape)) * like.element_size() for shape in of] for other, of in shapes.items()}
    buffers = {o: torch.empty(sum(count), dtype=torch.uint8, device=like.device) for o, count in counts.items()}
    messages = [
        dist.P2POp(call, buffer, dist.get_global_rank(group, other), group)
        for call, of in ((dist.isend, sent), (dist.irecv, buffers))
        for other, buffer in sorted(of.items())
        if buffer.numel()
    ]
    for work in dist.batch_isend_irecv(messages) if messages else []:
        work.wait()
    return {
        other: [part.view(like.dtype).view(shape) for part, shape in zip(buffers[other].split(counts[other]), of)]
        for other, of in shapes.items()
    }


def _take(tensor: Tensor, dim: int, rows: np.ndarray) -> Tensor:
    if rows[-1] - rows[0] == len(rows) - 1:
        return tensor.narrow(dim, int(rows[0]), len(rows))
    return tensor.index_select(dim, torch.from_numpy(rows).to(tensor.device))


def _resized(tensor: Tensor, dim: int, size: int) -> tuple[int, ...]:
    return (*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])


def _note(direction: str, received: Mapping[int, Sequence[Tensor]]) -> None:
    size = sum(tensor.nbytes for tensors in received.values() for tensor in tensors)
    for count in _counts:
        setattr(count, direction, getattr(count, direction) + size)

"""Neighborhood attention on a grid that is cut into slabs over several devices."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gridattn.ops.common import check_choice
from gridattn.ops.neighborhood.api import BACKENDS, attend_planned, to_autocast_dtype
from gridattn.ops.neighborhood.checks import (
    check_additional,
    check_bias,
    check_key_mask,
    check_tensors,
    count_visible_keys,
)
from gridattn.ops.neighborhood.crop import AxisCrop, Crop
from gridattn.ops.neighborhood.plan import Plan, make_plan
from gridattn.parallel.exchange import add_halo, axis_halo, replicated
from gridattn.parallel.slabs import Shard, make_shards, whole_grid


def sharded_neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    mesh: DeviceMesh,
    shard_axes: int | Sequence[int] | None = None,
    slabs: Sequence[Sequence[int]] | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`neighborhood_attention` of a grid of which every process holds a slab; same numbers, same gradients.

    Each process computes the queries of its slab. Of other slabs it receives the keys and values that these queries
    see and no others, and in the backward pass it sends their gradients back. All processes of the mesh call this
    together, forward and backward. The objective is the sum of the processes' losses: `bias`, `additional_keys` and
    `additional_values`, which all hold alike, get the sum of the gradients of all on every process.

    Args:
        query: (B, *slab, Hq, D), this process's slab of a grid of 1, 2 or 3 axes.
        key: (B, *slab, Hkv, D).
        value: (B, *slab, Hkv, Dv).
        kernel_size, stride, dilation, is_causal: as in `neighborhood_attention`, for the whole grid.
        mesh: one dimension an axis that is cut. Part of a larger mesh: `mesh["name"]`.
        shard_axes: the grid axis that each dimension of the mesh cuts; the first ones when None.
        slabs: per dimension of the mesh the sizes of all slabs along it, of any sizes from 1. When None, the processes
            tell each other theirs, which takes one small message more.
        scale, bias, additional_keys, additional_values, return_lse, backend: as in `neighborhood_attention`.
        key_mask: (B, *slab) bool.

    Returns:
        (B, *slab, Hq, Dv), with `return_lse` also (B, *slab, Hq).

    Raises:
        ValueError: what `neighborhood_attention` refuses; axes or slabs that do not fit the mesh or each other.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = dist.init_device_mesh("cpu", (1,))
        >>> q, k, v = torch.randn(3, 1, 12, 10, 2, 8)
        >>> sharded_neighborhood_attention(q, k, v, kernel_size=5, mesh=mesh, shard_axes=0).shape
        torch.Size([1, 12, 10, 2, 8])
        >>> dist.destroy_process_group()
    """
    check_choice("backend", backend, ("auto", *BACKENDS))
    query, key, value = (to_autocast_dtype(t) for t in (query, key, value))
    check_tensors(query, key, value)
    shards = make_shards(mesh, shard_axes, query.shape, query.ndim - 3, slabs)
    plan = make_plan(whole_grid(query.shape[1:-2], shards), kernel_size, stride, dilation, is_causal)
    additional = (additional_keys, additional_values)
    out, lse = attend_shards(query, key, value, plan, shards, scale, bias, key_mask, additional, return_lse, backend)
    return (out, lse) if return_lse else out


def attend_shards(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    shards: Sequence[Shard],
    scale: float | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    additional: tuple[Tensor | None, Tensor | None],
    need_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`sharded_neighborhood_attention` with the plan of the whole grid and its shards."""
    groups = [shard.group for shard in shards]
    extra = tuple(None if t is None else to_autocast_dtype(t) for t in additional)
    check_additional(key, value, *extra)
    check_bias(bias, query, plan)
    check_key_mask(key_mask, query, plan, spare=True)

    crops = [AxisCrop(axis, 0, axis.length) for axis in plan.axes]
    for shard in shards:
        halo = axis_halo(plan.axes[shard.axis], shard.sizes, shard.rank)
        key, value = add_halo((key, value), halo, shard)
        if key_mask is not None:
            (key_mask,) = add_halo((key_mask,), halo, shard)
        crops[shard.axis] = halo.crop
    crop = Crop(tuple(crops))
    key, value = (_place(tensor, crop) for tensor in (key, value))
    if key_mask is not None:
        key_mask = _place(key_mask, crop)
        if extra[0] is None or extra[0].shape[1] == 0:
            _check_visible(key_mask, crop, groups)
    bias, extra_keys, extra_values = (replicated(t, groups) for t in (bias, *extra))
    problem = (crop.pad_queries(query), key, value, crop.plan, scale, bias, key_mask, (extra_keys, extra_values))
    out, lse = attend_planned(*problem, need_lse, backend)
    inside = (slice(None), *crop.inside)
    return out[inside], lse[inside] if need_lse else lse


def _place(tensor: Tensor, crop: Crop) -> Tensor:
    """Puts rows that stand for `crop.keys` of each axis where the crop has them, with zeros between."""
    for dim, axis in enumerate(crop.axes, start=1):
        low, high = axis.span
        rows = axis.keys - low
        if len(rows) == rows[-1] - rows[0] + 1:
            amounts = [0, 0] * (tensor.ndim - 1 - dim) + [int(rows[0]), high - low - 1 - int(rows[-1])]
            tensor = F.pad(tensor, amounts) if any(amounts) else tensor
        else:
            spread = tensor.new_zeros((*tensor.shape[:dim], high - low, *tensor.shape[dim + 1 :]))
            tensor = spread.index_copy(dim, torch.from_numpy(rows).to(tensor.device), tensor)
    return tensor


def _check_visible(key_mask: Tensor, crop: Crop, groups: Sequence) -> None:
    """Raises ValueError, on all processes together, if the mask leaves a query of any of them without a key."""
    alone = (count_visible_keys(key_mask, crop.plan)[(slice(None), *crop.inside)] == 0).sum()
    for group in groups:
        dist.all_reduce(alone, group=group)
    if alone:
        raise ValueError(
            f"key_mask leaves {int(alone)} queries without a key; every window must keep at least one key unless "
            "additional_keys are given"
        )

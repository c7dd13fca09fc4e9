"""Deformable attention: every query reads a few points of the grid, between positions, that it chooses itself."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from gridattn.ops.common import check_choice

Shapes = Sequence[Sequence[int]]


def deformable_attention(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Weighted sum of values interpolated at given points of one or several grids (levels).

        out[q] = sum_l sum_p weights[q, l, p] * V_l(locations[q, l, p])

    V_l is level l, linearly interpolated along each axis and zero outside. Location 0 is the outer border of the first
    position and 1 that of the last, so the centre of position i of n lies at (i + 1/2) / n. A point closer than half a
    position to the border is interpolated with zero.

    Args:
        value: (B, S, heads, head_dim), the positions of all levels in row-major order, one level after the other.
        shapes: the grid of each level, first axis first, 1 to 3 axes; their sizes sum to S.
        locations: (B, Q, heads, levels, points, rank), last axis first: (x, y) on images.
        weights: (B, Q, heads, levels, points); the op does not normalise them.
        backend: "grid_sample" interpolates level by level; "gather" sums the corners of all points with
            `embedding_bag`, whose gradient is deterministic on CUDA too; "reference" forms the dense weights. "auto" is
            "grid_sample", or "gather" on CUDA where `torch.use_deterministic_algorithms` is on.

    Returns:
        (B, Q, heads, head_dim), of the values' dtype; half precision is computed in float32.

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.

    Source: Zhu et al., Deformable DETR, arXiv 2010.04159; used by Group Pose, arXiv 2308.07313.

    Example:
        >>> value = torch.arange(6.0).view(1, 6, 1, 1)  # a 2 x 3 grid
        >>> centre, one = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
        >>> deformable_attention(value, [(2, 3)], centre, one).item()
        2.5
    """
    check_choice("backend", backend, ("auto", "grid_sample", "gather", "reference"))
    _check_problem(value, shapes, locations, weights)
    if backend == "auto":
        needs_order = value.is_cuda and torch.are_deterministic_algorithms_enabled()
        backend = "gather" if needs_order else "grid_sample"
    compute = torch.promote_types(torch.promote_types(value.dtype, weights.dtype), torch.float32)
    attend = {"grid_sample": _by_grid_sample, "gather": _by_gather, "reference": deformable_attention_reference}
    out = attend[backend](value.to(compute), shapes, locations.to(compute), weights.to(compute))
    return out.to(value.dtype)


def _check_problem(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    if value.ndim != 4:
        raise ValueError(f"value has shape {tuple(value.shape)}; (B, positions, heads, head_dim) is allowed")
    rank = len(shapes[0]) if len(shapes) else 0
    if rank not in (1, 2, 3) or any(len(shape) != rank for shape in shapes):
        raise ValueError(f"shapes={list(shapes)} is not allowed; one or more grids of the same 1 to 3 axes are")
    positions = sum(prod(shape) for shape in shapes)
    if value.shape[1] != positions:
        raise ValueError(f"value has {value.shape[1]} positions; shapes={list(shapes)} have {positions}")
    batch, heads = value.shape[0], value.shape[2]
    expected = (batch, None, heads, len(shapes), None, rank)
    if locations.ndim != 6 or any(e is not None and e != s for e, s in zip(expected, locations.shape)):
        raise ValueError(
            f"locations has shape {tuple(locations.shape)}; ({batch}, queries, {heads}, {len(shapes)}, points, {rank}) "
            f"is allowed"
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(f"weights has shape {tuple(weights.shape)}; {tuple(locations.shape[:-1])} is allowed")


def deformable_weights(shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The weight of every position for every query: each point's weight, shared among its corners.

    A corner at distance (dx, dy) < 1, in positions, gets the part (1 - |dx|)(1 - |dy|).

    Args:
        shapes: the grid of each level.
        locations: (B, Q, heads, levels, points, rank), last axis first.
        weights: (B, Q, heads, levels, points).

    Returns:
        (B, Q, heads, S), positions of all levels in row-major order.

    Example:
        >>> ends = torch.tensor([0.25, 1.0]).view(1, 1, 1, 1, 2, 1)
        >>> deformable_weights([(2,)], ends, torch.ones(1, 1, 1, 1, 2)).flatten().tolist()
        [1.0, 0.5]
    """
    levels = []
    for level, shape in enumerate(shapes):
        share = weights[:, :, :, level].unsqueeze(-1)  # (B, Q, heads, points, positions so far)
        for axis, size in enumerate(shape):
            position = locations[:, :, :, level, :, len(shape) - 1 - axis, None] * size - 0.5
            distance = position - torch.arange(size, dtype=position.dtype, device=position.device)
            corner = (1 - distance.abs()).clamp_min(0)
            share = (share.unsqueeze(-1) * corner.unsqueeze(-2)).flatten(-2)
        levels.append(share.sum(-2))
    return torch.cat(levels, dim=-1)


def deformable_attention_reference(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The definition of `deformable_attention`: the dense weights of all positions times their values."""
    return torch.einsum("bqhs,bshd->bqhd", deformable_weights(shapes, locations, weights), value)


def _by_grid_sample(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, _ = value.shape
    if locations.shape[-1] == 1:  # grid_sample wants two axes: a first one of size 1, read at its centre
        shapes = [(1, *shape) for shape in shapes]
        locations = F.pad(locations, (0, 1), value=0.5)
    rank = locations.shape[-1]
    points = rearrange(2 * locations - 1, "b q h l p r -> l (b h) q p r")
    if rank == 3:
        points = points.unsqueeze(-3)
    shares = rearrange(weights, "b q h l p -> l (b h) 1 q p")
    out = value.new_zeros(())
    for level, tokens in enumerate(value.split([prod(shape) for shape in shapes], dim=1)):
        maps = rearrange(tokens, "b s h d -> (b h) d s").unflatten(-1, tuple(shapes[level]))
        sampled = F.grid_sample(maps, points[level], padding_mode="zeros", align_corners=False)
        out = out + (sampled.flatten(2, -2) * shares[level]).sum(-1)
    return rearrange(out, "(b h) d q -> b q h d", b=batch, h=heads)


def _by_gather(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    batch, positions, heads, _ = value.shape
    index, share = _corners(shapes, locations, weights)  # (B, Q, heads, levels * points * corners)
    sample = torch.arange(batch, device=value.device).view(-1, 1, 1, 1) * positions
    head = torch.arange(heads, device=value.device).view(-1, 1)
    row = (sample + index) * heads + head
    out = F.embedding_bag(row.flatten(0, 2), value.flatten(0, 2), mode="sum", per_sample_weights=share.flatten(0, 2))
    return out.view(*index.shape[:3], value.shape[-1])


def _corners(shapes: Shapes, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Index among all positions, and weight, of the 2 ** rank corners of every point; weight 0 outside the grid."""
    indices, shares, start = [], [], 0
    for level, shape in enumerate(shapes):
        share = weights[:, :, :, level].unsqueeze(-1)
        index = torch.zeros_like(share, dtype=torch.long)
        for axis, size in enumerate(shape):
            position = locations[:, :, :, level, :, len(shape) - 1 - axis] * size - 0.5
            position = position.clamp(-1, size)  # both ends see zeros only, as anything beyond them does
            below = position.detach().floor()
            part = position - below
            corner = torch.stack([below, below + 1], dim=-1).long()
            inside = (corner >= 0) & (corner < size)
            corner_share = torch.stack([1 - part, part], dim=-1) * inside
            index = (index.unsqueeze(-1) * size + corner.clamp(0, size - 1).unsqueeze(-2)).flatten(-2)
            share = (share.unsqueeze(-1) * corner_share.unsqueeze(-2)).flatten(-2)
        indices.append(start + index.flatten(-2))
        shares.append(share.flatten(-2))
        start += prod(shape)
    return torch.cat(indices, dim=-1), torch.cat(shares, dim=-1)

"""Attention inside clusters of similar positions: every centroid takes the positions that are most similar to it."""

from collections.abc import Sequence
from functools import reduce
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from gridattn.ops.centroids import centroid_similarity, normalize_vectors
from gridattn.ops.relative_attention import relative_attention


def cluster_members(similarity: Tensor, size: int) -> Tensor:
    """The positions that each centroid takes: those of largest similarity, in ascending order.

    A position may be taken by several centroids or by none.

    Args:
        similarity: (B, heads, N, K).
        size: positions per centroid; N at most.

    Returns:
        (B, heads, K, size) int64.

    Example:
        >>> cluster_members(torch.tensor([[[[0.1], [0.9], [0.2], [0.7]]]]), 2).tolist()
        [[[[1, 3]]]]
    """
    return similarity.transpose(-1, -2).topk(size, sorted=False).indices.sort().values


def routing_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    means: Tensor,
    cluster_size: int,
    *,
    norm: str = "unit",
    is_causal: bool = False,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    memory: tuple[Tensor, Tensor] | None = None,
    relative: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention among the positions that a centroid takes, for all centroids; a position in n clusters gets

        sum of its n outputs / (n + eps),

    and zero where no centroid takes it. Centroids choose queries and keys by the normalised vectors; the choice carries
    no gradient. Cost: O(N K d) to choose and O(K cluster_size^2 d) to attend.

    With norm "unit", logits are scale * q . k of the vectors as given; shared keys are k = q / |q| and a position
    looks at itself only if it may look at nothing else; eps = 1e-5. With "layer_norm", the paper's form, logits are
    the products of the normalised vectors; eps = 1e-2.

    Args:
        query: (B, *grid, heads, head_dim).
        key: (B, *key_grid, heads, head_dim), or None: shared with the query.
        value: (B, *key_grid, heads, value_dim).
        means: (heads, K, head_dim), the centroids.
        cluster_size: queries and keys per centroid; cut to the number of positions.
        norm: "unit" or "layer_norm", see `normalize_vectors`.
        is_causal: a query sees keys up to its own position in row-major order. Centroids still choose over all
            positions, so a later position can push an earlier one out of a cluster.
        query_mask: (B, *grid, heads or 1) bool, True for real positions.
        key_mask: (B, *key_grid, heads or 1) bool.
        memory: keys and values (heads, K, m, head_dim or value_dim) that all queries of a cluster see.
        relative: two tables (2 M + 1, head_dim) for keys and values, shared by heads and clusters; entry
            clip(j - i, -M, M) + M belongs to places i and j inside a cluster. Adds q . keys[.] to the logits and
            sum_j A_ij values[.] to the output.
        scale: factor of q . k; head_dim ** -0.5 ("unit") or 1 ("layer_norm") when None.

    Returns:
        (B, *grid, heads, value_dim).

    Raises:
        ValueError: shapes that do not fit; causal attention with keys of its own but no memory, where a query could be
            left without any key.

    Source: Efficient Content-Based Sparse Attention with Routing Transformers, arXiv 2003.05997.

    Example:
        >>> q, v = torch.randn(2, 1, 6, 6, 2, 8).unbind(0)
        >>> routing_attention(q, None, v, torch.randn(2, 4, 8), cluster_size=9).shape
        torch.Size([1, 6, 6, 2, 8])
    """
    _check(query, key, value, cluster_size, is_causal, memory, relative)
    shared, unit = key is None, norm == "unit"
    query_points = normalize_vectors(query, norm)
    key_points = query_points if key is None else normalize_vectors(key, norm)
    queries = centroid_members(query_points, means, cluster_size)
    keys = queries if shared else centroid_members(key_points, means, cluster_size)

    attended = (query, key_points if key is None else key) if unit else (query_points, key_points)
    q, k = (gather_members(t.to(value.dtype), at) for t, at in zip(attended, (queries, keys)))
    v = gather_members(value, keys)
    masks = [None if mask is None else mask.flatten(1, -2) for mask in (query_mask, key_mask)]
    visible = _visible(queries, keys, *masks, is_causal=is_causal, no_self=shared and unit)
    if memory is not None and memory[0].shape[-2]:
        k, v = (torch.cat([m.to(t.dtype).expand(len(t), *m.shape), t], -2) for m, t in zip(memory, (k, v)))
        visible = None if visible is None else F.pad(visible, (memory[0].shape[-2], 0), value=True)
    elif visible is not None:
        # No row may be empty. Alone with itself, a query takes its own value; masked, it weighs all keys alike.
        empty = ~visible.any(-1, keepdim=True)
        visible = visible | (empty & (queries.unsqueeze(-1) == keys.unsqueeze(-2)) if shared and unit else empty)
        q = q * ~empty
    factor = scale if scale is not None else q.shape[-1] ** -0.5 if unit else 1.0
    out = _attend(q, k, v, visible, relative, factor)
    return scatter_members(out, queries, query.shape[1:-2], eps=1e-5 if unit else 1e-2)


def gather_members(x: Tensor, members: Tensor) -> Tensor:
    """Takes the vectors of every cluster: (B, *grid, heads, d), (B, heads, K, size) -> (B, heads, K, size, d)."""
    tokens = x.flatten(1, -3).transpose(1, 2)
    rows = _rows(members, tokens.shape[2])
    return tokens.reshape(-1, tokens.shape[-1])[rows]


def scatter_members(x: Tensor, members: Tensor, grid: Sequence[int], *, eps: float = 1e-5) -> Tensor:
    """Brings vectors of clusters back: per position, their sum over its n clusters divided by n + eps.

    Args:
        x: (B, heads, K, size, d).
        members: (B, heads, K, size).
        grid: of the result.
        eps: added to the number of clusters.

    Returns:
        (B, *grid, heads, d).
    """
    batch, heads = members.shape[:2]
    positions = prod(grid)
    rows = _rows(members, positions).flatten()
    total = x.new_zeros(batch * heads * positions, x.shape[-1]).index_add(0, rows, x.flatten(0, 3))
    count = x.new_zeros(batch * heads * positions).index_add(0, rows, x.new_ones(rows.shape))
    mean = total / (count + eps).unsqueeze(-1)
    return mean.view(batch, heads, positions, x.shape[-1]).transpose(1, 2).unflatten(1, tuple(grid))


def centroid_members(points: Tensor, means: Tensor, size: int) -> Tensor:
    """`cluster_members` of normalised vectors: (B, *grid, heads, d), (heads, K, d) -> (B, heads, K, size or N)."""
    similarity = centroid_similarity(points.detach(), means)
    return cluster_members(similarity, min(size, similarity.shape[2]))


def _rows(members: Tensor, positions: int) -> Tensor:
    """Indices within a head's positions -> rows of all samples and heads."""
    batch, heads = members.shape[:2]
    first = positions * torch.arange(batch * heads, device=members.device)
    return members + first.view(batch, heads, 1, 1)


def _visible(
    queries: Tensor,
    keys: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    is_causal: bool,
    no_self: bool,
) -> Tensor | None:
    """Which members may see each other, (B, heads, K, queries, keys) bool; None where all may."""
    query_at, key_at = queries.unsqueeze(-1), keys.unsqueeze(-2)
    conditions = []
    if is_causal:
        conditions.append(query_at >= key_at)
    if no_self:
        conditions.append(query_at != key_at)
    if query_mask is not None:
        conditions.append(_gather_mask(query_mask, queries).unsqueeze(-1))
    if key_mask is not None:
        conditions.append(_gather_mask(key_mask, keys).unsqueeze(-2))
    return reduce(torch.logical_and, conditions).expand(*queries.shape, keys.shape[-1]) if conditions else None


def _gather_mask(mask: Tensor, members: Tensor) -> Tensor:
    """(B, N, heads or 1) of all positions -> (B, heads, K, size) of the members."""
    per_head = mask.transpose(1, 2).expand(-1, members.shape[1], -1)
    return per_head.take_along_dim(members.flatten(2), 2).view_as(members)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, relative: tuple[Tensor, Tensor] | None, scale: float
) -> Tensor:
    """Attention inside every cluster, (B, heads, K, size, d)."""
    if relative is None:
        flat = [t.flatten(0, 1) for t in (q, k, v)]
        visible = None if visible is None else visible.flatten(0, 1)
        return F.scaled_dot_product_attention(*flat, attn_mask=visible, scale=scale).unflatten(0, q.shape[:2])
    return relative_attention(q, k, v, relative, visible=visible, scale=scale)


def _check(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    cluster_size: int,
    is_causal: bool,
    memory: tuple[Tensor, Tensor] | None,
    relative: tuple[Tensor, Tensor] | None,
) -> None:
    source = query if key is None else key
    if query.ndim < 4 or source.shape[:-1] != value.shape[:-1] or source.shape[-2:] != query.shape[-2:]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(source.shape)} and value {tuple(value.shape)} must be "
            "(B, *grid, heads, channels); key and value share their grid, query and key their heads and channels"
        )
    if cluster_size < 1:
        raise ValueError(f"cluster_size={cluster_size} is not allowed; it must be at least 1")
    if is_causal and key is not None and (memory is None or memory[0].shape[-2] < 1):
        raise ValueError("is_causal=True with keys of their own needs memory; without it a query may see no key at all")
    if memory is not None and relative is not None:
        raise ValueError("memory and relative are both given; memory has no place inside a cluster")

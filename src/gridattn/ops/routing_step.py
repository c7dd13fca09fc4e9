"""One more position of a causal sequence: the last row of `block_attention` and of `routing_attention`, alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gridattn.ops.centroids import normalize_vectors
from gridattn.ops.relative_attention import relative_attention
from gridattn.ops.routing import centroid_members, gather_members


def block_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int,
    *,
    relative: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """The last row of causal `block_attention` along one axis.

    Args:
        query: (B, 1, heads, head_dim), of the last position.
        key: (B, T, heads, head_dim), of all positions.
        value: (B, T, heads, value_dim).
        window_size: positions per block.
        relative: as in `block_attention`.
        scale: factor of the logits; head_dim ** -0.5 when None.

    Returns:
        (B, 1, heads, value_dim).

    Example:
        >>> from gridattn.ops.block_attention import block_attention
        >>> q, k, v = torch.randn(3, 1, 11, 2, 8).unbind(0)
        >>> last = block_attention(q, k, v, 4, is_causal=True)[:, -1:]
        >>> torch.allclose(block_attention_step(q[:, -1:], k, v, 4), last, atol=1e-6)
        True
    """
    start = max(0, ((key.shape[1] - 1) // window_size - 1) * window_size)
    q, k, v = (t.transpose(1, 2) for t in (query, key[:, start:], value[:, start:]))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if relative is None:
        return F.scaled_dot_product_attention(q, k, v, scale=factor).transpose(1, 2)
    return relative_attention(factor * q, k, v, relative).transpose(1, 2)


def routing_attention_step(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    means: Tensor,
    cluster_size: int,
    *,
    norm: str = "unit",
    memory: tuple[Tensor, Tensor] | None = None,
    relative: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """The last row of causal `routing_attention` along one axis.

    Centroids choose among the positions given, which is all that exists when a sequence is made position by position.
    The last position attends in the clusters that take it, so that the cost is O(T K d) to choose and O(K cluster_size
    d) to attend.

    Args:
        query: (B, T, heads, head_dim), of all positions.
        key: like `query`, or None: shared with the query.
        value: (B, T, heads, value_dim).
        means: (heads, K, head_dim).
        cluster_size: positions per centroid.
        norm: as in `routing_attention`, like all that follows.
        memory: keys and values of their own for every cluster.
        relative: tables of vectors by distance between places in a cluster.
        scale: factor of q . k.

    Returns:
        (B, 1, heads, value_dim).

    Example:
        >>> from gridattn.ops.routing import routing_attention
        >>> q, v, means = *torch.randn(2, 1, 11, 2, 8).unbind(0), torch.randn(2, 3, 8)
        >>> last = routing_attention(q, None, v, means, 5, is_causal=True)[:, -1:]
        >>> torch.allclose(routing_attention_step(q, None, v, means, 5), last, atol=1e-6)
        True
    """
    unit, here = norm == "unit", query.shape[1] - 1
    query_points = normalize_vectors(query, norm)
    key_points = query_points if key is None else normalize_vectors(key, norm)
    queries = centroid_members(query_points, means, cluster_size)
    keys = queries if key is None else centroid_members(key_points, means, cluster_size)
    taken = (queries == here).any(-1)  # (B, heads, K)

    last = (query if unit else query_points)[:, -1:].transpose(1, 2)
    q = last.unsqueeze(2).expand(-1, -1, means.shape[1], -1, -1).to(value.dtype)
    k = gather_members((key_points if key is None or not unit else key).to(value.dtype), keys)
    v = gather_members(value, keys)
    # Shared with the query, a key of the position itself counts only where there is no other.
    others = keys != here if unit and key is None else torch.ones_like(keys, dtype=torch.bool)
    if memory is not None and memory[0].shape[-2]:
        k, v = (torch.cat([m.to(t.dtype).expand(len(t), *m.shape), t], -2) for m, t in zip(memory, (k, v)))
        visible = F.pad(others, (memory[0].shape[-2], 0), value=True)
    else:
        visible = others | ~others.any(-1, keepdim=True)
    factor = scale if scale is not None else q.shape[-1] ** -0.5 if unit else 1.0
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    mask = visible.flatten(0, 1).unsqueeze(-2)
    if relative is None:
        out = F.scaled_dot_product_attention(*flat, attn_mask=mask, scale=factor)
    else:
        out = relative_attention(flat[0], flat[1], flat[2], relative, visible=mask, scale=factor)
    out = out.unflatten(0, q.shape[:2]).squeeze(-2)  # (B, heads, K, value_dim)
    count = taken.to(out.dtype).sum(-1, keepdim=True) + (1e-5 if unit else 1e-2)
    return ((out * taken.unsqueeze(-1)).sum(2) / count).to(value.dtype).unsqueeze(1)

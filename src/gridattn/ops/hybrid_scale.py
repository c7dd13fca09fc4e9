"""Attention at two scales, the significance map that its weights give, and tokens reallocated by that map.

Half of the heads see the whole grid through coarse keys, one for a patch of positions; the other half see the window
around them at full resolution. How much attention a position receives from both halves is its significance. Ranked by
it, tokens are aggregated in groups: large groups of the least significant, small groups of the most significant.

Source: SG-Former: Self-guided Transformer with Evolving Token Reallocation, arXiv 2308.12216.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from gridattn.ops.common import per_axis
from gridattn.ops.partition import merge_windows, partition_windows, window_mask

GROUP_SIZES = {8: (196, 56, 28), 4: (49, 14, 7), 2: (2, 1)}
"""Tokens per group for each spatial reduction, least significant part first (Source: arXiv 2308.12216)."""

_WEIGHTS_AT_ONCE = 2**24


def hybrid_scale_attention(
    query: Tensor,
    coarse_key: Tensor,
    coarse_value: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Any = 7,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention in which half of the heads are global over coarse keys and half are local over windows.

    heads 0 ... h/2 - 1:  softmax(scale Q K_c^T) V_c, over all coarse positions;
    heads h/2 ... h - 1:  softmax(scale Q K^T) V, inside blocks of `window_size`.

    Args:
        query: (B, *grid, h, d); h is even.
        coarse_key: (B, *coarse, h / 2, d).
        coarse_value: (B, *coarse, h / 2, d).
        key: (B, *grid, h / 2, d).
        value: (B, *grid, h / 2, d).
        window_size: positions per window, one int or one per axis. A grid that the windows do not fill is padded and
            the padding masked; a window longer than an axis is cut to it.
        scale: factor of the logits; d ** -0.5 when None.
        dropout_p: dropout probability of the weights.

    Returns:
        (B, *grid, h, d).

    Raises:
        ValueError: heads of the query that are not twice those of the keys, or grids that differ.

    Example:
        >>> q, c, k = torch.randn(1, 9, 8, 4, 6), torch.randn(1, 5, 4, 2, 6), torch.randn(1, 9, 8, 2, 6)
        >>> hybrid_scale_attention(q, c, c, k, k, 4).shape
        torch.Size([1, 9, 8, 4, 6])
    """
    _check_halves(query, coarse_key, key)
    grid = query.shape[1:-2]
    window = _clip(window_size, grid)
    far, near = query.chunk(2, -2)
    options = {"scale": scale, "dropout_p": dropout_p}
    coarse = F.scaled_dot_product_attention(_tokens(far), _tokens(coarse_key), _tokens(coarse_value), **options)
    coarse = coarse.transpose(1, 2).reshape(near.shape)
    windows, mask = _windows(near, window), _visible(near, window)
    fine = F.scaled_dot_product_attention(
        windows, _windows(key, window), _windows(value, window), attn_mask=mask, **options
    )
    fine = _merge(fine.transpose(1, 2), window, query.shape[0], grid)
    return torch.cat((coarse, fine), -2)


@torch.no_grad()
def significance_map(
    query: Tensor,
    coarse_key: Tensor,
    key: Tensor,
    window_size: Any = 7,
    *,
    patch: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """How much attention every position receives in `hybrid_scale_attention`, at both scales; never with a gradient.

    S[p] = mean over the local heads and the positions q of the window of p of A_local[q, p]
    + mean over the global heads and all positions q of A_global[q, patch of p].

    The local part sums to one over every full window (each position has 1 / window on average, in windows at a padded
    border too); the coarse part sums to one over the coarse positions before it is spread to the grid.

    Args:
        query: (B, *grid, h, d).
        coarse_key: (B, *coarse, h / 2, d).
        key: (B, *grid, h / 2, d).
        window_size: positions per window, one int or one per axis.
        patch: positions of the grid per coarse position and axis. None stretches the coarse grid over the whole grid,
            position i of X taking entry floor(i * coarse / X), which is the same where the patches fill the grid.
        scale: factor of the logits; d ** -0.5 when None.

    Returns:
        (B, *grid), positive, float32 or wider.

    Raises:
        ValueError: heads of the query that are not twice those of the keys, or grids that differ.

    Example:
        >>> q, c, k = torch.randn(1, 8, 8, 4, 6), torch.randn(1, 2, 2, 2, 6), torch.randn(1, 8, 8, 2, 6)
        >>> significance_map(q, c, k, window_size=4).sum().round()  # 4 windows, and 16 positions for each coarse one
        tensor(20.)
    """
    _check_halves(query, coarse_key, key)
    grid, coarse = query.shape[1:-2], coarse_key.shape[1:-2]
    window = _clip(window_size, grid)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    far, near = query.chunk(2, -2)
    received = _received(_tokens(far), _tokens(coarse_key), factor).unflatten(1, coarse)
    local = _weights(_windows(near, window), _windows(key, window), factor, _visible(near, window)).mean((1, 2))
    return _merge(local, window, query.shape[0], grid) + _spread(received, grid, patch)


def hybrid_scale_reference(
    query: Tensor,
    coarse_key: Tensor,
    coarse_value: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Any = 7,
    *,
    patch: Sequence[int] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `hybrid_scale_attention` and `significance_map` with all weights written out.

    Returns:
        (B, *grid, h, d) and (B, *grid).
    """
    grid, coarse = query.shape[1:-2], coarse_key.shape[1:-2]
    window = _clip(window_size, grid)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    far, near = (_tokens(t) for t in query.chunk(2, -2))
    position = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid))
    block = position // torch.tensor(window)
    same = (block.unsqueeze(0) == block.unsqueeze(1)).all(-1)
    entry = position * torch.tensor(coarse) // torch.tensor(grid) if patch is None else position // torch.tensor(patch)

    coarse_weights = (factor * far @ _tokens(coarse_key).mT).softmax(-1)
    local_weights = (factor * near @ _tokens(key).mT).masked_fill(~same, -torch.inf).softmax(-1)
    out = torch.cat((coarse_weights @ _tokens(coarse_value), local_weights @ _tokens(value)), 1)
    received = coarse_weights.mean((1, 2)).unflatten(1, coarse)[(slice(None), *entry.unbind(1))]
    significance = local_weights.mean(1).sum(1) / prod(window) + received
    return out.transpose(1, 2).reshape(query.shape), significance.detach().view(-1, *grid)


def reallocate_tokens(x: Tensor, significance: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Aggregates tokens in groups of neighbours in rank: few for the least significant, more for the most significant.

    Sorted by significance, least first, the N tokens are cut into a quarter, a half and a quarter, or, where there are
    two weights, into halves. In part i every f_i tokens in a row become one: sum_t weights[i][t] token_t + biases[i].
    Only ranks matter; ties keep row-major order. Where f_i does not divide its part, the part's first token is
    repeated in front to fill the first group.

    Args:
        x: (B, N, C).
        significance: (B, N).
        weights: two or three vectors, (f_i), least significant part first.
        biases: as many scalars.

    Returns:
        (B, T, C) with T = `token_count(N, sizes)`; the parts one after the other.

    Raises:
        ValueError: a significance of another shape, or neither two nor three weights.

    Example:
        >>> x = torch.arange(8.0).view(1, 8, 1)
        >>> pairs, alone = torch.tensor([0.5, 0.5]), torch.ones(1)
        >>> reallocate_tokens(x, -x[..., 0], [pairs, alone], [torch.zeros(()), torch.zeros(())]).flatten().tolist()
        [6.5, 4.5, 3.0, 2.0, 1.0, 0.0]
    """
    batch, count, _ = x.shape
    if significance.shape != x.shape[:2]:
        raise ValueError(f"significance has shape {tuple(significance.shape)}; {(batch, count)} is allowed")
    order = significance.argsort(dim=-1, stable=True)
    slots, starts, start = [], [], 0
    for size, weight in zip(_part_sizes(count, len(weights)), weights):
        missing = -size % weight.shape[0]
        slots.append(start + torch.arange(-missing, size, device=x.device).clamp_min(0))
        starts.append(size + missing)
        start = start + size
    # Rows of all samples are numbered in one list: picking whole rows has a far cheaper backward than a gather.
    rows = order[:, torch.cat(slots)] + count * torch.arange(batch, device=x.device).unsqueeze(1)
    ranked = x.reshape(-1, x.shape[-1]).index_select(0, rows.flatten()).view(*rows.shape, x.shape[-1])
    groups = [
        torch.einsum("btfc,f->btc", rearrange(part, "b (t f) c -> b t f c", f=weight.shape[0]), weight) + bias
        for part, weight, bias in zip(ranked.split(starts, 1), weights, biases)
    ]
    return torch.cat(groups, 1)


def reallocate_tokens_reference(
    x: Tensor, significance: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    """The definition of `reallocate_tokens`, group by group."""
    samples = []
    for tokens, scores in zip(x, significance):
        ranked = sorted(range(len(tokens)), key=lambda n: float(scores[n]))
        groups, start = [], 0
        for size, weight, bias in zip(_part_sizes(len(tokens), len(weights)), weights, biases):
            part = ranked[start : start + size]
            part = part[:1] * (-size % len(weight)) + part
            start += size
            for first in range(0, len(part), len(weight)):
                members = part[first : first + len(weight)]
                groups.append(bias + sum(w * tokens[n] for w, n in zip(weight, members)))
        samples.append(torch.stack(groups))
    return torch.stack(samples)


def token_count(count: int, group_sizes: Sequence[int]) -> int:
    """Number of tokens that `reallocate_tokens` makes of `count`.

    Example:
        >>> [token_count(n, GROUP_SIZES[reduction]) for n, reduction in ((3136, 8), (784, 4), (196, 2))]
        [60, 60, 147]
    """
    return sum(-(-size // group) for size, group in zip(_part_sizes(count, len(group_sizes)), group_sizes))


def _part_sizes(count: int, parts: int) -> tuple[int, ...]:
    if parts == 2:
        return count // 2, count - count // 2
    if parts == 3:
        return count // 4, count - 2 * (count // 4), count // 4
    raise ValueError(f"weights has {parts} entries; 2 (halves) or 3 (a quarter, a half, a quarter) are allowed")


def _check_halves(query: Tensor, coarse_key: Tensor, key: Tensor) -> None:
    heads = query.shape[-2]
    for name, tensor in (("coarse_key", coarse_key), ("key", key)):
        if 2 * tensor.shape[-2] != heads:
            raise ValueError(f"{name} has {tensor.shape[-2]} heads; half of the query's {heads} heads are allowed")
    if key.shape[:-2] != query.shape[:-2]:
        raise ValueError(
            f"key has the grid {tuple(key.shape[1:-2])}; that of query {tuple(query.shape[1:-2])} is allowed"
        )


def _clip(window_size: Any, grid: Sequence[int]) -> tuple[int, ...]:
    # A symbolic size, met while a graph with dynamic sizes is exported, keeps the whole window: padding is masked.
    sizes = per_axis(window_size, len(grid), "window_size")
    return tuple(min(w, n) if isinstance(n, int) else w for w, n in zip(sizes, grid))


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(1, -3).transpose(1, 2)


def _windows(x: Tensor, window: Sequence[int]) -> Tensor:
    return rearrange(partition_windows(x, window), "b n w h d -> (b n) h w d")


def _merge(windows: Tensor, window: Sequence[int], batch: int, grid: Sequence[int]) -> Tensor:
    count = prod([(n + w - 1) // w for n, w in zip(grid, window)])
    return merge_windows(windows.reshape(batch, count, *windows.shape[1:]), window, grid)


def _visible(x: Tensor, window: Sequence[int]) -> Tensor | None:
    mask = window_mask(x.shape[1:-2], window, device=x.device)
    return None if mask is None else mask.repeat(x.shape[0], 1, 1).unsqueeze(1)


def _weights(query: Tensor, key: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    logits = query @ key.mT * scale
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1)


def _received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mean over heads and queries of the weights of every key, (B, M); a bounded part of the weights at a time."""
    batch, heads, count, _ = query.shape
    if not isinstance(count, int):
        return _weights(query, key, scale).mean((1, 2))
    rows = max(1, _WEIGHTS_AT_ONCE // max(1, batch * heads * key.shape[2]))
    sums = [_weights(part, key, scale).sum((1, 2)) for part in query.split(rows, 2)]
    return torch.stack(sums).sum(0) / (heads * count)


def _spread(coarse: Tensor, grid: Sequence[int], patch: Sequence[int] | None) -> Tensor:
    for axis, size in enumerate(grid):
        index = torch.arange(size, device=coarse.device)
        entry = index * coarse.shape[axis + 1] // size if patch is None else index // patch[axis]
        coarse = coarse.index_select(axis + 1, entry)
    return coarse

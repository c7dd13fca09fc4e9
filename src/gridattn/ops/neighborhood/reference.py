"""The definition of neighborhood attention in plain PyTorch.

With V(i) the keys visible to query i (`Plan`), h' = h // (Hq / Hkv), p the position within
a dilation group, and additional tokens visible to every query,

    S[i, j] = scale * <q[i, h], k[j, h']> + bias[h, p(j) - p(i) + kernel_size - 1]     j in V(i), key_mask[j]
    S[i, n] = scale * <q[i, h], additional_keys[n, h']>
    lse[i] = ln(sum_j exp S[i, j]),    P = exp(S - lse),    out[i] = sum_j P[i, j] v[j]

Every window is gathered, so memory is O(N * prod(kernel_size) * D): the yardstick for the other backends, not for big
grids.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from gridattn.ops.neighborhood.plan import Plan
from gridattn.ops.neighborhood.tables import axis_keys, window_tables


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    scale: float,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    need_lse: bool = True,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query over its window and the additional tokens, in one softmax.

    Args:
        query: (B, *grid, Hq, D).
        key: (B, *grid, Hkv, D).
        value: (B, *grid, Hkv, Dv).
        plan: the windows.
        scale: factor of the products.
        bias: (Hq, 2k - 1 per axis), added to the logits.
        key_mask: (B, *grid) bool, False hides a key.
        need_lse: not used; the lse always comes along.
        additional_keys: (B, N, Hkv, D), visible to every query.
        additional_values: (B, N, Hkv, Dv).

    Returns:
        out (B, *grid, Hq, Dv) in the query's dtype, and lse (B, *grid, Hq) in float32, or in float64 for float64. A
        query without any key gets 0 and -inf.
    """
    tables = [table[None] for table in window_tables(axis_keys(plan), query.device)]
    q, k, v = (t.flatten(1, -3) for t in (query, key, value))
    out, lse = _attend_windows(q, k, v, tables, scale, bias, key_mask, additional_keys, additional_values)
    return out.reshape(*query.shape[:-1], value.shape[-1]), lse.reshape(query.shape[:-1])


def attend_at(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    plan: Plan,
    scale: float,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries that stand at given positions: rows of the tables of `attend`.

    Args:
        query: (B, M, Hq, D).
        positions: (1 or B, M, rank) int, where each query stands.

    All else is as in `attend`.

    Returns:
        out (B, M, Hq, Dv) in the query's dtype, and lse (B, M, Hq).
    """
    flat = flat_positions(positions, plan)
    tables = [table[flat] for table in window_tables(axis_keys(plan), query.device)]
    k, v = (t.flatten(1, -3) for t in (key, value))
    return _attend_windows(query, k, v, tables, scale, bias, key_mask, additional_keys, additional_values)


def flat_positions(positions: Tensor, plan: Plan) -> Tensor:
    """(..., rank) positions -> (...) their numbers, row by row over the grid."""
    flat = torch.zeros_like(positions[..., 0])
    for axis, of_axis in zip(plan.axes, positions.unbind(-1)):
        flat = flat * axis.length + of_axis
    return flat


def _attend_windows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Sequence[Tensor],
    scale: float,
    bias: Tensor | None,
    key_mask: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, for query (B, M, Hq, D), key and value (B, N, Hkv, channels) and `tables` of each query's window,
    (1 or B, M, K) as in `tables.window_tables`."""
    kv_heads, wide = key.shape[-2], torch.promote_types(query.dtype, torch.float32)
    index, visible, bias_index = tables
    sample = torch.arange(query.shape[0], device=query.device)[:, None, None]
    q = rearrange(query.to(wide), "b i (h group) d -> b i h group d", h=kv_heads)
    k, v = (t.to(wide)[sample, index] for t in (key, value))

    logits = scale * torch.einsum("bihgd,bijhd->bhgij", q, k)
    if bias is not None:
        at_window = bias.to(wide).flatten(1)[:, bias_index]
        logits = logits + rearrange(at_window, "(h group) b i j -> b h group i j", h=kv_heads)
    if key_mask is not None:
        visible = visible & key_mask.flatten(1)[sample, index]
    logits = logits.masked_fill(~rearrange(visible, "b i j -> b 1 1 i j"), -torch.inf)
    if additional_keys is not None:
        extra = scale * torch.einsum("bihgd,bnhd->bhgin", q, additional_keys.to(wide))
        logits = torch.cat([logits, extra], dim=-1)

    empty = logits.amax(dim=-1, keepdim=True) == -torch.inf
    logits = logits.masked_fill(empty, 0.0)  # keeps the gradient of a query without keys at zero instead of NaN
    lse = logits.logsumexp(dim=-1, keepdim=True)
    weights = (logits - lse).exp().masked_fill(empty, 0.0)
    lse = lse.masked_fill(empty, -torch.inf)

    in_window = weights[..., : index.shape[-1]]
    out = torch.einsum("bhgij,bijhd->bihgd", in_window, v)
    if additional_values is not None:
        out = out + torch.einsum("bhgin,bnhd->bihgd", weights[..., index.shape[-1] :], additional_values.to(wide))
    out = rearrange(out, "b i h group d -> b i (h group) d", h=kv_heads)
    return out.to(query.dtype), rearrange(lse, "b h group i 1 -> b i (h group)", h=kv_heads)

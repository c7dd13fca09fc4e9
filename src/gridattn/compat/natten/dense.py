"""Dense attention with heads last, of one batch or of sequences packed one after the other."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from gridattn.ops.common import autocast_enabled, check_same_kind
from gridattn.ops.packing import map_groups


def check_attention_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Checks shapes, dtypes and devices of query, key and value; the numbers of queries and of keys may differ.

    Raises:
        ValueError: what does not fit.
        NotImplementedError: sparse or nested tensors.
    """
    check_strided(query=query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; (batch, tokens, heads, head_dim) is allowed")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; a floating point dtype is allowed")
    check_same_kind(query=query, key=key, value=value)
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key has batch {key.shape[0]} but query has {query.shape[0]}; they must be equal")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key has head_dim {key.shape[-1]} but query has {query.shape[-1]}; they must be equal")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"value has batch, tokens and heads {tuple(value.shape[:-1])} but key has {tuple(key.shape[:-1])}; "
            "they must be equal"
        )
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ValueError(f"query has {query.shape[2]} heads; a multiple of the {key.shape[2]} heads of key is allowed")


def check_strided(**tensors: Tensor | None) -> None:
    """Raises NotImplementedError for sparse and nested tensors."""
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.is_nested or tensor.layout != torch.strided):
            raise NotImplementedError(f"{name} is a nested or sparse tensor; dense tensors are allowed")


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """softmax(scale * Q K^T) V and, if needed, ln(sum_j exp(scale * q . k_j)).

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D); query head h reads key head h // (Hq / Hkv).
        value: (B, Skv, Hkv, Dv).
        is_causal: query i sees keys 0 to i (aligned at the beginning where Sq and Skv differ).
        scale: factor of the products; D ** -0.5 when None.
        need_lse: also compute the second result, which takes O(Sq * Skv) memory.

    Returns:
        (B, Sq, Hq, Dv) in the dtype of the query; (B, Sq, Hq) in float32 (float64 for float64), or None.
    """
    if need_lse:
        return _explicit_attention(query, key, value, is_causal, scale)
    q, k, v = (rearrange(t, "b s h d -> b h s d") for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return rearrange(out, "b h s d -> b s h d"), None


def _explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    kind = query.device.type
    autocast = autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast and query.dtype != torch.float64 else query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    q = rearrange(query.to(dtype).to(wide), "b s (h group) d -> b h group s d", h=key.shape[2])
    k, v = (rearrange(t.to(dtype).to(wide), "b s h d -> b h 1 s d") for t in (key, value))
    with torch.autocast(kind, enabled=False) if autocast else nullcontext():
        logits = (query.shape[-1] ** -0.5 if scale is None else scale) * q @ k.mT
        if is_causal:
            visible = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
            logits = logits.masked_fill(~visible, -torch.inf)
        lse = logits.logsumexp(dim=-1, keepdim=True)
        out = (logits - lse).exp() @ v
    out, lse = (rearrange(t, "b h group s d -> b s (h group) d") for t in (out, lse))
    return out.to(dtype), lse.squeeze(-1)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths_q: list[int],
    lengths_kv: list[int],
    is_causal: bool,
    scale: float | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Dense attention inside each of several packed sequences; those of equal lengths are computed as one batch.

    Args:
        query: (1, sum of lengths_q, Hq, D).
        key: (1, sum of lengths_kv, Hkv, D).
        value: (1, sum of lengths_kv, Hkv, Dv).
        lengths_q: tokens of each query sequence.
        lengths_kv: tokens of each key sequence; the outputs of a sequence without keys are 0, its lse -inf.
        is_causal: query i of a sequence sees its keys 0 to i.
        scale: as in `dense_attention`.
        need_lse: as in `dense_attention`.

    Returns:
        As `dense_attention`, packed like the query.
    """

    def attend(lengths: tuple[int, int], samples: list[int], q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [t for t in dense_attention(q, k, v, is_causal, scale, need_lse) if t is not None]

    pieces = query[0].split(lengths_q), key[0].split(lengths_kv), value[0].split(lengths_kv)
    out, *lse = map_groups(attend, list(zip(lengths_q, lengths_kv)), *pieces)
    return out.unsqueeze(0), lse[0].unsqueeze(0) if lse else None

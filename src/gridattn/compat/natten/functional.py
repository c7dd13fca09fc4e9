"""`natten.functional`: the operators under NATTEN's names, argument orders and defaults."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gridattn.compat.natten.dense import check_attention_tensors, check_strided, dense_attention, packed_attention
from gridattn.compat.natten.knobs import (
    check_attention_knobs,
    check_kernel_schedule,
    check_tiles,
    neighborhood_backend,
)
from gridattn.compat.natten.utils.varlen import packed_lengths
from gridattn.ops.neighborhood import merge_attentions as _merge_attentions
from gridattn.ops.neighborhood import neighborhood_attention

__all__ = ["attention", "merge_attentions", "na1d", "na2d", "na3d", "neighborhood_attention_generic"]


def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = 1,
    dilation: int | Sequence[int] | None = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: Mapping[str, Any] | None = None,
    backend: str | None = None,
    q_tile_shape: Sequence[int] | None = None,
    kv_tile_shape: Sequence[int] | None = None,
    backward_q_tile_shape: Sequence[int] | None = None,
    backward_kv_tile_shape: Sequence[int] | None = None,
    backward_kv_splits: Sequence[int] | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | None = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Any:
    """Generalized neighborhood attention on a grid of 1, 2 or 3 axes; `na1d`, `na2d` and `na3d` are this function.

    The number of axes is read from the query. A setting is one value for all axes or one per axis; `stride`, `dilation`
    and `is_causal` may be None for their defaults. `gridattn.ops.neighborhood_attention` gives the mathematics.

    Args:
        query: (B, *grid, Hq, D).
        key: (B, *grid, Hkv, D); Hq must be a multiple of Hkv.
        value: (B, *grid, Hkv, Dv).
        kernel_size: window size, at least 2; kernel_size * dilation must not exceed the grid.
        stride: queries that share a window, 1 to kernel_size.
        dilation: step between the keys of a window.
        is_causal: axes along which a query sees no later key.
        scale: factor of the logits; D ** -0.5 when None or 0.
        additional_keys: (B, N, Hkv, D), tokens visible to every query.
        additional_values: (B, N, Hkv, Dv).
        attention_kwargs: tuning arguments of `attention`; checked, without effect.
        backend: None, a NATTEN backend (the automatic choice) or a backend of `gridattn.ops.neighborhood_attention`.
        q_tile_shape: tuning argument, as all that follow up to `torch_compile`; checked, without effect.
        kv_tile_shape: see `q_tile_shape`.
        backward_q_tile_shape: see `q_tile_shape`.
        backward_kv_tile_shape: see `q_tile_shape`.
        backward_kv_splits: see `q_tile_shape`.
        backward_use_pt_reduction: see `q_tile_shape`.
        run_persistent_kernel: see `q_tile_shape`.
        kernel_schedule: see `q_tile_shape`; None, "non", "coop" or "pp".
        torch_compile: see `q_tile_shape`; wrap the model in torch.compile to compile it.
        return_lse: also return the logarithm of the sum of the exponentials of the visible logits.

    Returns:
        (B, *grid, Hq, Dv) in the dtype of the query; with `return_lse` also (B, *grid, Hq) in float32 (or float64).

    Raises:
        ValueError: settings, shapes, dtypes or devices that do not fit.
        NotImplementedError: sparse or nested tensors, an unknown backend.

    Source: arXiv 2504.16922 (GNA), arXiv 2403.04690 (FNA).

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 2, 10, 12, 4, 16)
        >>> neighborhood_attention_generic(q, k, v, (5, 7), stride=(1, 3), is_causal=(True, False)).shape
        torch.Size([2, 10, 12, 4, 16])
    """
    check_strided(
        query=query, key=key, value=value, additional_keys=additional_keys, additional_values=additional_values
    )
    own_backend = neighborhood_backend(backend)
    check_kernel_schedule(kernel_schedule)
    check_attention_knobs(attention_kwargs or {})
    tiles = {
        "q_tile_shape": q_tile_shape,
        "kv_tile_shape": kv_tile_shape,
        "backward_q_tile_shape": backward_q_tile_shape,
        "backward_kv_tile_shape": backward_kv_tile_shape,
        "backward_kv_splits": backward_kv_splits,
    }
    check_tiles(query.ndim - 3, tiles)
    return neighborhood_attention(
        query,
        key,
        value,
        kernel_size,
        1 if stride is None else stride,
        1 if dilation is None else dilation,
        False if is_causal is None else is_causal,
        scale=scale or None,
        additional_keys=additional_keys,
        additional_values=additional_values,
        return_lse=return_lse,
        backend=own_backend,
    )


na1d = na2d = na3d = neighborhood_attention_generic


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | None = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Any:
    """Dense attention, softmax(scale * Q K^T) V, of one batch or of sequences of different lengths packed into one.

    Packed sequences follow each other along the tokens of a batch of 1. They are described by `seqlens_Q` and
    `seqlens_KV`, or by what `natten.utils.varlen.generate_varlen_parameters` returns; both are read on the host.

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D); query head h reads key head h // (Hq / Hkv).
        value: (B, Skv, Hkv, Dv).
        is_causal: query i sees keys 0 to i, also where Sq and Skv differ.
        scale: factor of the logits; D ** -0.5 when None or 0.
        seqlens_Q: (n,) int32, lengths of packed query sequences.
        seqlens_KV: (n,) int32, lengths of packed key sequences.
        cumulative_seqlen_Q: (n + 1,) int32, running sums of the lengths with a leading 0, instead of `seqlens_Q`.
        cumulative_seqlen_KV: (n + 1,) int32, instead of `seqlens_KV`.
        max_seqlen_Q: longest query sequence, with `cumulative_seqlen_Q`.
        max_seqlen_KV: longest key sequence, with `cumulative_seqlen_KV`.
        backend: None or a NATTEN backend, without effect.
        q_tile_size: tuning argument, as all that follow up to `torch_compile`; checked, without effect.
        kv_tile_size: see `q_tile_size`.
        backward_q_tile_size: see `q_tile_size`.
        backward_kv_tile_size: see `q_tile_size`.
        backward_kv_splits: see `q_tile_size`.
        backward_use_pt_reduction: see `q_tile_size`.
        run_persistent_kernel: see `q_tile_size`.
        kernel_schedule: see `q_tile_size`; None, "non", "coop" or "pp".
        torch_compile: see `q_tile_size`.
        return_lse: also return the logarithm of the sum of the exponentials of the logits; takes O(Sq * Skv) memory.

    Returns:
        (B, Sq, Hq, Dv) in the dtype of the query; with `return_lse` also (B, Sq, Hq) in float32 (or float64).

    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit.
        NotImplementedError: sparse or nested tensors, an unknown backend.

    Example:
        >>> import torch
        >>> q, kv = torch.randn(1, 9, 4, 16), torch.randn(1, 7, 2, 16)
        >>> lengths = {"seqlens_Q": torch.tensor([4, 5]), "seqlens_KV": torch.tensor([1, 6])}
        >>> attention(q, kv, kv, **lengths).shape
        torch.Size([1, 9, 4, 16])
    """
    check_attention_tensors(query, key, value)
    if not isinstance(is_causal, bool):
        raise ValueError(f"is_causal={is_causal!r} is not allowed; it must be a bool")
    knobs = {
        "backend": backend,
        "q_tile_size": q_tile_size,
        "kv_tile_size": kv_tile_size,
        "backward_q_tile_size": backward_q_tile_size,
        "backward_kv_tile_size": backward_kv_tile_size,
        "backward_kv_splits": backward_kv_splits,
        "kernel_schedule": kernel_schedule,
    }
    check_attention_knobs(knobs)
    lengths = packed_lengths(
        query,
        key,
        (seqlens_Q, seqlens_KV),
        (cumulative_seqlen_Q, cumulative_seqlen_KV),
        (max_seqlen_Q, max_seqlen_KV),
    )
    if lengths is None:
        out, lse = dense_attention(query, key, value, is_causal, scale or None, return_lse)
    else:
        out, lse = packed_attention(query, key, value, *lengths, is_causal, scale or None, return_lse)
    return (out, lse) if return_lse else out


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint key sets, from the attention over each.

    lse = ln(sum_i exp lse_i),  out = sum_i exp(lse_i - lse) out_i. Its gradient is exact as it stands: `attention` and
    `na1d` to `na3d` pass gradients through their lse.

    Args:
        outputs: one (B, S, H, Dv) a key set.
        lse_tensors: one (B, S, H) a key set.
        torch_compile: without effect.
        use_autograd_fix: without effect.

    Returns:
        out (B, S, H, Dv) in the dtype of the outputs, lse (B, S, H) in float32 (float64 for float64).

    Raises:
        ValueError: fewer than one output, other ranks, or shapes that differ.

    Source: arXiv 2403.04690 (FNA).

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 8, 2, 16)
        >>> halves = [attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(0, 4), slice(4, 8))]
        >>> torch.allclose(merge_attentions(*zip(*halves))[0], attention(q, k, v), atol=1e-5)
        True
    """
    for name, tensors, rank, layout in (
        ("outputs", outputs, 4, "(batch, tokens, heads, head_dim)"),
        ("lse_tensors", lse_tensors, 3, "(batch, tokens, heads)"),
    ):
        for i, tensor in enumerate(tensors):
            if tensor.ndim != rank:
                raise ValueError(f"{name}[{i}] has shape {tuple(tensor.shape)}; {layout} is allowed")
    return _merge_attentions(outputs, lse_tensors)

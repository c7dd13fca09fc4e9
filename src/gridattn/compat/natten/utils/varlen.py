"""`natten.utils.varlen`: lengths of sequences that are packed one after the other along the token axis."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def generate_varlen_parameters(
    query: Tensor, key: Tensor, value: Tensor, seqlens_Q: Tensor, seqlens_KV: Tensor
) -> tuple[Tensor, Tensor, int, int]:
    """Where packed sequences begin and how long the longest is.

    Args:
        query: (1, sum of seqlens_Q, heads, head_dim).
        key: (1, sum of seqlens_KV, heads, head_dim).
        value: (1, sum of seqlens_KV, heads, value_dim).
        seqlens_Q: (n,) int32, lengths of the query sequences.
        seqlens_KV: (n,) int32, lengths of the key sequences.

    Returns:
        cumulative_seqlen_Q and cumulative_seqlen_KV, (n + 1,) int32 with a leading 0; max_seqlen_Q and max_seqlen_KV.

    Raises:
        ValueError: a batch other than 1; lengths that are no integer vector, or do not add up to the tokens.

    Example:
        >>> q, k = torch.randn(1, 9, 2, 8), torch.randn(1, 7, 2, 8)
        >>> generate_varlen_parameters(q, k, k, torch.tensor([4, 5]), torch.tensor([6, 1]))
        (tensor([0, 4, 9], dtype=torch.int32), tensor([0, 6, 7], dtype=torch.int32), 5, 6)
    """
    lengths_q, lengths_kv = _lengths("seqlens_Q", seqlens_Q), _lengths("seqlens_KV", seqlens_KV)
    _check_packing(query, key, lengths_q, lengths_kv)
    cumulative_q, cumulative_kv = (F.pad(t.cumsum(0, dtype=torch.int32), (1, 0)) for t in (seqlens_Q, seqlens_KV))
    return cumulative_q, cumulative_kv, max(lengths_q), max(lengths_kv)


def packed_lengths(
    query: Tensor,
    key: Tensor,
    seqlens: tuple[Tensor | None, Tensor | None],
    cumulative: tuple[Tensor | None, Tensor | None],
    longest: tuple[int | None, int | None],
) -> tuple[list[int], list[int]] | None:
    """Lengths of packed sequences from either of their descriptions; every pair is (of queries, of keys).

    Args:
        query: (1, tokens, heads, head_dim).
        key: (1, tokens, heads, head_dim).
        seqlens: (n,) lengths.
        cumulative: (n + 1,) running sums of the lengths with a leading 0.
        longest: longest lengths, given with `cumulative`.

    Returns:
        The lengths, or None where nothing is given and the tensors are an ordinary batch.

    Raises:
        ValueError: an incomplete description, both of them, or one that does not fit the tensors.
    """
    by_length, by_sum, by_longest = (
        any(entry is not None for entry in pair) for pair in (seqlens, cumulative, longest)
    )
    if not (by_length or by_sum or by_longest):
        return None
    if by_length in (by_sum, by_longest):
        raise ValueError(
            f"seqlens={seqlens}, cumulative_seqlen={cumulative}, max_seqlen={longest} (of Q, of KV) is not allowed; "
            "either both seqlens, or both cumulative_seqlen and both max_seqlen are"
        )
    if by_length:
        lengths_q, lengths_kv = _lengths("seqlens_Q", seqlens[0]), _lengths("seqlens_KV", seqlens[1])
    else:
        lengths_q, lengths_kv = (
            _steps("cumulative_seqlen_Q", cumulative[0]),
            _steps("cumulative_seqlen_KV", cumulative[1]),
        )
    _check_packing(query, key, lengths_q, lengths_kv)
    if by_sum:
        for name, limit, lengths in zip(("max_seqlen_Q", "max_seqlen_KV"), longest, (lengths_q, lengths_kv)):
            if not isinstance(limit, int) or limit < max(lengths):
                raise ValueError(f"{name}={limit!r} is not allowed; an int of at least {max(lengths)} is")
    return lengths_q, lengths_kv


def _lengths(name: str, seqlens: Tensor | None) -> list[int]:
    if not isinstance(seqlens, Tensor) or seqlens.ndim != 1 or seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}={seqlens!r} is not allowed; a vector of dtype torch.int32 is")
    return seqlens.tolist()


def _steps(name: str, cumulative: Tensor | None) -> list[int]:
    sums = _lengths(name, cumulative)
    if not sums or sums[0] != 0:
        raise ValueError(f"{name}={sums} does not begin with 0")
    return [end - start for start, end in pairwise(sums)]


def _check_packing(query: Tensor, key: Tensor, lengths_q: list[int], lengths_kv: list[int]) -> None:
    if len(lengths_q) != len(lengths_kv) or not lengths_q:
        raise ValueError(
            f"{len(lengths_q)} query sequences and {len(lengths_kv)} key sequences; as many of both, at least 1 each, "
            "are allowed"
        )
    for name, tensor, lengths in (("query", query, lengths_q), ("key", key, lengths_kv)):
        if tensor.shape[0] != 1:
            raise ValueError(f"{name} has batch {tensor.shape[0]}; packed sequences have batch 1")
        if min(lengths) < 0 or sum(lengths) != tensor.shape[1]:
            raise ValueError(
                f"{name} has {tensor.shape[1]} tokens but sequences of length {lengths}; the lengths must add up"
            )

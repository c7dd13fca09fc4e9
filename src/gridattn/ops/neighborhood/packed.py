"""Neighborhood attention on grids of different sizes in one call, packed one after the other."""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, overload

import torch
from torch import Tensor

from gridattn.ops.common import check_choice
from gridattn.ops.neighborhood.api import BACKENDS, _make_plan, attend_planned, to_autocast_dtype
from gridattn.ops.neighborhood.checks import (
    check_additional,
    check_bias,
    check_heads,
    check_layouts,
    check_mask,
    check_visible,
)
from gridattn.ops.neighborhood.plan import Plan
from gridattn.ops.packing import map_groups


@overload
def neighborhood_attention_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grids: Sequence[int | Sequence[int]],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def neighborhood_attention_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grids: Sequence[int | Sequence[int]],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def neighborhood_attention_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grids: Sequence[int | Sequence[int]],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on grids of different sizes, whose tokens follow each other: every sample on its own.

    The tokens of sample n are those from T(n) = sum_{m < n} prod(grids[m]) on, row by row over its grid, and

    out[T(n) : T(n + 1)] = `neighborhood_attention` of these tokens on grids[n].

    Every sample has its own borders. Padding would move them: the windows at a border are pushed back inside, and on a
    larger grid they are not. Samples on equal grids are computed together; nothing is padded.

    Args:
        query: (T, Hq, D), T tokens in all.
        key: (T, Hkv, D); Hq must be a multiple of Hkv.
        value: (T, Hkv, Dv).
        grids: size of each sample's grid, all of 1, 2 or 3 axes; an int is a grid of one axis.
        kernel_size: window size per axis, at least 2; kernel_size * dilation must not exceed any grid.
        stride: queries that share a window, 1 to kernel_size.
        dilation: step between the keys of a window.
        is_causal: axes along which a query sees no later key.
        scale: factor of the products; D ** -0.5 when None.
        bias: (Hq, 2k - 1 per axis), relative position bias of all samples; entry k - 1 is the query itself.
        key_mask: (T,) bool; only keys with True may be seen.
        additional_keys: (samples, N, Hkv, D), tokens visible to every query of their sample.
        additional_values: (samples, N, Hkv, Dv).
        return_lse: also return the logarithm of the sum of the exponentials of the visible logits.
        backend: as in `neighborhood_attention`.

    Returns:
        (T, Hq, Dv) in the dtype of the query; with `return_lse` also (T, Hq) in float32, or in float64 for float64.

    Raises:
        ValueError: what `neighborhood_attention` refuses; grids that are not positive ints, differ in their number of
            axes or do not add up to T tokens.
        NotImplementedError: sparse or nested tensors.

    Example:
        >>> from gridattn.ops import neighborhood_attention
        >>> grids = [(6, 9), (12, 5), (6, 9)]
        >>> q, k, v = torch.randn(3, 6 * 9 + 12 * 5 + 6 * 9, 4, 16)
        >>> out = neighborhood_attention_packed(q, k, v, grids, kernel_size=5)
        >>> second = (t[54:114].view(1, 12, 5, 4, 16) for t in (q, k, v))
        >>> torch.allclose(out[54:114].view(12, 5, 4, 16), neighborhood_attention(*second, kernel_size=5)[0], atol=1e-6)
        True
    """
    check_choice("backend", backend, ("auto", *BACKENDS))
    query, key, value = (to_autocast_dtype(t) for t in (query, key, value))
    additional_keys, additional_values = (
        t if t is None else to_autocast_dtype(t) for t in (additional_keys, additional_values)
    )
    sizes = _check_grids(grids)
    _check_tensors(query, key, value, sizes)
    plans = {size: _make_plan(size, kernel_size, stride, dilation, is_causal) for size in sizes}
    _check_options(query, key, value, sizes, plans, bias, key_mask, additional_keys, additional_values)

    def attend(
        size: tuple[int, ...], samples: list[int], q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None = None
    ) -> list[Tensor]:
        q, k, v = (t.unflatten(1, size) for t in (q, k, v))
        kept = None if kept is None else kept.unflatten(1, size)
        extra_keys, extra_values = (None if t is None else t[samples] for t in (additional_keys, additional_values))
        out, lse = attend_planned(
            q, k, v, plans[size], scale, bias, kept, (extra_keys, extra_values), return_lse, backend
        )
        results = [out, lse] if return_lse else [out]
        return [t.flatten(1, len(size)) for t in results]

    lengths = [prod(size) for size in sizes]
    packed = (query, key, value) if key_mask is None else (query, key, value, key_mask)
    out, *lse = map_groups(attend, sizes, *(t.split(lengths) for t in packed))
    return (out, lse[0]) if return_lse else out


def _check_grids(grids: Any) -> list[tuple[int, ...]]:
    """The grids as tuples."""
    if isinstance(grids, str) or not isinstance(grids, Sequence) or len(grids) == 0:
        raise ValueError(f"grids={grids!r} is not allowed; a sequence of at least one grid is")
    sizes = [tuple(grid) if isinstance(grid, Sequence) else (grid,) for grid in grids]
    for sample, size in enumerate(sizes):
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size) or len(size) not in (1, 2, 3):
            raise ValueError(f"grids[{sample}]={grids[sample]!r} is not allowed; 1 to 3 positive ints are")
        if len(size) != len(sizes[0]):
            raise ValueError(
                f"grids[{sample}]={grids[sample]!r} has {len(size)} axes but grids[0] has {len(sizes[0])}; "
                "they must be equal"
            )
    return sizes


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, sizes: Sequence[tuple[int, ...]]) -> None:
    layout = (3,), "(tokens, heads, head_dim)"
    check_layouts(query=(query, *layout), key=(key, *layout), value=(value, *layout))
    tokens = sum(map(prod, sizes))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if len(tensor) != tokens:
            raise ValueError(f"{name} has {len(tensor)} tokens; {tokens} are allowed, as many as the grids hold")
    check_heads(query, key, value)


def _check_options(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Sequence[tuple[int, ...]],
    plans: dict[tuple[int, ...], Plan],
    bias: Tensor | None,
    key_mask: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
) -> None:
    of_samples = [t[:1].expand(len(sizes), -1, -1) for t in (key, value)]
    check_additional(of_samples[0], of_samples[1], additional_keys, additional_values)
    check_bias(bias, query, plans[sizes[0]])
    if key_mask is None:
        return
    check_mask(key_mask, (len(query),), query.device, "tokens,")
    if additional_keys is None or additional_keys.shape[1] == 0:
        masks = key_mask.split([prod(size) for size in sizes])
        for size, plan in plans.items():
            samples = [sample for sample, other in enumerate(sizes) if other == size]
            alike = torch.stack([masks[sample].reshape(size) for sample in samples])
            check_visible(alike, plan, samples=samples)

"""Neighborhood attention in which every query chooses one of a few window sizes."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from gridattn.ops.common import check_choice
from gridattn.ops.neighborhood.api import BACKENDS, _make_plan, _no_autocast, attend_planned, to_autocast_dtype
from gridattn.ops.neighborhood.checks import (
    bounds,
    check_bias,
    check_mask,
    check_tensors,
    check_visible,
    check_window_choice,
)
from gridattn.ops.neighborhood.crop import Crop, crop_plan
from gridattn.ops.neighborhood.plan import Plan
from gridattn.ops.neighborhood.positions import attend_in_crop, gather_cost, gather_windows, span
from gridattn.ops.relative_bias import crop_relative_bias


@overload
def neighborhood_attention_mixed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_sizes: Sequence[int | Sequence[int]],
    choice: Tensor,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def neighborhood_attention_mixed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_sizes: Sequence[int | Sequence[int]],
    choice: Tensor,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def neighborhood_attention_mixed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_sizes: Sequence[int | Sequence[int]],
    choice: Tensor,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention with a window size per query, chosen from a few.

    out[i] = out_c[i] with c = choice[i], where out_c is `neighborhood_attention` with kernel_sizes[c].

    The queries of each size are computed together, where that is cheaper in the smallest part of the grid that holds
    them all, else by gathering their windows: sizes chosen by few queries, or in one region, cost little. No gradient
    reaches `choice`.

    Args:
        query: (B, *grid, Hq, D) on a grid of 1, 2 or 3 axes.
        key: (B, *grid, Hkv, D); Hq must be a multiple of Hkv.
        value: (B, *grid, Hkv, Dv).
        kernel_sizes: window sizes to choose from, each an int or one per axis.
        choice: integers from 0 to len(kernel_sizes) - 1: (*grid) for all samples and heads, (B, *grid) for all heads,
            or (1 or B, *grid, 1 or Hq).
        stride: queries that share a window, 1 to the smallest kernel size.
        dilation: step between the keys of a window.
        is_causal: axes along which a query sees no later key.
        scale: factor of the products; D ** -0.5 when None.
        bias: (Hq, 2K - 1 per axis) with K the largest kernel size along the axis: relative position bias; entry K - 1
            is the query itself, and smaller windows read the middle of the table.
        key_mask: (B, *grid) bool; only keys with True may be seen.
        return_lse: also return the logarithm of the sum of the exponentials of the visible logits.
        backend: "auto"; or a backend of `neighborhood_attention`, which then runs on the whole grid once a size, as
            "auto" does in traces; "reference" is the definition.

    Returns:
        (B, *grid, Hq, Dv) in the dtype of the query; with `return_lse` also (B, *grid, Hq) in float32, or in float64
        for float64.

    Raises:
        ValueError: what `neighborhood_attention` refuses; no kernel size; a `choice` that holds no integers of an
            allowed shape, or (not checked in traces, where such a query gets 0) others than the numbers of the sizes.
        NotImplementedError: sparse or nested tensors.

    Example:
        >>> q, k, v = torch.randn(3, 2, 12, 14, 4, 16)
        >>> choice = torch.zeros(12, 14, dtype=torch.int64)
        >>> choice[3:9, 4:10] = 1
        >>> neighborhood_attention_mixed(q, k, v, [3, (7, 9)], choice).shape
        torch.Size([2, 12, 14, 4, 16])
    """
    check_choice("backend", backend, ("auto", *BACKENDS))
    query, key, value = (to_autocast_dtype(t) for t in (query, key, value))
    check_tensors(query, key, value)
    plans = _plans(query.shape[1:-2], kernel_sizes, stride, dilation, is_causal)
    batch, *grid, heads, _ = query.shape
    choice = check_window_choice(choice, batch, tuple(grid), heads, len(plans), query.device)
    largest = [max(sizes) for sizes in zip(*([axis.kernel for axis in plan.axes] for plan in plans))]
    check_bias(bias, query, _make_plan(query.shape[1:-2], largest))
    if key_mask is not None:
        check_mask(key_mask, tuple(query.shape[:-2]), query.device)
        for number, plan in enumerate(plans):
            check_visible(key_mask, plan, (choice == number).any(dim=-1))
    problem = _Problem(query, key, value, query.shape[-1] ** -0.5 if scale is None else float(scale), key_mask)
    biases = [None if bias is None else crop_relative_bias(bias, [axis.kernel for axis in plan.axes]) for plan in plans]
    if backend == "auto" and not torch.compiler.is_compiling() and query.numel():
        with _no_autocast(query.device.type):
            out, lse = _attend_by_size(problem, plans, biases, choice, return_lse)
    else:
        out, lse = _attend_on_whole_grid(problem, plans, biases, choice, return_lse, backend)
    return (out, lse) if return_lse else out


class _Problem(NamedTuple):
    """What all window sizes share; shapes as in `neighborhood_attention_mixed`."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    key_mask: Tensor | None


def _attend_on_whole_grid(
    problem: _Problem,
    plans: Sequence[Plan],
    biases: Sequence[Tensor | None],
    choice: Tensor,
    need_lse: bool,
    backend: str,
) -> tuple[Tensor, Any]:
    """The definition: every size at every position, of which one is taken."""
    query, key, value, scale, key_mask = problem
    out = query.new_zeros(*query.shape[:-1], value.shape[-1])
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full(query.shape[:-1], -torch.inf, dtype=wide)
    for number, (plan, bias) in enumerate(zip(plans, biases)):
        results = attend_planned(query, key, value, plan, scale, bias, key_mask, (None, None), need_lse, backend)
        chosen = choice == number
        out = torch.where(chosen[..., None], results[0], out)
        if need_lse:
            lse = torch.where(chosen, results[1], lse)
    return out, lse


def _attend_by_size(
    problem: _Problem, plans: Sequence[Plan], biases: Sequence[Tensor | None], choice: Tensor, need_lse: bool
) -> tuple[Tensor, Any]:
    """The queries of each size on their own."""
    query, value = problem.query, problem.value
    rows, outs, lses = [], [], []
    for number, (plan, bias) in enumerate(zip(plans, biases)):
        chosen = choice == number
        places = chosen.expand(len(query), *chosen.shape[1:]).nonzero()
        if len(places) == 0:
            continue
        crop = crop_plan(plan, bounds(places[:, 1 : 1 + len(plan.axes)]))
        queries = len(places) / len(query) / choice.shape[-1]
        attend = _gather if queries * gather_cost(query.device) < crop.positions else _attend_in_crop
        out, lse = attend(problem, plan, crop, bias, places, choice.shape[-1] > 1, need_lse)
        rows.append(_rows(places, query.shape[1:-1], choice.shape[-1] > 1))
        outs.append(out)
        lses.append(lse)
    order = torch.cat(rows).argsort()  # every query has chosen one size, so the sorted rows are all rows
    out = torch.cat(outs).index_select(0, order).reshape(*query.shape[:-1], value.shape[-1])
    return out, torch.cat(lses).index_select(0, order).reshape(query.shape[:-1]) if need_lse else None


def _rows(places: Tensor, sizes: Sequence[int], per_head: bool) -> Tensor:
    """Numbers of (sample, *position, head) among all of (B, *grid), or (B, *grid, heads) with a choice per head."""
    rows = places[:, 0]
    for index, size in zip(places[:, 1:].unbind(-1), sizes if per_head else sizes[:-1]):
        rows = rows * size + index
    return rows


def _attend_in_crop(
    problem: _Problem, plan: Plan, crop: Crop, bias: Tensor | None, places: Tensor, per_head: bool, need_lse: bool
) -> tuple[Tensor, Any]:
    """Results of the queries at `places`, (P, sample and position and head), from the part of the grid around them."""
    query, key, value, scale, key_mask = problem
    out, lse = attend_in_crop(query[span(crop)], key, value, crop, scale, bias, key_mask, need_lse)
    origin = places.new_tensor([0, *(axis.span[0] for axis in crop.axes), 0])
    rows = _rows(places - origin, out.shape[1:-1], per_head)
    last = len(plan.axes) + per_head
    return out.flatten(0, last).index_select(0, rows), lse.flatten(0, last).index_select(0, rows) if need_lse else None


def _gather(
    problem: _Problem, plan: Plan, crop: Crop, bias: Tensor | None, places: Tensor, per_head: bool, need_lse: bool
) -> tuple[Tensor, Any]:
    """The same from gathered windows. With a choice per head, every head of a query is a query, of a key a key."""
    query, key, value, scale, kept = problem
    heads, kv_heads, rank = query.shape[-2], key.shape[-2], len(plan.axes)
    sample, head = places[:, 0], places[:, -1]
    first_key, first_entry, step, last = sample * query.shape[1:-2].numel(), None, 1, rank
    if per_head:
        first_key, step, last = first_key * kv_heads + head // (heads // kv_heads), kv_heads, rank + 1
        if bias is not None:
            first_entry, bias = head * bias[0].numel(), bias.reshape(1, -1)
        kept = None if kept is None else kept[..., None].expand(*kept.shape, kv_heads)
    tokens, keys, values = (t.flatten(0, last) for t in (query, key, value))
    if per_head:
        tokens, keys, values = (t.unsqueeze(1) for t in (tokens, keys, values))
    out, lse = gather_windows(
        tokens.index_select(0, _rows(places, query.shape[1:-1], per_head)),
        keys,
        values,
        places[:, 1 : 1 + rank],
        first_key,
        step,
        first_entry,
        plan,
        scale,
        None if bias is None else bias.flatten(1),
        None if kept is None else kept.flatten(),
        need_lse,
    )
    if per_head:
        out, lse = out.squeeze(1), None if lse is None else lse.squeeze(1)
    return out, lse


def _plans(grid: Sequence[int], kernel_sizes: Any, stride: Any, dilation: Any, is_causal: Any) -> list[Plan]:
    if isinstance(kernel_sizes, str) or not isinstance(kernel_sizes, Sequence) or len(kernel_sizes) == 0:
        raise ValueError(f"kernel_sizes={kernel_sizes!r} is not allowed; a sequence of at least one kernel size is")
    return [_make_plan(grid, size, stride, dilation, is_causal) for size in kernel_sizes]

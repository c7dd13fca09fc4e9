"""Neighborhood attention of queries at given positions only: the windows of those queries are gathered, in chunks."""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, overload

import torch
from einops import repeat
from torch import Tensor

from gridattn.ops.common import check_choice
from gridattn.ops.neighborhood import reference
from gridattn.ops.neighborhood.api import (
    _attend_everywhere,
    _make_plan,
    _no_autocast,
    attend_planned,
    to_autocast_dtype,
)
from gridattn.ops.neighborhood.checks import (
    bounds,
    check_additional,
    check_bias,
    check_heads,
    check_layouts,
    check_mask,
    check_positions,
    check_visible,
)
from gridattn.ops.neighborhood.crop import Crop, crop_plan
from gridattn.ops.neighborhood.merge import merge_attentions
from gridattn.ops.neighborhood.plan import Plan
from gridattn.ops.neighborhood.tables import axis_keys, axis_window_tables
from gridattn.ops.neighborhood.tiled import Tiles, attend_tiles, chunk_step

# Time of one query whose window is gathered, in queries of the operator on a whole grid, measured on a CPU: there
# against its kernels, elsewhere against the tiled backend.
GATHER_COST_ON_CPU, GATHER_COST_ELSEWHERE = 20, 5
CHUNKS_IN_CACHE = 4  # chunks of gathered windows for one chunk of tiles: they are read once, so a nearer cache will do


@overload
def neighborhood_attention_at(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
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
def neighborhood_attention_at(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
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


def neighborhood_attention_at(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
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
    """Neighborhood attention of queries that stand at given positions of a grid of keys and values.

    out[m] = sum_j P[m, j] v[j],  P[m] = softmax over the keys j visible from positions[m] of scale * <q[m], k[j]> +
    bias[p(j) - p(positions[m]) + k - 1].

    What a position sees is what it sees in `neighborhood_attention`, which also explains the settings. The cost grows
    with the number of queries, not with the grid; a position may be asked several times.

    Args:
        query: (B, M, Hq, D).
        key: (B, *grid, Hkv, D) on a grid of 1, 2 or 3 axes; Hq must be a multiple of Hkv.
        value: (B, *grid, Hkv, Dv).
        positions: (M, rank) for all samples or (B, M, rank), integers: the index of each query along each axis.
        kernel_size: window size per axis, at least 2; kernel_size * dilation must not exceed the grid.
        stride: queries that share a window, 1 to kernel_size.
        dilation: step between the keys of a window.
        is_causal: axes along which a query sees no later key.
        scale: factor of the products; D ** -0.5 when None.
        bias: (Hq, 2k - 1 per axis), relative position bias; entry k - 1 is the query itself.
        key_mask: (B, *grid) bool; only keys with True may be seen.
        additional_keys: (B, N, Hkv, D), tokens visible to every query.
        additional_values: (B, N, Hkv, Dv).
        return_lse: also return the logarithm of the sum of the exponentials of the visible logits.
        backend: "gather" (any device, exportable), "grid" (the operator on the smallest part of the grid that holds
            all windows; every position at most once a sample; not in traces), "reference" (the definition), or "auto":
            the cheaper of the first two, and "gather" in traces.

    Returns:
        (B, M, Hq, Dv) in the dtype of the query; with `return_lse` also (B, M, Hq) in float32, or in float64 for
        float64.

    Raises:
        ValueError: what `neighborhood_attention` refuses; positions that are no integers of an allowed shape or lie
            outside the grid (in traces the table lookup raises); "grid" with a position given twice or in a trace.
        NotImplementedError: sparse or nested tensors.

    Source: arXiv 2504.16922 (GNA) for the windows.

    Example:
        >>> q, k, v = torch.randn(2, 5, 4, 16), *torch.randn(2, 2, 12, 9, 4, 16)
        >>> positions = torch.tensor([[0, 0], [11, 8], [5, 4], [5, 4], [6, 0]])
        >>> neighborhood_attention_at(q, k, v, positions, kernel_size=(7, 3)).shape
        torch.Size([2, 5, 4, 16])
    """
    check_choice("backend", backend, ("auto", "gather", "grid", "reference"))
    query, key, value = (to_autocast_dtype(t) for t in (query, key, value))
    additional_keys, additional_values = (
        t if t is None else to_autocast_dtype(t) for t in (additional_keys, additional_values)
    )
    _check_tensors(query, key, value)
    check_additional(key, value, additional_keys, additional_values)
    plan = _make_plan(key.shape[1:-2], kernel_size, stride, dilation, is_causal)
    check_bias(bias, query, plan)
    grid = tuple([axis.length for axis in plan.axes])  # torch.compile reads the fields of a plan, not its properties
    positions = check_positions(positions, query.shape[0], grid, query.device, query.shape[1])
    if key_mask is not None:
        check_mask(key_mask, tuple(key.shape[:-2]), query.device)
        if additional_keys is None or additional_keys.shape[1] == 0:
            check_visible(key_mask, plan, _asked(positions, key_mask))
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    way = _choose_way(backend, positions, plan)

    with _no_autocast(query.device.type):
        problem = (query, key, value, positions, plan, factor, bias, key_mask)
        if way == "reference":
            out, lse = reference.attend_at(*problem, additional_keys, additional_values)
        elif additional_keys is None or additional_values is None:
            out, lse = _WAYS[way](*problem, need_lse=return_lse)
        else:
            window = _WAYS[way](*problem, need_lse=True)
            extra = _attend_everywhere(query, additional_keys, additional_values, factor)
            out, lse = merge_attentions(*zip(window, extra))
    return (out, lse) if return_lse else out


def gather_windows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    first_key: Tensor,
    key_step: int,
    first_entry: Tensor | None,
    plan: Plan,
    scale: float,
    bias: Tensor | None,
    kept: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a list of queries over windows of a list of keys.

    The key of query i at grid index x is row first_key[i] + key_step * flat(x).

    Args:
        query: (P, Hq, D), P > 0.
        key: (R, Hkv, D).
        value: (R, Hkv, Dv).
        positions: (P, rank) index of each query on its grid.
        first_key: (P,) row of the first position of the query's grid.
        key_step: rows between neighbouring positions.
        first_entry: (P,) entry of the flat `bias` at which the query's table begins; 0 when None.
        plan: the windows.
        scale: factor of the products.
        bias: (Hq, entries) or None.
        kept: (R,) bool or None, False hides a key.
        need_lse: whether to compute the lse.

    Returns:
        out (P, Hq, Dv), and lse (P, Hq) in float32 at least or None.
    """
    count, device = len(query), query.device
    rows = torch.arange(count, device=device)
    first_entry = torch.zeros_like(rows) if first_entry is None else first_entry
    unmasked = torch.ones(count, 1, 1, dtype=torch.bool, device=device)
    # Every query is a tile of its own. The first "axis" says which rows are its own, the others which window it has.
    tables = [rows, rows[:, None], first_key[:, None], unmasked, first_entry[:, None, None]]
    of_axes = axis_window_tables(axis_keys(plan), device, key_step)
    for axis, of_axis in enumerate(positions.unbind(-1)):
        keys, visible, entries = of_axes[3 * axis : 3 * axis + 3]
        tables += [of_axis, keys.new_zeros(len(keys), 1), keys, visible, entries]
    full = not any(axis.causal for axis in plan.axes)
    keys = prod([axis.kernel for axis in plan.axes])
    alike = count if full and bias is None else 0
    q, k, v = (t.unsqueeze(1) for t in (query, key, value))
    sizes = (count, alike, full, 1, keys)
    step = chunk_step(q, k, v, sizes, broadcast=not need_lse and bias is None and kept is None)
    if device.type == "cpu" and not torch.compiler.is_compiling():
        step = max(1, step // CHUNKS_IN_CACHE)
    kept = None if kept is None else kept[:, None]
    out, lse = attend_tiles(Tiles(tables, *sizes, step, kept, scale, need_lse), q, k, v, bias)
    return out.squeeze(1), lse.flatten(1) if need_lse and lse is not None else None


def gather_cost(device: torch.device) -> int:
    """Queries of the operator on a whole grid that take as long as one whose window is gathered."""
    return GATHER_COST_ON_CPU if device.type == "cpu" else GATHER_COST_ELSEWHERE


def attend_in_crop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    crop: Crop,
    scale: float,
    bias: Tensor | None,
    key_mask: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Any]:
    """The operator on a part of a grid, without checks: `query` is on the part, all else on the whole grid."""
    part = span(crop)
    key_mask = None if key_mask is None else key_mask[part]
    problem = (query, key[part], value[part], crop.plan, scale, bias, key_mask)
    return attend_planned(*problem, (None, None), need_lse, "auto")


def span(crop: Crop) -> tuple[slice, ...]:
    """The part as an index of (B, *grid, ...)."""
    return slice(None), *(slice(*axis.span) for axis in crop.axes)


def _gather(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    plan: Plan,
    scale: float,
    bias: Tensor | None,
    key_mask: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Any]:
    """Gathers every query's window; arguments as in `reference.attend_at`."""
    batch, count = query.shape[:2]
    if batch * count == 0:
        return reference.attend_at(query, key, value, positions, plan, scale, bias, key_mask)
    sample = torch.arange(batch, device=query.device).repeat_interleave(count)
    rank = len(plan.axes)
    out, lse = gather_windows(
        query.flatten(0, 1),
        key.flatten(0, rank),
        value.flatten(0, rank),
        positions.expand(batch, -1, -1).flatten(0, 1),
        sample * prod(key.shape[1:-2]),
        1,
        None,
        plan,
        scale,
        None if bias is None else bias.flatten(1),
        None if key_mask is None else key_mask.flatten(),
        need_lse,
    )
    return out.unflatten(0, (batch, count)), None if lse is None else lse.unflatten(0, (batch, count))


def _scatter(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    plan: Plan,
    scale: float,
    bias: Tensor | None,
    key_mask: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Any]:
    """Lays the queries out on the part of the grid around them; arguments as in `reference.attend_at`."""
    if query.shape[0] * query.shape[1] == 0:
        return reference.attend_at(query, key, value, positions, plan, scale, bias, key_mask)
    crop = crop_plan(plan, bounds(positions))
    inside = reference.flat_positions(positions - positions.new_tensor([axis.span[0] for axis in crop.axes]), crop.plan)
    batch, count, *channels = query.shape
    rows = (inside + torch.arange(batch, device=query.device)[:, None] * crop.positions).flatten()
    laid_out = query.new_zeros(batch * crop.positions, *channels).index_copy(0, rows, query.flatten(0, 1))
    laid_out = laid_out.reshape(batch, *crop.plan.grid, *channels)
    results = attend_in_crop(laid_out, key, value, crop, scale, bias, key_mask, need_lse)
    out, lse = (
        None if t is None else t.flatten(0, len(plan.axes)).index_select(0, rows).unflatten(0, (batch, count))
        for t in results
    )
    assert out is not None
    return out, lse


_WAYS = {"gather": _gather, "grid": _scatter}


def _choose_way(backend: str, positions: Tensor, plan: Plan) -> str:
    if torch.compiler.is_compiling():
        if backend == "grid":
            raise ValueError("backend='grid' cannot run in a trace, which does not know the positions; 'gather' can")
        return "gather" if backend == "auto" else backend
    if backend in ("gather", "reference"):
        return backend
    if positions.numel() == 0:
        return "gather"
    crop = crop_plan(plan, bounds(positions))
    worth_it = backend == "grid" or positions.shape[1] * gather_cost(positions.device) > crop.positions
    distinct = worth_it and _are_distinct(positions, plan)
    if backend == "grid" and not distinct:
        raise ValueError("positions hold a position twice in one sample; backend='grid' takes each at most once")
    return "grid" if distinct else "gather"


def _are_distinct(positions: Tensor, plan: Plan) -> bool:
    ordered = reference.flat_positions(positions, plan).sort(dim=-1).values
    return bool((ordered.diff(dim=-1) > 0).all())


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    grid = (4, 5, 6), "(batch, 1 to 3 grid axes, heads, head_dim)"
    check_layouts(
        key=(key, *grid), value=(value, *grid), query=(query, (4,), "(batch, number of positions, heads, head_dim)")
    )
    if value.shape[:-2] != key.shape[:-2]:
        raise ValueError(
            f"value has batch and grid {tuple(value.shape[:-2])} but key has {tuple(key.shape[:-2])}; "
            "they must be equal"
        )
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"query has batch {query.shape[0]} but key has {key.shape[0]}; they must be equal")
    check_heads(query, key, value)


def _asked(positions: Tensor, key_mask: Tensor) -> Tensor:
    """(B, *grid) bool: where there is a query."""
    at = repeat(positions, "b m rank -> (r b) m rank", r=key_mask.shape[0] // max(1, len(positions))).unbind(-1)
    sample = torch.arange(len(key_mask), device=key_mask.device)[:, None]
    return torch.zeros_like(key_mask).index_put((sample, *at), torch.ones((), dtype=torch.bool, device=key_mask.device))

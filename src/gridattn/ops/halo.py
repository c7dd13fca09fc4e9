"""Blocked local attention: every block of queries sees its own block and a halo around it."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gridattn.ops.common import check_choice, check_same_kind, per_axis
from gridattn.ops.padding import pad_grid

CHUNK_OF_LOGITS = 2**19
"""Logits that are made at a time where they are made at all: as many as stay in the caches of a CPU."""


def halo_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: Any,
    halo_size: Any,
    *,
    stride: Any = 1,
    relative: Sequence[Tensor] | None = None,
    scale: float | None = None,
    mask_padding: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Attention of blocks of b queries to the window of w = b + 2h keys around their block.

    Along every axis, block I sees the positions I b - h .. I b + b + h - 1. The query at place r of its block
    (0 <= r < b) and the key at place u of the window (0 <= u < w), places being vectors with one entry per axis, have
    the logit

        scale * q . k + sum over axes a of q . relative[a][u_a - r_a + w_a - 1],

    and the softmax runs over the window. With a stride s, queries stand at every s-th position only: a block then has
    b / s queries along the axis, and r counts them, so that one step between queries weighs as one step between keys.

    Args:
        query: (B, *query_grid, heads, head_dim), where query_grid = ceil(grid / stride).
        key: (B, *grid, heads, head_dim), 1 to 3 axes.
        value: (B, *grid, heads, value_dim).
        block_size: b, per axis.
        halo_size: h, per axis, 0 or more.
        stride: s, per axis; divides `block_size`.
        relative: per axis a table (2 w - 1, head_dim) of relative vectors, shared by heads and blocks; None leaves the
            term out.
        scale: factor of q . k; head_dim ** -0.5 when None.
        mask_padding: leave the positions outside the map out of the softmax. When False they take part as zero keys and
            zero values (their logit is the relative term alone), as in the published networks.
        backend: "reference" loops over the blocks; "auto" hands all blocks to one scaled dot-product attention whose
            vectors carry the relative terms, q' = [scale q, q . relative[0], ...] and k' = [k, onehot(u_0), ...], so
            that no table of logits is made.

    Returns:
        (B, *query_grid, heads, value_dim), dtype of `value`.

    Raises:
        ValueError: shapes, sizes or tables that do not fit together.

    Source: Scaling Local Self-Attention for Parameter Efficient Visual Backbones, arXiv 2103.12731, section 3.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 10, 13, 2, 8).unbind(0)
        >>> halo_attention(q, k, v, block_size=4, halo_size=1).shape
        torch.Size([1, 10, 13, 2, 8])
    """
    check_same_kind(query=query, key=key, value=value)
    check_choice("backend", backend, ("auto", "reference"))
    if key.ndim not in (4, 5, 6) or key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} do not fit; (B, *grid, heads, channels) with "
            "1 to 3 axes and equal sizes but for the channels is allowed"
        )
    windows = _make_windows(tuple(key.shape[1:-2]), block_size, halo_size, stride)
    query_grid = tuple((size + s - 1) // s for size, s in zip(windows.grid, windows.stride))
    if query.shape != (key.shape[0], *query_grid, *key.shape[-2:]):
        raise ValueError(
            f"query has shape {tuple(query.shape)}; with key {tuple(key.shape)} and stride={stride} "
            f"{(key.shape[0], *query_grid, *key.shape[-2:])} is allowed"
        )
    tables = () if relative is None else tuple(relative)
    expected = [(2 * w - 1, key.shape[-1]) for w in windows.window]
    if relative is not None and [tuple(table.shape) for table in tables] != expected:
        raise ValueError(f"relative has the shapes {[tuple(t.shape) for t in tables]}; {expected} is allowed")

    factor = query.shape[-1] ** -0.5 if scale is None else scale
    attend = _attend_reference if backend == "reference" else _attend
    padding = [(0, n * p - size) for n, p, size in zip(windows.blocks, windows.places, query_grid)]
    out = attend(pad_grid(query, padding), key, value, windows, tables, factor, mask_padding)
    return out[(slice(None), *(slice(size) for size in query_grid))]


def relative_rows(table: Tensor, num_queries: int, window: int) -> Tensor:
    """Relative vectors of every pair of places along one axis.

    Args:
        table: (2 * window - 1, head_dim).
        num_queries: queries of a block along the axis.
        window: keys of a window along the axis.

    Returns:
        (num_queries, window, head_dim): entry (r, u) is `table[u - r + window - 1]`.
    """
    by_start = table.unfold(0, window, 1)  # a query at place r reads from entry window - 1 - r on
    return by_start[window - num_queries :].flip(0).transpose(1, 2)


class _Windows(NamedTuple):
    """Sizes of one problem, each with an entry per axis."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    halo: tuple[int, ...]
    stride: tuple[int, ...]
    blocks: tuple[int, ...]
    """blocks along the axis, the last one padded"""
    places: tuple[int, ...]
    """queries of a block"""
    window: tuple[int, ...]
    """keys of a window"""


def _make_windows(grid: tuple[int, ...], block_size: Any, halo_size: Any, stride: Any) -> _Windows:
    block = per_axis(block_size, len(grid), "block_size")
    halo = per_axis(halo_size, len(grid), "halo_size", minimum=0)
    strides = per_axis(stride, len(grid), "stride")
    if any(b % s for b, s in zip(block, strides)):
        raise ValueError(f"stride={stride} does not divide block_size={block}; a divisor is allowed on every axis")
    return _Windows(
        grid,
        block,
        halo,
        strides,
        # Not -(-size // b): in ONNX a division of negative integers is cut off, not rounded down.
        blocks=tuple((size + b - 1) // b for size, b in zip(grid, block)),
        places=tuple(b // s for b, s in zip(block, strides)),
        window=tuple(b + 2 * h for b, h in zip(block, halo)),
    )


def _pad_keys(x: Tensor, windows: _Windows) -> Tensor:
    """(B, *grid, heads, channels) with its halo, filled up to whole blocks."""
    sizes = zip(windows.grid, windows.block, windows.halo, windows.blocks)
    return pad_grid(x, [(h, n * b + h - size) for size, b, h, n in sizes])


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    windows: _Windows,
    tables: tuple[Tensor, ...],
    scale: float,
    mask_padding: bool,
) -> Tensor:
    q = _to_blocks(query, windows)  # (B * heads, *blocks, *places, head_dim)
    k, v = (_to_windows(_pad_keys(x, windows), windows) for x in (key, value))
    terms = _relative_terms(q, tables, windows)  # per axis (B * heads, *blocks, *places, window)
    if mask_padding:
        barred = _tables(windows, key)[1]
        terms = terms or [q.new_zeros(()).expand(*q.shape[:-1], size) for size in windows.window]
        terms = [term + outside for term, outside in zip(terms, barred)]

    num_logits = q.shape[0] * prod(windows.blocks) * prod(windows.places) * prod(windows.window)
    attend = _attend_directly if _tabulates(num_logits, q.device) else _attend_fused
    out = attend(q * scale, k, v, terms, windows)
    return _from_blocks(out, windows, key.shape[-2])


def _tabulates(num_logits: int, device: torch.device) -> bool:
    """Whether tables of logits beat a fused kernel: on a CPU; with gradients, which keep them all, only a few."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return num_logits <= 2**22 or not torch.is_grad_enabled()


def _attend_directly(q: Tensor, k: Tensor, v: Tensor, terms: list[Tensor], windows: _Windows) -> Tensor:
    """By a table of logits, for a few blocks at a time so that it stays in the caches."""
    rank = len(windows.grid)
    logits_of_block = prod(windows.places) * prod(windows.window)
    few = max(1, CHUNK_OF_LOGITS // logits_of_block)
    queries, *on_axes = (t.flatten(0, rank).split(few) for t in (q, *terms))
    keys, values = (t.flatten(0, 1).split(few) for t in (k, v))
    out = []
    for query, key, value, *added in zip(queries, keys, values, *on_axes):
        logits = query.flatten(1, -2) @ key.mT
        by_place = logits.view(*query.shape[:-1], *windows.window)
        for axis, term in enumerate(added):
            by_place += term.view(*query.shape[:-1], *(w if a == axis else 1 for a, w in enumerate(windows.window)))
        out.append(logits.softmax(-1) @ value)
    return torch.cat(out).unflatten(0, k.shape[:2])


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, terms: list[Tensor], windows: _Windows) -> Tensor:
    rank = len(windows.grid)
    q = torch.cat([q, *terms], -1).flatten(rank + 1, -2).flatten(1, rank)
    places = [_one_hot_places(windows.window, axis, k).expand(*k.shape[:-1], -1) for axis in range(len(terms))]
    k = torch.cat([k, *places], -1)
    # The kernels want one width for all three; on GPUs a multiple of eight.
    width = max(q.shape[-1], v.shape[-1])
    width = width if q.device.type == "cpu" else -(-width // 8) * 8
    q, k, padded_value = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, padded_value, scale=1.0)[..., : v.shape[-1]]


def _tables(windows: _Windows, like: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The tables, kept between calls except while a graph is traced: a traced tensor must not outlive its graph."""
    build = _build_tables if torch.compiler.is_compiling() else _kept_tables
    return build(windows, like.device, like.dtype)


def _build_tables(windows: _Windows, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Where the keys of every block are, and which of them lie outside the map.

    Returns:
        index (blocks * keys,) int64: for blocks and places in row-major order, positions in the flat padded map.
        barred, per axis (blocks at that axis, ones elsewhere, window): a large negative number outside the map, else 0.
    """
    rank = len(windows.grid)
    flat, barred = torch.zeros((), dtype=torch.long, device=device), []
    for axis, (size, block, halo, _, blocks, _, window) in enumerate(zip(*windows)):
        first = torch.arange(blocks, device=device) * block
        position = first[:, None] + torch.arange(window, device=device)
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = position.shape
        flat = flat * (blocks * block + 2 * halo) + position.view(shape)
        outside = (position < halo) | (position >= size + halo)
        shape = [1] * (2 * rank) + [window]
        shape[axis] = blocks
        barred.append((outside.to(dtype) * (torch.finfo(dtype).min / 8)).view(shape))
    return flat.flatten(), barred


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _kept_tables(windows: _Windows, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    return _build_tables(windows, device, dtype)


def _to_windows(x: Tensor, windows: _Windows) -> Tensor:
    """The padded map (B, *grid, heads, channels) -> (B * heads, blocks, positions of a window, channels)."""
    rank, (batch, heads, channels) = len(windows.grid), (x.shape[0], *x.shape[-2:])
    if torch.is_grad_enabled() and x.requires_grad:  # the gradient of a gather takes less time than that of an unfold
        index, _ = _tables(windows, x)
        x = x.flatten(1, rank).transpose(1, 2).flatten(0, 1).index_select(1, index)
    else:
        for axis, (window, block) in enumerate(zip(windows.window, windows.block), start=1):
            x = x.unfold(axis, window, block)
        x = x.permute(0, 1 + rank, *range(1, 1 + rank), *range(3 + rank, 3 + 2 * rank), 2 + rank)
    return x.reshape(batch * heads, prod(windows.blocks), prod(windows.window), channels)


def _to_blocks(x: Tensor, windows: _Windows) -> Tensor:
    """(B, *grid, heads, channels) -> (B * heads, *blocks, *places, channels)."""
    rank = len(windows.grid)
    split = [size for pair in zip(windows.blocks, windows.places) for size in pair]
    x = x.reshape(x.shape[0], *split, *x.shape[-2:])
    return (
        x.permute(0, 2 * rank + 1, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 2)
        .flatten(0, 1)
        .contiguous()
    )


def _from_blocks(x: Tensor, windows: _Windows, heads: int) -> Tensor:
    """(B * heads, blocks, places, channels) -> (B, *grid, heads, channels)."""
    rank = len(windows.grid)
    x = x.reshape(x.shape[0] // heads, heads, *windows.blocks, *windows.places, x.shape[-1])
    order = [i for axis in range(rank) for i in (2 + axis, 2 + rank + axis)]
    sizes = [n * p for n, p in zip(windows.blocks, windows.places)]
    return x.permute(0, *order, 1, 2 * rank + 2).reshape(x.shape[0], *sizes, heads, x.shape[-1])


def _relative_terms(query: Tensor, tables: tuple[Tensor, ...], windows: _Windows) -> list[Tensor]:
    """What the logits gain by the key's place along each axis: (N, *blocks, *places, window) each.

    query: (N, *blocks, *places, d). The term of place r and key u is query . table[u - r + window - 1].
    """
    rank = len(windows.grid)
    if torch.compiler.is_compiling() or not tables:
        return [_product_with_rows(query, table, windows, axis) for axis, table in enumerate(tables)]
    products = query @ torch.cat(tables).to(query.dtype).mT  # with every vector of all tables
    terms, start = [], products.storage_offset()
    for axis, size in enumerate(windows.window):
        steps = list(products.stride())
        steps[1 + rank + axis] -= 1  # every further place starts one vector earlier
        terms.append(products.as_strided((*query.shape[:-1], size), steps, start + size - 1))
        start += 2 * size - 1
    return terms


def _product_with_rows(query: Tensor, table: Tensor, windows: _Windows, axis: int) -> Tensor:
    rows = relative_rows(table.to(query.dtype), windows.places[axis], windows.window[axis])
    place = "rct"[: len(windows.grid)]
    flat = query.flatten(0, len(place))
    return torch.einsum(f"n{place}d,{place[axis]}ud->n{place}u", flat, rows).unflatten(0, query.shape[: 1 + len(place)])


def _one_hot_places(window: tuple[int, ...], axis: int, like: Tensor) -> Tensor:
    """(keys, window[axis]): row u has its one at u_axis."""
    eye = torch.eye(window[axis], dtype=like.dtype, device=like.device)
    before, after = prod(window[:axis]), prod(window[axis + 1 :])
    return eye.repeat_interleave(after, 0).repeat(before, 1)


def _attend_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    windows: _Windows,
    tables: tuple[Tensor, ...],
    scale: float,
    mask_padding: bool,
) -> Tensor:
    """The definition, block by block."""
    rank = len(windows.grid)
    padded_key, padded_value = _pad_keys(key, windows), _pad_keys(value, windows)
    inside = _pad_keys(key.new_ones(1, *windows.grid, 1, 1), windows).bool()
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    for number in product(*map(range, windows.blocks)):
        queries = (slice(None), *(slice(i * p, i * p + p) for i, p in zip(number, windows.places)))
        keys = (slice(None), *(slice(i * b, i * b + w) for i, b, w in zip(number, windows.block, windows.window)))
        q = query[queries]
        k, v, seen = (x[keys].flatten(1, rank) for x in (padded_key, padded_value, inside))
        logits = scale * torch.einsum("b...hd,bkhd->b...hk", q, k)
        if tables:
            logits = logits + torch.einsum("b...hd,...kd->b...hk", q, _relative_vectors(windows, tables))
        if mask_padding:
            logits = logits.masked_fill(~seen[0, :, 0, 0], -torch.inf)
        out[queries] = torch.einsum("b...hk,bkhd->b...hd", logits.softmax(-1), v)
    return out


def _relative_vectors(windows: _Windows, tables: tuple[Tensor, ...]) -> Tensor:
    """(*places, keys, head_dim): the sum over axes of the relative vectors of a pair of places."""
    rank, total = len(windows.grid), tables[0].new_zeros(())
    for axis, table in enumerate(tables):
        rows = relative_rows(table, windows.places[axis], windows.window[axis])
        shape = [1] * (2 * rank) + [table.shape[1]]
        shape[axis], shape[rank + axis] = rows.shape[:2]
        total = total + rows.view(shape)
    return total.flatten(rank, -2)

"""Exact neighborhood attention in blocks over `scaled_dot_product_attention`: any device, differentiable, exportable.

Queries are tiled; each tile attends, under a mask, to the one box of keys that holds all its windows (see `tiling`). Dilation groups
become further tiles. Most tiles differ by a shift only and share one mask. Tiles are processed in chunks, so that memory stays
proportional to the number of tokens.
"""

import operator
from collections.abc import Callable
from functools import reduce
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from gridattn.ops.neighborhood.plan import AxisPlan, Plan
from gridattn.ops.neighborhood.tables import AxisKey, axis_keys, to_tensors
from gridattn.ops.neighborhood.tiling import Tiling, make_tiling

CHUNK_ELEMENTS = {"cpu": 1 << 22}
"""Numbers that the tokens and logits of one chunk of tiles may hold: about a cache on the cpu, enough to fill a device elsewhere."""
CHUNK_ELEMENTS_ELSEWHERE = 1 << 26


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    scale: float,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention of every query over its window; the arguments are those of `reference.attend`.

    Returns:
        out (B, *grid, Hq, Dv) and, where needed, lse (B, *grid, Hq) in float32 at least, else None.
    """
    if (
        bias is None
        and key_mask is None
        and not need_lse
        and query.shape[0]
        and all(_sees_all(axis) for axis in plan.axes)
    ):
        return _attend_densely(query, key, value, scale), None
    axes, (batch, *grid, heads, _) = axis_keys(plan), query.shape
    q, k, v = (rearrange(t, "b ... h d -> (...) b h d").contiguous() for t in (query, key, value))
    kept = None if key_mask is None else rearrange(key_mask, "b ... -> (...) b")

    num_tiles, num_alike, full, num_queries, num_keys = _tiling_sizes(axes)
    *tile_tables, slot = _tiling_tables(axes, query.device)
    channels = q.shape[-1] + v.shape[-1]
    logits = num_queries * num_keys * (1 if not need_lse and bias is None and kept is None else batch * heads)
    tokens = batch * channels * (num_queries * heads + num_keys * k.shape[-2])
    step = max(1, CHUNK_ELEMENTS.get(query.device.type, CHUNK_ELEMENTS_ELSEWHERE) // (logits + tokens))

    outs, lses = [], []
    for first, end, alike in ((0, num_alike, True), (num_alike, num_tiles, False)):
        for start in range(first, end, step):
            queries, keys, visible, bias_index = _tiles(tile_tables, slice(start, min(start + step, end)), alike)
            if alike and full and bias is None and kept is None:
                mask = empty = None
            else:
                mask, empty = _mask(visible, bias_index, bias, kept, keys, batch, k.shape[-2], heads)
            out, lse = _attend_tiles(q, k, v, queries, keys, mask, empty, scale, need_lse or batch == 0)
            outs.append(out)
            lses.append(lse)
    out = rearrange(torch.cat(outs)[slot], "i b h d -> b i h d").reshape(batch, *grid, heads, v.shape[-1])
    if not need_lse:
        return out, None
    return out, rearrange(torch.cat(lses)[slot], "i b h 1 -> b i h").reshape(batch, *grid, heads)


def _sees_all(axis: AxisPlan) -> bool:
    return axis.kernel == axis.length and not axis.causal


def _attend_densely(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    q, k, v = (rearrange(t, "b ... h d -> b h (...) d") for t in (query, key, value))
    k, v = (t.repeat_interleave(query.shape[-2] // key.shape[-2], dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return rearrange(out, "b h i d -> b i h d").reshape(*query.shape[:-1], value.shape[-1])


def _tiles(tables: list[Tensor], chunk: slice, alike: bool) -> tuple[Tensor, ...]:
    """Combines the axes' tables for some tiles.

    Returns:
        queries (tiles, i) and keys (tiles, j), flat positions; visible (tiles, i, j) bool and bias_index (tiles, i, j), flat
        entries of a table of relative position biases, for the first tile only where all are alike.
    """
    of_axes = [tables[i : i + 5] for i in range(0, len(tables), 5)]
    queries = _outer([query[tile[chunk]] for tile, query, *_ in of_axes], operator.add)
    keys = _outer([key[tile[chunk]] for tile, _, key, *_ in of_axes], operator.add)
    if alike:
        chunk = slice(chunk.start, chunk.start + 1)
    visible = _outer([seen[tile[chunk]] for tile, _, _, seen, _ in of_axes], operator.and_)
    bias_index = _outer([entry[tile[chunk]] for tile, *_, entry in of_axes], operator.add)
    return queries, keys, visible, bias_index


def _outer(tables: list[Tensor], join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Joins one (tiles, i) or (tiles, i, j) table an axis into one whose i and j run over the product of the axes'."""
    spread = []
    for axis, table in enumerate(tables):
        shape = [1] * (len(tables) * (table.ndim - 1))
        shape[axis :: len(tables)] = table.shape[1:]
        spread.append(table.reshape(-1, *shape))
    joined = reduce(join, spread).flatten(1, len(tables))
    return joined.flatten(2) if tables[0].ndim == 3 else joined


def _mask(
    visible: Tensor,
    bias_index: Tensor,
    bias: Tensor | None,
    kept: Tensor | None,
    keys: Tensor,
    batch: int,
    kv_heads: int,
    heads: int,
) -> tuple[Tensor, Tensor | None]:
    """The mask of some tiles.

    Returns:
        mask, to broadcast to (tiles, B * Hkv, group * i, j): bool, or with a bias the number to add to each logit; and, with a key
        mask, which queries see no key, to broadcast to (tiles, B * Hkv, group * i, 1). Those see every key in the mask, since a
        softmax over nothing has no gradient.
    """
    group, empty = heads // kv_heads, None
    if kept is None:
        mask = repeat(visible, "t i j -> t 1 (g i) j", g=group)
    else:
        seen = visible[:, None] & rearrange(kept[keys.flatten()], "(t j) b -> t b 1 j", t=len(keys))
        none = ~seen.any(dim=-1, keepdim=True)
        mask, empty = (repeat(x, "t b i j -> t (b h) (g i) j", h=kv_heads, g=group) for x in (seen | none, none))
    if bias is None:
        return mask, empty
    entries = bias.flatten(1)[:, bias_index]
    entries = repeat(entries, "(h g) t i j -> t (b h) (g i) j", h=kv_heads, b=batch)
    return entries.masked_fill(~mask, -torch.inf), empty


def _attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    empty: Tensor | None,
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of the tiles' queries over the tiles' keys.

    Args:
        q, k, v: (N, B, heads, channels).
        queries: (tiles, i), positions of the queries.
        keys: (tiles, j), positions of the keys.
        mask: broadcasts to (tiles, B * Hkv, group * i, j), bool or to be added; None where all is visible.
        empty: broadcasts to (tiles, B * Hkv, group * i, 1), marks queries without any key.

    Returns:
        out (tiles * i, B, Hq, Dv) and lse (tiles * i, B, Hq, 1) or None.
    """
    tiles, kv_heads = len(queries), k.shape[2]
    q = rearrange(q[queries.flatten()], "(t i) b (h g) d -> t (b h) (g i) d", t=tiles, h=kv_heads)
    k, v = (rearrange(x[keys.flatten()], "(t j) b h d -> t (b h) j d", t=tiles) for x in (k, v))
    if need_lse:
        out, lse = _attend_with_lse(q, k, v, mask, scale)
    else:
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
        out, lse = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), None
    if empty is not None:
        out = out.masked_fill(empty, 0.0)
        lse = None if lse is None else lse.masked_fill(empty, -torch.inf)
    pattern, sizes = "t (b h) (g i) d -> (t i) b (h g) d", {"h": kv_heads, "i": queries.shape[1]}
    return rearrange(out, pattern, **sizes), None if lse is None else rearrange(lse, pattern, **sizes)


def _attend_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention written out, in float32 at least: PyTorch's own does not give the lse."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = scale * q.to(wide) @ k.to(wide).mT
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    lse = logits.logsumexp(dim=-1, keepdim=True)
    return ((logits - lse).exp() @ v.to(wide)).to(q.dtype), lse


@torch.compiler.assume_constant_result
def _tiling_sizes(axes: tuple[AxisKey, ...]) -> tuple[int, int, bool, int, int]:
    """Tiles in all, tiles alike, whether those need no mask, queries and keys of a tile."""
    tiling = _make_tiling(axes)
    return tiling.tiles, tiling.alike, tiling.is_full, tiling.queries, tiling.keys


@torch.compiler.assume_constant_result
def _tiling_tables(axes: tuple[AxisKey, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Per axis (tile of the axis for each tile of the grid, query, key, visible, bias_index), then the slot of each position.

    Positions and entries are multiplied by the step of their axis, so that their sum over the axes is the flat one.
    """
    return to_tensors(_tables, device, axes)


def _tables(axes: tuple[AxisKey, ...]) -> tuple[np.ndarray, ...]:
    tiling = _make_tiling(axes)
    tiles = np.unravel_index(tiling.order, [len(axis.query) for axis in tiling.axes])
    tables = []
    for i, (tile, axis) in enumerate(zip(tiles, tiling.axes)):
        step = prod(other.axis.length for other in tiling.axes[i + 1 :])
        entry_step = prod(2 * other.axis.kernel - 1 for other in tiling.axes[i + 1 :])
        tables += [tile, axis.query * step, axis.key * step, axis.visible, axis.bias_index * entry_step]
    return *tables, tiling.slot


def _make_tiling(axes: tuple[AxisKey, ...]) -> Tiling:
    return make_tiling(tuple(AxisPlan(*axis) for axis in axes))

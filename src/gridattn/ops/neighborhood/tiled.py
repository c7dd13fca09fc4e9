"""Exact neighborhood attention in blocks over `scaled_dot_product_attention`: any device, differentiable, exportable.

Queries are tiled; each tile attends, under a mask, to the one box of keys that holds all its windows (see `tiling`).
Dilation groups become further tiles. Most tiles differ by a shift only and share one mask. Tiles are processed in
chunks, so that memory stays proportional to the number of tokens.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.autograd.function import once_differentiable

from gridattn.ops.constants import constant_in_traces, to_tensors
from gridattn.ops.neighborhood.plan import AxisPlan, Plan
from gridattn.ops.neighborhood.tables import AxisKey, axis_keys
from gridattn.ops.neighborhood.tiling import Tiling, make_tiling

CHUNK_ELEMENTS = 1 << 22
"""Numbers that the tokens and logits of one chunk of tiles may hold on the cpu: about a cache."""
CHUNK_ELEMENTS_ELSEWHERE = 1 << 26
"""The same for other devices, which want more work at once, and for traces, which hold the code of every chunk."""


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
    batch, *grid, heads, _ = query.shape
    if bias is None and key_mask is None and not need_lse and batch and all(_sees_all(axis) for axis in plan.axes):
        return _attend_densely(query, key, value, scale), None

    q, k, v = (rearrange(t, "b ... h d -> (...) b h d").contiguous() for t in (query, key, value))
    kept = None if key_mask is None else rearrange(key_mask, "b ... -> (...) b")
    *tables, slot = _tiling_tables(axis_keys(plan), query.device)
    sizes = _tiling_sizes(axis_keys(plan))
    step = chunk_step(q, k, v, sizes, broadcast=not need_lse and bias is None and kept is None)
    out, lse = attend_tiles(Tiles(tables, *sizes, step, kept, scale, need_lse or batch == 0), q, k, v, bias)
    out = rearrange(out.index_select(0, slot), "i b h d -> b i h d").reshape(batch, *grid, heads, v.shape[-1])
    if lse is None or not need_lse:
        return out, None
    return out, rearrange(lse.index_select(0, slot), "i b h 1 -> b i h").reshape(batch, *grid, heads)


def attend_tiles(tiles: "Tiles", q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`Tiles.attend`; in training, many chunks are computed anew in the backward pass instead of being kept."""
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias))
    if trained and len(tiles.chunks()) > 2 and not torch.compiler.is_compiling():
        return _Recomputed.apply(tiles, q, k, v, bias)
    return tiles.attend(q, k, v, bias)


@dataclass(frozen=True)
class Tiles:
    """Where the tiles' tokens stand, and attention inside the tiles.

    Attributes:
        tables: per axis, see `_tiling_tables`.
        num_tiles, num_alike, full, num_queries, num_keys: see `_tiling_sizes`.
        step: tiles in a chunk.
        kept: (N, B) bool, the key mask.
        scale: factor of the products.
        need_lse: whether to compute the lse.
    """

    tables: list[Tensor]
    num_tiles: int
    num_alike: int
    full: bool
    num_queries: int
    num_keys: int
    step: int
    kept: Tensor | None
    scale: float
    need_lse: bool

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(N, B, heads, channels) each -> out (tiles * i, B, Hq, Dv) and lse (tiles * i, B, Hq, 1) or None."""
        outs, lses = [], []
        for chunk, alike in self.chunks():
            queries, keys = self.positions(chunk)
            tokens = (q.index_select(0, queries), k.index_select(0, keys), v.index_select(0, keys))
            out, lse = self.attend_chunk(*tokens, bias, chunk, alike, keys)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses) if self.need_lse else None

    def chunks(self) -> list[tuple[slice, bool]]:
        """Slices of the tiles, each with whether its tiles are alike."""
        groups = ((0, self.num_alike, True), (self.num_alike, self.num_tiles, False))
        return [
            (slice(start, min(start + self.step, end)), alike)
            for first, end, alike in groups
            for start in range(first, end, self.step)
        ]

    def positions(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Flat positions of the chunk's queries (tiles * i,) and keys (tiles * j,)."""
        queries, keys = (
            _outer([of_axis[n][of_axis[0][chunk]] for of_axis in self._by_axis()], operator.add) for n in (1, 2)
        )
        return queries.flatten(), keys.flatten()

    def attend_chunk(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, chunk: slice, alike: bool, keys: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Attention inside a chunk's tiles.

        Args:
            q: (tiles * i, B, Hq, D), the tokens at the queries' positions.
            k, v: (tiles * j, B, Hkv, channels), those at the keys' positions.
            bias: (Hq, 2k - 1 per axis) or None.
            chunk: the tiles.
            alike: whether all share one mask.
            keys: (tiles * j,), positions of the keys.

        Returns:
            out (tiles * i, B, Hq, Dv) and lse (tiles * i, B, Hq, 1) or None.
        """
        count, (_, batch, kv_heads, _) = chunk.stop - chunk.start, k.shape
        group = q.shape[2] // kv_heads
        if alike and self.full and bias is None and self.kept is None:
            mask = empty = None
        else:
            visible, bias_index = self._visible(slice(chunk.start, chunk.start + 1) if alike else chunk)
            kept = None if self.kept is None else rearrange(self.kept[keys], "(t j) b -> t b 1 j", t=count)
            mask, empty = _mask(visible, bias_index, bias, kept, batch, kv_heads, group)
        q = rearrange(q, "(t i) b (h g) d -> t (b h) (g i) d", t=count, h=kv_heads)
        k, v = (rearrange(x, "(t j) b h d -> t (b h) j d", t=count) for x in (k, v))
        if self.need_lse:
            out, lse = _attend_with_lse(q, k, v, mask, self.scale)
        else:
            mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
            out, lse = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale), None
        if empty is not None:
            out = out.masked_fill(empty, 0.0)
            lse = None if lse is None else lse.masked_fill(empty, -torch.inf)
        pattern, sizes = "t (b h) (g i) d -> (t i) b (h g) d", {"h": kv_heads, "g": group}
        return rearrange(out, pattern, **sizes), None if lse is None else rearrange(lse, pattern, **sizes)

    def _visible(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """(tiles, i, j) both: whether a key is visible, and its flat entry of a table of relative position biases."""
        seen, entry = ([of_axis[n][of_axis[0][chunk]] for of_axis in self._by_axis()] for n in (3, 4))
        return _outer(seen, operator.and_), _outer(entry, operator.add)

    def _by_axis(self) -> list[list[Tensor]]:
        return [self.tables[i : i + 5] for i in range(0, len(self.tables), 5)]


class _Recomputed(torch.autograd.Function):
    """`Tiles.attend` that keeps only its arguments for the backward pass, which runs every chunk once more: the
    tokens of all halos are several times the tokens of the grid, and PyTorch would add up one gradient of the grid's
    size for every chunk."""

    @staticmethod
    def forward(
        ctx: Any, tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ctx.tiles = tiles
        ctx.save_for_backward(q, k, v, bias)
        return tiles.attend(q, k, v, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        tiles, saved = ctx.tiles, [t for t in ctx.saved_tensors if t is not None]
        grads = [torch.zeros_like(t, dtype=_wide(t.dtype)) for t in saved]
        rows = 0
        for chunk, alike in tiles.chunks():
            queries, keys = tiles.positions(chunk)
            places = (queries, keys, keys)
            leaves = [t.index_select(0, place).requires_grad_() for t, place in zip(saved, places)]
            bias = [t.detach().requires_grad_() for t in saved[3:]]
            with torch.enable_grad():
                outputs = tiles.attend_chunk(*leaves, bias[0] if bias else None, chunk, alike, keys)
            of_chunk = slice(rows, rows := rows + len(queries))
            pairs = [(out, g[of_chunk]) for out, g in zip(outputs, (grad_out, grad_lse)) if out is not None]
            parts = torch.autograd.grad([out for out, _ in pairs], leaves + bias, [g for _, g in pairs])
            for total, part, place in zip(grads, parts, places):
                total.index_add_(0, place, part.to(total.dtype))
            for total, part in zip(grads[3:], parts[3:]):
                total += part
        grads = [g.to(t.dtype) for g, t in zip(grads, saved)]
        return None, *grads, *[None] * (4 - len(grads))


def chunk_step(q: Tensor, k: Tensor, v: Tensor, sizes: tuple[int, int, bool, int, int], broadcast: bool) -> int:
    """How many tiles make a chunk; `broadcast` says that one mask serves all heads and the logits are never stored."""
    (_, batch, heads, _), (*_, num_queries, num_keys) = q.shape, sizes
    logits = num_queries * num_keys * (1 if broadcast else batch * heads)
    tokens = batch * (q.shape[-1] + v.shape[-1]) * (num_queries * heads + num_keys * k.shape[-2])
    on_cpu = q.device.type == "cpu" and not torch.compiler.is_compiling()
    return max(1, (CHUNK_ELEMENTS if on_cpu else CHUNK_ELEMENTS_ELSEWHERE) // max(1, logits + tokens))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sees_all(axis: AxisPlan) -> bool:
    return axis.kernel == axis.length and not axis.causal


def _attend_densely(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    q, k, v = (rearrange(t, "b ... h d -> b h (...) d") for t in (query, key, value))
    k, v = (t.repeat_interleave(query.shape[-2] // key.shape[-2], dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return rearrange(out, "b h i d -> b i h d").reshape(*query.shape[:-1], value.shape[-1])


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
    batch: int,
    kv_heads: int,
    group: int,
) -> tuple[Tensor, Tensor | None]:
    """The mask of some tiles; visible and bias_index (tiles, i, j), kept (tiles, B, 1, j).

    Returns:
        mask, to broadcast to (tiles, B * Hkv, group * i, j): bool, or with a bias the number to add to each logit;
        and, with a key mask, which queries see no key, to broadcast to (tiles, B * Hkv, group * i, 1). Those see
        every key in the mask, since a softmax over nothing has no gradient.
    """
    if kept is None:
        mask, empty = repeat(visible, "t i j -> t 1 (g i) j", g=group), None
    else:
        seen = visible[:, None] & kept
        none = ~seen.any(dim=-1, keepdim=True)
        mask, empty = (repeat(x, "t b i j -> t (b h) (g i) j", h=kv_heads, g=group) for x in (seen | none, none))
    if bias is None:
        return mask, empty
    entries = bias.flatten(1)[:, bias_index]
    entries = repeat(entries, "(h g) t i j -> t (b h) (g i) j", h=kv_heads, b=batch)
    return entries.masked_fill(~mask, -torch.inf), empty


def _attend_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention written out, in float32 at least: PyTorch's own does not give the lse."""
    wide = _wide(q.dtype)
    logits = scale * q.to(wide) @ k.to(wide).mT
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    lse = logits.logsumexp(dim=-1, keepdim=True)
    return ((logits - lse).exp() @ v.to(wide)).to(q.dtype), lse


@constant_in_traces
def _tiling_sizes(axes: tuple[AxisKey, ...]) -> tuple[int, int, bool, int, int]:
    """Tiles in all, tiles alike, whether those need no mask, queries and keys of a tile."""
    tiling = _make_tiling(axes)
    return tiling.tiles, tiling.alike, tiling.is_full, tiling.queries, tiling.keys


@constant_in_traces
def _tiling_tables(axes: tuple[AxisKey, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Per axis (tile of the axis for each tile of the grid, query, key, visible, bias_index), then each position's
    slot.

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

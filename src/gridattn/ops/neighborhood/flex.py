"""Neighborhood attention by PyTorch's FlexAttention, over tokens in tile order.

Tokens of a tile follow each other, so a block of FlexAttention is a tile of the grid (`TileLayout`, dilation groups in
tiles of their own). Which tiles visit which, and which of them need no mask, follows from per-axis intervals (`slots`);
inside the others, the mask compares the place of a key with the window of a query, axis by axis.
"""

from functools import lru_cache
from itertools import product
from math import prod

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from gridattn.ops.constants import constant_in_traces, to_tensors
from gridattn.ops.neighborhood import tiled
from gridattn.ops.neighborhood.layout import TileLayout
from gridattn.ops.neighborhood.plan import AxisPlan, Plan
from gridattn.ops.neighborhood.slots import AxisSlots, AxisView, spread, visits
from gridattn.ops.neighborhood.tables import AxisKey, axis_keys

BLOCK = 128
"""Tokens of a tile: the smallest block that FlexAttention takes with its default settings everywhere."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
RECOMPILE_LIMIT = 256
"""Problems of different shapes and settings in one process."""


def supports(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> str | None:
    """Why FlexAttention cannot take a problem, or None if it can."""
    device = query.device.type
    if device not in ("cuda", "xpu", "cpu"):
        return f"FlexAttention does not run on {device}"
    if device == "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return "FlexAttention has no gradient on the CPU"
    if query.dtype not in DTYPES:
        return f"{query.dtype} is not one of {', '.join(map(str, DTYPES))}"
    if device != "cpu" and min(query.shape[-1], value.shape[-1]) < 16:
        return "FlexAttention on a GPU takes at least 16 channels a head"
    return None


def supports_layout(layout: TileLayout, plan: Plan) -> str | None:
    """Why FlexAttention cannot take tokens in an order, or None if it can."""
    tokens = prod(layout.tile)
    if tokens < BLOCK or tokens & (tokens - 1):
        return f"its tiles of {layout.tile} hold {tokens} tokens; a power of two of at least {BLOCK} is needed"
    dilation = tuple(axis.dilation for axis in plan.axes)
    if any(own not in (1, of_axis) for own, of_axis in zip(layout.dilation, dilation)):
        return f"the layout has dilation {layout.dilation}; 1 or that of the attention, {dilation}, is needed"
    return None


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
    """Attention of every query over its window; arguments and results as in `tiled.attend`.

    On the CPU and outside `torch.compile`, FlexAttention forms all logits of the grid at once.
    """
    keys = axis_keys(plan)
    layout = TileLayout([axis.length for axis in plan.axes], _best_tile(keys), [axis.dilation for axis in plan.axes])
    q, k, v = (layout.to_tiles(t) for t in (query, key, value))
    kept = None if key_mask is None else layout.to_tiles(key_mask)
    out, lse = attend_in_layout(q, k, v, layout, plan, scale, bias, kept, need_lse)
    return layout.to_grid(out), None if lse is None else layout.to_grid(lse)


def attend_in_layout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TileLayout,
    plan: Plan,
    scale: float,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`attend` on tokens that are in tile order; what padded queries get is finite but has no meaning.

    Args:
        query: (B, layout.tokens, Hq, D).
        key: (B, layout.tokens, Hkv, D).
        value: (B, layout.tokens, Hkv, Dv).
        layout: the order, see `supports_layout`.
        plan, scale, bias: as in `attend`.
        key_mask: (B, layout.tokens) bool.
        need_lse: whether to give the lse.

    Returns:
        out (B, layout.tokens, Hq, Dv) and lse (B, layout.tokens, Hq), or None unless needed.
    """
    keys = axis_keys(plan)
    if not len(query):
        q, k, v = (layout.to_grid(t) for t in (query, key, value))
        out, lse = tiled.attend(q, k, v, plan, scale, bias, None, need_lse)
        return layout.to_tiles(out), None if lse is None else layout.to_tiles(lse)
    q, k, v = (rearrange(t, "b i h d -> b h i d") for t in (query, key, value))
    if query.device.type == "cpu":
        q, k, v = (t.contiguous() for t in (q, k, v))  # its compiled kernel does not take views of other results
    if not torch.is_grad_enabled():  # on the CPU, FlexAttention refuses what could require a gradient elsewhere
        q, k, v = (t.detach() for t in (q, k, v))
    views = _views(keys, layout.tile, layout.dilation, query.device)
    blocks = _blocks(keys, layout.tile, layout.dilation, key_mask is not None, query.device)
    steps = tuple(axis[3] // groups for axis, groups in zip(keys, layout.dilation))
    entries = () if bias is None else _entries(keys, layout.tile, layout.dilation, query.device)
    table = None if bias is None else bias.flatten(1).to(torch.promote_types(query.dtype, torch.float32))
    problem = (q, k, v, blocks, views, steps, prod(layout.tile), entries, table, key_mask, scale, need_lse)
    if query.device.type == "cpu" or torch.compiler.is_compiling():
        out, lse = _flex(*problem)
    else:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
            out, lse = _compiled_flex()(*problem)
    return rearrange(out, "b h i d -> b i h d"), None if lse is None else rearrange(lse, "b h i -> b i h")


def _flex(
    q: Tensor, k: Tensor, v: Tensor, blocks: tuple[Tensor, ...], views: tuple[Tensor, ...], steps: tuple[int, ...],
    block: int, entries: tuple[Tensor, ...], table: Tensor | None, kept: Tensor | None, scale: float, need_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """FlexAttention over (B, heads, tokens, channels), with all tables as arguments: graphs differ by shapes alone."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i >= 0
        for axis, step in enumerate(steps):
            first, stop, place = views[3 * axis : 3 * axis + 3]
            seen = seen & (place[j] >= first[i]) & (place[j] < stop[i])
            if step > 1:
                seen = seen & ((place[j] - first[i]) % step == 0)
        return seen if kept is None else seen & kept[b, j]

    def with_bias(logit: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert table is not None
        entry = torch.clamp(entries[1][j] - entries[0][i], 0, table.shape[1] - 1)  # of a key that is not seen, any
        return logit + table[h, entry]

    full = (None,) * 4 if len(blocks) == 4 else blocks[4:]
    mask = BlockMask(
        seq_lengths=(q.shape[2], q.shape[2]),
        kv_num_blocks=blocks[0],
        kv_indices=blocks[1],
        q_num_blocks=blocks[2],
        q_indices=blocks[3],
        full_kv_num_blocks=full[0],
        full_kv_indices=full[1],
        full_q_num_blocks=full[2],
        full_q_indices=full[3],
        BLOCK_SIZE=(block, block),
        mask_mod=visible,
    )
    score_mod = None if table is None else with_bias
    options = {"score_mod": score_mod, "block_mask": mask, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if not need_lse:
        return flex_attention(q, k, v, **options), None
    out, extra = flex_attention(q, k, v, **options, return_aux=AuxRequest(lse=True))
    return out, extra.lse


@lru_cache(maxsize=1)
def _compiled_flex():
    return torch.compile(_flex, dynamic=False, fullgraph=True)


@constant_in_traces
def _best_tile(axes: tuple[AxisKey, ...]) -> tuple[int, ...]:
    """The tile of `BLOCK` tokens, a power of two along each axis, with the fewest visits; the squarest among equals."""
    return _find_tile(axes)


@lru_cache(maxsize=1024)
def _find_tile(axes: tuple[AxisKey, ...]) -> tuple[int, ...]:
    sides = [1 << n for n in range(BLOCK.bit_length())]

    def along(axis: AxisKey, tile: int) -> int:
        slots = AxisSlots(axis[0], tile, axis[3])
        first, stop = AxisView(AxisPlan(*axis), slots, slots).visited
        return int((stop - first).sum())

    visits_along = [{tile: along(axis, tile) for tile in sides} for axis in axes]
    tiles = [tile for tile in product(sides, repeat=len(axes)) if prod(tile) == BLOCK]
    return min(tiles, key=lambda tile: (prod(v[t] for v, t in zip(visits_along, tile)), max(tile), tile))


@constant_in_traces
def _views(
    axes: tuple[AxisKey, ...], tile: tuple[int, ...], dilation: tuple[int, ...], device: torch.device
) -> tuple[Tensor, ...]:
    """Per axis, each (tokens,) int32: first and last place, exclusive, that the token sees; its own place."""
    return to_tensors(_build_views, device, axes, tile, dilation)


def _build_views(axes: tuple[AxisKey, ...], tile: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    slots, views = _slots(axes, tile, dilation)
    places = [np.arange(axis.tiles * axis.tile) for axis in slots]
    tables = zip(*(spread(slots, t) for t in ([v.first for v in views], [v.stop for v in views], places)))
    return tuple(table.astype(np.int32) for of_axis in tables for table in of_axis)


@constant_in_traces
def _entries(
    axes: tuple[AxisKey, ...], tile: tuple[int, ...], dilation: tuple[int, ...], device: torch.device
) -> tuple[Tensor, ...]:
    """Both (tokens,) int32: key minus query is the entry of a flat table of relative position biases."""
    return to_tensors(_build_entries, device, axes, tile, dilation)


def _build_entries(
    axes: tuple[AxisKey, ...], tile: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
    slots, _ = _slots(axes, tile, dilation)
    steps = [prod(2 * kernel - 1 for _, kernel, *_ in axes[n + 1 :]) for n in range(len(axes))]
    places = [of_axis.index // axis[3] * step for of_axis, axis, step in zip(slots, axes, steps)]
    of_key = np.sum(spread(slots, places), axis=0)
    centre = sum((axis[1] - 1) * step for axis, step in zip(axes, steps))
    return (of_key - centre).astype(np.int32), of_key.astype(np.int32)


@constant_in_traces
def _blocks(
    axes: tuple[AxisKey, ...], tile: tuple[int, ...], dilation: tuple[int, ...], masked: bool, device: torch.device
) -> tuple[Tensor, ...]:
    """The block lists of FlexAttention: visited key tiles of each query tile and the other way around.

    Returns:
        Number (1, 1, tiles) and list (1, 1, tiles, tiles) of the tiles that need a mask, by query tile and by key tile;
        then, unless there are none, the same four of those that need none. All need one where keys are `masked`.
    """
    return to_tensors(_build_blocks, device, axes, tile, dilation, masked)


def _build_blocks(
    axes: tuple[AxisKey, ...], tile: tuple[int, ...], dilation: tuple[int, ...], masked: bool
) -> tuple[np.ndarray, ...]:
    from torch.nn.attention.flex_attention import BlockMask

    pairs = visits(_slots(axes, tile, dilation)[1])
    full = pairs.full & (not masked)
    partial = _lists(pairs.row[~full], pairs.column[~full], pairs.rows)
    whole = _lists(pairs.row[full], pairs.column[full], pairs.rows) if full.any() else (None, None)
    mask = BlockMask.from_kv_blocks(*partial, *whole, BLOCK_SIZE=prod(tile))
    fields = (mask.kv_num_blocks, mask.kv_indices, mask.q_num_blocks, mask.q_indices)
    fields += (mask.full_kv_num_blocks, mask.full_kv_indices, mask.full_q_num_blocks, mask.full_q_indices)
    return tuple(field.numpy() for field in fields if field is not None)


def _lists(row: np.ndarray, column: np.ndarray, tiles: int) -> tuple[Tensor, Tensor]:
    """Pairs in order of their rows -> (1, 1, tiles) how many each row has, and (1, 1, tiles, tiles) which."""
    count = np.bincount(row, minlength=tiles)
    lists = np.zeros((tiles, tiles), dtype=np.int32)
    lists[row, np.arange(len(row)) - (np.cumsum(count) - count)[row]] = column
    return torch.from_numpy(count.astype(np.int32))[None, None], torch.from_numpy(lists)[None, None]


def _slots(
    axes: tuple[AxisKey, ...], tile: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[AxisSlots, ...], tuple[AxisView, ...]]:
    slots = tuple(AxisSlots(axis[0], *of_axis) for axis, *of_axis in zip(axes, tile, dilation))
    return slots, tuple(AxisView(AxisPlan(*axis), own, own) for axis, own in zip(axes, slots))

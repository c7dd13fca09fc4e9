"""The CPU kernels of neighborhood attention: forward and backward over the blocks of a `Tiling`, compiled by numba.

Each kernel takes work items (sample and key head, block) from a shared counter until none is left, so any number of
threads may run it at once; whatever an item writes belongs to it alone. Tensors arrive as flat views of their memory,
each with a row of strides (batch, three axes, head). Arithmetic is in float32, or in float64 for tensors of float64.

Logits are kept in base 2: with z = log2(e) * (scale * q.k + bias), P = 2^(z - log2(sum 2^z)).
"""

import inspect
import math
from collections.abc import Callable
from hashlib import sha256
from types import ModuleType
from typing import Any

import numpy as np
from numba import njit

from gridattn.ops.neighborhood import cpu_blocks, cpu_products, cpu_team, cpu_tiles, cpu_vector
from gridattn.ops.neighborhood.cpu_blocks import (
    HIDDEN,
    LOG2_E,
    QUERY_BLOCKS,
    add,
    add_bias,
    add_bias_gradient,
    add_box,
    copy_box,
    fill,
    hide_keys,
    hide_masked,
    lay_out_pattern,
    load_queries,
    multiply,
    numbers,
    open_block,
    open_run,
    open_tile,
    room,
    scratch_tables,
    store_queries,
    triples,
)
from gridattn.ops.neighborhood.cpu_products import (
    KEY_BLOCK,
    QUERY_BLOCK,
    dot,
    exponentials,
    outer_add,
    scores,
    transpose,
    weighted_sum,
)
from gridattn.ops.neighborhood.cpu_team import run_team
from gridattn.ops.neighborhood.cpu_threads import Kernel
from gridattn.ops.neighborhood.cpu_tiles import LANES
from gridattn.ops.neighborhood.cpu_vector import take_next

LN_2 = math.log(2.0)


def compiled(function: Callable[..., None]) -> Any:
    """Compiles on the first call, and keeps the result on disk where there is a folder that may be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


def sources(*modules: ModuleType) -> np.ndarray:
    """An argument whose type names the text of modules.

    numba's cache of compiled kernels goes by the kernel's own file and the types of its arguments alone.
    """
    text = "".join(map(inspect.getsource, modules))
    return np.empty(0, dtype=[(f"sources_{sha256(text.encode()).hexdigest()[:16]}", np.int8)])


SOURCES = sources(cpu_blocks, cpu_products, cpu_team, cpu_tiles, cpu_vector)


@compiled
def _forward(
    query, key, value, bias, key_mask, out, lse, strides, sizes, scale,
    step, kernel, shape, tiles, runs, blocks, patterns, capacity, items, counter, texts,
):  # fmt: skip
    """Attends for the items of the forward pass until `counter` reaches their number.

    Args:
        query, key, value, out, lse: tensors. bias: a flat table per head, or empty. key_mask: bool, or empty.
        strides: (6, 5) of query, key, value, key_mask, out, lse.
        sizes: batch, query heads, key heads, depth of keys, depth of values.
        step, kernel, shape: dilation, kernel size and tile shape along each axis.
        tiles, runs, blocks, patterns, capacity: see `Tiling`. items: the blocks to work on.
        counter: (1,) the next item, shared by all threads. texts: SOURCES.
    """
    batch, heads, key_heads, depth, value_depth = sizes
    members = heads // key_heads
    pitch, value_pitch = -(-depth // LANES) * LANES, -(-value_depth // LANES) * LANES
    bias_size, masked = len(bias) // heads, len(key_mask) > 0
    q_stride, k_stride, v_stride, mask_stride = strides[0], strides[1], strides[2], strides[3]
    out_stride, lse_stride = strides[4], strides[5]
    most_keys = -(-capacity[0] // KEY_BLOCK) * KEY_BLOCK
    (box, run_begin, run_end), run_tables, tile, (rows, lane_from, lane_to), key_groups = scratch_tables(most_keys)
    (pattern, extent, tile_begin, tile_end), (group_keys, group_count) = run_tables, key_groups
    keys, values, penalty = (
        room(lse, capacity[1], pitch),
        room(lse, capacity[1], value_pitch),
        numbers(lse, capacity[1]),
    )
    visible, p = room(lse, most_keys, LANES), room(lse, most_keys, LANES)
    logits = room(lse, most_keys, LANES) if masked else visible
    q_rows, q_lanes, sums = room(lse, LANES, pitch), room(lse, LANES, pitch), room(lse, LANES, value_pitch)
    peak, total, ones = numbers(lse, LANES), numbers(lse, LANES), np.ones(LANES, lse.dtype)

    while True:
        item = take_next(counter)
        if item >= batch * key_heads * len(items):
            break
        sample, key_head = divmod(open_block(item, items, blocks, box, run_begin, run_end), key_heads)
        copy_box(key, k_stride, sample, key_head, step, box, depth, pitch, keys)
        copy_box(value, v_stride, sample, key_head, step, box, value_depth, value_pitch, values)
        if masked:
            hide_masked(key_mask, mask_stride, sample, step, box, keys, values, penalty)
        for head in range(key_head * members, (key_head + 1) * members):
            for run in range(triples(run_begin, run_end)):
                open_run(run, run_begin, run_end, runs, tiles, patterns, pattern, extent, tile_begin, tile_end)
                count = lay_out_pattern(
                    pattern, extent, box, visible, rows, lane_from, lane_to, group_keys, group_count
                )
                padded = -(-count // KEY_BLOCK) * KEY_BLOCK
                if bias_size:
                    add_bias(pattern, extent, kernel, bias, head * bias_size, visible)
                for index in range(triples(tile_begin, tile_end)):
                    first = open_tile(index, tile_begin, tile_end, tiles, box, tile)
                    load_queries(query, scale * LOG2_E, q_stride, sample, head, step, tile, shape, depth, pitch, q_rows)
                    transpose(q_rows, pitch, q_lanes)
                    if masked:
                        hide_keys(visible, penalty, first, rows, padded, logits)
                    scores(keys, first * pitch, pitch, depth, rows, padded, q_lanes, logits, LANES, p, peak)
                    for lane in range(LANES):
                        peak[lane] = max(
                            peak[lane], HIDDEN / 10
                        )  # where nothing is visible, 2^(HIDDEN - peak) is still 0
                    exponentials(p, padded, peak, total)
                    for group in range(QUERY_BLOCKS):
                        weighted_sum(
                            p, group * QUERY_BLOCK, group_keys, group * most_keys, group_count[group], rows,
                            values, first * value_pitch, value_pitch, sums, group * QUERY_BLOCK * value_pitch,
                        )  # fmt: skip
                    for lane in range(LANES):
                        if total[lane] == 0:
                            peak[lane] = -np.inf
                        else:
                            peak[lane] = (peak[lane] + math.log2(total[lane])) * LN_2
                            total[lane] = 1 / total[lane]
                    store_queries(
                        sums, total, out_stride, sample, head, step, tile, shape, value_depth, value_pitch, out
                    )
                    store_queries(peak, ones, lse_stride, sample, head, step, tile, shape, 1, 1, lse)


@compiled
def _backward(
    query, key, value, bias, key_mask, out, lse, d_out, d_lse, d_query, d_key, d_value, d_bias, strides, sizes, scale,
    step, kernel, shape, tiles, runs, blocks, patterns, capacity, items, counter, texts,
):  # fmt: skip
    """Adds the gradients of the items of one phase, whose blocks share no key; dS = P * (dP - sum(dO * O) + dlse).

    Args beyond those of `forward`:
        strides: (11, 5) of query, key, value, key_mask, out, lse, d_out, d_lse, d_query, d_key, d_value.
        d_key, d_value: gradients to add to, of the type of `lse`. d_bias: likewise, the bias tables of every item.
    """
    batch, heads, key_heads, depth, value_depth = sizes
    members = heads // key_heads
    pitch, value_pitch = -(-depth // LANES) * LANES, -(-value_depth // LANES) * LANES
    bias_size, masked = len(bias) // heads, len(key_mask) > 0
    q_stride, k_stride, v_stride, mask_stride = strides[0], strides[1], strides[2], strides[3]
    out_stride, lse_stride, do_stride, d_lse_stride = strides[4], strides[5], strides[6], strides[7]
    dq_stride, dk_stride, dv_stride = strides[8], strides[9], strides[10]
    most_keys = -(-capacity[0] // KEY_BLOCK) * KEY_BLOCK
    (box, run_begin, run_end), run_tables, tile, (rows, lane_from, lane_to), key_groups = scratch_tables(most_keys)
    (pattern, extent, tile_begin, tile_end), (group_keys, group_count) = run_tables, key_groups
    keys, values, penalty = (
        room(lse, capacity[1], pitch),
        room(lse, capacity[1], value_pitch),
        numbers(lse, capacity[1]),
    )
    d_keys, d_values = room(lse, capacity[1], pitch), room(lse, capacity[1], value_pitch)
    visible, p, ds = room(lse, most_keys, LANES), room(lse, most_keys, LANES), room(lse, most_keys, LANES)
    logits = room(lse, most_keys, LANES) if masked else visible
    d_logits = room(lse, most_keys, LANES)
    q_rows, q_lanes, dq_rows = room(lse, LANES, pitch), room(lse, LANES, pitch), room(lse, LANES, pitch)
    out_rows, do_rows, do_lanes = (
        room(lse, LANES, value_pitch),
        room(lse, LANES, value_pitch),
        room(lse, LANES, value_pitch),
    )
    delta, shift, d_shift, unused = numbers(lse, LANES), numbers(lse, LANES), numbers(lse, LANES), numbers(lse, LANES)
    scales = np.full(LANES, scale, lse.dtype)

    while True:
        item = take_next(counter)
        if item >= batch * key_heads * len(items):
            break
        sample, key_head = divmod(open_block(item, items, blocks, box, run_begin, run_end), key_heads)
        copy_box(key, k_stride, sample, key_head, step, box, depth, pitch, keys)
        copy_box(value, v_stride, sample, key_head, step, box, value_depth, value_pitch, values)
        if masked:
            hide_masked(key_mask, mask_stride, sample, step, box, keys, values, penalty)
        fill(d_keys, 0)
        fill(d_values, 0)
        for member in range(members):
            head = key_head * members + member
            for run in range(triples(run_begin, run_end)):
                open_run(run, run_begin, run_end, runs, tiles, patterns, pattern, extent, tile_begin, tile_end)
                count = lay_out_pattern(
                    pattern, extent, box, visible, rows, lane_from, lane_to, group_keys, group_count
                )
                padded = -(-count // KEY_BLOCK) * KEY_BLOCK
                if bias_size:
                    add_bias(pattern, extent, kernel, bias, head * bias_size, visible)
                    fill(d_logits, 0)
                fill(q_rows, 0)
                fill(do_rows, 0)
                for lane in range(LANES):
                    shift[lane] = -np.inf
                for index in range(triples(tile_begin, tile_end)):
                    first = open_tile(index, tile_begin, tile_end, tiles, box, tile)
                    load_queries(query, scale * LOG2_E, q_stride, sample, head, step, tile, shape, depth, pitch, q_rows)
                    load_queries(
                        out, 1.0, out_stride, sample, head, step, tile, shape, value_depth, value_pitch, out_rows
                    )
                    load_queries(
                        d_out, 1.0, do_stride, sample, head, step, tile, shape, value_depth, value_pitch, do_rows
                    )
                    load_queries(lse, LOG2_E, lse_stride, sample, head, step, tile, shape, 1, 1, shift)
                    load_queries(d_lse, 1.0, d_lse_stride, sample, head, step, tile, shape, 1, 1, d_shift)
                    for lane in range(LANES):
                        dot(do_rows, out_rows, lane * value_pitch, value_pitch, delta, lane)
                        d_shift[lane] -= delta[lane]
                        if shift[lane] == -np.inf:  # no query, or one that sees nothing: P = 2^(z - shift) is 0
                            shift[lane] = -HIDDEN
                            d_shift[lane] = 0
                    transpose(q_rows, pitch, q_lanes)
                    transpose(do_rows, value_pitch, do_lanes)
                    if masked:
                        hide_keys(visible, penalty, first, rows, padded, logits)
                    scores(keys, first * pitch, pitch, depth, rows, padded, q_lanes, logits, LANES, p, unused)
                    exponentials(p, padded, shift, unused)
                    scores(
                        values, first * value_pitch, value_pitch, value_depth, rows, padded,
                        do_lanes, d_shift, 0, ds, unused,
                    )  # fmt: skip
                    multiply(ds, p, padded)
                    for group in range(QUERY_BLOCKS):
                        weighted_sum(
                            ds, group * QUERY_BLOCK, group_keys, group * most_keys, group_count[group], rows,
                            keys, first * pitch, pitch, dq_rows, group * QUERY_BLOCK * pitch,
                        )  # fmt: skip
                    store_queries(dq_rows, scales, dq_stride, sample, head, step, tile, shape, depth, pitch, d_query)
                    outer_add(ds, lane_from, lane_to, rows, count, q_rows, pitch, d_keys, first * pitch)
                    outer_add(p, lane_from, lane_to, rows, count, do_rows, value_pitch, d_values, first * value_pitch)
                    if bias_size:
                        add(d_logits, ds, count)
                if bias_size:
                    bias_start = (item * members + member) * bias_size
                    add_bias_gradient(pattern, extent, kernel, d_logits, visible, bias_start, d_bias)
        add_box(d_keys, LN_2, dk_stride, sample, key_head, step, box, depth, pitch, d_key)
        add_box(d_values, 1.0, dv_stride, sample, key_head, step, box, value_depth, value_pitch, d_value)


@compiled
def _forward_on_team(start_region, threads, *problem):
    return run_team(_forward, problem, start_region, threads)


@compiled
def _backward_on_team(start_region, threads, *problem):
    return run_team(_backward, problem, start_region, threads)


forward, backward = Kernel(_forward, _forward_on_team), Kernel(_backward, _backward_on_team)

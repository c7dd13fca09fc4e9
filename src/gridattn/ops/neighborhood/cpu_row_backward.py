"""The row kernel of neighborhood attention on the CPU: backward, over the blocks of `RowBlocks`, compiled by numba.

Threads, views of memory and base 2 are as in `cpu_kernels`. A block first goes through its queries, which gives

    P = 2^(z - log2(e) * lse),    dS = P * (dO.v + dlse - sum P * dO.v),    dQ = scale * sum over keys of dS * k

and keeps P and dS of a row of queries with its keys side by side, so that they are the weights of its keys:

    dK = scale * sum over queries of dS * q,    dV = sum over queries of P * dO
"""

import numpy as np
from numba import njit

from gridattn.ops.neighborhood import (
    cpu_blocks,
    cpu_kernels,
    cpu_products,
    cpu_row_blocks,
    cpu_row_gradients,
    cpu_row_kernel,
    cpu_row_products,
    cpu_rows,
    cpu_team,
    cpu_vector,
)
from gridattn.ops.neighborhood.cpu_blocks import LOG2_E, numbers
from gridattn.ops.neighborhood.cpu_kernels import LN_2, compiled, sources
from gridattn.ops.neighborhood.cpu_row_blocks import BAND
from gridattn.ops.neighborhood.cpu_row_gradients import add_windows, keep_entries, key_weights, row_dots, take_columns
from gridattn.ops.neighborhood.cpu_row_kernel import copy_rows, offset_of
from gridattn.ops.neighborhood.cpu_row_products import (
    DEPTHS_AT_ONCE,
    ROW_LANES,
    row_gradients,
    row_mixture,
    straight_mixture,
    write_columns,
)
from gridattn.ops.neighborhood.cpu_team import run_team
from gridattn.ops.neighborhood.cpu_threads import Kernel
from gridattn.ops.neighborhood.cpu_vector import take_next

SOURCES = sources(
    cpu_blocks, cpu_kernels, cpu_products, cpu_row_blocks, cpu_row_gradients, cpu_row_kernel, cpu_row_products,
    cpu_rows, cpu_team, cpu_vector,
)  # fmt: skip


@njit(nogil=True)
def _collect_bias(sums, kinds, kernel, start, d_bias):
    """Adds the lanes of every kind of vector to the entries of a head's bias table."""
    for kind in range(len(kinds)):
        for row in range((2 * kernel[0] - 1) * (2 * kernel[1] - 1)):
            at = start + row * (2 * kernel[2] - 1)
            for column in range(kernel[2]):
                for lane in range(ROW_LANES):
                    if kinds[kind, lane] >= 0:
                        d_bias[at + kinds[kind, lane] + column] += sums[kind, row, column, lane]


@njit(nogil=True)
def _read_rows(
    pair, keys_done, tensors, strides, of, boxes, sizes, unit, factor, depths, pitches, margin, kernel, buffers
):  # fmt: skip
    """Copies what a pair of query rows reads and no pair before; returns how many rows of keys are there now."""
    query, key, value, out, lse, d_out, d_lse = tensors
    keys, values, queries, d_outs, shift, offset = buffers
    (k_pitch, v_pitch), (pitch, query_pitch), (key_box, query_box) = depths, pitches, boxes
    depth, value_depth = sizes[3], sizes[4]
    sample, head, step = of
    members = 2 if pair[2] >= 0 else 1
    inside, last = pair[3], (pair[4] + kernel[0] - 1) * key_box[3] + pair[4 + members] + kernel[1]
    for_keys, for_queries = (sample, head, step, key_box, unit), (sample, head, step, query_box)
    copy_rows(keys_done, last, key, strides[1], *for_keys, depth, k_pitch, pitch, keys, 0)
    copy_rows(keys_done, last, value, strides[2], *for_keys, value_depth, v_pitch, pitch, values, 0)
    stop = inside + members
    copy_rows(inside, stop, query, strides[0], *for_queries, factor, depth, k_pitch, query_pitch, queries, margin)
    copy_rows(inside, stop, d_out, strides[5], *for_queries, unit, value_depth, v_pitch, query_pitch, d_outs, margin)
    for m in range(members):
        at = np.empty(4, np.int64)  # of out, lse, d_out, d_lse
        for i in range(4):
            at[i] = offset_of(strides[3 + i], sample, head, pair[0], pair[1 + m], query_box[4])
        apart, to = step[2] * strides[3:7, 3], (inside + m) * query_pitch + margin
        for x in range(query_box[5]):
            shift[to + x] = lse[at[1] + x * apart[1]] * LOG2_E
            offset[to + x] = d_lse[at[3] + x * apart[3]]
        row_dots(d_out, at[2], apart[2], out, at[0], apart[0], query_box[5], value_depth, offset, to)
    return max(keys_done, last)


@compiled
def _backward_rows(
    query, key, value, bias, out, lse, d_out, d_lse, d_query, d_key, d_value, d_bias, strides, sizes, scale, bias_size,
    step, kernel, areas, pairs, due, key_pairs, columns, vectors, lanes, kinds, key_vectors, places, origins,
    capacity, items, counter, texts,
):  # fmt: skip
    """Gives the gradients of the items until `counter` reaches their number.

    Args:
        query, key, value, out, lse, d_out, d_lse, d_query, d_key, d_value: tensors.
        bias: a flat table per head in base 2, or one of zeros for all heads.
        d_bias: zeros, a flat table per item, or empty.
        strides: (10, 5) of the tensors. sizes: as in the forward pass.
        bias_size: numbers of a head's table, or 0 where one serves all.
        step, ..., items: see `RowBlocks`. counter: (1,) the next item, shared by all threads. texts: SOURCES.
    """
    batch, heads, _, depth, value_depth = sizes
    key_rows, pitch, query_rows, query_pitch, margin, kept, kept_size, most_weights = capacity
    k_pitch = -(-depth // DEPTHS_AT_ONCE) * DEPTHS_AT_ONCE
    v_pitch = -(-value_depth // DEPTHS_AT_ONCE) * DEPTHS_AT_ONCE
    row_bias = 2 * kernel[2] - 1
    plane_bias = (2 * kernel[1] - 1) * row_bias
    window_rows, row_size = kernel[0] * kernel[1], row_bias * ROW_LANES
    window = window_rows * row_size

    keys, values = numbers(lse, key_rows * k_pitch * pitch), numbers(lse, key_rows * v_pitch * pitch)
    queries, d_outs = numbers(lse, query_rows * k_pitch * query_pitch), numbers(lse, query_rows * v_pitch * query_pitch)
    shift, offset = numbers(lse, query_rows * query_pitch), numbers(lse, query_rows * query_pitch)
    buffers = keys, values, queries, d_outs, shift, offset
    kept_p, kept_ds = np.empty(kept * kept_size, lse.dtype), np.empty(kept * kept_size, lse.dtype)
    kept_at = np.zeros(query_rows, np.int64)  # of a row of queries, counted from the block's first key
    beside = ROW_LANES * ROW_LANES  # numbers before the windows, which `keep_entries` reads
    p, ds = numbers(lse, beside + 2 * window), numbers(lse, beside + 2 * window)
    w_p, w_ds = numbers(lse, most_weights * ROW_LANES), numbers(lse, most_weights * ROW_LANES)
    q, g = numbers(lse, 2 * k_pitch * ROW_LANES), numbers(lse, 2 * v_pitch * ROW_LANES)
    mixed = numbers(lse, 2 * max(k_pitch, v_pitch) * ROW_LANES)
    unit, factor = np.full(ROW_LANES, 1.0, lse.dtype), np.full(1, scale * LOG2_E, lse.dtype)
    scales, key_factor = np.full(ROW_LANES, scale, lse.dtype), np.full(ROW_LANES, LN_2, lse.dtype)
    bias_rows = (2 * kernel[0] - 1) * (2 * kernel[1] - 1) if len(d_bias) else 0
    bias_sums = np.zeros((len(kinds), bias_rows, row_bias, ROW_LANES), lse.dtype)
    query_sizes = np.array([kernel[0], kernel[1], kernel[2], row_bias, plane_bias, row_bias])
    key_sizes, place = np.zeros(6, np.int64), np.zeros(8, np.int64)
    width = 0

    while True:
        item = take_next(counter)
        if item >= batch * heads * len(items):
            break
        sample, head = divmod(item // len(items), heads)
        area, column = areas[items[item % len(items), 0]], columns[items[item % len(items), 1]]
        of, keys_done, done = (sample, head, step), 0, area[10]
        boxes = (
            (area[0], area[1], area[2], area[3], column[0], column[1]),
            (area[4], area[5], area[6], area[7], column[2], column[3]),
        )
        if column[3] != width:  # what lies beside the queries of a row must not be a NaN
            queries[:] = 0
            d_outs[:] = 0
            width = column[3]
        bias_sums[:] = 0
        for band in range(area[8], area[9], BAND):
            band_end = min(band + BAND, area[9])
            for i in range(band, band_end):
                keys_done = _read_rows(
                    pairs[i], keys_done, (query, key, value, out, lse, d_out, d_lse), strides, of, boxes, sizes,
                    unit, factor, (k_pitch, v_pitch), (pitch, query_pitch), margin, kernel, buffers,
                )  # fmt: skip
                for m in range(2 if pairs[i, 2] >= 0 else 1):
                    first_row = pairs[i, 4] * kernel[1] + pairs[i, 5 + m]
                    at = (i - area[8]) % kept * kept_size + m * window
                    kept_at[pairs[i, 3] + m] = at - first_row * row_size
            for v in range(column[4], column[5]):
                first, count, at_query, at_key, least_bias, own_from, own_to, kind, entries = vectors[v]
                for i in range(band, band_end):
                    plane, inside = pairs[i, 0], pairs[i, 3]
                    members = 2 if pairs[i, 2] >= 0 else 1
                    place[0], place[1], place[2], place[3] = pairs[i, 4], pairs[i, 5], kernel[1], pairs[i, 6]
                    place[4], place[5] = kernel[1] * (members - 1), at_key
                    for m in range(members):
                        place[6 + m] = head * bias_size + pairs[i, 7 + m] * row_bias + least_bias
                        at = (inside + m) * k_pitch * query_pitch + at_query
                        take_columns(queries, at, query_pitch, k_pitch, q, m * k_pitch * ROW_LANES)
                        at = (inside + m) * v_pitch * query_pitch + at_query
                        take_columns(d_outs, at, query_pitch, v_pitch, g, m * v_pitch * ROW_LANES)
                    to = (i - area[8]) % kept * kept_size + (v - column[4]) * 2 * window + least_bias * ROW_LANES
                    own_p, own_ds, at = (kept_p, kept_ds, to) if entries == 0 else (p, ds, beside)
                    row_gradients(
                        keys, values, k_pitch, v_pitch, pitch, boxes[0][3], q, g, bias, shift, offset,
                        inside * query_pitch + at_query, (members - 1) * query_pitch, lanes[v], query_sizes, place,
                        own_p, own_ds, at,
                    )  # fmt: skip
                    if entries > 0:
                        for m in range(members):
                            given = at + m * window, lanes[v], window_rows, entries, row_bias
                            keep_entries(p, *given, kept_p, to + m * window)
                            keep_entries(ds, *given, kept_ds, to + m * window)
                    if own_from == own_to or pairs[i, 9] == pairs[i, 10]:
                        continue
                    row_mixture(keys, k_pitch, pitch, boxes[0][3], own_ds, at, lanes[v], query_sizes, place, mixed)
                    for m in range(pairs[i, 9], pairs[i, 10]):
                        to = offset_of(strides[7], *of[:2], plane, pairs[i, 1 + m], first + own_from * step[2])
                        start, apart = m * k_pitch * ROW_LANES + own_from, step[2] * strides[7, 3]
                        write_columns(mixed, start, scales, own_to - own_from, depth, d_query, to, apart)
                        for z in range(kernel[0] if bias_rows else 0):
                            row = kind * bias_rows + pairs[i, 7 + m] + z * (2 * kernel[1] - 1)
                            start = at + m * window + z * kernel[1] * row_size
                            add_windows(own_ds, start, kernel[1], kernel[2], row_bias, bias_sums, row * row_size)
            last = area[10] + due[band_end - 1]
            for v in range(column[6], column[7]):
                first, count, at_query, size, kept_from, origin = key_vectors[v]
                for i in range(done, last):
                    plane, planes = key_pairs[i, 0], key_pairs[i, 4]
                    members = 2 if key_pairs[i, 2] >= 0 else 1
                    most_rows = max(key_pairs[i, 6], key_pairs[i, 8])
                    for m in range(members):
                        row = (plane - area[0]) // step[0] * kernel[1] + (key_pairs[i, 1 + m] - area[2]) // step[1]
                        from_row = row * row_size + kept_from
                        for z in range(planes):
                            first_row = (key_pairs[i, 3] + z) * boxes[1][3] + key_pairs[i, 5 + 2 * m]
                            to = (m * planes + z) * most_rows * size * ROW_LANES
                            key_weights(
                                kept_p, kept_ds, kept_at, first_row, key_pairs[i, 6 + 2 * m], from_row,
                                places, origins, origin, size, w_p, w_ds, to,
                            )  # fmt: skip
                    key_sizes[0], key_sizes[1], key_sizes[2], key_sizes[3] = planes, most_rows, size, size
                    place[0], place[1:5], place[5] = key_pairs[i, 3], key_pairs[i, 5:9], at_query
                    straight_mixture(queries, k_pitch, query_pitch, boxes[1][3], w_ds, 0, key_sizes, place, mixed)
                    for m in range(members):
                        to = offset_of(strides[8], *of[:2], plane, key_pairs[i, 1 + m], first)
                        start, apart = m * k_pitch * ROW_LANES, step[2] * strides[8, 3]
                        write_columns(mixed, start, key_factor, count, depth, d_key, to, apart)
                    straight_mixture(d_outs, v_pitch, query_pitch, boxes[1][3], w_p, 0, key_sizes, place, mixed)
                    for m in range(members):
                        to = offset_of(strides[9], *of[:2], plane, key_pairs[i, 1 + m], first)
                        start, apart = m * v_pitch * ROW_LANES, step[2] * strides[9, 3]
                        write_columns(mixed, start, unit, count, value_depth, d_value, to, apart)
            done = last
        if bias_rows:
            _collect_bias(bias_sums, kinds, kernel, item * bias_rows * row_bias, d_bias)


@compiled
def _backward_rows_on_team(start_region, threads, *problem):
    return run_team(_backward_rows, problem, start_region, threads)


backward_rows = Kernel(_backward_rows, _backward_rows_on_team)

"""The row kernel of neighborhood attention on the CPU: forward, over the blocks of a `RowTiling`, compiled by numba.

Threads, views of memory and base 2 are as in `cpu_kernels`.
"""

import numpy as np
from numba import njit

from gridattn.ops.neighborhood import cpu_blocks, cpu_products, cpu_row_products, cpu_team, cpu_vector
from gridattn.ops.neighborhood.cpu_blocks import LOG2_E, numbers, room
from gridattn.ops.neighborhood.cpu_kernels import compiled, sources
from gridattn.ops.neighborhood.cpu_row_products import (
    DEPTHS_AT_ONCE,
    ROW_LANES,
    read_columns,
    row_exponentials,
    row_logarithms,
    row_mixture,
    row_scores,
    write_columns,
)
from gridattn.ops.neighborhood.cpu_team import run_team
from gridattn.ops.neighborhood.cpu_threads import Kernel
from gridattn.ops.neighborhood.cpu_vector import take_next

BAND = 4  # pairs of query rows whose keys are visited before their values: most of a pair's keys are the next one's too
SOURCES = sources(cpu_blocks, cpu_products, cpu_row_products, cpu_team, cpu_vector)


@njit(nogil=True)
def offset_of(stride, sample, head, a, b, c):
    """Where a head's row at (a, b, c) of the grid begins."""
    return sample * stride[0] + head * stride[4] + a * stride[1] + b * stride[2] + c * stride[3]


@njit(nogil=True)
def copy_rows(start, stop, source, stride, sample, head, step, box, factor, depth, room_of, pitch, target, to):
    """Copies rows of a box times a factor, so that positions along the last axis lie side by side.

    `box` holds first index on the grid and size along each axis; the rows of its planes are counted on.
    """
    for row in range(start, stop):
        a, b = box[0] + row // box[3] * step[0], box[2] + row % box[3] * step[1]
        at = offset_of(stride, sample, head, a, b, box[4])
        read_columns(source, at, step[2] * stride[3], box[5], depth, factor, target, to + row * room_of * pitch, pitch)


@njit(nogil=True)
def _place_pair(pair, rows, bias_at, row_bias, place):
    """Says in `place` where a pair of query rows finds its keys; returns how many rows it has."""
    count = 2 if pair[3] >= 0 else 1
    place[1], place[2], place[3], place[4] = pair[1], rows, pair[4], rows * (count - 1)
    place[6], place[7] = bias_at + pair[2] * row_bias, bias_at + pair[5] * row_bias
    return count


@compiled
def _forward_rows(
    query, key, value, bias, out, lse, strides, sizes, scale, bias_size,
    step, kernel, blocks, planes, pairs, vectors, lanes, capacity, items, counter, texts,
):  # fmt: skip
    """Attends for the items of the forward pass until `counter` reaches their number.

    Args:
        query, key, value, out, lse: tensors. bias: a flat table per head in base 2, or one of zeros for all heads.
        strides: (5, 5) of query, key, value, out, lse.
        sizes: batch, query heads, key heads, depth of keys, depth of values.
        bias_size: numbers of a head's table, or 0 where one serves all.
        step, kernel, blocks, planes, pairs, vectors, lanes, capacity, items: see `RowTiling`.
        counter: (1,) the next item, shared by all threads. texts: SOURCES.
    """
    batch, heads, key_heads, depth, value_depth = sizes
    members = heads // key_heads
    value_pitch = -(-value_depth // DEPTHS_AT_ONCE) * DEPTHS_AT_ONCE
    rows, pitch = capacity
    row_bias = 2 * kernel[2] - 1
    plane_bias = (2 * kernel[1] - 1) * row_bias
    window = kernel[0] * kernel[1] * kernel[2]
    window_sizes = np.array([kernel[0], kernel[1], kernel[2], kernel[2], plane_bias, row_bias])
    place = np.zeros(8, np.int64)
    keys, values = numbers(lse, rows * depth * pitch), numbers(lse, rows * value_pitch * pitch)
    q, p = numbers(lse, 2 * depth * ROW_LANES), np.zeros((BAND, 2 * window, ROW_LANES), lse.dtype)
    mixed, unit, factor = numbers(lse, 2 * value_pitch * ROW_LANES), numbers(lse, 1), numbers(lse, 1)
    peak, total = room(lse, 2, ROW_LANES), numbers(lse, ROW_LANES)
    inverse = np.zeros((BAND, 2, ROW_LANES), lse.dtype)
    unit[0], factor[0] = 1, scale * LOG2_E
    q_stride, out_stride, lse_stride = strides[0], strides[3], strides[4]

    while True:
        item = take_next(counter)
        if item >= batch * key_heads * len(items):
            break
        sample, key_head = divmod(item // len(items), key_heads)
        chosen = items[item % len(items)]
        planes_of, rows_of, segment = blocks[0, chosen[0]], blocks[1, chosen[1]], blocks[2, chosen[2]]
        box = planes_of[0], planes_of[1], rows_of[0], rows_of[1], segment[0], segment[1]
        of, all_rows = (sample, key_head, step, box, unit), planes_of[1] * rows_of[1]
        copy_rows(0, all_rows, key, strides[1], *of, depth, depth, pitch, keys, 0)
        copy_rows(0, all_rows, value, strides[2], *of, value_depth, value_pitch, pitch, values, 0)
        for head in range(key_head * members, (key_head + 1) * members):
            for plane in planes[planes_of[2] : planes_of[3]]:
                for v in range(segment[2], segment[3]):
                    first, queries, column, least_bias = vectors[v]
                    bias_at = head * bias_size + plane[2] * plane_bias + least_bias
                    place[0], place[5] = plane[1], column
                    for band in range(rows_of[2], rows_of[3], BAND):
                        band_end = min(band + BAND, rows_of[3])
                        for i in range(band, band_end):
                            own = p[i - band]
                            count = _place_pair(pairs[i], kernel[1], bias_at, row_bias, place)
                            for m in range(count):
                                at = offset_of(q_stride, sample, head, plane[0], pairs[i, 3 * m], first)
                                to, apart = m * depth * ROW_LANES, step[2] * q_stride[3]
                                read_columns(query, at, apart, queries, depth, factor, q, to, ROW_LANES)
                            row_scores(
                                keys,
                                depth,
                                pitch,
                                rows_of[1],
                                q,
                                bias,
                                lanes[v],
                                window_sizes,
                                place,
                                own,
                                peak,
                            )
                            for m in range(count):
                                row_exponentials(own[m * window : (m + 1) * window], window, peak[m], total)
                                row_logarithms(peak[m], total, inverse[i - band, m])
                                at = offset_of(lse_stride, sample, head, plane[0], pairs[i, 3 * m], first)
                                for lane in range(queries):
                                    lse[at + lane * step[2] * lse_stride[3]] = peak[m, lane]
                        for i in range(band, band_end):
                            own = p[i - band]
                            count = _place_pair(pairs[i], kernel[1], bias_at, row_bias, place)
                            row_mixture(
                                values,
                                value_pitch,
                                pitch,
                                rows_of[1],
                                own,
                                0,
                                lanes[v],
                                window_sizes,
                                place,
                                mixed,
                            )
                            for m in range(count):
                                at = offset_of(out_stride, sample, head, plane[0], pairs[i, 3 * m], first)
                                start, apart = m * value_pitch * ROW_LANES, step[2] * out_stride[3]
                                write_columns(mixed, start, inverse[i - band, m], queries, value_depth, out, at, apart)


@compiled
def _forward_rows_on_team(start_region, threads, *problem):
    return run_team(_forward_rows, problem, start_region, threads)


forward_rows = Kernel(_forward_rows, _forward_rows_on_team)

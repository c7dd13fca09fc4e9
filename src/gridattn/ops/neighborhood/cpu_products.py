"""The matrix products of the CPU kernels, blocked for registers.

Arrays "by key" hold one row of LANES numbers per key, one lane per query, so that a softmax over keys needs no sums
across lanes. Every loop multiplies such an array with rows of keys, values or queries: one operand is a vector, the
other one number spread over the lanes, and a block of sums stays in registers.
"""

from functools import reduce
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from gridattn.ops.neighborhood.cpu_tiles import LANES
from gridattn.ops.neighborhood.cpu_vector import Sums, count_up, int64, vector_loop, whole_blocks

_WIDE = bool(llvm.get_host_cpu_features().get("avx512f", False))
KEY_BLOCK = 8 if _WIDE else 4  # keys per pass of `scores`: as many sums as the register file holds
QUERY_BLOCK = 4  # queries per pass of `weighted_sum`
_COLUMN_BLOCKS = (4, 2, 1) if _WIDE else (1,)  # vectors of columns per pass of `weighted_sum` and `outer_add`


@vector_loop
def scores(v, a, a_start, pitch, depth, rows, count, b, initial, initial_step, out, peak):
    """out[i, lane] = initial[i, lane] + sum over d of a[rows[i], d] * b[d, lane]; peak[lane] is the largest over i.

    `count` must be a multiple of KEY_BLOCK; `initial_step` is LANES, or 0 where one row of `initial` serves all keys.
    """
    builder = v.builder
    largest = Sums(v, 1)
    largest[0] = v.constant(-np.finfo(np.float32).max)
    sums = Sums(v, KEY_BLOCK)
    with count_up(builder, int64(0), count, KEY_BLOCK) as (i, _):
        keys = []
        for r in range(KEY_BLOCK):
            key = builder.add(i, int64(r))
            sums[r] = v.load(initial, builder.mul(key, initial_step))
            keys.append(builder.gep(a, [builder.add(a_start, builder.mul(v.element(rows, key), pitch))]))
        with count_up(builder, int64(0), depth) as (d, _):
            b_row = v.load(b, builder.mul(d, int64(LANES)))
            for r in range(KEY_BLOCK):
                sums[r] = v.multiply_add(v.spread(v.element(keys[r], d)), b_row, sums[r])
        for r in range(KEY_BLOCK):
            v.store(sums[r], out, builder.mul(builder.add(i, int64(r)), int64(LANES)))
            largest[0] = v.call("llvm.maxnum", largest[0], sums[r])
    v.store(largest[0], peak, int64(0))


def emit_exponentials(v, x, count, shift, total):
    """x[i, lane] becomes 2^(x[i, lane] - shift[lane]), which must be at most about 1; total[lane] is the sum over i."""
    builder = v.builder
    sums = Sums(v, 1)
    sums[0] = v.constant(0.0)
    shifts = v.load(shift, int64(0))
    with count_up(builder, int64(0), count) as (i, _):
        at = builder.mul(i, int64(v.width))
        power = v.exp2(builder.fsub(v.load(x, at), shifts))
        v.store(power, x, at)
        sums[0] = builder.fadd(sums[0], power)
    v.store(sums[0], total, int64(0))


exponentials = vector_loop(emit_exponentials)


@vector_loop
def weighted_sum(v, weights, first_lane, keys, keys_start, count, rows, b, b_start, pitch, out, out_start):
    """out[q, :] = sum over i in keys of weights[i, first_lane + q] * b[rows[i], :] for QUERY_BLOCK queries q.

    Rows of `b` and `out` are `pitch` numbers long, a multiple of LANES.
    """
    builder = v.builder
    start = int64(0)
    for block in _COLUMN_BLOCKS:
        stop = whole_blocks(builder, start, pitch, block * LANES)
        sums = Sums(v, QUERY_BLOCK * block)
        with count_up(builder, start, stop, block * LANES) as (column, _):
            for s in range(QUERY_BLOCK * block):
                sums[s] = v.constant(0.0)
            b_columns = builder.gep(b, [builder.add(b_start, column)])
            with count_up(builder, int64(0), count) as (n, _):
                i = v.element(keys, builder.add(keys_start, n))
                weight = builder.add(builder.mul(i, int64(LANES)), first_lane)
                b_row = builder.mul(v.element(rows, i), pitch)
                vectors = [v.load(b_columns, builder.add(b_row, int64(c * LANES))) for c in range(block)]
                for q in range(QUERY_BLOCK):
                    number = v.spread(v.element(weights, builder.add(weight, int64(q))))
                    for c in range(block):
                        sums[q * block + c] = v.multiply_add(number, vectors[c], sums[q * block + c])
            for q in range(QUERY_BLOCK):
                row = builder.add(builder.add(out_start, column), builder.mul(int64(q), pitch))
                for c in range(block):
                    v.store(sums[q * block + c], out, builder.add(row, int64(c * LANES)))
        start = stop


@vector_loop
def outer_add(v, weights, lane_from, lane_to, rows, count, b, pitch, out, out_start):
    """out[rows[i], :] += sum over lanes q of weights[i, q] * b[q, :]; only lane_from[i] <= q < lane_to[i] need count.

    Rows of `b` and `out` are `pitch` numbers long, a multiple of LANES.
    """
    builder = v.builder
    first_column = int64(0)
    for block in _COLUMN_BLOCKS:
        last_column = whole_blocks(builder, first_column, pitch, block * LANES)
        with count_up(builder, first_column, last_column, block * LANES) as (column, _):
            first_key = int64(0)
            for key_block in (4, 1):
                last_key = whole_blocks(builder, first_key, count, key_block)
                sums = Sums(v, key_block * block)
                with count_up(builder, first_key, last_key, key_block) as (i, _):
                    keys = [builder.add(i, int64(r)) for r in range(key_block)]
                    targets = [
                        builder.add(builder.add(out_start, column), builder.mul(v.element(rows, key), pitch))
                        for key in keys
                    ]
                    lane_start = _pick(builder, "<", [v.element(lane_from, key) for key in keys])
                    lane_stop = _pick(builder, ">", [v.element(lane_to, key) for key in keys])
                    for r in range(key_block):
                        for c in range(block):
                            sums[r * block + c] = v.load(out, builder.add(targets[r], int64(c * LANES)))
                    with count_up(builder, lane_start, lane_stop) as (q, _):
                        b_row = builder.add(builder.mul(q, pitch), column)
                        vectors = [v.load(b, builder.add(b_row, int64(c * LANES))) for c in range(block)]
                        for r in range(key_block):
                            weight = v.element(weights, builder.add(builder.mul(keys[r], int64(LANES)), q))
                            for c in range(block):
                                sums[r * block + c] = v.multiply_add(v.spread(weight), vectors[c], sums[r * block + c])
                    for r in range(key_block):
                        for c in range(block):
                            v.store(sums[r * block + c], out, builder.add(targets[r], int64(c * LANES)))
                first_key = last_key
        first_column = last_column


def _pick(builder: Any, comparison: str, values: list[ir.Value]) -> ir.Value:
    """The smallest ("<") or the largest (">") of some integers."""
    return reduce(lambda a, b: builder.select(builder.icmp_signed(comparison, a, b), a, b), values)


@vector_loop
def transpose(v, rows, pitch, out):
    """out[d, lane] = rows[lane, d] for LANES rows of `pitch` numbers, a multiple of LANES."""
    builder = v.builder
    with count_up(builder, int64(0), pitch, LANES) as (d, _):
        block = [v.load(rows, builder.add(d, builder.mul(int64(lane), pitch))) for lane in range(LANES)]
        for i, vector in enumerate(v.transposed(block)):
            v.store(vector, out, builder.mul(builder.add(d, int64(i)), int64(LANES)))


@vector_loop
def dot(v, a, b, start, pitch, out, at):
    """out[at] = sum over d of a[start + d] * b[start + d], rows of `pitch` numbers, a multiple of LANES."""
    builder = v.builder
    sums = Sums(v, 1)
    sums[0] = v.constant(0.0)
    with count_up(builder, start, builder.add(start, pitch), LANES) as (d, _):
        sums[0] = v.multiply_add(v.load(a, d), v.load(b, d), sums[0])
    builder.store(v.total(sums[0]), builder.gep(out, [at]))

"""The matrix products of the row kernel: lanes are neighbouring queries of a row, and so are their keys.

Keys and values lie transposed, one row of positions for each depth. A key offset then is one load at a shifted place,
and a permutation of its lanes pushes the windows of a border back into the grid. Two rows of queries, A and B, which
see most key rows in common, share the loads. No product is computed that no query needs.

Arrays of integers say where things are (`ROW_SIZES`, `ROW_PLACE`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba.core import cgutils

from gridattn.ops.neighborhood.cpu_products import emit_exponentials
from gridattn.ops.neighborhood.cpu_rows import ROW_LANES
from gridattn.ops.neighborhood.cpu_vector import Sums, Vectors, choose, count_up, int64, prefetch, vector_loop

KEYS_AT_ONCE = 7  # key offsets whose logits of two query rows stay in registers
DEPTHS_AT_ONCE = 8 if llvm.get_host_cpu_features().get("avx512vl", False) else 4  # likewise, of the values
HAS_PERMUTE = bool(llvm.get_host_cpu_features().get("avx2", False))


class RowSizes(NamedTuple):
    """Order of the sizes that a problem has; logits of the rows of a window lie `apart` vectors apart."""

    planes: int
    rows: int
    columns: int
    apart: int
    plane_bias: int
    row_bias: int


class RowPlace(NamedTuple):
    """Order of what says where a vector of queries of rows A and B finds its keys."""

    plane: int
    row_a: int
    rows_a: int
    row_b: int
    rows_b: int
    column: int
    bias_a: int
    bias_b: int


def row_loop(emit: Any) -> Any:
    """`vector_loop` for vectors of ROW_LANES numbers."""
    return vector_loop(emit, ROW_LANES)


row_exponentials = row_loop(emit_exponentials)


@row_loop
def row_scores(v, keys, depth, pitch, plane_rows, q, bias, index, sizes, place, out, peak):
    """out[m, o, lane] = bias + sum over d of keys[plane, row, d, column] * q[m, d, lane] for the window's o-th key.

    m is 0 for row A and 1 for row B; peak[m, lane] is the largest over o. `index` holds the permutation of the lanes of
    keys and then that of the bias.
    """
    largest = Sums(v, 2)
    largest[0] = largest[1] = v.constant(-np.finfo(np.float32).max)

    def finish(m, there, logit):
        v.store(logit, out, there)
        largest[m] = v.call("llvm.maxnum", largest[m], logit)

    _visit_products(v, [(keys, depth, q, bias, finish)], pitch, plane_rows, index, sizes, place, int64(0))
    for m in (0, 1):
        v.store(largest[m], peak, int64(m * v.width))


@row_loop
def row_gradients(
    v, keys, values, depth, value_depth, pitch, plane_rows, q, d_out, bias, shift, offset, queries, apart,
    index, sizes, place, p, ds, to,
):  # fmt: skip
    """The weights P = 2^(logit - shift) of windows, and the gradients dS = P * (values.d_out + offset) of their logits.

    Logits are those of `row_scores`; `shift` and `offset` hold a number for each lane from `queries` on, those of row B
    `apart` numbers later. P and dS are laid out as logits are, from `to` on.
    """
    b = v.builder
    at = {m: b.add(queries, b.mul(apart, int64(m))) for m in (0, 1)}
    shifts, offsets = ({m: v.load(array, at[m]) for m in (0, 1)} for array in (shift, offset))

    def finish(m, there, logit):
        v.store(v.exp2(b.fsub(logit, shifts[m])), p, there)

    def multiply(m, there, product):
        v.store(b.fmul(v.load(p, there), b.fadd(product, offsets[m])), ds, there)

    sources = (keys, depth, q, bias, finish), (values, value_depth, d_out, None, multiply)
    _visit_products(v, sources, pitch, plane_rows, index, sizes, place, to)


@row_loop
def row_logarithms(v, peak, total, inverse):
    """peak becomes ln(2) * (peak + log2(total)), and `inverse` 1 / total, of ROW_LANES numbers each."""
    b, zero = v.builder, int64(0)
    totals = v.load(total, zero)
    v.store(b.fdiv(v.constant(1.0), totals), inverse, zero)
    log = b.fadd(v.load(peak, zero), v.log2(totals))
    v.store(b.fmul(log, v.constant(math.log(2.0))), peak, zero)


@row_loop
def row_mixture(v, values, depth, pitch, plane_rows, weights, start, index, sizes, place, out):
    """out[m, d, lane] = sum over keys o of the window of weights[m, o, lane] * values[plane, row, d, column].

    The weights begin at `start`. `depth` is a multiple of DEPTHS_AT_ONCE.
    """
    _emit_mixture(v, values, depth, pitch, plane_rows, weights, start, index, sizes, place, out)


@row_loop
def straight_mixture(v, values, depth, pitch, plane_rows, weights, start, sizes, place, out):
    """`row_mixture` where the keys of neighbouring lanes are neighbours."""
    _emit_mixture(v, values, depth, pitch, plane_rows, weights, start, None, sizes, place, out)


def _emit_mixture(v, values, depth, pitch, plane_rows, weights, start, index, sizes, place, out):
    b = v.builder
    size, at = _fields(v, sizes, RowSizes), _fields(v, place, RowPlace)
    lanes = None if index is None else v.load_index(index, int64(0))
    row_size = b.mul(depth, pitch)
    sums = Sums(v, 2 * DEPTHS_AT_ONCE)
    with count_up(b, int64(0), depth, DEPTHS_AT_ONCE) as (d, _):
        for i in range(2 * DEPTHS_AT_ONCE):
            sums[i] = v.constant(0.0)

        def visit(members, plane_row, offsets, plane, d=d):
            first = b.add(b.add(b.mul(plane_row, row_size), b.mul(d, pitch)), at.column)
            rows = [b.gep(values, [b.add(first, b.mul(pitch, int64(c)))]) for c in range(DEPTHS_AT_ONCE)]
            windows = {m: b.add(start, _window_row(v, size, m, plane, offsets[m])) for m in members}

            with count_up(b, int64(0), size.columns) as (j, _):
                given = {m: v.load(weights, b.add(windows[m], b.mul(j, int64(v.width)))) for m in members}
                for c, row in enumerate(rows):
                    value = v.load(row, j)
                    value = value if lanes is None else v.permute(value, lanes)
                    for m in members:
                        i = m * DEPTHS_AT_ONCE + c
                        sums[i] = v.multiply_add(given[m], value, sums[i])

        _visit_rows(v, size, at, plane_rows, visit)
        for m in (0, 1):
            for c in range(DEPTHS_AT_ONCE):
                row = b.add(b.add(d, int64(c)), b.mul(depth, int64(m)))
                v.store(sums[m * DEPTHS_AT_ONCE + c], out, b.mul(row, int64(v.width)))


@row_loop
def read_columns(v, source, at, stride, count, depth, factor, target, to, pitch):
    """target[d, x] = source[x, d] * factor[0] for `count` rows of `source`, `stride` numbers apart, from `at` on.

    The target's rows lie `pitch` numbers apart, from `to` on. A source of 16-bit integers is bfloat16.
    """
    b, wide = v.builder, int64(v.width)
    many = b.and_(b.icmp_signed(">=", count, wide), b.icmp_signed(">=", depth, wide))
    factors = v.spread(v.element(factor, int64(0)))
    with b.if_else(many) as (blocks, singles):
        with blocks, _overlapping(b, count, v.width) as x, _overlapping(b, depth, v.width) as d:
            rows = [b.add(at, b.mul(b.add(x, int64(i)), stride)) for i in range(v.width)]
            block = [v.load_stored(source, b.add(row, d)) for row in rows]
            for row in rows:
                prefetch(b, source, b.add(b.add(row, b.mul(stride, wide)), d))
            for i, column in enumerate(v.transposed(block)):
                line = b.add(to, b.mul(b.add(d, int64(i)), pitch))
                v.store(b.fmul(column, factors), target, b.add(line, x))
        with singles:
            one = Vectors(v.context, b, v.dtype, 1)
            single = one.spread(v.element(factor, int64(0)))
            with count_up(b, int64(0), count) as (x, _), count_up(b, int64(0), depth) as (d, _):
                number = one.load_stored(source, b.add(b.add(at, b.mul(x, stride)), d))
                one.store(b.fmul(number, single), target, b.add(b.add(to, b.mul(d, pitch)), x))


@row_loop
def write_columns(v, source, start, factors, count, depth, target, at, stride):
    """target[lane, d] = source[d, lane] * factors[lane] for the first `count` lanes; the reverse of `read_columns`."""
    b, wide = v.builder, int64(v.width)
    many = b.and_(b.icmp_signed(">=", count, wide), b.icmp_signed(">=", depth, wide))
    factor = v.load(factors, int64(0))
    with b.if_else(many) as (blocks, singles):
        with blocks, _overlapping(b, depth, v.width) as d:
            lines = [b.add(start, b.mul(b.add(d, int64(i)), wide)) for i in range(v.width)]
            block = [b.fmul(v.load(source, line), factor) for line in lines]
            for i, row in enumerate(v.transposed(block)):
                v.store_rounded(row, target, b.add(b.add(at, b.mul(stride, int64(i))), d))
        with singles:
            one = Vectors(v.context, b, v.dtype, 1)
            with count_up(b, int64(0), count) as (x, _), count_up(b, int64(0), depth) as (d, _):
                number = one.load(source, b.add(b.add(start, b.mul(d, wide)), x))
                number = b.fmul(number, one.load(factors, x))
                one.store_rounded(number, target, b.add(b.add(at, b.mul(x, stride)), d))


def _fields(v: Vectors, array: ir.Value, kind: Any) -> Any:
    """The numbers of an array of integers under the names of a NamedTuple."""
    return kind(*(v.element(array, int64(i)) for i in range(len(kind._fields))))


def _visit_rows(v: Vectors, size: Any, at: Any, plane_rows: ir.Value, visit: Callable[..., None]) -> None:
    """Emits a loop over the key rows that A alone, both, and B alone see.

    `visit` is given the members that see the row, its number in the block, its offset in each one's window and the
    number of its plane in the window.
    """
    b = v.builder
    end_a = b.add(at.row_a, at.rows_a)
    parts = (((0,), at.row_a, at.row_b), ((0, 1), at.row_b, end_a), ((1,), end_a, b.add(at.row_b, at.rows_b)))
    with count_up(b, int64(0), size.planes) as (plane, _):
        first = b.mul(b.add(at.plane, plane), plane_rows)
        for members, start, stop in parts:
            with count_up(b, start, stop) as (y, _):
                offsets = {m: b.sub(y, (at.row_a, at.row_b)[m]) for m in members}
                visit(members, b.add(first, y), offsets, plane)


def _visit_products(
    v: Vectors, sources: Sequence[tuple], pitch: ir.Value, plane_rows: ir.Value, index: Any, sizes: Any, place: Any,
    to: ir.Value,
) -> None:  # fmt: skip
    """Emits the products of the queries of rows A and B with their keys, for each of several pairs of both.

    `sources` are keys, their depth, queries, bias or None, and a function of the member, the key's place in the windows
    that begin at `to`, and the product, which is emitted for each product before those of the next pair.
    """
    b, wide = v.builder, int64(v.width)
    size, at = _fields(v, sizes, RowSizes), _fields(v, place, RowPlace)
    key_lanes, bias_lanes = v.load_index(index, int64(0)), v.load_index(index, wide)
    passes = b.sdiv(b.add(size.columns, int64(KEYS_AT_ONCE - 1)), int64(KEYS_AT_ONCE))
    block = b.sdiv(b.sub(b.add(size.columns, passes), int64(1)), passes)

    def multiply(members, count, key_row, depth, q, bias, biases):
        """Products with `count` neighbouring keys."""
        sums = Sums(v, 2 * count)
        for m in members:
            for j in range(count):
                initial = v.constant(0.0)
                if bias is not None:
                    initial = v.permute(v.load(bias, b.add(biases[m], int64(j))), bias_lanes)
                sums[m * count + j] = initial
        with count_up(b, int64(0), depth) as (d, _):
            queries = {m: v.load(q, b.mul(b.add(b.mul(depth, int64(m)), d), wide)) for m in members}
            columns = b.gep(key_row, [b.mul(d, pitch)])
            for j in range(count):
                key = v.permute(v.load(columns, int64(j)), key_lanes)
                for m in members:
                    sums[m * count + j] = v.multiply_add(queries[m], key, sums[m * count + j])
        return sums

    def visit(members, plane_row, offsets, plane):
        row_bias = {m: _bias_row(b, size, at, m, plane, offsets[m]) for m in members}
        targets = {m: b.add(to, _window_row(v, size, m, plane, offsets[m])) for m in members}

        with cgutils.for_range_slice(b, int64(0), size.columns, block, size.columns.type, inc=True) as (j, _):
            left = b.sub(size.columns, j)
            left = b.select(b.icmp_signed("<", left, block), left, block)

            def emit(count, j=j):
                for keys, depth, q, bias, finish in sources:
                    key_row = b.gep(keys, [b.add(b.add(b.mul(plane_row, b.mul(depth, pitch)), at.column), j)])
                    biases = {m: b.add(row_bias[m], j) for m in members}
                    sums = multiply(members, count, key_row, depth, q, bias, biases)
                    for m in members:
                        for i in range(count):
                            finish(m, b.add(targets[m], b.mul(b.add(j, int64(i)), wide)), sums[m * count + i])

            choose(b, left, range(1, KEYS_AT_ONCE + 1), emit)

    _visit_rows(v, size, at, plane_rows, visit)


def _window_row(v: Vectors, size: Any, member: int, plane: ir.Value, row: ir.Value) -> ir.Value:
    """Where the numbers for a row of a window begin, the windows of A and B counted on."""
    b = v.builder
    rows = b.add(b.mul(b.add(b.mul(size.planes, int64(member)), plane), size.rows), row)
    return b.mul(b.mul(rows, size.apart), int64(v.width))


def _bias_row(b: Any, size: Any, at: Any, member: int, plane: ir.Value, row: ir.Value) -> ir.Value:
    """Entry of the bias table for the first key of a row of a window."""
    start = (at.bias_a, at.bias_b)[member]
    return b.add(start, b.add(b.mul(plane, size.plane_bias), b.mul(row, size.row_bias)))


@contextmanager
def _overlapping(b: Any, count: ir.Value, width: int) -> Iterator[ir.Value]:
    """A loop over blocks of `width` that ends at `count`, the last one overlapping the one before where it must."""
    last = b.sub(count, int64(width))
    with count_up(b, int64(0), count, width) as (i, _):
        yield b.select(b.icmp_signed("<", i, last), i, last)

"""Register-blocked vector loops for the CPU kernels, written as LLVM instructions that numba functions call.

A tile of LANES queries is handled at a time. Arrays "by key" hold one row of LANES numbers per key, one lane per query, so that a
softmax over keys needs no sums across lanes. All loops below are matrix products of such arrays with rows of keys or queries:
their operands stay in registers, one operand is a vector, the other one number spread over the lanes. Writing the vectors out
(LLVM splits them into what the machine has) makes the speed independent of how well a compiler recognises the loops.
"""

import inspect
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.polynomial import Chebyshev

LANES = 16
_WIDE = bool(llvm.get_host_cpu_features().get("avx512f", False))
KEY_BLOCK = 8 if _WIDE else 4  # keys per pass of `scores`: as many sums as the register file holds
QUERY_BLOCK = 4  # queries per pass of `weighted_sum`
_COLUMN_BLOCKS = (4, 2, 1) if _WIDE else (1,)  # vectors of columns per pass of `weighted_sum` and `outer_add`
_CACHE_LINE = 64
_INDEX = ir.IntType(64)
# Degree of the polynomial for 2^x on [-1/2, 1/2] and layout of the floating point format: bits, mantissa bits, exponent bias.
_FORMATS = {types.float32: (6, 32, 23, 127), types.float64: (12, 64, 52, 1023)}


class _Vectors:
    """Emits operations on vectors of `width` numbers."""

    def __init__(self, context: Any, builder: ir.IRBuilder, dtype: types.Float, width: int = LANES):
        self.builder = builder
        self.dtype = dtype
        self.width = width
        self.scalar = context.get_value_type(dtype)
        self.type = ir.VectorType(self.scalar, width)

    def constant(self, value: float) -> ir.Constant:
        return ir.Constant(self.type, [value] * self.width)

    def element(self, array: ir.Value, index: ir.Value) -> ir.Value:
        return self.builder.load(self.builder.gep(array, [index]))

    def _vector_pointer(self, array: ir.Value, index: ir.Value) -> ir.Value:
        return self.builder.bitcast(self.builder.gep(array, [index]), self.type.as_pointer())

    def load(self, array: ir.Value, index: ir.Value) -> ir.Value:
        return self.builder.load(self._vector_pointer(array, index), align=self.dtype.bitwidth // 8)

    def store(self, vector: ir.Value, array: ir.Value, index: ir.Value) -> None:
        self.builder.store(vector, self._vector_pointer(array, index), align=self.dtype.bitwidth // 8)

    def load_stored(self, array: ir.Value, index: ir.Value) -> ir.Value:
        """Loads from a row that is stored as float or as bfloat16."""
        if array.type.pointee == self.scalar:
            return self.load(array, index)
        halves = self._integers(16)
        pointer = self.builder.bitcast(self.builder.gep(array, [index]), halves.as_pointer())
        bits = self.builder.zext(self.builder.load(pointer, align=2), self._integers(32))
        return self.builder.bitcast(self.builder.shl(bits, self._integers(32, 16)), self.type)

    def store_rounded(self, vector: ir.Value, array: ir.Value, index: ir.Value) -> None:
        """Stores to a row of floats or of bfloat16, to the nearest one and in a tie to the even one."""
        if array.type.pointee == self.scalar:
            self.store(vector, array, index)
            return
        builder = self.builder
        bits = builder.bitcast(vector, self._integers(32))
        last = builder.and_(builder.lshr(bits, self._integers(32, 16)), self._integers(32, 1))
        rounded = builder.add(builder.add(bits, self._integers(32, 0x7FFF)), last)
        is_nan = builder.fcmp_unordered("uno", vector, vector)
        bits = builder.select(is_nan, self._integers(32, 0x7FC00000), rounded)
        halves = builder.trunc(builder.lshr(bits, self._integers(32, 16)), self._integers(16))
        builder.store(halves, builder.bitcast(builder.gep(array, [index]), halves.type.as_pointer()), align=2)

    def _integers(self, bits: int, value: int | None = None) -> Any:
        """The type of a vector of integers, or such a vector with one value everywhere."""
        integers = ir.VectorType(ir.IntType(bits), self.width)
        return integers if value is None else ir.Constant(integers, [value] * self.width)

    def spread(self, number: ir.Value) -> ir.Value:
        undefined = ir.Constant(self.type, ir.Undefined)
        first = self.builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(first, first, self._integers(32, 0))

    def total(self, vector: ir.Value) -> ir.Value:
        """The sum of the numbers of a vector."""
        name = f"llvm.vector.reduce.fadd.v{self.width}f{self.dtype.bitwidth}"
        function_type = ir.FunctionType(self.scalar, [self.scalar, self.type])
        function = cgutils.get_or_insert_function(self.builder.module, function_type, name)
        return self.builder.call(function, [ir.Constant(self.scalar, 0.0), vector], fastmath=("reassoc",))

    def interleave(self, a: ir.Value, b: ir.Value, first: int) -> ir.Value:
        """LANES numbers taken in turn from `a` and `b`, from lane `first` on."""
        order = [lane for i in range(first, first + LANES // 2) for lane in (i, i + LANES)]
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), LANES), order))

    def call(self, name: str, *operands: ir.Value) -> ir.Value:
        function_type = ir.FunctionType(self.type, [self.type] * len(operands))
        name = f"{name}.v{self.width}f{self.dtype.bitwidth}"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function_type, name), operands)

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return self.call("llvm.fmuladd", a, b, c)

    def exp2(self, x: ir.Value) -> ir.Value:
        """2^x for x <= 0, exactly 0 where it is too small: 2^n from the exponent bits times a polynomial in x - n."""
        degree, bits, mantissa, exponent_bias = _FORMATS[self.dtype]
        lowest = self.constant(-float(exponent_bias))
        x = self.builder.select(self.builder.fcmp_ordered("<", x, lowest), lowest, x)  # lets a NaN pass
        n = self.call("llvm.rint", x)
        fraction = self.builder.fsub(x, n)
        fit = Chebyshev.interpolate(np.exp2, degree, domain=[-0.5, 0.5])
        coefficients = fit.convert(kind=np.polynomial.Polynomial).coef
        power = self.constant(float(coefficients[-1]))
        for coefficient in coefficients[-2::-1]:
            power = self.multiply_add(power, fraction, self.constant(float(coefficient)))
        exponent = self.builder.fptosi(n, self._integers(bits))
        exponent = self.builder.add(exponent, self._integers(bits, exponent_bias))
        exponent = self.builder.shl(exponent, self._integers(bits, mantissa))
        return self.builder.fmul(power, self.builder.bitcast(exponent, self.type))


class _Sums:
    """A block of vectors that a loop adds to; LLVM keeps it in registers."""

    def __init__(self, vectors: _Vectors, count: int):
        self.vectors = vectors
        self.slots = [cgutils.alloca_once(vectors.builder, vectors.type) for _ in range(count)]

    def __getitem__(self, i: int) -> ir.Value:
        return self.vectors.builder.load(self.slots[i])

    def __setitem__(self, i: int, vector: ir.Value) -> None:
        self.vectors.builder.store(vector, self.slots[i])


def _index(value: int) -> ir.Constant:
    return ir.Constant(_INDEX, value)


def _count_up(builder: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int = 1) -> Any:
    return cgutils.for_range_slice(builder, start, stop, _index(step), _INDEX, inc=True)


def _whole_blocks(builder: ir.IRBuilder, start: ir.Value, stop: ir.Value, block: int) -> ir.Value:
    """The last index up to which [start, stop) is made of whole blocks."""
    length = builder.sub(stop, start)
    return builder.add(start, builder.sub(length, builder.srem(length, _index(block))))


def _vector_loop(emit: Any) -> Any:
    """Makes a function that numba code can call out of one that emits instructions.

    The caller passes arrays, which arrive as pointers to their first element, and integers, which arrive as int64.
    """

    def declare(typing_context: Any, *given: types.Type) -> Any:
        dtype = next(t.dtype for t in given if isinstance(t, types.Array) and isinstance(t.dtype, types.Float))
        expected = [t if isinstance(t, types.Array) else types.int64 for t in given]

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            operands = [
                context.make_array(t)(context, builder, argument).data if isinstance(t, types.Array) else argument
                for t, argument in zip(signature.args, arguments)
            ]
            emit(_Vectors(context, builder, dtype), *operands)
            return context.get_dummy_value()

        return types.none(*expected), generate

    declare.__name__ = emit.__name__
    declare.__doc__ = emit.__doc__
    declare.__signature__ = inspect.signature(emit)  # numba takes the number of arguments from here
    return intrinsic(declare)


@_vector_loop
def scores(v, a, a_start, pitch, depth, rows, count, b, initial, initial_step, out, peak):
    """out[i, lane] = initial[i, lane] + sum over d of a[rows[i], d] * b[d, lane]; peak[lane] = max over i of out[i, lane].

    `count` must be a multiple of KEY_BLOCK; `initial_step` is LANES, or 0 where one row of `initial` serves all keys.
    """
    builder = v.builder
    largest = _Sums(v, 1)
    largest[0] = v.constant(-np.finfo(np.float32).max)
    sums = _Sums(v, KEY_BLOCK)
    with _count_up(builder, _index(0), count, KEY_BLOCK) as (i, _):
        keys = []
        for r in range(KEY_BLOCK):
            key = builder.add(i, _index(r))
            sums[r] = v.load(initial, builder.mul(key, initial_step))
            keys.append(builder.gep(a, [builder.add(a_start, builder.mul(v.element(rows, key), pitch))]))
        with _count_up(builder, _index(0), depth) as (d, _):
            b_row = v.load(b, builder.mul(d, _index(LANES)))
            for r in range(KEY_BLOCK):
                sums[r] = v.multiply_add(v.spread(v.element(keys[r], d)), b_row, sums[r])
        for r in range(KEY_BLOCK):
            v.store(sums[r], out, builder.mul(builder.add(i, _index(r)), _index(LANES)))
            largest[0] = v.call("llvm.maxnum", largest[0], sums[r])
    v.store(largest[0], peak, _index(0))


@_vector_loop
def exponentials(v, x, count, shift, total):
    """x[i, lane] becomes 2^(x[i, lane] - shift[lane]), which must be at most about 1; total[lane] is the sum over i."""
    builder = v.builder
    sums = _Sums(v, 1)
    sums[0] = v.constant(0.0)
    shifts = v.load(shift, _index(0))
    with _count_up(builder, _index(0), count) as (i, _):
        at = builder.mul(i, _index(LANES))
        power = v.exp2(builder.fsub(v.load(x, at), shifts))
        v.store(power, x, at)
        sums[0] = builder.fadd(sums[0], power)
    v.store(sums[0], total, _index(0))


@_vector_loop
def weighted_sum(v, weights, first_lane, keys, keys_start, count, rows, b, b_start, pitch, out, out_start):
    """out[q, :] = sum over i in keys of weights[i, first_lane + q] * b[rows[i], :] for QUERY_BLOCK queries q.

    Rows of `b` and `out` are `pitch` numbers long, a multiple of LANES.
    """
    builder = v.builder
    start = _index(0)
    for block in _COLUMN_BLOCKS:
        stop = _whole_blocks(builder, start, pitch, block * LANES)
        sums = _Sums(v, QUERY_BLOCK * block)
        with _count_up(builder, start, stop, block * LANES) as (column, _):
            for s in range(QUERY_BLOCK * block):
                sums[s] = v.constant(0.0)
            b_columns = builder.gep(b, [builder.add(b_start, column)])
            with _count_up(builder, _index(0), count) as (n, _):
                i = v.element(keys, builder.add(keys_start, n))
                weight = builder.add(builder.mul(i, _index(LANES)), first_lane)
                b_row = builder.mul(v.element(rows, i), pitch)
                vectors = [v.load(b_columns, builder.add(b_row, _index(c * LANES))) for c in range(block)]
                for q in range(QUERY_BLOCK):
                    number = v.spread(v.element(weights, builder.add(weight, _index(q))))
                    for c in range(block):
                        sums[q * block + c] = v.multiply_add(number, vectors[c], sums[q * block + c])
            for q in range(QUERY_BLOCK):
                row = builder.add(builder.add(out_start, column), builder.mul(_index(q), pitch))
                for c in range(block):
                    v.store(sums[q * block + c], out, builder.add(row, _index(c * LANES)))
        start = stop


@_vector_loop
def outer_add(v, weights, lane_from, lane_to, rows, count, b, pitch, out, out_start):
    """out[rows[i], :] += sum over lanes q of weights[i, q] * b[q, :], where only lane_from[i] <= q < lane_to[i] need count.

    Rows of `b` and `out` are `pitch` numbers long, a multiple of LANES.
    """
    builder = v.builder
    first_column = _index(0)
    for block in _COLUMN_BLOCKS:
        last_column = _whole_blocks(builder, first_column, pitch, block * LANES)
        with _count_up(builder, first_column, last_column, block * LANES) as (column, _):
            first_key = _index(0)
            for key_block in (4, 1):
                last_key = _whole_blocks(builder, first_key, count, key_block)
                sums = _Sums(v, key_block * block)
                with _count_up(builder, first_key, last_key, key_block) as (i, _):
                    keys = [builder.add(i, _index(r)) for r in range(key_block)]
                    targets = [
                        builder.add(builder.add(out_start, column), builder.mul(v.element(rows, key), pitch))
                        for key in keys
                    ]
                    lane_start = lane_stop = None
                    for key in keys:
                        lo, hi = v.element(lane_from, key), v.element(lane_to, key)
                        lane_start = lo if lane_start is None else _pick(builder, "<", lane_start, lo)
                        lane_stop = hi if lane_stop is None else _pick(builder, ">", lane_stop, hi)
                    for r in range(key_block):
                        for c in range(block):
                            sums[r * block + c] = v.load(out, builder.add(targets[r], _index(c * LANES)))
                    with _count_up(builder, lane_start, lane_stop) as (q, _):
                        b_row = builder.add(builder.mul(q, pitch), column)
                        vectors = [v.load(b, builder.add(b_row, _index(c * LANES))) for c in range(block)]
                        for r in range(key_block):
                            weight = v.element(weights, builder.add(builder.mul(keys[r], _index(LANES)), q))
                            for c in range(block):
                                sums[r * block + c] = v.multiply_add(v.spread(weight), vectors[c], sums[r * block + c])
                    for r in range(key_block):
                        for c in range(block):
                            v.store(sums[r * block + c], out, builder.add(targets[r], _index(c * LANES)))
                first_key = last_key
        first_column = last_column


def _pick(builder: ir.IRBuilder, comparison: str, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.icmp_signed(comparison, a, b), a, b)


@_vector_loop
def transpose(v, rows, pitch, out):
    """out[d, lane] = rows[lane, d] for LANES rows of `pitch` numbers, a multiple of LANES."""
    builder = v.builder
    with _count_up(builder, _index(0), pitch, LANES) as (d, _):
        block = [v.load(rows, builder.add(d, builder.mul(_index(lane), pitch))) for lane in range(LANES)]
        for _ in range(LANES.bit_length() - 1):
            pairs = list(zip(block[: LANES // 2], block[LANES // 2 :]))
            block = [v.interleave(a, b, first) for a, b in pairs for first in (0, LANES // 2)]
        for i, vector in enumerate(block):
            v.store(vector, out, builder.mul(builder.add(d, _index(i)), _index(LANES)))


@_vector_loop
def dot(v, a, b, start, pitch, out, at):
    """out[at] = sum over d of a[start + d] * b[start + d], rows of `pitch` numbers, a multiple of LANES."""
    builder = v.builder
    sums = _Sums(v, 1)
    sums[0] = v.constant(0.0)
    with _count_up(builder, start, builder.add(start, pitch), LANES) as (d, _):
        sums[0] = v.multiply_add(v.load(a, d), v.load(b, d), sums[0])
    builder.store(v.total(sums[0]), builder.gep(out, [at]))


def _row_loop(emit: Any) -> Any:
    """Makes a function that numba code can call out of one that emits what to do with neighbouring numbers of two rows.

    The call is (source, at, factor, length, target, to): `length` numbers of `source` from `at` on, times `factor`, go to `target`
    from `to` on. A row of 16-bit integers holds the upper halves of float32 numbers (bfloat16).
    """

    def declare(typing_context, source, at, factor, length, target, to):
        number = target.dtype if isinstance(target.dtype, types.Float) else source.dtype

        def generate(context, builder, signature, arguments):
            rows = [context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 4)]
            _, at, factor, length, _, to = arguments
            done = _index(0)
            for width in (LANES, 1):
                v = _Vectors(context, builder, number, width)
                factors = v.spread(factor)
                stop = _whole_blocks(builder, done, length, width)
                with _count_up(builder, done, stop, width) as (d, _):
                    emit(v, rows[0], builder.add(at, d), factors, rows[1], builder.add(to, d))
                done = stop
            return context.get_dummy_value()

        return types.none(source, types.int64, number, types.int64, target, types.int64), generate

    declare.__name__ = emit.__name__
    declare.__doc__ = emit.__doc__
    return intrinsic(declare)


@_row_loop
def read_row(v, source, at, factors, target, to):
    """target = source * factor, where the target is of the type that kernels compute in."""
    v.store(v.builder.fmul(v.load_stored(source, at), factors), target, to)


@_row_loop
def write_row(v, source, at, factors, target, to):
    """target = source * factor, where the source is of the type that kernels compute in."""
    v.store_rounded(v.builder.fmul(v.load(source, at), factors), target, to)


@_row_loop
def add_row(v, source, at, factors, target, to):
    """target += source * factor, both of the type that kernels compute in."""
    v.store(v.multiply_add(v.load(source, at), factors, v.load(target, to)), target, to)


@intrinsic
def prefetch_row(typing_context, source, at, length):
    """Asks for `length` numbers of a row, which may lie outside of the array, to be brought into the cache."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        stop = builder.add(arguments[1], arguments[2])
        with _count_up(builder, arguments[1], stop, _CACHE_LINE * 8 // source.dtype.bitwidth) as (d, _):
            address = builder.bitcast(builder.gep(array, [d]), byte)
            builder.call(function, [address, flag(0), flag(3), flag(1)])  # to read, into all levels, data
        return context.get_dummy_value()

    return types.none(source, types.int64, types.int64), generate


@intrinsic
def take_next(typing_context, counter):
    """Adds 1 to counter[0] in one step that threads share, and returns the value before."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, _index(1), "monotonic")

    return types.int64(counter), generate

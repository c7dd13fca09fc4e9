"""Vectors of numbers for the CPU kernels, written as LLVM instructions that numba functions call.

A vector has one lane for each query of a tile. Writing vectors out (LLVM splits them into what the machine has) makes
the speed independent of how well a compiler recognises loops.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numba.extending
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numpy.polynomial import Chebyshev, Polynomial

from gridattn.ops.neighborhood.cpu_tiles import LANES

intrinsic: Any = numba.extending.intrinsic  # callers see another signature than the decorated function has
_CACHE_LINE = 64
_INT64 = ir.IntType(64)
# Degree of the polynomial for 2^x on [-1/2, 1/2] and the format of numbers: bits, mantissa bits, exponent bias.
_FORMATS = {types.float32: (5, 32, 23, 127), types.float64: (12, 64, 52, 1023)}


class Vectors:
    """Emits operations on vectors of `width` numbers."""

    def __init__(self, context: Any, builder: Any, dtype: types.Float, width: int = LANES):
        self.context = context
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

    def load_stored(self, array: Any, index: ir.Value) -> ir.Value:
        """Loads from a row that is stored as float or as bfloat16."""
        if array.type.pointee == self.scalar:
            return self.load(array, index)
        halves = self._integers(16)
        pointer = self.builder.bitcast(self.builder.gep(array, [index]), halves.as_pointer())
        bits = self.builder.zext(self.builder.load(pointer, align=2), self._integers(32))
        return self.builder.bitcast(self.builder.shl(bits, self._integers(32, 16)), self.type)

    def store_rounded(self, vector: ir.Value, array: Any, index: ir.Value) -> None:
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

    def transposed(self, block: list[ir.Value]) -> list[ir.Value]:
        """The columns of a square block of numbers given by its rows."""
        half = self.width // 2
        for _ in range(self.width.bit_length() - 1):
            pairs = list(zip(block[:half], block[half:]))
            block = [self._interleave(a, b, first) for a, b in pairs for first in (0, half)]
        return block

    def _interleave(self, a: ir.Value, b: ir.Value, first: int) -> ir.Value:
        """Numbers taken in turn from `a` and `b`, from lane `first` on."""
        order = [lane for i in range(first, first + self.width // 2) for lane in (i, i + self.width)]
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), self.width), order))

    def permute(self, vector: ir.Value, index: ir.Value) -> ir.Value:
        """vector[index[lane]] for every lane, in one instruction of AVX2, for 8 numbers of float32."""
        function_type = ir.FunctionType(self.type, [self.type, self._integers(32)])
        function = cgutils.get_or_insert_function(self.builder.module, function_type, "llvm.x86.avx2.permps")
        return self.builder.call(function, [vector, index])

    def load_index(self, array: ir.Value, at: ir.Value) -> ir.Value:
        """Lane numbers from an array of int32."""
        pointer = self.builder.bitcast(self.builder.gep(array, [at]), self._integers(32).as_pointer())
        return self.builder.load(pointer, align=4)

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
        # A sum with a number that has no bits left for a fraction rounds x; its lowest bits are n + exponent_bias.
        shift = self.constant(1.5 * 2**mantissa + exponent_bias)
        shifted = self.builder.fadd(x, shift)
        fraction = self.builder.fsub(x, self.builder.fsub(shifted, shift))
        power = self._fit(np.exp2, degree, (-0.5, 0.5), fraction)
        exponent = self.builder.shl(self.builder.bitcast(shifted, self._integers(bits)), self._integers(bits, mantissa))
        return self.builder.fmul(power, self.builder.bitcast(exponent, self.type))

    def log2(self, x: ir.Value) -> ir.Value:
        """log2(x) for normal float32 x > 0, to about 1e-7; a NaN passes."""
        _, bits, mantissa, exponent_bias = _FORMATS[types.float32]
        whole = self.builder.bitcast(x, self._integers(bits))
        exponent = self.builder.sub(
            self.builder.lshr(whole, self._integers(bits, mantissa)), self._integers(bits, exponent_bias)
        )
        one = self._integers(bits, exponent_bias << mantissa)
        part = self.builder.or_(self.builder.and_(whole, self._integers(bits, (1 << mantissa) - 1)), one)
        offset = self.builder.fsub(self.builder.bitcast(part, self.type), self.constant(1.5))
        log = self._fit(lambda t: np.log2(1.5 + t), 9, (-0.5, 0.5), offset)
        log = self.builder.fadd(log, self.builder.sitofp(exponent, self.type))
        return self.builder.fadd(log, self.builder.fsub(x, x))

    def _fit(self, function: Callable[..., Any], degree: int, domain: tuple[float, float], x: ir.Value) -> ir.Value:
        """The polynomial that interpolates a function on a domain."""
        coefficients = Chebyshev.interpolate(function, degree, domain=domain).convert(kind=Polynomial).coef
        value = self.constant(float(coefficients[-1]))
        for coefficient in coefficients[-2::-1]:
            value = self.multiply_add(value, x, self.constant(float(coefficient)))
        return value


class Sums:
    """A block of vectors that a loop adds to; LLVM keeps it in registers."""

    def __init__(self, vectors: Vectors, count: int):
        self.vectors = vectors
        self.slots = [cgutils.alloca_once(vectors.builder, vectors.type) for _ in range(count)]

    def __getitem__(self, i: int) -> ir.Value:
        return self.vectors.builder.load(self.slots[i])

    def __setitem__(self, i: int, vector: ir.Value) -> None:
        self.vectors.builder.store(vector, self.slots[i])


def int64(value: int) -> ir.Constant:
    return ir.Constant(_INT64, value)


def count_up(builder: Any, start: ir.Value, stop: ir.Value, step: int = 1) -> Any:
    return cgutils.for_range_slice(builder, start, stop, int64(step), _INT64, inc=True)


def whole_blocks(builder: Any, start: ir.Value, stop: ir.Value, block: int) -> ir.Value:
    """The last index up to which [start, stop) is made of whole blocks."""
    length = builder.sub(stop, start)
    return builder.add(start, builder.sub(length, builder.srem(length, int64(block))))


def choose(builder: Any, number: ir.Value, cases: Iterable[int], emit: Callable[[int], None]) -> None:
    """Emits the code of every case; what runs is that of the case whose number it is."""
    done = builder.append_basic_block("chosen")
    branches = {case: builder.append_basic_block(f"case{case}") for case in cases}
    switch = builder.switch(number, done)
    for case, branch in branches.items():
        switch.add_case(int64(case), branch)
        builder.position_at_end(branch)
        emit(case)
        builder.branch(done)
    builder.position_at_end(done)


def vector_loop(emit: Any, width: int = LANES) -> Any:
    """Makes a function that numba code can call out of one that emits instructions on vectors of `width` numbers.

    The caller passes arrays, which arrive as pointers to their first element, and integers, which arrive as int64.
    """

    def declare(typing_context: Any, *given: types.Type) -> Any:
        dtype = next(t.dtype for t in given if isinstance(t, types.Array) and isinstance(t.dtype, types.Float))
        expected = [t if isinstance(t, types.Array) else types.int64 for t in given]

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> ir.Value:
            operands = [
                context.make_array(t)(context, builder, argument).data if isinstance(t, types.Array) else argument
                for t, argument in zip(signature.args, arguments)
            ]
            emit(Vectors(context, builder, dtype, width), *operands)
            return context.get_dummy_value()

        return types.none(*expected), generate

    declare.__name__ = emit.__name__
    declare.__doc__ = emit.__doc__
    declare.__signature__ = inspect.signature(emit)  # numba takes the number of arguments from here
    return intrinsic(declare)


def _row_loop(emit: Any) -> Any:
    """Makes a function that numba code can call out of one that emits what to do with neighbouring numbers of two rows.

    The call is (source, at, factor, length, target, to): `length` numbers of `source` from `at` on, times `factor`, go
    to `target` from `to` on. A row of 16-bit integers holds the upper halves of float32 numbers (bfloat16).
    """

    def declare(typing_context, source, at, factor, length, target, to):
        number = target.dtype if isinstance(target.dtype, types.Float) else source.dtype

        def generate(context, builder, signature, arguments):
            rows = [context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 4)]
            _, at, factor, length, _, to = arguments
            done = int64(0)
            for width in (LANES, 1):
                v = Vectors(context, builder, number, width)
                factors = v.spread(factor)
                stop = whole_blocks(builder, done, length, width)
                with count_up(builder, done, stop, width) as (d, _):
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


def prefetch(builder: Any, array: ir.Value, index: ir.Value) -> None:
    """Asks for the cache line of array[index], which may lie outside of the array."""
    byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    function_type = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
    address = builder.bitcast(builder.gep(array, [index]), byte)
    builder.call(function, [address, flag(0), flag(3), flag(1)])  # to read, into all levels, data


@intrinsic
def prefetch_row(typing_context, source, at, length):
    """Asks for `length` numbers of a row, which may lie outside of the array, to be brought into the cache."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        stop = builder.add(arguments[1], arguments[2])
        with count_up(builder, arguments[1], stop, _CACHE_LINE * 8 // source.dtype.bitwidth) as (d, _):
            prefetch(builder, array, d)
        return context.get_dummy_value()

    return types.none(source, types.int64, types.int64), generate


@intrinsic
def take_next(typing_context, counter):
    """Adds 1 to counter[0] in one step that threads share, and returns the value before."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, int64(1), "monotonic")

    return types.int64(counter), generate

"""Compiled kernels on the threads of an OpenMP runtime, started from compiled code: no thread runs any Python."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from gridattn.ops.neighborhood.cpu_threads import FAILED
from gridattn.ops.neighborhood.cpu_vector import int64, intrinsic

_BYTES = ir.IntType(8).as_pointer()
_CLOCK_MONOTONIC = 1  # on Linux, where Python's perf_counter_ns reads the same clock


@intrinsic
def run_team(typing_context, kernel, problem, start_region, threads):
    """Calls kernel(*problem) on up to `threads` OpenMP threads at once and waits for all of them.

    `start_region` is the address of the runtime's GOMP_parallel. Returns when the first of the calls ended, in
    nanoseconds of the monotonic clock, or FAILED if one of them raised.
    """
    signature = kernel.get_call_type(typing_context, problem.types, {})

    def generate(context: Any, builder: Any, outer: Any, arguments: Any) -> ir.Value:
        called = kernel.dispatcher.get_compile_result(signature)
        context.add_linking_libs([called.library])
        shared = ir.LiteralStructType([arguments[1].type, int64(0).type])
        region = ir.Function(
            builder.module, ir.FunctionType(ir.VoidType(), [_BYTES]), builder.module.get_unique_name("team")
        )
        region.linkage = "internal"
        body = ir.IRBuilder(region.append_basic_block("entry"))
        given = body.bitcast(region.args[0], shared.as_pointer())
        members = cgutils.unpack_tuple(body, body.load(cgutils.gep_inbounds(body, given, 0, 0)), len(problem.types))
        status, _ = context.call_internal_no_propagate(body, called.fndesc, called.signature, members)
        first_end = cgutils.gep_inbounds(body, given, 0, 1)
        body.cmpxchg(first_end, int64(0), _now(body), "monotonic", "monotonic")
        with body.if_then(status.is_error, likely=False):
            body.store_atomic(int64(FAILED), first_end, "monotonic", 8)
        body.ret_void()

        data = cgutils.alloca_once(builder, shared)
        builder.store(arguments[1], cgutils.gep_inbounds(builder, data, 0, 0))
        builder.store(int64(0), cgutils.gep_inbounds(builder, data, 0, 1))
        count = ir.IntType(32)
        start_type = ir.FunctionType(ir.VoidType(), [region.type, _BYTES, count, count])
        start = builder.inttoptr(arguments[2], start_type.as_pointer())
        builder.call(start, [region, builder.bitcast(data, _BYTES), builder.trunc(arguments[3], count), count(0)])
        return builder.load(cgutils.gep_inbounds(builder, data, 0, 1))

    return types.int64(kernel, problem, types.int64, types.int64), generate


def _now(builder: Any) -> ir.Value:
    """Nanoseconds of the monotonic clock."""
    time = cgutils.alloca_once(builder, ir.LiteralStructType([int64(0).type] * 2))
    function_type = ir.FunctionType(ir.IntType(32), [ir.IntType(32), time.type])
    read = cgutils.get_or_insert_function(builder.module, function_type, "clock_gettime")
    builder.call(read, [ir.IntType(32)(_CLOCK_MONOTONIC), time])
    seconds, rest = (builder.load(cgutils.gep_inbounds(builder, time, 0, i)) for i in (0, 1))
    return builder.add(builder.mul(seconds, int64(10**9)), rest)

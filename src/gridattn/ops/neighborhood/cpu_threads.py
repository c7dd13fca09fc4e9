"""Threads for the CPU kernels: PyTorch's own where they can be had and are not held up, else those of a pool.

PyTorch's OpenMP threads keep spinning for some milliseconds after an operator. Threads of a pool have to share the
cores with them, so that right after a `Linear` hardly any gets to run; hence the kernels are handed to those threads.
But OpenMP makes a caller wait for all threads, even those that other processes keep from running and for which no work
is left. Where that has just happened, the pool is better: its caller does not wait for a helper that never began.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import get_ident
from time import perf_counter

import torch

HELD_UP = 0.001  # seconds that a caller may wait for the other OpenMP threads
POOL_TIME = 1.0  # seconds before OpenMP is tried again after it has held up a caller
_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_in_forked_process = False
_pool_until = 0.0


def run_on_threads(call: Callable[[], None], count: int) -> None:
    """Calls a function up to `count` times at once, always once on this thread; raises what any of the calls raises.

    A single call has to do all the work that it finds undone, as the others may come late or never.
    """
    if count == 1:
        call()
    elif _in_forked_process or perf_counter() < _pool_until or _openmp() is None:
        _run_in_pool(call, count)
    else:
        _run_in_region(call, count)


def _run_in_region(call: Callable[[], None], count: int) -> None:
    global _pool_until
    start_region = _openmp()
    assert start_region is not None
    errors: list[BaseException] = []
    caller, times = get_ident(), [perf_counter()]

    def region(_: int | None) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)
        if get_ident() == caller:
            times.append(perf_counter())

    start_region(_REGION(region), None, count, 0)
    begin, done, end = *times, perf_counter()
    if end - done > max(HELD_UP, (done - begin) / 2):
        _pool_until = end + POOL_TIME
    if errors:
        raise errors[0]


@cache
def _openmp() -> Callable[..., None] | None:
    """The function that starts a parallel region in PyTorch's OpenMP runtime (named by GCC's ABI), or None."""
    maps = Path("/proc/self/maps")
    if not sys.platform.startswith("linux") or not maps.exists():
        return None
    loaded = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()}
    runtimes = [path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))]
    own = [path for path in runtimes if Path(path).is_relative_to(Path(torch.__file__).parent)] or runtimes
    if len(own) != 1:
        return None
    function = getattr(ctypes.CDLL(own[0]), "GOMP_parallel", None)
    if function is not None:
        function.argtypes, function.restype = [_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return function


def _run_in_pool(call: Callable[[], None], count: int) -> None:
    futures = [_pool().submit(call) for _ in range(count - 1)]
    call()
    for future in futures:
        if not future.cancel():
            future.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="gridattn")


def _forget_threads() -> None:
    global _in_forked_process
    _in_forked_process = True
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)  # a forked process has none of its parent's threads

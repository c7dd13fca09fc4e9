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
from time import perf_counter_ns
from typing import NamedTuple

import torch

HELD_UP = 1_000_000  # nanoseconds that a caller may wait for the other OpenMP threads
POOL_TIME = 1_000_000_000  # nanoseconds before OpenMP is tried again after it has held up a caller
FAILED = -1  # what a kernel on a team gives that raised on one of its threads
_in_forked_process = False
_pool_until = 0


class Kernel(NamedTuple):
    """A compiled kernel that several threads may run at once.

    Each call has to do all the work that it finds undone, as others may come late or never.
    """

    call: Callable[..., None]
    call_on_team: Callable[..., int]  # takes the arguments of `run_team` and then those of the kernel


def run_on_threads(kernel: Kernel, problem: tuple, count: int) -> None:
    """Calls a kernel on this thread and up to `count` - 1 others at once; raises if any of the calls does."""
    global _pool_until
    start_region = None if _in_forked_process or count == 1 else _openmp()
    begin = perf_counter_ns()
    if count == 1:
        kernel.call(*problem)
    elif start_region is None or begin < _pool_until:
        _run_in_pool(kernel.call, problem, count)
    else:
        first_end = kernel.call_on_team(start_region, count, *problem)
        end = perf_counter_ns()
        if first_end == FAILED:
            raise MemoryError("a compiled kernel failed on one of its threads")  # all that it can lack is memory
        if end - first_end > max(HELD_UP, (first_end - begin) // 2):
            _pool_until = end + POOL_TIME


@cache
def _openmp() -> int | None:
    """The address in PyTorch's OpenMP runtime of what starts a parallel region (named by GCC's ABI), or None."""
    maps = Path("/proc/self/maps")
    if not sys.platform.startswith("linux") or not maps.exists():
        return None
    loaded = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()}
    runtimes = [path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))]
    own = [path for path in runtimes if Path(path).is_relative_to(Path(torch.__file__).parent)] or runtimes
    if len(own) != 1:
        return None
    function = getattr(ctypes.CDLL(own[0]), "GOMP_parallel", None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


def _run_in_pool(call: Callable[..., None], problem: tuple, count: int) -> None:
    futures = [_pool().submit(call, *problem) for _ in range(count - 1)]
    call(*problem)
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

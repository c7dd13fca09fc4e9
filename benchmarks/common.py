"""What all benchmarks share: timing several candidates in one run, the rate of matrix products, tables and JSON.

Machines are noisy and differ, so candidates are called in turns, what is reported is ratios, and the fastest call of
each counts: other processes only ever add to a time.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

PRODUCT_SIZE = 1024
SHORT_TURN = 0.05
Candidates = dict[str, Callable[[], Any]]


def split_runnable(candidates: Candidates) -> tuple[Candidates, dict[str, str]]:
    """Calls each candidate once, which also warms it up; gives those that run, and why the others do not."""
    runnable, failures = {}, {}
    for name, call in candidates.items():
        try:
            call()
            runnable[name] = call
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return runnable, failures


def time_in_turns(
    candidates: Candidates, *, rounds: int = 9, seconds: float = 20.0, device: str = "cpu", warm: bool = False
) -> dict[str, float]:
    """Calls all candidates in turns and returns the seconds of the fastest call of each.

    A candidate rests once it has used up its `seconds`, but it is timed at least once. Unless the candidates are
    `warm`, there is one round more, which does not count. A turn of less than `SHORT_TURN` seconds is lengthened by
    more calls: what an operator finds in the caches, and whether the threads are awake, is then its own doing and not
    that of the candidate before it.
    """

    def turn(name: str) -> float:
        began = perf_counter()
        fastest = last = call(name)
        while perf_counter() - began + last < SHORT_TURN:
            last = call(name)
            fastest = min(fastest, last)
        return fastest

    def call(name: str) -> float:
        wait_for(device)
        start = perf_counter()
        candidates[name]()
        wait_for(device)
        return perf_counter() - start

    if not warm:
        for name in candidates:
            call(name)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, taken in times.items():
            if not taken or sum(taken) < seconds:
                taken.append(turn(name))
    return {name: min(taken) for name, taken in times.items()}


def wait_for(device: str) -> None:
    """Waits until a device has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def matrix_product(dtype: torch.dtype, device: str) -> tuple[Callable[[], Tensor], int]:
    """A product of two square matrices, to be timed beside the candidates, and its floating point operations."""
    a, b = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype, device=device)
    return lambda: a @ b, 2 * PRODUCT_SIZE**3


_PRINT_PEAK = """
import pathlib, resource, sys
status = pathlib.Path("/proc/self/status")
if status.exists():  # on Linux, getrusage also counts the process that started this one
    print(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1))
"""


def peak_memory(code: str) -> float:
    """Peak resident memory in GiB of a fresh Python process that runs `code`."""
    command = [sys.executable, "-c", f"{code}\n{_PRINT_PEAK}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) / 2**20


def machine(device: str) -> dict[str, Any]:
    """What a reader of a result has to know about where it comes from."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table; numbers are rounded to three digits."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a result where the caller wants it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")

"""Block sizes of the Triton kernels: the fastest of a few, found at the first call of a problem and kept on disk."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from gridattn.ops.constants import constant_in_traces


class Block(NamedTuple):
    """Tokens of a tile of queries and of a tile of keys, and how a program runs."""

    queries: int
    keys: int
    warps: int
    stages: int


# The last of each needs least of a multiprocessor and runs where nothing can be timed.
FORWARD = (Block(128, 128, 8, 2), Block(128, 64, 8, 2), Block(128, 64, 4, 3), Block(64, 64, 4, 3), Block(32, 32, 4, 1))
QUERY_GRADIENT = (Block(128, 64, 8, 2), Block(64, 64, 4, 2), Block(64, 32, 4, 2), Block(32, 32, 4, 1))
KEY_GRADIENT = (
    Block(64, 128, 8, 2),
    Block(64, 64, 8, 2),
    Block(64, 64, 4, 2),
    Block(32, 64, 4, 2),
    Block(32, 32, 4, 1),
)
INTERPRETED = Block(32, 32, 4, 1)

_chosen: dict[tuple, Block] = {}


def run_fastest(kernel: str, blocks: Sequence[Block], problem: tuple, run: Callable[[Block], None]) -> None:
    """Runs a kernel with the block sizes that were fastest on this problem and device.

    Args:
        kernel: its name.
        blocks: the sizes to try.
        problem: what the choice depends on besides the device: a tuple of plain values.
        run: runs the kernel once; must give the same result every time.
    """
    if interpreted():
        return run(INTERPRETED)
    key = (kernel, problem, torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    if key not in _chosen:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return run(blocks[-1])
        _chosen[key] = _from_disk(key, blocks, run)
    return run(_chosen[key])


@constant_in_traces
def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _from_disk(key: tuple, blocks: Sequence[Block], run: Callable[[Block], None]) -> Block:
    import triton
    from triton.runtime.cache import get_cache_manager

    text = repr((key, tuple(blocks), triton.__version__))
    cache = get_cache_manager(hashlib.sha256(text.encode()).hexdigest())
    path = cache.get_file("gridattn_block.json")
    if path is not None:
        with open(path) as file:
            kept = Block(*json.load(file))
        if kept in blocks:
            return kept
    block = _fastest(blocks, run)
    cache.put(json.dumps(block), "gridattn_block.json", binary=False)
    return block


def _fastest(blocks: Sequence[Block], run: Callable[[Block], None]) -> Block:
    """The block size of the shortest time among those that fit into a multiprocessor."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times = {}
    for block in blocks:
        try:
            times[block] = do_bench(lambda block=block: run(block), warmup=5, rep=30, return_mode="min")
        except OutOfResources:
            continue
    return min(times, key=times.__getitem__) if times else blocks[-1]

"""Neighborhood attention over a grid that is larger than memory: peak memory, throughput, and a check of the result.

    python benchmarks/streamed.py [--size 16384] [--inputs functions|files] [--folder DIR] [--json PATH]

One sample, one head of 16 channels in bfloat16, kernel 7. At the default size every tensor has 8 GiB. The output is a
memory-mapped file; the inputs are functions that make the numbers of a region, or with `--inputs files` memory-mapped
files too. All files lie in a temporary folder inside `--folder` and are removed at the end.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from common import machine, print_table, write_json
from torch import Tensor

from gridattn.ops import GridReader, neighborhood_attention, neighborhood_attention_streamed
from gridattn.ops.neighborhood.stream_sources import release, to_array, to_tensor

KERNEL, CHANNELS, BYTES = 7, 16, 2
STRIP = 4 * KERNEL
"""Rows of the crops that the result is checked against."""


class Numbers:
    """Numbers of any region of a grid, always the same: the product of a random row and a random column a channel."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows, self.columns = torch.randn(2, size, CHANNELS, generator=generator).to(torch.bfloat16)

    def __call__(self, region: tuple[slice, ...]) -> Tensor:
        _, rows, columns = region
        return (self.rows[rows, None] * self.columns[columns])[None, :, :, None]


def write_file(path: Path, numbers: Numbers, size: int) -> np.ndarray:
    """A memory-mapped .npy file of the numbers of the whole grid."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(1, size, size, 1, CHANNELS))
    for start in range(0, size, 256):
        rows = slice(start, min(start + 256, size))
        array[:, rows] = to_array(numbers((slice(0, 1), rows, slice(0, size))))
        release(array)
    array.flush()
    return np.load(path, mmap_mode="r")


def largest_error(result: np.ndarray, numbers: list[Numbers], size: int) -> float:
    """Largest difference, |a - b| / (1 + |b|), between sampled rows of the result and attention, in float32, of the
    rows around them.

    A strip of rows that has its borders further from a row than the window reaches, or at the borders of the grid,
    gives that row its windows.
    """
    worst = 0.0
    for row in (0, 1, size // 3, size // 2 + 1, size - 2, size - 1):
        first = min(max(0, row - STRIP // 2), size - STRIP)
        region = (slice(0, 1), slice(first, first + STRIP), slice(0, size))
        query, key, value = (of(region).float() for of in numbers)
        expected = neighborhood_attention(query, key, value, KERNEL)[0, row - first]
        difference = (to_tensor(np.array(result[0, row])).float() - expected).abs()
        worst = max(worst, (difference / (1 + expected.abs())).max().item())
    return worst


def peak_memory() -> float:
    """Peak resident memory of this process in GiB."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=16384, help="rows and columns of the grid")
    parser.add_argument("--inputs", choices=("functions", "files"), default="functions")
    parser.add_argument("--memory", type=int, default=512, help="MiB that a tile and the work on it may take")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "streamed.json")
    arguments = parser.parse_args()
    size = arguments.size
    if size < STRIP:
        parser.error(f"--size {size} is not allowed; at least {STRIP} is")

    files = 4 if arguments.inputs == "files" else 1
    needed, free = files * size**2 * CHANNELS * BYTES, shutil.disk_usage(arguments.folder).free
    if needed > free:
        parser.error(
            f"{arguments.folder} has {free / 2**30:.1f} GiB free, but {files} files take {needed / 2**30:.1f} GiB; "
            "name another --folder, a smaller --size, or take --inputs functions"
        )
    numbers = [Numbers(size, seed) for seed in range(3)]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if arguments.inputs == "files":
            inputs = [write_file(folder / f"{i}.npy", of, size) for i, of in enumerate(numbers)]
        else:
            inputs = [GridReader(of, (1, size, size, 1, CHANNELS), torch.bfloat16) for of in numbers]
        before, start = peak_memory(), perf_counter()
        result = neighborhood_attention_streamed(
            *inputs,
            KERNEL,
            out=folder / "out.npy",
            memory=arguments.memory * 2**20,
            progress=lambda done, tiles: print(f"\rtile {done} of {tiles}", end="", file=sys.stderr, flush=True),
        )
        seconds, peak = perf_counter() - start, peak_memory()
        print(file=sys.stderr)
        error = largest_error(result, numbers, size)
        del result, inputs
    assert error < torch.finfo(torch.bfloat16).eps, (
        f"sampled rows differ by {error} from attention of the rows around them"
    )

    flops = 4 * CHANNELS * KERNEL**2 * size**2
    rows = [
        ("peak resident memory, GiB", peak),
        ("the same before the work, GiB", before),
        ("one tensor, GiB", size**2 * CHANNELS * BYTES / 2**30),
        ("seconds", seconds),
        ("million positions a second", size**2 / seconds / 1e6),
        ("useful GFLOP/s", flops / seconds / 1e9),
        ("largest error of sampled rows", error),
    ]
    print_table(f"{size}x{size} k{KERNEL} 1x{CHANNELS} bfloat16, inputs: {arguments.inputs}", ("what", "value"), rows)
    write_json(arguments.json, {"machine": machine("cpu"), "size": size, "inputs": arguments.inputs, **dict(rows)})
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()

"""Neighborhood attention against dense attention, compiled FlexAttention and our own `tiled` backend.

    python benchmarks/neighborhood.py [--device cpu] [--quick] [--suite ours|natten] [--json PATH]

One run gives one table of ratios: how many times faster than each rival, and the share of the machine's matrix product
rate that is reached in useful arithmetic: 2 * (D + Dv) operations per visible pair forward, 5 / 2 times that backward.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    Candidates,
    machine,
    matrix_product,
    peak_memory,
    print_table,
    split_runnable,
    time_in_turns,
    write_json,
)
from einops import rearrange
from natten_suite import run_suite
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gridattn.ops.neighborhood.api import neighborhood_attention
from gridattn.ops.neighborhood.plan import Plan, make_plan


class Problem(NamedTuple):
    grid: tuple[int, ...]
    kernel_size: int
    heads: int
    depth: int

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.grid))} k{self.kernel_size} {self.heads}x{self.depth}"


PROBLEMS = (
    Problem((56, 56), 7, 4, 32),
    Problem((64, 64), 13, 4, 64),
    Problem((128, 128), 13, 4, 64),
    Problem((32, 32, 32), 5, 4, 32),
)
DTYPES = (torch.float32, torch.bfloat16)
FLEX_BLOCKS = (32, 64, 128)
RIVALS = ("dense", "flex", "tiled")
COLUMNS = ("problem", "type", "pass", "ms", *(f"x {rival}" for rival in RIVALS), "% of product rate", "GFLOP/s")

BIG_GRID = """
import torch
from gridattn.ops.neighborhood.api import neighborhood_attention
query, key, value = (torch.randn(1, 1024, 1024, 1, 32, requires_grad={train}) for _ in range(3))
out = neighborhood_attention(query, key, value, kernel_size=7)
if {train}:
    out.backward(torch.ones_like(out))
"""


def visible_keys(plan: Plan) -> np.ndarray:
    """(tokens, window): flat indices of the keys that each token sees, where no axis is causal."""
    flat = np.zeros((1, 1), dtype=np.int64)
    for axis in plan.axes:
        along = axis.start[:, None] + axis.dilation * np.arange(axis.kernel)
        flat = rearrange(flat[:, None, :, None] * axis.length + along[None, :, None, :], "q i w j -> (q i) (w j)")
    return flat


def flex_mask(plan: Plan, block: int, device: str) -> BlockMask:
    """The mask of FlexAttention over tokens in reading order, from the plan, without a table of all pairs."""
    seen = visible_keys(plan) // block
    blocks = -(-len(seen) // block)
    marks = torch.zeros(blocks, blocks, dtype=torch.bool)
    marks[torch.arange(len(seen))[:, None] // block, torch.from_numpy(seen)] = True
    counts = marks.sum(dim=1, dtype=torch.int32).to(device)
    order = marks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(device, torch.int32)
    starts = [torch.from_numpy(axis.start).to(device) for axis in plan.axes]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        result = query >= 0
        for start, axis in zip(reversed(starts), reversed(plan.axes)):
            offset = key % axis.length - start[query % axis.length]
            result = result & (offset >= 0) & (offset < axis.kernel)
            query, key = query // axis.length, key // axis.length
        return result

    lengths = (len(seen), len(seen))
    return BlockMask.from_kv_blocks(counts[None, None], order[None, None], None, None, block, visible, lengths)


def dense_candidates(problem: Problem, dtype: torch.dtype, device: str, train: bool) -> Candidates:
    """Dense attention, and FlexAttention at several block sizes, over (B, H, N, D)."""
    tokens = int(np.prod(problem.grid))
    shape = (3, 1, problem.heads, tokens, problem.depth)
    inputs = [t.requires_grad_(train) for t in torch.randn(shape, dtype=dtype, device=device)]
    plan = make_plan(problem.grid, problem.kernel_size)
    candidates: Candidates = {"dense": step(F.scaled_dot_product_attention, inputs, train)}
    for block in FLEX_BLOCKS:
        flex = torch.compile(partial(flex_attention, block_mask=flex_mask(plan, block, device)), dynamic=False)
        candidates[f"flex {block}"] = step(flex, inputs, train)
    return candidates


def our_candidates(problem: Problem, dtype: torch.dtype, device: str, train: bool) -> Candidates:
    """Our operator and its `tiled` backend, over (B, *grid, H, D)."""
    shape = (3, 1, *problem.grid, problem.heads, problem.depth)
    inputs = [t.requires_grad_(train) for t in torch.randn(shape, dtype=dtype, device=device)]
    return {
        name: step(partial(neighborhood_attention, kernel_size=problem.kernel_size, backend=backend), inputs, train)
        for name, backend in (("ours", "auto"), ("tiled", "tiled"))
    }


def step(attention: Callable[..., Tensor], inputs: list[Tensor], train: bool) -> Callable[[], Any]:
    """A call that runs attention forward, and backward too if it is training."""
    gradient = torch.randn_like(inputs[0])
    if not train:
        return lambda: attention(*inputs)
    return lambda: torch.autograd.grad(attention(*inputs), inputs, gradient)


def measure(problem: Problem, dtype: torch.dtype, train: bool, device: str, quick: bool) -> dict[str, Any]:
    """One row of the table."""
    product, product_flops = matrix_product(dtype, device)
    candidates = our_candidates(problem, dtype, device, train) | dense_candidates(problem, dtype, device, train)
    candidates, failures = split_runnable(candidates | {"product": product})
    rounds, seconds = (5, 4.0) if quick else (15, 15.0)
    times = time_in_turns(candidates, rounds=rounds, seconds=seconds, device=device, warm=True)
    flex = [seconds for name, seconds in times.items() if name.startswith("flex")]
    if flex:
        times["flex"] = min(flex)
    pairs = make_plan(problem.grid, problem.kernel_size).num_visible * problem.heads
    rate = 4 * problem.depth * pairs * (3.5 if train else 1) / times["ours"]
    return {
        "problem": str(problem),
        "dtype": str(dtype).removeprefix("torch."),
        "pass": "forward + backward" if train else "forward",
        "seconds": times,
        "ratios": {rival: times[rival] / times["ours"] for rival in RIVALS if rival in times},
        "product_share": rate / (product_flops / times["product"]),
        "flops_per_second": rate,
        "failures": failures,
    }


def memory_rows() -> dict[str, float]:
    """Peak resident memory in GiB on a grid of 1024 x 1024, and of a process that only imports PyTorch."""
    return {
        "import torch": peak_memory("import torch"),
        "1024x1024 k7 1x32 forward": peak_memory(BIG_GRID.format(train=False)),
        "1024x1024 k7 1x32 forward + backward": peak_memory(BIG_GRID.format(train=True)),
    }


def cells(result: dict[str, Any]) -> list[Any]:
    """A result as a row of the printed table."""
    ratios = [result["ratios"].get(rival, "does not run") for rival in RIVALS]
    own = [100 * result["product_share"], result["flops_per_second"] / 1e9]
    return [result["problem"], result["dtype"], result["pass"], 1e3 * result["seconds"]["ours"], *ratios, *own]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="the two small problems and fewer rounds")
    parser.add_argument(
        "--suite", choices=("ours", "natten"), default="ours", help="natten: its published runs, on CUDA"
    )
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "neighborhood.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    results_folder = Path(__file__).parent / "results"
    if arguments.suite == "natten":
        write_json(arguments.json or results_folder / "natten_suite.json", run_suite(arguments.device))
        return
    path = arguments.json or results_folder / "neighborhood.json"

    results = []
    for problem in PROBLEMS[:2] if arguments.quick else PROBLEMS:
        for dtype in DTYPES:
            for train in (False, True):
                results.append(measure(problem, dtype, train, arguments.device, arguments.quick))
                print("measured", *cells(results[-1]), flush=True)
                torch.compiler.reset()
    memory = memory_rows() if arguments.device == "cpu" else {}
    write_json(path, {"machine": machine(arguments.device), "results": results, "peak_memory_gib": memory})

    print_table("Neighborhood attention: times faster than ...", COLUMNS, [cells(result) for result in results])
    for reason in sorted({f"{name}: {text}" for r in results for name, text in r["failures"].items()}):
        print("does not run:", reason)
    if memory:
        print_table("Peak memory", ("process", "GiB"), list(memory.items()))
    print(f"written to {path}")


if __name__ == "__main__":
    main()

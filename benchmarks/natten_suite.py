"""The problems of NATTEN's published profiler runs, on a GPU, beside its published times and compiled FlexAttention.

Run by `python benchmarks/neighborhood.py --device cuda --suite natten`. Our times are of the whole call on heads-last
tensors, so they include every reordering of tokens; of NATTEN both published figures are shown, the kernel alone and
with its token permutation. FlexAttention gets tokens in reading order and a mask of the same windows, made beforehand.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import machine, print_table
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from gridattn.ops import TileLayout, neighborhood_attention, neighborhood_attention_in_layout
from gridattn.ops.neighborhood.plan import Plan, make_plan

DEPTH = 128
DTYPE = torch.float16
OURS = ("triton", "flex", "tiled")
REPEATS = 20


class Published(NamedTuple):
    """Milliseconds on one GPU: the kernel, and the whole call with its token permutation."""

    kernel: float
    whole: float


class Case(NamedTuple):
    """A problem, batch 1, with the forward times that NATTEN's documentation gives."""

    grid: tuple[int, ...]
    heads: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    tile: tuple[int, ...]
    published: dict[str, Published]

    def __str__(self) -> str:
        grid, kernel, stride = ("x".join(map(str, axes)) for axes in (self.grid, self.kernel_size, self.stride))
        return f"{grid} w {kernel} s {stride}, {self.heads} heads"


def case(grid, heads, kernel_size, stride, tile, h100, b200) -> Case:
    return Case(grid, heads, kernel_size, stride, tile, {"H100": Published(*h100), "B200": Published(*b200)})


LINE, IMAGE, VIDEO = (32768,), (256, 256), (30, 48, 80)
CASES = (
    case(LINE, 1, (2048,), (1,), (128,), (0.094848, 0.094848), (0.058111, 0.058111)),
    case(LINE, 1, (2048,), (256,), (128,), (0.062687, 0.062687), (0.037888, 0.037888)),
    case(LINE, 1, (2048,), (2048,), (128,), (0.059264, 0.059264), (0.038240, 0.038240)),
    case(IMAGE, 24, (80, 80), (1, 1), (16, 8), (16.201, 18.603), (8.692, 10.931)),
    case(IMAGE, 24, (80, 80), (16, 16), (16, 8), (7.914, 10.601), (4.114, 6.389)),
    case(VIDEO, 24, (18, 24, 24), (1, 1, 1), (2, 8, 8), (79.043, 84.417), (42.243, 47.353)),
    case(VIDEO, 24, (18, 24, 24), (16, 8, 8), (2, 8, 8), (23.359, 29.109), (13.010, 18.538)),
)
"""Figures of NATTEN's documentation (profiler sample outputs, version 0.21); tile is its H100 key tile."""


def run_suite(device: str) -> dict[str, Any]:
    """Times every case forward and forward with backward, prints the tables and returns all figures.

    Raises:
        SystemExit: no CUDA device.
    """
    if device != "cuda" or not torch.cuda.is_available():
        raise SystemExit(f"--suite natten needs --device cuda and a CUDA GPU; device is {device!r}, " + _gpus())
    results = []
    for problem in CASES:
        for train in (False, True):
            results.append(measure(problem, train))
            print("measured", problem, "training" if train else "forward", results[-1]["milliseconds"], flush=True)
            torch.compiler.reset()
    show(results)
    return {"machine": machine(device), "dtype": str(DTYPE), "results": results}


def _gpus() -> str:
    return f"{torch.cuda.device_count()} GPUs are visible"


def measure(problem: Case, train: bool) -> dict[str, Any]:
    """Milliseconds of every candidate that runs, and why the others do not."""
    milliseconds, failures = {}, {}
    for name, make in candidates(problem, train).items():
        try:
            milliseconds[name] = time_call(make())
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        torch.cuda.empty_cache()
    return {
        "problem": str(problem),
        "pass": "forward + backward" if train else "forward",
        "milliseconds": milliseconds,
        "published": {gpu: figures._asdict() for gpu, figures in problem.published.items()},
        "failures": failures,
    }


def candidates(problem: Case, train: bool) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Functions that prepare a candidate and return a call of it."""
    settings = {"kernel_size": problem.kernel_size, "stride": problem.stride}

    def ours(backend: str) -> Callable[[], Any]:
        return step(partial(neighborhood_attention, **settings, backend=backend), inputs(problem.grid, problem), train)

    def in_tiles() -> Callable[[], Any]:
        layout = TileLayout(problem.grid, problem.tile)
        attention = partial(neighborhood_attention_in_layout, layout=layout, **settings, backend="flex")
        return step(attention, inputs((layout.tokens,), problem), train)

    def rival() -> Callable[[], Any]:
        flex = torch.compile(partial(flex_attention, block_mask=reading_order_mask(problem)), dynamic=False)
        return step(flex, heads_first(problem), train)

    def dense() -> Callable[[], Any]:
        return step(F.scaled_dot_product_attention, heads_first(problem), train)

    return {
        **{f"ours {backend}": partial(ours, backend) for backend in OURS},
        "ours flex, tokens in tiles": in_tiles,
        "FlexAttention": rival,
        "dense": dense,
    }


def inputs(tokens: tuple[int, ...], problem: Case) -> list[Tensor]:
    shape = (1, *tokens, problem.heads, DEPTH)
    return [torch.randn(shape, dtype=DTYPE, device="cuda") for _ in range(3)]


def heads_first(problem: Case) -> list[Tensor]:
    return [rearrange(t, "b ... h d -> b h (...) d").contiguous() for t in inputs(problem.grid, problem)]


def reading_order_mask(problem: Case) -> BlockMask:
    """The windows as a mask over tokens in reading order; PyTorch looks at all pairs of tokens once to make it."""
    plan: Plan = make_plan(problem.grid, problem.kernel_size, problem.stride)
    starts = [torch.from_numpy(axis.start).to("cuda") for axis in plan.axes]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        result = query >= 0
        for start, axis in zip(reversed(starts), reversed(plan.axes)):
            offset = key % axis.length - start[query % axis.length]
            result = result & (offset >= 0) & (offset < axis.kernel)
            query, key = query // axis.length, key // axis.length
        return result

    tokens = torch.Size(problem.grid).numel()
    return torch.compile(create_block_mask)(visible, None, None, tokens, tokens, device="cuda")


def step(attention: Callable[..., Tensor], tensors: list[Tensor], train: bool) -> Callable[[], Any]:
    """A call that runs attention forward, and backward too if it is training."""
    if not train:
        return lambda: attention(*tensors)
    leaves = [t.requires_grad_() for t in tensors]
    gradient = torch.randn_like(tensors[0])
    return lambda: torch.autograd.grad(attention(*leaves), leaves, gradient)


def time_call(call: Callable[[], Any]) -> float:
    """Milliseconds of one call: the median of calls queued one after the other, after three that do not count."""
    for _ in range(3):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(before.elapsed_time(after) for before, after in pairwise(marks))
    return times[len(times) // 2]


def show(results: list[dict[str, Any]]) -> None:
    """Prints times beside the published ones, ratios to the rivals, and the backend that was fastest in most cases."""
    name = torch.cuda.get_device_name()
    forward = [result for result in results if result["pass"] == "forward"]
    names = [*(f"ours {backend}" for backend in OURS), "ours flex, tokens in tiles", "FlexAttention", "dense"]
    rows = [
        [r["problem"], *(r["milliseconds"].get(n, "does not run") for n in names)]
        + [r["published"][gpu][part] for gpu in ("H100", "B200") for part in ("kernel", "whole")]
        for r in forward
    ]
    published = [f"NATTEN {gpu} {part}" for gpu in ("H100", "B200") for part in ("kernel", "with permute")]
    print_table(f"Forward on {name}, ms ({DTYPE}, head dim {DEPTH})", ["problem", *names, *published], rows)
    rows = [
        [r["problem"], *(r["milliseconds"].get(n, "does not run") for n in names)] for r in results if r not in forward
    ]
    print_table(f"Forward and backward on {name}, ms", ["problem", *names], rows)

    rows, wins = [], []
    for result in results:
        times = result["milliseconds"]
        own = {backend: times[f"ours {backend}"] for backend in OURS if f"ours {backend}" in times}
        if not own:
            continue
        wins.append(min(own, key=own.__getitem__))
        best = own[wins[-1]]
        same = next((gpu for gpu in result["published"] if gpu in name), None)
        against = result["published"][same]["whole"] / best if same and result in forward else "-"
        rivals = [times[rival] / best if rival in times else "does not run" for rival in ("FlexAttention", "dense")]
        rows.append([result["problem"], result["pass"], wins[-1], *rivals, against])
    columns = ["problem", "pass", "fastest of ours", "x FlexAttention", "x dense", "x NATTEN on this GPU"]
    print_table("Times faster than ...", columns, rows)
    for reason in sorted({f"{n}: {text}" for r in results for n, text in r["failures"].items()}):
        print("does not run:", reason)
    if wins:
        print(f'for measured_gpus.json: "{name}": "{max(set(wins), key=wins.count)}"')

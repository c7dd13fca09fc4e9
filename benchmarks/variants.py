"""Queries at some positions, packed grids and window sizes per token, against what one would do without them.

    python benchmarks/variants.py [--device cpu] [--quick] [--json PATH]

Every table holds ratios of times of one run: below 1 is faster than the rival in the column's head.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Candidates, machine, print_table, time_in_turns, write_json
from torch import Tensor

from gridattn.ops import (
    neighborhood_attention,
    neighborhood_attention_at,
    neighborhood_attention_mixed,
    neighborhood_attention_packed,
)

GRID, KERNEL, HEADS, DEPTH = (64, 64), 7, 4, 32
SHARES = (1 / 256, 1 / 64, 1 / 16, 1 / 4, 1)
SIZES = (3, 7, 11)
PACKS = {
    "8 grids 20x20 to 40x40": [(20, 40), (40, 20), (24, 32), (32, 24), (28, 28), (28, 28), (40, 40), (20, 20)],
    "32 grids 8x8 to 16x16": [(8 + i % 3 * 4, 8 + i % 5 * 2) for i in range(32)],
    "one 64x64, 15 16x16": [(64, 64)] + [(16, 16)] * 15,
}


def tensors(*shape: int, device: str, train: bool) -> list[Tensor]:
    return [t.requires_grad_(train) for t in torch.randn(3, *shape, HEADS, DEPTH, device=device)]


def step(attend: Callable[..., Tensor], inputs: Sequence[Tensor], train: bool) -> Callable[[], Any]:
    """A call that runs attention forward, and backward too if it is training."""
    if not train:
        return lambda: attend(*inputs)
    gradient = torch.randn_like(attend(*inputs))
    return lambda: torch.autograd.grad(attend(*inputs), inputs, gradient)


def at_positions(device: str, train: bool, timed: Callable[[Candidates], dict[str, float]]) -> list[dict[str, Any]]:
    """A share of the positions, scattered or in one square, against all of them."""
    _, key, value = tensors(1, *GRID, device=device, train=train)
    whole = tensors(1, *GRID, device=device, train=train)
    places = torch.cartesian_prod(*(torch.arange(n, device=device) for n in GRID))
    inputs, candidates = {}, {"whole": step(partial(neighborhood_attention, kernel_size=KERNEL), whole, train)}
    for share in SHARES:
        count, side = int(share * prod(GRID)), int(share**0.5 * GRID[0])
        asked = {
            "scattered": places[torch.randperm(len(places), device=device)[:count]],
            "square": places[(places < side).all(dim=1)],
        }
        for name, positions in asked.items():
            query = torch.randn(1, len(positions), HEADS, DEPTH, device=device, requires_grad=train)
            attend = partial(neighborhood_attention_at, positions=positions, kernel_size=KERNEL)
            inputs[share, name] = (query, key, value)
            for way in ("auto", "gather"):
                call = partial(attend, backend=way)
                candidates[f"{share} {name} {way}"] = step(call, inputs[share, name], train)
    times = timed(candidates)
    return [
        {
            "queries": f"1/{round(1 / share)}, {name}",
            "x whole grid": times[f"{share} {name} auto"] / times["whole"],
            "x whole grid, gathered": times[f"{share} {name} gather"] / times["whole"],
            "us a query": 1e6 * times[f"{share} {name} auto"] / inputs[share, name][0].shape[1],
        }
        for share, name in inputs
    ]


def packed(device: str, train: bool, timed: Callable[[Candidates], dict[str, float]]) -> list[dict[str, Any]]:
    """Packed grids against a loop, and against padding to the largest grid (whose results at borders are others)."""
    rows = []
    for name, grids in PACKS.items():
        lengths, largest = [prod(grid) for grid in grids], [max(axis) for axis in zip(*grids)]
        inputs = tensors(sum(lengths), device=device, train=train)
        mask = pad([torch.ones(grid, dtype=torch.bool, device=device)[..., None] for grid in grids], largest)[..., 0]
        mask |= ~mask.flatten(1).any(dim=1).view(-1, 1, 1)

        def loop(*qkv: Tensor, lengths: list[int] = lengths, grids: list = grids) -> Tensor:
            outs = [
                neighborhood_attention(*(t.unflatten(0, grid)[None] for t in own), kernel_size=KERNEL)
                for *own, grid in zip(*(t.split(lengths) for t in qkv), grids)
            ]
            return torch.cat([out.flatten(0, 2) for out in outs])

        def padded(*qkv: Tensor, lengths: list[int] = lengths, grids: list = grids, largest: list = largest) -> Tensor:
            own = (pad([t.unflatten(0, g) for t, g in zip(x.split(lengths), grids)], largest) for x in qkv)
            out = neighborhood_attention(*own, kernel_size=KERNEL)
            return torch.cat([o[: g[0], : g[1]].flatten(0, 1) for o, g in zip(out, grids)])

        ours = partial(neighborhood_attention_packed, grids=grids, kernel_size=KERNEL)
        candidates = {"packed": ours, "loop": loop, "padded": padded}
        times = timed({which: step(call, inputs, train) for which, call in candidates.items()})
        rows.append(
            {
                "grids": name,
                "x loop": times["packed"] / times["loop"],
                "x padded": times["packed"] / times["padded"],
                "ms": 1e3 * times["packed"],
            }
        )
    return rows


def pad(grids: Sequence[Tensor], largest: Sequence[int]) -> Tensor:
    """(h, w, ...) each -> (samples, *largest, ...) with zeros."""
    return torch.stack(
        [F.pad(t, [0, 0] * (t.ndim - 2) + [0, largest[1] - t.shape[1], 0, largest[0] - t.shape[0]]) for t in grids]
    )


def mixed(device: str, train: bool, timed: Callable[[Candidates], dict[str, float]]) -> list[dict[str, Any]]:
    """A window size per token against the largest everywhere, and against every size everywhere."""
    side = GRID[0]
    random = torch.rand(GRID, device=device)
    ring = torch.cartesian_prod(*(torch.arange(n, device=device) - side // 2 for n in GRID)).abs().amax(1).view(GRID)
    choices = {
        "large in the middle eighth": (ring < side // 6).long() * 2,
        "three rings": (ring < side // 3).long() + (ring < side // 6),
        "scattered, 1/64 large": (random < 1 / 64).long() * 2,
        "scattered thirds": (random * 3).long(),
    }
    inputs, rows = tensors(1, *GRID, device=device, train=train), []
    for name, choice in choices.items():
        attend = partial(neighborhood_attention_mixed, kernel_sizes=SIZES, choice=choice)
        candidates = {
            "mixed": attend,
            "largest": partial(neighborhood_attention, kernel_size=SIZES[-1]),
            "all": lambda *qkv: [neighborhood_attention(*qkv, kernel_size=size) for size in SIZES][-1],
        }
        if train:  # the sum reaches every size's backward pass
            candidates["all"] = lambda *qkv: sum(neighborhood_attention(*qkv, kernel_size=size) for size in SIZES)
        times = timed({which: step(call, inputs, train) for which, call in candidates.items()})
        pairs = torch.tensor(SIZES, device=device)[choice].double().square().mean().item() / SIZES[-1] ** 2
        rows.append(
            {
                "choice": name,
                "x largest everywhere": times["mixed"] / times["largest"],
                "visible pairs / largest": pairs,
                "x every size everywhere": times["mixed"] / times["all"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rounds, seconds = (5, 2.0) if args.quick else (15, 10.0)
    timed = partial(time_in_turns, rounds=rounds, seconds=seconds, device=args.device)
    record: dict[str, Any] = {"machine": machine(args.device)}
    for name, table in (("queries", at_positions), ("packed", packed), ("mixed", mixed)):
        for train in (False, True):
            rows = table(args.device, train, timed)
            title = f"{name}, {'forward + backward' if train else 'forward'}"
            record[title] = rows
            print_table(title, list(rows[0]), [list(row.values()) for row in rows])
    if args.json:
        write_json(args.json, record)


if __name__ == "__main__":
    main()

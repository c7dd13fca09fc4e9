"""Time of every registered attention on images, beside dense attention and, where timm has the mechanism, beside timm.

    python benchmarks/layers.py [--quick] [--only PATTERN] [--json FILE]

Each row times forward and forward + backward of one layer (dim 64, 4 heads, batch 1, float32) at 14x14, 56x56 and
112x112, in turn with its rivals, so that a machine whose speed drifts slows all alike; only dense attention at 112x112,
which takes seconds, is timed once for all rows. `x dense` is dense attention's
time over ours, `x timm` timm's over ours: above 1, ours is faster. `slope` is the growth of our forward time with the
number of tokens between the two larger grids, on a log-log scale, for mechanisms that claim linear cost; 1 is linear.
"""

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine, print_table, time_in_turns, write_json
from torch import Tensor, nn

from gridattn.layers import attention_info, create_attention, list_attentions

DIM, HEADS = 64, 4
SIZES = (14, 56, 112)
MEMORY_LIMIT = 6 << 30
"""Bytes above which a layer is not run at a size."""

Call = Callable[[], object]


class ChannelsLast(nn.Module):
    """A module on (B, C, H, W) as one on (B, H, W, C)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(-1, 1)).movedim(1, -1)


class Tokens(nn.Module):
    """A module on (B, N, C) as one on (B, H, W, C)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(1, 2)).view(x.shape)


def timm_peer(name: str, size: int) -> nn.Module | None:
    """timm's version of a mechanism with the same settings, or None."""
    if name == "halo":
        from timm.layers.halo_attn import HaloAttn

        return ChannelsLast(HaloAttn(DIM, num_heads=HEADS, block_size=7, halo_size=3, dim_head=DIM // HEADS))
    if name == "dual":
        from timm.models.davit import ChannelBlock, SpatialBlock

        blocks = SpatialBlock(DIM, HEADS, window_size=7), ChannelBlock(DIM, HEADS)
        return ChannelsLast(nn.Sequential(*blocks))
    if name == "gated_positional":
        from timm.models.convit import GPSA

        return Tokens(GPSA(DIM, HEADS))
    if name == "multi_axis":
        from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl

        config = MaxxVitTransformerCfg(dim_head=DIM // HEADS, window_size=(7, 7), grid_size=(7, 7))
        return nn.Sequential(*(PartitionAttentionCl(DIM, kind, config) for kind in ("block", "grid")))
    return None


def peer_options(name: str) -> dict:
    """Options that give our layer the settings of the peer."""
    options = {"halo": {"block_size": 7, "halo_size": 3}, "multi_axis": {"window_size": 7, "tanh_gelu": False}}
    return options.get(name, {})


def calls(layer: nn.Module, x: Tensor) -> tuple[Call, Call]:
    """Forward as in inference, and forward with backward to input and parameters as in training."""
    leaf, frozen = x.clone().requires_grad_(), copy.deepcopy(layer).eval()

    def forward() -> None:
        with torch.no_grad():  # timm's gated attention keeps what it makes in inference mode for its training
            frozen(x)

    def train() -> None:
        layer(leaf).sum().backward()

    return forward, train


def measure(name: str, size: int, repeats: int) -> dict:
    """Median seconds of ours, dense attention and timm at one size; None where one is not run."""
    grid = (size, size)
    ours = create_attention(name, DIM, HEADS, grid=grid, **peer_options(name))
    rivals: dict[str, nn.Module | None] = {"ours": ours, "timm": timm_peer(name, size)}
    if size != SIZES[-1]:
        rivals["dense"] = create_attention("global", DIM, HEADS, grid=grid)
    x = torch.randn(1, *grid, DIM)
    timed = {}
    for kind, layer in rivals.items():
        too_big = kind != "dense" and ours.memory(grid) > MEMORY_LIMIT
        if layer is not None and not too_big:
            timed[f"{kind} forward"], timed[f"{kind} train"] = calls(layer, x)
    return time_in_turns(timed, rounds=repeats, seconds=2.0)


def measure_dense(size: int) -> dict:
    """Median seconds of dense attention alone: where a pass takes seconds, it is measured once for all rows."""
    grid = (size, size)
    timed = dict(
        zip(
            ("dense forward", "dense train"),
            calls(create_attention("global", DIM, HEADS, grid=grid), torch.randn(1, *grid, DIM)),
        )
    )
    return time_in_turns(timed, rounds=3, seconds=20.0)


def ratio(times: dict, rival: str, what: str) -> str:
    ours, theirs = times.get(f"ours {what}"), times.get(f"{rival} {what}")
    return "-" if ours is None or theirs is None else f"{theirs / ours:.2f}"


def slope(by_size: dict[int, dict]) -> str:
    """d log(time) / d log(tokens) of the forward pass between the two larger grids."""
    small, large = (by_size[size].get("ours forward") for size in SIZES[-2:])
    if small is None or large is None:
        return "-"
    return f"{math.log(large / small) / math.log((SIZES[-1] / SIZES[-2]) ** 2):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="shell pattern of names")
    parser.add_argument("--quick", action="store_true", help="three repeats instead of nine")
    parser.add_argument("--json", type=Path, help="file for the raw times")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows, raw = [], {}
    dense = measure_dense(SIZES[-1])
    for name in list_attentions(arguments.only):
        info = attention_info(name)
        if 2 not in info.ranks:
            continue
        by_size = {size: measure(name, size, 3 if arguments.quick else 9) for size in SIZES}
        by_size[SIZES[-1]] |= dense
        raw[name] = by_size
        row: dict[str, str] = {"attention": name}
        for size in SIZES:
            times = by_size[size]
            row[f"{size}: ms"] = f"{1e3 * times['ours forward']:.2f}" if "ours forward" in times else "-"
            for what, short in (("forward", "fwd"), ("train", "f+b")):
                row[f"{size}: {short} x dense"] = ratio(times, "dense", what)
                row[f"{size}: {short} x timm"] = ratio(times, "timm", what)
        row["slope"] = slope(by_size) if info.linear_cost else ""
        rows.append(row)
        print(name, "done", flush=True)
    for size in SIZES:
        columns = [key for key in rows[0] if ":" not in key or key.startswith(f"{size}:")]
        print_table(
            f"{size}x{size}, dim 64, 4 heads, batch 1, float32", columns, [[r[c] for c in columns] for r in rows]
        )
    if arguments.json:
        write_json(arguments.json, {"machine": machine("cpu"), "seconds": raw, "rows": rows})


if __name__ == "__main__":
    main()

"""Images per second of the smallest published variant of every family, beside timm's equal model where it has one.

    python benchmarks/models.py [--quick] [--only PATTERN,...] [--batch N] [--no-memory] [--json FILE]

Forward (eval) and training step (forward, backward, SGD) at 224x224 (HaloNet-26: 256x256, as timm's takes no other),
float32, random weights, two threads. Each row is
timed in turns with timm's model and with two fixed references, timm's ConvNeXt-Atto and Swin-T, so that a machine whose
speed drifts slows all alike. `x timm`, `x convnext`, `x swin` are our images per second over theirs: above 1, ours is
faster. `GiB` is the peak memory of a fresh process that makes one training step, the imports included.
"""

import argparse
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import timm
import torch
from common import machine, peak_memory, print_table, time_in_turns, write_json
from torch import Tensor, nn

from gridattn.models import create_model, list_models, model_info

SIZE, THREADS = 224, 2
OTHER_SIZES = {"timm_halonet26t": 256}
"""Image sizes of rows whose model in timm does not take `SIZE`."""

REFERENCES = {"convnext": "convnext_atto", "swin": "swin_tiny_patch4_window7_224"}
PEERS: dict[str, str | None] = {
    "agent_cswin_t": None,
    "agent_deit_t": None,
    "agent_pvt_t": None,
    "agent_swin_t": None,
    "attnet_xxs": None,
    "convit_tiny": "convit_tiny",
    "davit_tiny": "davit_tiny",
    "dinat_s_tiny": None,
    "halonet_h0": None,
    "hrnet_w32_psa_s": None,
    "maxvit_pico_rw_256": "maxvit_pico_rw_256",
    "mobilenet_v1_050_ulsam_11": None,
    "mobilenet_v2_100_ulsam_12_13_15_16": None,
    "nat_isotropic_small": None,
    "nat_mini": None,
    "pose_hrnet_w32_psa_s_256x192": None,
    "pose_simplebaseline_r50_psa_s": None,
    "ppma_t": None,
    "resnet50_psa_s": None,
    "sgformer_s": None,
    "tic_t": None,
    "timm_halonet26t": "halonet26t",
    "van_b0": None,
}
"""Our smallest published variants, and timm's model with the same layers and widths."""


def build(source: str, name: str, size: int) -> nn.Module:
    """A model of ours or of timm's with random weights."""
    torch.manual_seed(0)
    if source == "ours":
        return create_model(name, img_size=size)
    options: dict[str, Any] = {"img_size": size} if name.startswith(("maxvit", "swin")) else {}
    return timm.create_model(name, **options)


def training_step(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """One step of SGD on the mean square of the outputs, in training mode."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    return step


def forward_pass(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """One pass without gradients, in eval mode."""

    def run() -> None:
        model.eval()
        with torch.inference_mode():
            model(images)

    return run


def memory_probe(source: str, name: str, batch: int, size: int) -> None:
    """What the fresh process does whose peak memory is taken."""
    torch.set_num_threads(THREADS)
    training_step(build(source, name, size), torch.randn(batch, 3, size, size))()


def measure(name: str, peer: str | None, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a pass ("forward") and of a training step ("train"), each by rival ("ours", "timm", "swin", ...)."""
    rivals = {"ours": ("ours", name)} | ({} if peer is None else {"timm": ("timm", peer)})
    rivals |= {key: ("timm", reference) for key, reference in REFERENCES.items()}
    size = OTHER_SIZES.get(name, SIZE)
    images = torch.randn(batch, 3, size, size)
    models = {key: build(*rival, size) for key, rival in rivals.items()}
    timed = {}
    for kind, make in (("forward", forward_pass), ("train", training_step)):
        candidates = {key: make(model, images) for key, model in models.items()}
        timed[kind] = time_in_turns(candidates, rounds=rounds, seconds=10.0)
    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="shell patterns of names, commas between")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="three rounds instead of seven")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--json", type=Path, help="file for the raw figures")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    known = set(list_models())
    left = {model_info(name).build.__name__ for name in known}
    left -= {model_info(name).build.__name__ for name in PEERS if name in known}
    print(f"families without a published variant here: {', '.join(sorted(left)) or 'none'}")

    rows, raw = [], {}
    for name, peer in PEERS.items():
        if name not in known or not any(fnmatch(name, part) for part in arguments.only.split(",")):
            continue
        seconds = measure(name, peer, arguments.batch, 3 if arguments.quick else 7)
        memory = {}
        if not arguments.no_memory:
            for key, (source, model) in {"ours": ("ours", name), "timm": ("timm", peer)}.items():
                if model is not None:
                    memory[key] = probe(source, model, arguments.batch, OTHER_SIZES.get(name, SIZE))
        raw[name] = {"timm": peer, "size": OTHER_SIZES.get(name, SIZE), "seconds": seconds, "peak_memory_gib": memory}
        rows.append(row(name, seconds, memory, arguments.batch))
        print(name, "done", file=sys.stderr, flush=True)
    if not rows:
        parser.error(f"--only {arguments.only} matches no model")
    columns = list(rows[0])
    title = f"images/s at {SIZE}x{SIZE}, batch {arguments.batch}, {THREADS} threads, float32"
    print_table(title, columns, [[r[c] for c in columns] for r in rows])
    means = {kind: mean_ratio(raw, kind) for kind in ("forward", "train")}
    for kind, mean in means.items():
        print(f"{kind}: geometric mean of images/s over timm's: {'-' if mean is None else f'{mean:.2f}'}")
    if arguments.json:
        record = {"machine": machine("cpu"), "batch": arguments.batch, "models": raw, "mean_ratio": means}
        write_json(arguments.json, record)


def probe(source: str, name: str, batch: int, size: int) -> float:
    """Peak memory in GiB of a fresh process that makes one training step."""
    folder = str(Path(__file__).resolve().parent)
    call = f"models.memory_probe({source!r}, {name!r}, {batch}, {size})"
    return peak_memory(f"import sys; sys.path.insert(0, {folder!r}); import models; {call}")


def row(name: str, seconds: dict[str, dict[str, float]], memory: dict[str, float], batch: int) -> dict[str, str]:
    """A line of the table; "-" where there is nothing to compare with."""
    cells = {"model": name}
    for kind, short in (("forward", "fwd"), ("train", "train")):
        times = seconds[kind]
        cells[f"{short} img/s"] = f"{batch / times['ours']:.1f}"
        for rival in ("timm", *REFERENCES):
            cells[f"{short} x {rival}"] = f"{times[rival] / times['ours']:.2f}" if rival in times else "-"
    for key, title in (("ours", "GiB"), ("timm", "timm GiB")):
        cells[title] = f"{memory[key]:.2f}" if key in memory else "-"
    return cells


def mean_ratio(raw: dict, kind: str) -> float | None:
    """Geometric mean of timm's time over ours, over the models that timm has."""
    ratios = [r["seconds"][kind]["timm"] / r["seconds"][kind]["ours"] for r in raw.values() if r["timm"]]
    return geometric_mean(ratios) if ratios else None


if __name__ == "__main__":
    main()

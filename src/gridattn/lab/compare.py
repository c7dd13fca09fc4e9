"""Several attentions in the same network, on the same data, with the same budget: accuracy, cost, curves, pictures."""

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gridattn.data import ImageDataset, load_dataset
from gridattn.lab.bench import count_macs, latency, machine, step_memory
from gridattn.lab.compare_settings import CompareSettings
from gridattn.lab.pictures import heat_axes
from gridattn.lab.report import COLUMNS, render_report
from gridattn.lab.samples import to_picture
from gridattn.lab.selection import select_attentions
from gridattn.lab.show import View, look, open_image, query_fractions, scale_image
from gridattn.layers import attention_info
from gridattn.models import model_info
from gridattn.models.common import Backbone
from gridattn.systems.base import pick_device
from gridattn.systems.classify import load_classifier, train_classifier
from gridattn.systems.output import RunFolder, atomic, write_csv, write_json

Row = dict[str, Any]
BATCH = 16  # images of the timed forward pass and of the training step whose memory is measured


def compare(settings: CompareSettings, *, command: str = "", log: Callable[[str], None] = print) -> Row:
    """Trains and measures every mechanism, and writes results.json, results.csv, report.html and models/.

    A mechanism that fails has "error" in its entry instead of figures; the others go on. `models/NAME` is the run of
    the first seed, `models/NAME-seedS` those of the others.

    Args:
        settings: what is compared.
        command: how it was started, for the report.
        log: takes a line of progress.

    Returns:
        The content of results.json.

    Raises:
        ValueError: settings that no mechanism could be trained with, or a folder that holds other results.
    """
    names = select_attentions(settings.attention)
    out = Path(settings.out)
    if (out / "results.json").exists() and not (settings.resume or settings.overwrite):
        raise ValueError(f"out={str(out)!r} holds results; add --resume to go on or --overwrite to replace them")
    for name in names:
        settings.training(name, settings.seeds[0], out)
    model_info(settings.host)
    data = load_dataset(settings.data, settings.image_size)
    picture = open_image(settings.image) if settings.image else to_picture(data.val[0][0], data)
    at = query_fractions(settings.query, picture.size)

    entries = {name: _head(name, settings) for name in names}
    models: dict[str, Backbone] = {}
    for number, name in enumerate(names, 1):
        log(f"[{number}/{len(names)}] {name}: {entries[name]['summary']}")
        try:
            runs = [_train(settings, name, seed, out, log) for seed in settings.seeds]
            model: Any = load_classifier(out / "models" / name).model.to(pick_device(None))
            entries[name] |= _accuracy(runs) | cost(model, settings.image_size)
            models[name] = model
        except Exception as error:  # any failure of one mechanism is a result, and the others must still be reported
            entries[name]["error"] = " ".join(str(error).split()) or type(error).__name__
            log(f"    failed: {entries[name]['error']}")
    for name, seconds in latencies(models, settings.image_size).items():
        entries[name]["latency_ms"] = 1000 * seconds
    views = [
        look(model, name, scale_image(picture, settings.image_size, model), data.preprocess, at, trained=True)
        for name, model in models.items()
    ]
    results = _results(settings, data, list(entries.values()), command)
    write_json(out / "results.json", results)
    write_csv(out / "results.csv", [_flat(entry) for entry in entries.values()])
    with atomic(out / "report.html") as temporary:
        temporary.write_text(render_report(results, _pictures(np.asarray(picture), views)), encoding="utf-8")
    return results


def summary_rows(results: Row) -> list[Row]:
    """The results as printable rows, best first."""
    entries = sorted(results["attentions"], key=lambda entry: -entry.get("accuracy_mean", -1.0))
    return [
        {
            "attention": entry["name"],
            **{c.heading: "" if "error" in entry else c.text(entry) for c in COLUMNS},
            "error": entry.get("error", ""),
        }
        for entry in entries
    ]


def cost(model: Backbone, image_size: int) -> Row:
    """Parameters, multiply-accumulates of one image and peak memory of a training step of `BATCH` images."""
    images = _noise(model, image_size)

    def step() -> None:
        F.cross_entropy(model(images), torch.zeros(BATCH, dtype=torch.long, device=images.device)).backward()

    model.train()
    step()
    model.zero_grad()
    peak, method = step_memory(step, images.device)
    model.zero_grad()
    model.eval()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": count_macs(model, images[:1]),
        "memory_bytes": peak,
        "memory_method": method,
    }


def latencies(models: Mapping[str, Backbone], image_size: int, rounds: int = 3) -> dict[str, float]:
    """Seconds per image of each model; they take turns, so that a busy moment does not fall on one alone."""
    seconds = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            seconds[name].append(latency(model, _noise(model, image_size)))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _noise(model: Backbone, image_size: int) -> torch.Tensor:
    device = next(model.parameters()).device
    return torch.randn(BATCH, model.in_chans, image_size, image_size, device=device)


def _head(name: str, settings: CompareSettings) -> Row:
    info = attention_info(name)
    options = settings.options.get(name, {})
    return {
        "name": name,
        "summary": info.summary,
        "source": info.source,
        "exact_map": info.exact_map,
        "options": options,
    }


def _train(settings: CompareSettings, name: str, seed: int, out: Path, log: Callable[[str], None]) -> Row:
    """One training; a finished one with the same settings is reused when resuming."""
    path = out / "models" / (name if seed == settings.seeds[0] else f"{name}-seed{seed}")
    training = settings.training(name, seed, path)
    folder = RunFolder(path)
    if not (settings.resume and folder.result.is_file() and _stored(folder) == training.stored()):
        train_classifier(training)
    with folder.history.open(newline="", encoding="utf-8") as file:
        history = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    curve = [
        {
            "epoch": int(row["epoch"]),
            "accuracy": row["val_accuracy"],
            "val_loss": row["val_loss"],
            "train_loss": row["train_loss"],
        }
        for row in history
    ]
    best = max(point["accuracy"] for point in curve)
    seconds = sum(row["seconds"] for row in history)
    log(f"    seed {seed}: accuracy {best:.3f} after {seconds:.0f} s")
    return {
        "seed": seed,
        "accuracy": best,
        "seconds": seconds,
        "model": path.relative_to(out).as_posix(),
        "curve": curve,
    }


def _stored(folder: RunFolder) -> Any:
    return yaml.safe_load(folder.settings.read_text(encoding="utf-8")) if folder.settings.is_file() else None


def _accuracy(runs: Sequence[Row]) -> Row:
    values = [run["accuracy"] for run in runs]
    return {
        "accuracy_mean": statistics.fmean(values),
        "accuracy_std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "train_seconds": statistics.fmean(run["seconds"] for run in runs),
        "runs": list(runs),
    }


def _results(settings: CompareSettings, data: ImageDataset, entries: Sequence[Row], command: str) -> Row:
    batches = settings.limit_batches or len(data.train) // settings.batch_size
    method = next((entry["memory_method"] for entry in entries if "memory_method" in entry), "")
    return {
        "settings": asdict(settings),
        "data": {
            "name": data.spec,
            "classes": len(data.classes),
            "description": f"{data.spec}: {len(data.train)} training and {len(data.val)} validation images of "
            f"{data.image_size} x {data.image_size} pixels, classes {', '.join(data.classes)}",
        },
        "network": f"{settings.host}, the same for all but for its attention layers",
        "budget": f"{settings.epochs} epochs of {batches} batches of {settings.batch_size} images, "
        f"learning rate {settings.lr:g}; the accuracy is that of the best epoch",
        "batch": BATCH,
        "memory_method": method,
        "pictures_note": "Last attention layer of the trained networks, mean over heads, for one query point (ringed) "
        f"in {settings.image or 'a validation image'}. The brighter, the more weight, on one scale for all mechanisms; "
        "without tint: not seen at all.",
        "machine": machine(),
        "finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "attentions": list(entries),
    }


def _flat(entry: Row) -> Row:
    keep = (
        "name",
        "accuracy_mean",
        "accuracy_std",
        "parameters",
        "macs",
        "latency_ms",
        "memory_bytes",
        "train_seconds",
    )
    return {key: entry.get(key, "") for key in (*keep, "error")}


def _pictures(image: NDArray[np.uint8], views: Sequence[View]) -> dict[str, bytes]:
    """PNG of the image with the query point, then of each view."""
    if not views:
        return {}
    nothing = replace(views[0], attention="image", weights=np.zeros_like(views[0].weights))
    return {view.attention: _png(image, view) for view in (nothing, *views)}


def _png(image: NDArray[np.uint8], view: View) -> bytes:
    figure = Figure(figsize=(3, 3 * image.shape[0] / image.shape[1]), dpi=120)
    heat_axes(figure.add_axes((0, 0, 1, 1)), image, view.weights, view.query)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()

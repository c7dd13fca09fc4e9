"""Several attentions in the same network, on the same data, with the same budget: accuracy, cost, curves and pictures."""

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.resources import files
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
from gridattn.lab.pictures import heat_axes
from gridattn.lab.report import COLUMNS, render_report
from gridattn.lab.samples import to_picture
from gridattn.lab.selection import check_options, select_attentions
from gridattn.lab.show import View, look, open_image, query_fractions, scale_image
from gridattn.layers import attention_info
from gridattn.models.common import Backbone
from gridattn.systems.base import pick_device
from gridattn.systems.classify import ClassifySettings, load_classifier, train_classifier
from gridattn.systems.output import RunFolder, atomic, write_csv, write_json
from gridattn.systems.settings import check_least, check_names

Row = dict[str, Any]
BATCH = 16  # images of the timed forward pass and of the training step whose memory is measured


@dataclass
class CompareSettings:
    """What a comparison can be told.

    Args:
        attention: names or patterns of the mechanisms (`select_attentions`).
        out: folder of the results.
        data: dataset, as `load_dataset` takes it.
        image_size: height and width of the images, pixels.
        host: backbone whose attention is exchanged.
        epochs: passes over the training set.
        batch_size: images per step.
        lr: highest learning rate.
        seeds: one training each.
        limit_batches: at most so many batches in every epoch of training and validation; 0 for all.
        options: keywords of single mechanisms, by name.
        train: further settings of `gridattn train classify`.
        image: picture for the attention maps: a file or an embedded photograph; None takes the first validation image.
        query: (row, column) of the query point; two ints are pixels of the picture, floats are fractions of it.
        resume: reuses what `out` holds of trainings with the same settings.
        overwrite: replaces what `out` holds.
    """

    attention: list[str] = field(default_factory=lambda: ["all"])
    out: str = "runs/compare"
    data: str = "textures"
    image_size: int = 64
    host: str = "grid_vit_micro"
    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    seeds: list[int] = field(default_factory=lambda: [0])
    limit_batches: int = 0
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    image: str | None = None
    query: tuple[float, float] = (0.5, 0.5)
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_least("limit_batches", self.limit_batches, 0)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} is not allowed; at least one seed, each once")
        check_options(self.options)
        own = {"data", "image_size", "model", "epochs", "batch_size", "lr", "seed", "output", "attention", "resume"}
        check_names("train setting", self.train, {entry.name for entry in fields(ClassifySettings)} - own)

    def training(self, attention: str, seed: int, output: Path) -> ClassifySettings:
        """The settings of one training."""
        limit = {"limit_train_batches": self.limit_batches, "limit_val_batches": self.limit_batches}
        return ClassifySettings(
            **{
                **self.train,
                "data": self.data,
                "image_size": self.image_size,
                "model": self.host,
                "attention": attention,
                "model_options": {
                    **self.train.get("model_options", {}),
                    **({"attention_options": self.options[attention]} if attention in self.options else {}),
                },
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "lr": self.lr,
                "seed": seed,
                "output": str(output),
                "overwrite": True,
                "trainer": {**(limit if self.limit_batches else {}), **self.train.get("trainer", {})},
            }
        )


def read_settings(recipe: str | None, given: Mapping[str, Any]) -> CompareSettings:
    """Settings from a recipe, with what was given laid over it.

    Args:
        recipe: one of `recipe_names()`, the path of a YAML file, or None.
        given: settings by name; None stands for not given.

    Raises:
        ValueError: an unknown recipe or setting, or a value that is not allowed.
    """
    base: dict[str, Any] = {}
    if recipe is not None:
        own = Path(str(files("gridattn.lab") / "recipes" / f"{recipe}.yaml"))
        path = own if recipe in recipe_names() else Path(recipe)
        if not path.is_file():
            raise ValueError(f"recipe={recipe!r} is not known; allowed: {', '.join(recipe_names())}, or a YAML file")
        base = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(base, dict):
            raise ValueError(f"recipe {recipe!r} is not a mapping of settings")
        check_names(f"setting of recipe {recipe!r}", base, {entry.name for entry in fields(CompareSettings)})
    return CompareSettings(**{**base, **{name: value for name, value in given.items() if value is not None}})


def recipe_names() -> list[str]:
    """Names of the recipes of comparisons that come with the package."""
    folder = files("gridattn.lab") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def compare(settings: CompareSettings, *, command: str = "", log: Callable[[str], None] = print) -> Row:
    """Trains every mechanism with every seed, measures it, and writes results.json, results.csv, report.html and models/.

    A mechanism that fails has "error" in its entry instead of figures; the others go on. `models/NAME` is the run of the first
    seed, `models/NAME-seedS` those of the others.

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
    data = load_dataset(settings.data, settings.image_size)
    picture = open_image(settings.image) if settings.image else to_picture(data.val[0][0], data)
    at = query_fractions(settings.query, picture.size)

    entries = {name: _head(name, settings) for name in names}
    models: dict[str, Backbone] = {}
    for number, name in enumerate(names, 1):
        log(f"[{number}/{len(names)}] {name}: {entries[name]['summary']}")
        try:
            runs = [_train(settings, name, seed, out, log) for seed in settings.seeds]
            model = load_classifier(out / "models" / name).model.to(pick_device(None))
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
    """Seconds per image of each model; they take turns, so that a busy moment of the machine does not fall on one alone."""
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
    return {"name": name, "summary": info.summary, "source": info.source, "options": options}


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
    batches = -(-len(data.train) // settings.batch_size) if not settings.limit_batches else settings.limit_batches
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
        "budget": f"{settings.epochs} epochs of {batches} batches of {settings.batch_size} images, learning rate {settings.lr:g}; "
        "the accuracy is that of the best epoch",
        "batch": BATCH,
        "memory_method": method,
        "pictures_note": f"Last attention layer of the trained networks, mean over heads, for one query point (ringed) in "
        f"{settings.image or 'a validation image'}. Bright: much weight, on one scale for all; no tint: not seen at all.",
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

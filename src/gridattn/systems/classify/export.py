"""A trained classifier as a folder that needs nothing else: weights, the model's call, classes and preprocessing."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gridattn.data.transforms import Preprocess
from gridattn.models import load_model, save_model
from gridattn.systems.output import RunFolder, write_json


@dataclass
class Classifier:
    """A trained classifier.

    Attributes:
        model: images (B, 3, H, W) -> logits (B, classes), in eval mode.
        classes: class names, by logit.
        preprocess: turns a picture into the model's input.
        data: the dataset it was trained on, as `load_dataset` takes it.
        seed: of the training; also of the dataset's split.
        metrics: of the validation after the exported epoch.
    """

    model: nn.Module
    classes: tuple[str, ...]
    preprocess: Preprocess
    data: str
    seed: int
    metrics: dict[str, float]


def save_classifier(classifier: Classifier, folder: str | Path) -> None:
    """Writes model.safetensors, config.json (the call of `create_model`) and classifier.json, each atomically."""
    save_model(classifier.model, folder)
    about = {
        "classes": list(classifier.classes),
        "preprocess": classifier.preprocess.to_config(),
        "data": classifier.data,
        "seed": classifier.seed,
        "metrics": classifier.metrics,
    }
    write_json(Path(folder) / "classifier.json", about)


def load_classifier(path: str | Path) -> Classifier:
    """Loads what `save_classifier` wrote.

    Args:
        path: the folder, its `model.safetensors`, or a run folder, of which the best epoch's model is taken.

    Raises:
        ValueError: a path without a trained classifier, or damaged files.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if not (folder / "classifier.json").is_file():
        folder = RunFolder(folder).model
    file = folder / "classifier.json"
    if not file.is_file():
        raise ValueError(f"checkpoint={str(path)!r} holds no trained classifier (a folder with classifier.json)")
    try:
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        preprocess = Preprocess.from_config(about["preprocess"])
        rest = tuple(about["classes"]), preprocess, about["data"], about["seed"], about["metrics"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {type(error).__name__} {error}") from None
    model = load_model(folder)
    if model.num_classes != len(rest[0]):
        raise ValueError(f"{str(file)!r} names {len(rest[0])} classes but the model has {model.num_classes}")
    return Classifier(model, *rest)

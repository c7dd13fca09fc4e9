"""Training of an image classifier, from settings to exported model."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gridattn.data import load_dataset
from gridattn.models import create_model
from gridattn.systems.base import start_run
from gridattn.systems.classify.export import Classifier, save_classifier
from gridattn.systems.classify.task import ClassifySettings, ClassifyTask
from gridattn.systems.output import RunFolder
from gridattn.systems.trained import train_and_export

SAME = ("data", "image_size", "model", "attention", "model_options", "seed", "batch_size")
"""Settings that a resumed run shares with its checkpoint: they shape the weights or the order of the samples."""


def train_classifier(settings: ClassifySettings) -> dict[str, Any]:
    """Trains a classifier and exports the best and the last epoch's weights.

    The run folder then holds what `RunFolder` lists. In a run of several processes every one of them calls this.

    Args:
        settings: what to train, on what, and how.

    Returns:
        Metrics of the best epoch: epoch, val_accuracy, val_loss, train_loss and so on; `parameters`, the size of the
        model; `model`, the folder of the exported model. An empty dict in all processes but the first.

    Raises:
        ValueError: settings that are not allowed, or a dataset, model or run folder that cannot be used.
    """
    folder = start_run(settings, SAME)
    data = load_dataset(
        settings.data, settings.image_size, seed=settings.seed, augment=settings.augment, verify=settings.verify
    )
    model = build_model(settings, len(data.classes))
    task = ClassifyTask(model, settings, len(data.classes))

    def export(target: Path, metrics: dict[str, float]) -> None:
        save_classifier(Classifier(model, data.classes, data.preprocess, settings.data, settings.seed, metrics), target)

    return train_and_export(task, data.train, data.val, folder, export, monitor="val_accuracy")


def build_model(settings: ClassifySettings, num_classes: int) -> nn.Module:
    """The network that the settings describe.

    Raises:
        ValueError: a name, option or weight file that `create_model` refuses, or a size that the network refuses.
    """
    options = dict(settings.model_options)
    if settings.attention is not None:
        options["attention"] = settings.attention
    weights = Path(settings.weights) if settings.weights else None
    if weights is not None and weights.is_dir():
        own = RunFolder(weights).model
        weights = (own if own.is_dir() else weights) / "model.safetensors"
    model = create_model(
        settings.model,
        num_classes=num_classes,
        img_size=settings.image_size,
        drop_path_rate=settings.drop_path_rate,
        checkpoint=weights,
        **options,
    )
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, settings.image_size, settings.image_size))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model {settings.model!r} cannot take image_size={settings.image_size}: {reason}") from None
    return model.train()

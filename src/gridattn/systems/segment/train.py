"""Training of a segmentation network, from settings to exported model."""

from typing import Any

from gridattn.systems.base import start_run
from gridattn.systems.segment.convert import start_from
from gridattn.systems.segment.data import load_segmentation
from gridattn.systems.segment.model import build_segmenter, check_trainable
from gridattn.systems.segment.task import SegmentSettings, SegmentTask
from gridattn.systems.trained import train_and_export, trained_exporter

SAME = (
    *("data", "seed", "batch_size", "model", "attention", "model_options", "out_indices", "in_chans"),
    *("head", "head_options", "aux_channels", "crop_size"),
)
"""Settings that a resumed run shares with its checkpoint: they shape the weights or the order of the samples."""


def train_segmenter(settings: SegmentSettings) -> dict[str, Any]:
    """Trains a segmentation network and exports the best and the last epoch's weights.

    The run folder then holds what `RunFolder` lists. In a run of several processes every one of them calls this.

    Args:
        settings: what to train, on what, and how.

    Returns:
        Metrics of the best epoch: epoch, val_miou, val_pixel_accuracy, val_mean_class_accuracy, val_loss, train_loss
        and so on; `parameters`, the size of the network; `model`, the folder of the exported network. An empty dict in
        all processes but the first.

    Raises:
        ValueError: settings that are not allowed, or a dataset, model or run folder that cannot be used.
    """
    folder = start_run(settings, SAME)
    data = load_segmentation(
        settings.data,
        in_chans=settings.in_chans,
        seed=settings.seed,
        reduce_zero_label=settings.reduce_zero_label,
        verify=settings.verify,
    )
    keywords = network_keywords(settings, len(data.classes))
    model = build_segmenter(**keywords)
    check_trainable(model, settings.in_chans, settings.crop)
    if settings.weights is not None:
        start_from(model, settings.weights)
    task = SegmentTask(model, settings, len(data.classes))
    about = {
        "data": settings.data,
        "seed": settings.seed,
        "reduce_zero_label": settings.reduce_zero_label,
        "classes": list(data.classes),
        "mean": list(data.normalise.mean),
        "std": list(data.normalise.std),
        "view": settings.view.to_config(),
    }
    train = data.training(settings.crop, settings.augment, settings.view.resize, settings.seed)
    export = trained_exporter(task, keywords, about)
    return train_and_export(task, train, data.validation(), folder, export, monitor="val_miou")


def network_keywords(settings: SegmentSettings, num_classes: int) -> dict[str, Any]:
    """The keywords of `build_segmenter` that the settings describe."""
    options = dict(settings.model_options)
    if settings.attention is not None:
        options["attention"] = settings.attention
    if settings.drop_path_rate is not None:
        options["drop_path_rate"] = settings.drop_path_rate
    if settings.weights is None:  # given weights come with tables of their own size
        options.setdefault("img_size", list(settings.crop))
    return {
        "model": settings.model,
        "num_classes": num_classes,
        "in_chans": settings.in_chans,
        "model_options": options,
        "out_indices": settings.out_indices,
        "head": settings.head,
        "head_options": dict(settings.head_options),
        "aux_channels": settings.aux_channels if settings.aux_weight else 0,
    }

"""Training and evaluation of a detector."""

from typing import Any

import torch
from torch.utils.data import DataLoader

from gridattn.systems.base import pick_device, start_run
from gridattn.systems.detect.data import DetectionData, ObjectSamples, load_detection_data, train_transform
from gridattn.systems.detect.metrics import AveragePrecision
from gridattn.systems.detect.model import build_detector
from gridattn.systems.detect.task import DetectSettings, DetectTask
from gridattn.systems.output import write_json
from gridattn.systems.settings import check_least
from gridattn.systems.trained import Trained, load_trained, train_and_export, trained_exporter

SAME = (
    "data",
    "detector",
    "image_size",
    "model",
    "attention",
    "model_options",
    "channels",
    "levels",
    "seed",
    "batch_size",
)
"""Settings that a resumed run shares with its checkpoint: they shape the weights or the order of the samples."""


def train_detector(settings: DetectSettings) -> dict[str, Any]:
    """Trains a detector and exports the best and the last epoch's weights.

    The run folder then holds what `RunFolder` lists. In a run of several processes every one of them calls this.

    Args:
        settings: what to train, on what, and how.

    Returns:
        Metrics of the best epoch: epoch, val_box_ap, val_box_ap50, train_loss and so on; `parameters`, the size of the
        model; `model`, the folder of the exported model. An empty dict in all processes but the first.

    Raises:
        ValueError: settings that are not allowed, or a dataset, model or run folder that cannot be used.
    """
    folder = start_run(settings, SAME)
    masks = settings.detector == "mask_rcnn"
    data = load_detection_data(settings.data, settings.image_size, masks=masks, seed=settings.seed)
    network = _network(settings, data)
    task = DetectTask(build_detector(**_starting(network, settings)).train(), settings)
    transform = train_transform(
        settings.train_sizes or [settings.image_size],
        settings.max_size,
        flip=settings.flip,
        crop=settings.crop,
        before=settings.crop_sizes,
    )
    about = {
        "data": settings.data,
        "seed": settings.seed,
        "classes": data.classes,
        "categories": data.categories,
    }
    return train_and_export(
        task,
        ObjectSamples(data.train, transform, settings.seed),
        ObjectSamples(data.val, seed=settings.seed),
        folder,
        trained_exporter(task, network, about),
        monitor="val_mask_ap" if masks else "val_box_ap",
    )


def _network(settings: DetectSettings, data: DetectionData) -> dict[str, Any]:
    options = dict(settings.model_options)
    if settings.attention is not None:
        options["attention"] = settings.attention
    names = (
        "detector",
        "image_size",
        "max_size",
        "channels",
        "head_dim",
        "levels",
        "finest",
        "anchor_scale",
        "head_groups",
    )
    shape = {name: getattr(settings, name) for name in names}
    return {"backbone": settings.model, "num_classes": len(data.classes), **shape, "options": options}


def _starting(network: dict[str, Any], settings: DetectSettings) -> dict[str, Any]:
    if settings.weights is None:
        return network
    return {**network, "options": {**network["options"], "checkpoint": settings.weights}}


def load_detector(checkpoint: str) -> Trained:
    """A trained detector; `about` names its data, seed, classes and category ids.

    Raises:
        ValueError: a path without a trained detector, or damaged files.
    """
    return load_trained(checkpoint, "detect", build_detector)


def evaluate_detector(
    checkpoint: str,
    data: str | None = None,
    *,
    batch_size: int = 8,
    workers: int = 0,
    device: str | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """COCO's average precision of a trained detector on the validation part of a dataset.

    Args:
        checkpoint: run folder, or folder of an exported detector.
        data: scenes or coco:PATH; None takes the dataset it was trained on. Classes are matched by name.
        batch_size: images that are loaded at a time; the result does not depend on it.
        workers: processes that load data.
        device: such as "cpu" or "cuda:0"; None takes the accelerator where there is one.
        output: file for the metrics, JSON; None writes none.

    Returns:
        `images`, `objects`, and what `AveragePrecision` gives: box_ap, box_ap50, box_ap75, box_ap_small ...,
        box_ap_per_class, and for detectors with masks mask_ap and so on.

    Raises:
        ValueError: a checkpoint or dataset that cannot be used, or a class that the detector does not know.
    """
    check_least("batch_size", batch_size, 1)
    check_least("workers", workers, 0)
    where = pick_device(device)
    trained = load_detector(checkpoint)
    model: Any = trained.model.to(where)
    classes, seed = trained.about["classes"], trained.about["seed"]
    spec = data or trained.about["data"]
    found = load_detection_data(spec, trained.network["image_size"], masks=model.has_masks, seed=seed)
    unknown = sorted(set(found.classes) - set(classes))
    if unknown:
        raise ValueError(f"data={spec!r} has the class {unknown[0]!r}; the detector knows {', '.join(classes)}")
    label = torch.tensor([classes.index(name) for name in found.classes])
    samples = ObjectSamples(found.val, seed=seed)
    precision = AveragePrecision(model.has_masks)
    images = objects = 0
    with torch.inference_mode():
        for pictures, targets in DataLoader(samples, batch_size, collate_fn=samples.collate, num_workers=workers):
            detections = [{k: v.cpu() for k, v in one.items()} for one in model([p.to(where) for p in pictures])]
            truth = [{**target, "labels": label[target["labels"]]} for target in targets]
            precision.update(detections, truth)
            images += len(pictures)
            objects += sum(len(target["labels"]) for target in targets)
    report = {"data": spec, "images": images, "objects": objects, **precision.compute(classes)}
    if output is not None:
        write_json(output, report)
    return report

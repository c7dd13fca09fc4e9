"""Measuring a trained segmentation network on images with masks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from gridattn.ops.common import check_choice
from gridattn.systems.base import pick_device
from gridattn.systems.output import write_json
from gridattn.systems.segment.data import Normalise, Pairs, WholeSamples, is_embedded, load_segmentation
from gridattn.systems.segment.inference import View, class_probabilities
from gridattn.systems.segment.metrics import pixel_confusion, segmentation_report
from gridattn.systems.segment.model import build_segmenter
from gridattn.systems.segment.task import measure
from gridattn.systems.trained import Trained, load_trained


@dataclass(frozen=True)
class TrainedSegmenter:
    """A trained network with its classes, preprocessing and view."""

    trained: Trained
    classes: tuple[str, ...]
    normalise: Normalise
    view: View


def load_segmenter(checkpoint: str) -> TrainedSegmenter:
    """Loads a run folder or an exported network.

    Raises:
        ValueError: a path without a trained segmentation network, or damaged files.
    """
    trained = load_trained(checkpoint, "segment", build_segmenter)
    about = trained.about
    try:
        classes, view = tuple(about["classes"]), View.of(**about["view"])
        normalise = Normalise(tuple(about["mean"]), tuple(about["std"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"checkpoint={checkpoint!r} is damaged: {type(error).__name__} {error}") from None
    return TrainedSegmenter(trained, classes, normalise, view)


def evaluate_segmenter(
    checkpoint: str,
    data: str | None = None,
    *,
    split: str = "val",
    resize: list[int] | None = None,
    window: list[int] | None = None,
    stride: list[int] | None = None,
    ratios: list[float] | None = None,
    flip: bool = False,
    workers: int = 0,
    device: str | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Intersection over union and pixel accuracy of a trained network, per class and in all.

    Args:
        checkpoint: run folder, or folder of an exported network.
        data: dataset, as `load_segmentation` takes it; None takes the one it was trained on.
        split: "val", the part that training does not see, or "all", for files.
        resize: longer and shorter side that images are fitted to; None does as the training did.
        window: height and width of the windows that images are cut into; None does as the training did.
        stride: step between windows; None takes two thirds of a given window.
        ratios: factors of the image size whose predictions are averaged.
        flip: whether the mirrored image is averaged in.
        workers: processes that load data.
        device: such as "cpu" or "cuda:0"; None takes the accelerator where there is one.
        output: file for the metrics, JSON; None writes none.

    Returns:
        What `segmentation_report` gives, with `loss` (mean of -log p over the labelled pixels), the number of `images`,
        the `data` and the `split` measured.

    Raises:
        ValueError: a checkpoint or dataset that cannot be used, or classes that are not the network's.
    """
    check_choice("split", split, ("val", "all"))
    loaded = load_segmenter(checkpoint)
    about = loaded.trained.about
    view = loaded.view.but(resize=resize, window=window, stride=stride, ratios=ratios, flip=flip or None)
    where = pick_device(device)
    spec = data or about["data"]
    found = load_segmentation(
        spec,
        in_chans=len(loaded.normalise.mean),
        seed=about["seed"],
        reduce_zero_label=about["reduce_zero_label"],
    )
    if found.classes != loaded.classes:
        raise ValueError(
            f"data={spec!r} has the classes {', '.join(found.classes)}; the network knows {', '.join(loaded.classes)}"
        )
    samples = WholeSamples(found.val if split == "val" else _all(found, spec), loaded.normalise)
    network = loaded.trained.model.to(where)
    confusion, loss = pixel_confusion(len(loaded.classes)).to(where), MeanMetric().to(where)
    with torch.inference_mode():
        for batch in DataLoader(samples, batch_size=1, num_workers=workers, collate_fn=samples.collate):
            for image, target in batch:
                measure(class_probabilities(network, image.to(where), view), target.to(where), confusion, loss)
    report = {
        "data": spec,
        "split": split,
        "images": len(samples),
        "loss": float(loss.compute()),
        **segmentation_report(confusion.compute().cpu(), loaded.classes),
    }
    if output is not None:
        write_json(output, report)
    return report


def _all(found: Any, spec: str) -> Pairs:
    if is_embedded(spec):
        raise ValueError(f"split='all' is for files; data={spec!r} allows 'val'")
    return Pairs([*found.train.items, *found.val.items], found.val.read)

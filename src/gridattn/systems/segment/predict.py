"""Classes of every pixel of the user's own pictures: areas as JSON, masks, and pictures with a legend."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gridattn.data.images import listed_images, read_image
from gridattn.systems.base import pick_device
from gridattn.systems.output import write_json
from gridattn.systems.segment.data import is_embedded, load_segmentation
from gridattn.systems.segment.evaluate import TrainedSegmenter, load_segmenter
from gridattn.systems.segment.inference import class_probabilities
from gridattn.systems.segment.metrics import overall, pixel_confusion
from gridattn.systems.segment.pictures import draw, write_mask

log = logging.getLogger("gridattn")

SAMPLES = 3


@dataclass(frozen=True)
class _Input:
    name: str
    stem: str
    picture: Image.Image
    truth: NDArray[np.uint8] | None = None


def predict_masks(
    images: list[str] | None = None,
    *,
    checkpoint: str,
    output: str = "predictions",
    resize: list[int] | None = None,
    window: list[int] | None = None,
    stride: list[int] | None = None,
    ratios: list[float] | None = None,
    flip: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Segments pictures; writes predictions.json and, for each, NAME.mask.png (class indices) and NAME.png (a picture).

    Args:
        images: picture files, and folders of them, nested or not; none takes three held-out samples of the embedded
            dataset that the network was trained on.
        checkpoint: run folder, or folder of an exported network.
        output: folder to write to.
        resize: longer and shorter side that images are fitted to; None does as the training did.
        window: height and width of the windows that images are cut into; None does as the training did.
        stride: step between windows; None takes two thirds of a given window.
        ratios: factors of the image size whose predictions are averaged.
        flip: whether the mirrored image is averaged in.
        device: such as "cpu" or "cuda:0"; None takes the accelerator where there is one.

    Returns:
        `classes`, by index; `predictions`: for each picture `image`, `mask`, `picture`, `size` ([H, W]), `confidence`
        (mean probability of the chosen class), `areas` (class -> pixels and share, largest first) and, for embedded
        samples, `miou` and `pixel_accuracy`; `skipped`: damaged files with the `reason`; `output`: the folder.

    Raises:
        ValueError: a path that does not exist, a folder without pictures, nothing readable, or a checkpoint that cannot
            be used.
    """
    files = listed_images(images) if images else []
    loaded = load_segmenter(checkpoint)
    view = loaded.view.but(resize=resize, window=window, stride=stride, ratios=ratios, flip=flip or None)
    where = pick_device(device)
    network = loaded.trained.model.to(where)
    folder = Path(output)

    predictions: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for item in _pictures(files, skipped) if files else _held_out(loaded):
        pixels = loaded.normalise(loaded.normalise.pixels(item.picture)).to(where)
        with torch.inference_mode():
            chosen = class_probabilities(network, pixels, view).max(0)
        labels = chosen.indices.to(torch.uint8).cpu().numpy()
        predictions.append(_describe(item, labels, float(chosen.values.mean()), loaded.classes, folder))
        _write(item, labels, predictions[-1], loaded.classes, folder)
    if not predictions:
        raise ValueError(f"none of the {len(files)} images can be read; the first: {skipped[0]['reason']}")
    if skipped:
        reasons = "; ".join(entry["reason"] for entry in skipped)
        log.warning("%d of %d images are skipped: %s", len(skipped), len(files), reasons)
    result = {
        "checkpoint": checkpoint,
        "output": output,
        "classes": list(loaded.classes),
        "predictions": predictions,
        "skipped": skipped,
    }
    write_json(folder / "predictions.json", result)
    return result


def _pictures(files: Sequence[Path], skipped: list[dict[str, str]]) -> Iterator[_Input]:
    """Readable pictures under names that differ; the damaged ones are added to `skipped`."""
    taken: set[str] = set()
    for file in files:
        try:
            picture = read_image(file)
        except ValueError as error:
            skipped.append({"image": str(file), "reason": str(error)})
            continue
        stem, number = file.stem, 1
        while stem in taken or stem.removesuffix(".mask") in taken:
            number += 1
            stem = f"{file.stem}-{number}"
        taken.add(stem)
        yield _Input(str(file), stem, picture)


def _held_out(loaded: TrainedSegmenter) -> Iterator[_Input]:
    spec = loaded.trained.about["data"]
    if not is_embedded(spec):
        raise ValueError("images is empty; name picture files or folders of them")
    val = load_segmentation(spec, in_chans=len(loaded.normalise.mean)).val
    for index in np.linspace(0, len(val) - 1, SAMPLES + 2).round().astype(int)[1:-1].tolist():
        picture, truth = val[index]
        yield _Input(val.name(index), val.name(index), Image.fromarray(picture).convert("RGB"), truth)


def _describe(
    item: _Input, labels: NDArray[np.uint8], confidence: float, classes: Sequence[str], folder: Path
) -> dict[str, Any]:
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    order = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]
    described: dict[str, Any] = {
        "image": item.name,
        "mask": str(folder / f"{item.stem}.mask.png"),
        "picture": str(folder / f"{item.stem}.png"),
        "size": list(labels.shape),
        "confidence": round(confidence, 6),
        "areas": {
            classes[i]: {"pixels": int(counts[i]), "share": round(float(counts[i] / labels.size), 6)} for i in order
        },
    }
    if item.truth is not None:
        confusion = pixel_confusion(len(classes))
        confusion.update(torch.from_numpy(labels).long()[None], torch.from_numpy(item.truth).long()[None])
        metrics = overall(confusion.compute())
        described |= {name: round(metrics[name], 6) for name in ("miou", "pixel_accuracy")}
    return described


def _write(
    item: _Input, labels: NDArray[np.uint8], described: dict[str, Any], classes: Sequence[str], folder: Path
) -> None:
    shares = [described["areas"].get(name, {"share": 0.0})["share"] for name in classes]
    write_mask(labels, len(classes), Path(described["mask"]))
    draw(np.asarray(item.picture), labels, classes, shares, Path(described["picture"]), item.truth)

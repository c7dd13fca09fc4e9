"""Classes of the user's own pictures: a table, JSON, and the pictures with their labels."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from gridattn.data.images import listed_images, read_image
from gridattn.systems.base import pick_device
from gridattn.systems.classify.export import Classifier, load_classifier
from gridattn.systems.output import atomic, write_csv, write_json
from gridattn.systems.settings import check_least

log = logging.getLogger("gridattn")

SHOWN = 24
THUMBNAIL = 224


def predict_classes(
    images: list[str],
    checkpoint: str,
    output: str = "predictions",
    *,
    top: int = 3,
    batch_size: int = 32,
    device: str | None = None,
) -> dict[str, Any]:
    """Classifies pictures and writes predictions.json, predictions.csv and predictions.png.

    Args:
        images: picture files, and folders of them, nested or not.
        checkpoint: run folder, or folder of an exported classifier.
        output: folder to write to.
        top: how many classes to give for each picture, the most probable first.
        batch_size: pictures per step.
        device: such as "cpu" or "cuda:0"; None takes the accelerator where there is one.

    Returns:
        `predictions`: for each picture `image` and `top`, a list of `class` and `probability`; `skipped`: damaged files
        with the `reason`; `output`: the folder. The picture shows the first 24.

    Raises:
        ValueError: a path that does not exist, a folder without pictures, nothing readable, or a checkpoint that cannot
            be used.
    """
    check_least("top", top, 1)
    check_least("batch_size", batch_size, 1)
    files = listed_images(images)
    classifier = load_classifier(checkpoint)
    where = pick_device(device)
    classifier.model.to(where)

    predictions: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    thumbnails: list[Image.Image] = []
    for names, pictures in _batches(files, batch_size, skipped):
        probabilities = _probabilities(classifier, pictures, where)
        values, labels = probabilities.topk(min(top, len(classifier.classes)))
        for name, row, label_row in zip(names, values.tolist(), labels.tolist()):
            best = [{"class": classifier.classes[i], "probability": round(p, 6)} for p, i in zip(row, label_row)]
            predictions.append({"image": name, "top": best})
        for picture in pictures[: SHOWN - len(thumbnails)]:
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            thumbnails.append(picture)
    if not predictions:
        raise ValueError(f"none of the {len(files)} images can be read; the first: {skipped[0]['reason']}")
    if skipped:
        log.warning(
            "%d of %d images are skipped: %s", len(skipped), len(files), "; ".join(s["reason"] for s in skipped)
        )

    result = {"checkpoint": checkpoint, "output": output, "predictions": predictions, "skipped": skipped}
    write_json(Path(output) / "predictions.json", result)
    write_csv(Path(output) / "predictions.csv", [_row(prediction) for prediction in predictions])
    _draw(thumbnails, predictions, Path(output) / "predictions.png")
    return result


def _batches(
    files: Sequence[Path], size: int, skipped: list[dict[str, str]]
) -> Iterator[tuple[list[str], list[Image.Image]]]:
    """Readable pictures in batches; the damaged ones are added to `skipped`."""
    names: list[str] = []
    pictures: list[Image.Image] = []
    for file in files:
        try:
            pictures.append(read_image(file))
            names.append(str(file))
        except ValueError as error:
            skipped.append({"image": str(file), "reason": str(error)})
        if len(names) == size:
            yield names, pictures
            names, pictures = [], []
    if names:
        yield names, pictures


def _probabilities(classifier: Classifier, pictures: Sequence[Image.Image], device: torch.device) -> torch.Tensor:
    transform = classifier.preprocess.transform()
    with torch.inference_mode():
        logits = classifier.model(torch.stack([transform(picture) for picture in pictures]).to(device))
    return logits.float().softmax(1).cpu()


def _row(prediction: dict[str, Any]) -> dict[str, Any]:
    row = {"image": prediction["image"]}
    for rank, entry in enumerate(prediction["top"], 1):
        row |= {f"class_{rank}": entry["class"], f"probability_{rank}": entry["probability"]}
    return row


def _draw(pictures: Sequence[Image.Image], predictions: Sequence[dict[str, Any]], path: Path) -> None:
    columns = min(6, len(pictures))
    rows = -(-len(pictures) // columns)
    lines = len(predictions[0]["top"]) + 1
    figure = Figure(figsize=(2.4 * columns, (2.3 + 0.17 * lines) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, picture, prediction in zip(axes, pictures, predictions):
        axis.imshow(picture)
        best, *others = [f"{entry['class']} {entry['probability']:.1%}" for entry in prediction["top"]]
        axis.set_title(best, fontsize=10, fontweight="bold")
        caption = "\n".join([*others, _short(Path(prediction["image"]).name)])
        axis.text(0.5, -0.02, caption, transform=axis.transAxes, ha="center", va="top", fontsize=8, parse_math=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _short(name: str, length: int = 28) -> str:
    return name if len(name) <= length else f"{name[: length - 10]}…{name[-9:]}"

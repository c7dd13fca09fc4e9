"""Objects in the user's own pictures: JSON as COCO has it, and the pictures with boxes, masks and scores."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from gridattn.data.images import listed_images, read_image
from gridattn.ops.common import check_probability
from gridattn.systems.base import pick_device
from gridattn.systems.detect.coco import encode
from gridattn.systems.detect.data import ObjectSamples, load_detection_data
from gridattn.systems.detect.run import load_detector
from gridattn.systems.output import atomic, write_json
from gridattn.systems.settings import check_least

log = logging.getLogger("gridattn")

SHOWN = 12
HELD_OUT = 12


def predict_objects(
    images: list[str] | None = None,
    checkpoint: str = "runs/latest",
    output: str = "predictions",
    *,
    score: float = 0.5,
    overlap: float = 0.5,
    mask: float = 0.5,
    most: int = 100,
    device: str | None = None,
) -> dict[str, Any]:
    """Finds objects in pictures and writes detections.json, images.json and detections.png.

    Args:
        images: picture files, and folders of them, nested or not; none takes 12 scenes that training has not seen.
        checkpoint: run folder, or folder of an exported detector.
        output: folder to write to.
        score: least score of a detection.
        overlap: intersection over union above which the weaker of two boxes of a class is dropped.
        mask: least probability of a pixel of a mask.
        most: most detections of a picture, the best ones.
        device: such as "cpu" or "cuda:0"; None takes the accelerator where there is one.

    Returns:
        `detections`, in COCO's result format (image_id, category_id, bbox as x, y, width, height, score and, with
        masks, segmentation as run lengths) with the names `category` and `image` added; `images`: `id`, `file_name`,
        `width`, `height`; `skipped`: damaged files with the `reason`; `output`: the folder. An image's id is its file
        name where all of them are numbers, as in COCO, and counts from 1 otherwise. The picture shows the first 12.

    Raises:
        ValueError: a path that does not exist, a folder without pictures, nothing readable, a threshold out of range,
            or a checkpoint that cannot be used.
    """
    for name, value in {"score": score, "overlap": overlap, "mask": mask}.items():
        check_probability(name, value)
    check_least("most", most, 1)
    files = listed_images(images) if images else []
    trained = load_detector(checkpoint)
    where = pick_device(device)
    model: Any = trained.model.to(where)
    model.set_thresholds(score, overlap, mask, most)

    pictures, skipped = _read(files) if images else (_scenes(trained.network["image_size"], trained.about["seed"]), [])
    if not pictures:
        raise ValueError(f"none of the {len(files)} images can be read; the first: {skipped[0]['reason']}")
    numbers = _ids(list(pictures))
    detections: list[dict[str, Any]] = []
    listed: list[dict[str, Any]] = []
    shown: list[tuple[NDArray[np.uint8], dict[str, Tensor]]] = []
    for (name, open_picture), number in zip(pictures.items(), numbers):
        array = open_picture()
        with torch.inference_mode():
            tensor = torch.from_numpy(array.copy()).permute(2, 0, 1).to(where).float() / 255
            found = {key: value.cpu() for key, value in model([tensor])[0].items()}
        listed.append({"id": number, "file_name": name, "height": array.shape[0], "width": array.shape[1]})
        detections += _results(found, number, name, trained.about)
        if len(shown) < SHOWN:
            shown.append((array, found))
    if skipped:
        log.warning(
            "%d of %d images are skipped: %s", len(skipped), len(files), "; ".join(s["reason"] for s in skipped)
        )
    result = {"checkpoint": checkpoint, "output": output}
    result |= {"images": listed, "detections": detections, "skipped": skipped}
    write_json(Path(output) / "detections.json", detections)
    write_json(Path(output) / "images.json", {"images": listed, "skipped": skipped})
    draw_detections(shown, trained.about["classes"], Path(output) / "detections.png")
    return result


def _read(files: Sequence[Path]) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """How to open each readable picture, by name, and the others with the reason."""
    pictures: dict[str, Any] = {}
    skipped: list[dict[str, str]] = []
    for file in files:
        try:
            read_image(file)
        except ValueError as error:
            skipped.append({"image": str(file), "reason": str(error)})
        else:
            pictures[str(file)] = lambda file=file: np.asarray(read_image(file))
    return pictures, skipped


def _scenes(size: int, seed: int) -> dict[str, Any]:
    samples = ObjectSamples(load_detection_data("scenes", size, seed=seed).val, seed=seed)
    return {
        f"scene {i + 1}": lambda i=i: (samples[i][0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        for i in range(HELD_OUT)
    }


def _ids(names: Sequence[str]) -> list[int]:
    stems = [Path(name).stem for name in names]
    numbers = [int(stem) for stem in stems if stem.isdecimal()]
    return numbers if len(set(numbers)) == len(stems) else list(range(1, len(stems) + 1))


def _results(found: dict[str, Tensor], number: int, name: str, about: dict[str, Any]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for i, (box, label, score) in enumerate(zip(found["boxes"], found["labels"].tolist(), found["scores"].tolist())):
        x1, y1, x2, y2 = (round(v, 3) for v in box.tolist())
        entry = {
            "image_id": number,
            "category_id": about["categories"][label],
            "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)],
            "score": round(score, 6),
            "category": about["classes"][label],
            "image": name,
        }
        if "masks" in found:
            entry["segmentation"] = encode(found["masks"][i].numpy())
        results.append(entry)
    return results


def draw_detections(
    shown: Sequence[tuple[NDArray[np.uint8], dict[str, Tensor]]], classes: Sequence[str], path: Path
) -> None:
    """Writes one picture of all pictures (H, W, 3) with what a `Detector` found in them."""
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (array, found) in zip(axes, shown):
        axis.imshow(array)
        height, width = array.shape[:2]
        for i, (box, label, score) in enumerate(
            zip(found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist())
        ):
            colour = f"C{label % 10}"
            x1, y1, x2, y2 = box
            if "masks" in found:
                layer = np.zeros((height, width, 4))
                layer[found["masks"][i].numpy()] = to_rgba(colour, 0.5)
                axis.imshow(layer)
            # Pixel centres are whole numbers here, while boxes count from the edge of the first pixel.
            axis.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=colour, lw=1.5))
            style = {"fontsize": 7, "color": "white", "parse_math": False, "va": "bottom", "clip_on": True}
            text = f"{classes[label]} {score:.2f}"
            axis.text(x1 - 0.5, y1 - 0.5, text, bbox={"facecolor": colour, "lw": 0, "pad": 0.8}, **style)
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=75, format="png")

"""Datasets in the layout of COCO: one JSON file of annotations a split, and a folder of pictures."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray

from gridattn.data import read_image
from gridattn.systems.detect.scenes import Example

log = logging.getLogger("gridattn")

ANNOTATIONS = (
    "annotations/instances_{split}2017.json",
    "annotations/instances_{split}.json",
    "annotations/{split}.json",
    "{split}.json",
    "{split}/_annotations.coco.json",
)
PICTURES = ("{split}2017", "{split}", "images/{split}2017", "images/{split}", "images", ".")


class CocoImages:
    """The pictures of an annotation file, with their objects.

    The file is read and checked whole at once; pictures are opened when they are asked for.

    Args:
        file: the annotations.
        folder: where `file_name` of its images is looked for.
        masks: whether outlines are needed.

    Attributes:
        categories: category id -> name, by rising id; labels are the ranks of the ids.

    Raises:
        ValueError: a file that is missing, is not JSON, lacks an entry or contradicts itself, or a picture that is
            missing. The message names the file and the entry.
    """

    def __init__(self, file: Path, folder: Path, *, masks: bool = False) -> None:
        self.file, self.folder, self.masks = file, folder, masks
        content = _read(file)
        self.categories = {
            _entry(file, "category", c, "id", int): str(_entry(file, "category", c, "name", str))
            for c in sorted(content["categories"], key=lambda c: _entry(file, "category", c, "id", int))
        }
        if not self.categories:
            raise ValueError(f"{str(file)!r} names no categories")
        self.images: list[dict[str, Any]] = []
        self.objects: dict[int, list[dict[str, Any]]] = {}
        for image in content["images"]:
            self._add_image(image)
        if not self.images:
            raise ValueError(f"{str(file)!r} lists no images")
        sizes = {image["id"]: (image["width"], image["height"]) for image in self.images}
        flat = sum(not self._add_object(annotation, sizes) for annotation in content["annotations"])
        if flat:
            log.warning("%d of %d boxes of %r are empty and passed over", flat, len(content["annotations"]), str(file))

    def _add_image(self, image: Any) -> None:
        number = _entry(self.file, "image", image, "id", int)
        for name, kind in (("file_name", str), ("width", int), ("height", int)):
            _entry(self.file, f"image {number}", image, name, kind)
        if number in self.objects:
            raise ValueError(f"{str(self.file)!r} lists two images of the id {number}")
        if not (self.folder / image["file_name"]).is_file():
            raise ValueError(f"image {str(self.folder / image['file_name'])!r} of {str(self.file)!r} does not exist")
        self.images.append(image)
        self.objects[number] = []

    def _add_object(self, annotation: Any, sizes: Mapping[int, tuple[int, int]]) -> bool:
        """Whether the annotation has a box inside of its picture."""
        name = f"annotation {annotation.get('id', '?')}" if isinstance(annotation, dict) else "annotation"
        image = _entry(self.file, name, annotation, "image_id", int)
        category = _entry(self.file, name, annotation, "category_id", int)
        box = _entry(self.file, name, annotation, "bbox", list)
        if image not in self.objects:
            raise ValueError(f"{name} of {str(self.file)!r} belongs to the image {image}, which is not listed")
        if category not in self.categories:
            raise ValueError(f"{name} of {str(self.file)!r} is of the category {category}, which is not listed")
        if len(box) != 4 or not all(isinstance(v, int | float) and math.isfinite(v) for v in box):
            raise ValueError(f"{name} of {str(self.file)!r} has the bbox {box}; x, y, width, height are needed")
        if self.masks and not annotation.get("segmentation"):
            raise ValueError(f"{name} of {str(self.file)!r} has no segmentation, which masks need")
        width, height = sizes[image]
        x1, y1, x2, y2 = box[0], box[1], box[0] + box[2], box[1] + box[3]
        clipped = [max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2)]
        if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
            return False
        self.objects[image].append({**annotation, "name": name, "box": clipped})
        return True

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        """Reads a picture; raises ValueError where it is damaged or not of the size that the annotations give."""
        image = self.images[index]
        path, (width, height) = self.folder / image["file_name"], (image["width"], image["height"])
        picture = read_image(path)
        if picture.size != (width, height):
            raise ValueError(
                f"image {str(path)!r} has {picture.size[0]}x{picture.size[1]} pixels; "
                f"{str(self.file)!r} gives {width}x{height}"
            )
        objects = self.objects[image["id"]]
        labels = [list(self.categories).index(o["category_id"]) for o in objects]
        boxes = np.asarray([o["box"] for o in objects], np.float32).reshape(-1, 4)
        area = [o.get("area") or float((b[2] - b[0]) * (b[3] - b[1])) for o, b in zip(objects, boxes)]
        return Example(
            image=np.asarray(picture),
            boxes=boxes,
            labels=np.asarray(labels, np.int64),
            masks=self._masks(objects, width, height) if self.masks else None,
            crowd=np.asarray([bool(o.get("iscrowd", 0)) for o in objects], bool),
            area=np.asarray(area, np.float32),
            image_id=image["id"],
        )

    def _masks(self, objects: Sequence[Mapping[str, Any]], width: int, height: int) -> NDArray[np.bool_]:
        masks = np.zeros((len(objects), height, width), bool)
        for mask, entry in zip(masks, objects):
            try:
                mask[:] = decode(entry["segmentation"], width, height)
            except (ValueError, TypeError, KeyError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{entry['name']} of {str(self.file)!r} has a bad segmentation: {reason}") from None
        return masks


def decode(segmentation: Any, width: int, height: int) -> NDArray[np.bool_]:
    """A mask (height, width) of COCO's `segmentation`: polygons, or run lengths as a list or as a string.

    Raises:
        ValueError: run lengths of another size, or outlines that are none.

    Example:
        >>> decode([[1, 1, 5, 1, 5, 3, 1, 3]], 6, 4).sum(), decode({"size": [2, 3], "counts": [1, 2, 3]}, 3, 2).sum()
        (np.int64(8), np.int64(2))
    """
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"its size is {segmentation['size']}, that of the image [{height}, {width}]")
        counts = segmentation["counts"]
        if isinstance(counts, list) and sum(counts) != height * width:
            raise ValueError(f"its run lengths add up to {sum(counts)}, not to {height * width} pixels")
    elif not all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation):
        raise ValueError("a polygon needs three points or more, x and y of each")
    return np.asarray(rle.decode(rle.segmToRle(segmentation, width, height))).astype(bool)


def encode(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's run lengths of a mask (height, width), as JSON takes them.

    Example:
        >>> encoded = encode(np.eye(3, dtype=bool))
        >>> encoded["size"], bool((decode(encoded, 3, 3) == np.eye(3)).all())
        ([3, 3], True)
    """
    found = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(v) for v in found["size"]], "counts": found["counts"].decode("ascii")}


def find_split(root: Path, split: str) -> tuple[Path, Path] | None:
    """The annotation file of a split and its folder of pictures; None where there are no annotations.

    Raises:
        ValueError: annotations without a folder that holds their first picture.
    """
    files = [root / name.format(split=split) for name in ANNOTATIONS]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        return None
    images = _read(file)["images"]
    first = _entry(file, "image", images[0], "file_name", str) if images else ""
    folders = [file.parent, *(root / name.format(split=split) for name in PICTURES)]
    folder = next((f for f in folders if (f / first).is_file()), None)
    if folder is None:
        tried = ", ".join(name.format(split=split) for name in PICTURES)
        raise ValueError(f"image {first!r} of {str(file)!r} does not exist in any of {tried}")
    return file, folder


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"annotations {str(file)!r} cannot be read: {' '.join(str(error).split())}") from None
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"annotations {str(file)!r} have no list {name!r}")
    return content


def _entry(file: Path, what: str, record: Any, name: str, kind: type) -> Any:
    """An entry of a record of the file; raises ValueError where it is missing or of another kind."""
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{what} of {str(file)!r} has {name}={value!r}; a value of type {kind.__name__} is needed")
    return value

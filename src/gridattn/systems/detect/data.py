"""Pictures with their objects as training and validation samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from gridattn.data import SeededSamples
from gridattn.systems.detect.coco import ANNOTATIONS, CocoImages, find_split
from gridattn.systems.detect.cutouts import CLASSES
from gridattn.systems.detect.scenes import Example, Scenes

TRAIN_SCENES, VAL_SCENES = 960, 160
HELD_OUT = 0.2

Sample = tuple[Tensor, dict[str, Tensor]]


class ObjectSamples(SeededSamples):
    """Images (3, H, W) of 0..1 and their targets, by draw number.

    A target has `boxes`, `labels`, `masks` where there are any, `iscrowd`, `area`, `image_id` and `seed`, a number of
    this draw from which a detector samples its anchors. With a `transform` (training) crowds are left out and `area`
    and `iscrowd` are not given. Padding is a black image with the `image_id` -1.

    Args:
        source: gives an `Example` for an index.
        transform: of `torchvision.transforms.v2`; None leaves images as they are.
        seed: the run's seed.
    """

    def __init__(self, source: Any, transform: v2.Transform | None = None, seed: int = 0) -> None:
        super().__init__(seed)
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int) -> Sample:
        return self._to_sample(self.source[index])

    def padding(self) -> Sample:
        empty = np.zeros(0, bool)
        masks = np.zeros((0, 32, 32), bool) if getattr(self.source, "masks", True) else None
        black, boxes = np.zeros((32, 32, 3), np.uint8), np.zeros((0, 4), np.float32)
        return _to_tensors(Example(black, boxes, empty.astype(np.int64), masks, empty, empty.astype(np.float32), -1))

    def _to_sample(self, example: Example) -> Sample:
        image, target = _to_tensors(example)
        if self.transform is not None:
            single = ~target["iscrowd"].bool()
            size = (image.shape[-2], image.shape[-1])
            boxes: Any = tv_tensors.BoundingBoxes(  # pyright: ignore[reportCallIssue]  its overloads know no such call
                target["boxes"][single], format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size
            )
            given: dict[str, Any] = {"boxes": boxes, "labels": target["labels"][single]}
            if "masks" in target:
                given["masks"] = tv_tensors.Mask(target["masks"][single])
            image, found = self.transform(tv_tensors.Image(image), given)
            image = image.as_subclass(Tensor)
            plain = {name: value.as_subclass(Tensor) for name, value in found.items()}
            target = {**plain, "image_id": target["image_id"]}
        target["seed"] = torch.randint(2**62, ())
        return image.float() / 255, target

    @staticmethod
    def collate(samples: list[Sample]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Images and targets, as lists, as their sizes may differ."""
        return [image for image, _ in samples], [target for _, target in samples]


def _to_tensors(example: Example) -> Sample:
    target = {
        "boxes": torch.from_numpy(example.boxes.copy()),
        "labels": torch.from_numpy(example.labels),
        "iscrowd": torch.from_numpy(example.crowd).long(),
        "area": torch.from_numpy(example.area),
        "image_id": torch.tensor(example.image_id),
    }
    if example.masks is not None:
        target["masks"] = torch.from_numpy(example.masks).to(torch.uint8)
    return torch.from_numpy(example.image.copy()).permute(2, 0, 1), target


def train_transform(
    sizes: Sequence[int], max_size: int, *, flip: float = 0.5, crop: Sequence[int] = (), before: Sequence[int] = ()
) -> v2.Transform:
    """Flip and multi-scale resizing, half of the time around a crop as DETR has it.

    Args:
        sizes: shorter sides, of which each image takes one at random, pixels.
        max_size: the longer side does not exceed this.
        flip: probability of mirroring left and right.
        crop: smallest and largest side of the crop, pixels; empty for none.
        before: shorter sides before the crop.
    """
    resize = v2.RandomShortestSize(list(sizes), max_size)
    steps: list[Any] = [v2.RandomHorizontalFlip(flip), resize]
    if crop:
        cut = v2.Compose([v2.RandomShortestSize(list(before)), RandomRegion(crop[0], crop[1]), resize])
        steps[1] = v2.RandomChoice([resize, cut])
    return v2.Compose([*steps, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)])


class RandomRegion(v2.Transform):
    """A region of random height and width, each of `least` to `most` pixels or the whole side where that is shorter."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least, self.most = least, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sides = v2.functional.get_size(flat_inputs[0])
        lengths = [int(torch.randint(min(self.least, s), min(self.most, s) + 1, ())) for s in sides]
        top, left = (int(torch.randint(s - n + 1, ())) for s, n in zip(sides, lengths))
        return {"top": top, "left": left, "height": lengths[0], "width": lengths[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


@dataclass
class DetectionData:
    """A dataset.

    Attributes:
        spec: how it was asked for.
        classes: names, by label.
        categories: ids, by label, as in the annotation file.
        train: sources of `Example`.
        val: the same, not seen in training.
    """

    spec: str
    classes: list[str]
    categories: list[int]
    train: Any
    val: Any


class Part:
    """Some samples of a source."""

    def __init__(self, source: Any, indices: Sequence[int]) -> None:
        self.source, self.indices = source, list(indices)
        self.masks = source.masks

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.indices[index]]


def load_detection_data(spec: str, image_size: int = 96, *, masks: bool = False, seed: int = 0) -> DetectionData:
    """Loads a dataset for detection.

    * `scenes`: digits, faces and coins on photographed textures, made as they are needed (`Scenes`).
    * `coco:PATH`: annotations/instances_train.json (or instances_train2017.json, or PATH/train.json) and the same of
      val, with the pictures in PATH/train, PATH/train2017, PATH/images or PATH. Without annotations of val a fifth of
      the pictures, drawn by `seed`, is held out.

    Args:
        spec: one of the above.
        image_size: side of the scenes, pixels; pictures of files keep their own size.
        masks: whether outlines are needed.
        seed: of the split, where there is one to make.

    Raises:
        ValueError: an unknown name, or files that cannot be used.

    Example:
        >>> data = load_detection_data("scenes", 64)
        >>> data.classes, data.val[0].image.shape
        (['digit', 'face', 'coin'], (64, 64, 3))
    """
    name, _, path = spec.partition(":")
    if spec == "scenes":
        if image_size < 32:
            raise ValueError(f"image_size={image_size} is too small for scenes; 32 is the least")
        parts = [
            Scenes(image_size, count, training=t, seed=seed) for count, t in ((TRAIN_SCENES, True), (VAL_SCENES, False))
        ]
        return DetectionData(spec, list(CLASSES), list(range(1, len(CLASSES) + 1)), *parts)
    if name != "coco" or not path:
        raise ValueError(f"data={spec!r} is not known; allowed: scenes, coco:PATH")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"data folder {str(root)!r} does not exist or is not a folder")
    found = find_split(root, "train")
    if found is None:
        raise ValueError(
            f"data folder {str(root)!r} holds no annotations; one of "
            f"{', '.join(n.format(split='train') for n in ANNOTATIONS)} is needed"
        )
    train: Any = CocoImages(*found, masks=masks)
    categories = train.categories
    held = find_split(root, "val")
    if held is not None:
        val: Any = CocoImages(*held, masks=masks)
        if val.categories != categories:
            raise ValueError(f"the categories of {str(held[0])!r} differ from those of {str(found[0])!r}")
    else:
        order = np.random.default_rng(seed).permutation(len(train)).tolist()
        count = max(1, round(HELD_OUT * len(order)))
        if len(order) < 2:
            raise ValueError(f"{str(found[0])!r} lists a single image; a split into training and validation needs two")
        train, val = Part(train, sorted(order[count:])), Part(train, sorted(order[:count]))
    return DetectionData(spec, list(categories.values()), list(categories), train, val)

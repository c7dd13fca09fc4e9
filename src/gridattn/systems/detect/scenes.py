"""Procedural scenes: photographed textures with real objects on them, and their exact boxes and masks."""

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gridattn.systems.detect.cutouts import CLASSES, Cutout, cutouts

TEXTURES = ("brick", "grass", "gravel")
MOST = 5
"""Objects in a scene."""
SIDE = (0.16, 0.45)
"""Height of an object over the side of the scene."""


@dataclass
class Example:
    """A picture and what is in it.

    Attributes:
        image: (H, W, 3), 8 bit.
        boxes: (N, 4): x1, y1, x2, y2, pixels; the right and lower edge lie outside of the last pixel.
        labels: (N,), class indices.
        masks: (N, H, W), boolean; None where there are none.
        crowd: (N,), whether an entry outlines a group, which training passes over and metrics forgive.
        area: (N,), pixels of each object, which decides whether it is small, medium or large.
        image_id: the number of the picture in its dataset.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.bool_] | None
    crowd: NDArray[np.bool_]
    area: NDArray[np.float32]
    image_id: int = 0


class Scenes:
    """Scenes of `size` x `size` pixels, composed anew at every look.

    A crop of a photographed texture, in a random tint, carries 0 to 5 objects: handwritten digits, faces and coins
    (`cutouts`), each in a random tint of its own and of a height drawn log-uniformly. Later objects lie over earlier
    ones, of which at least 70 % stays visible; boxes and masks are those of the visible part. Training takes the left
    70 % of the textures and three quarters of the objects of each class, validation the rest.

    All randomness comes from the generator of `random`, so that a caller who seeds it gets the same scene again.

    Args:
        size: side, pixels.
        count: number of scenes, of which only the length of an epoch depends.
        training: which part of the sources.
        seed: of the split of the objects.
    """

    def __init__(self, size: int, count: int, *, training: bool, seed: int = 0) -> None:
        from skimage import data

        self.objects: list[list[Cutout]] = []
        for label, name in enumerate(CLASSES):
            every = cutouts(name)
            order = np.random.default_rng((seed, label)).permutation(len(every))
            held = len(every) // 4
            self.objects.append([every[i] for i in (order[held:] if training else order[:held])])
        photographs = [getattr(data, name)() for name in TEXTURES]
        edges = [round(0.7 * photograph.shape[1]) for photograph in photographs]
        self.regions = [p[:, :edge] if training else p[:, edge:] for p, edge in zip(photographs, edges)]
        self.size, self.count = size, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng(random.getrandbits(64))
        canvas = self._background(rng)
        masks: list[NDArray[np.bool_]] = []
        whole: list[int] = []
        labels: list[int] = []
        for _ in range(rng.integers(0, MOST + 1)):
            label = int(rng.integers(len(CLASSES)))
            grey, alpha = self._placed(rng, self.objects[label][rng.integers(len(self.objects[label]))])
            mask = alpha >= 0.5
            left = [old & ~mask for old in masks]
            if not mask.any() or any(new.sum() < 0.7 * size for new, size in zip(left, whole)):
                continue
            colour = 255 * grey[..., None] * rng.uniform(0.6, 1.2, 3)
            canvas += alpha[..., None] * (colour - canvas)
            masks = [*left, mask]
            whole.append(int(mask.sum()))
            labels.append(label)
        stacked = np.stack(masks) if masks else np.zeros((0, self.size, self.size), bool)
        return Example(
            image=canvas.clip(0, 255).round().astype(np.uint8),
            boxes=boxes_of(stacked),
            labels=np.asarray(labels, np.int64),
            masks=stacked,
            crowd=np.zeros(len(labels), bool),
            area=stacked.sum((1, 2), dtype=np.float32),
            image_id=index + 1,
        )

    def _background(self, rng: np.random.Generator) -> NDArray[np.float64]:
        region = self.regions[rng.integers(len(self.regions))]
        side = min(self.size, *region.shape)
        y, x = (int(rng.integers(extent - side + 1)) for extent in region.shape)
        crop = Image.fromarray(region[y : y + side, x : x + side]).resize(
            (self.size, self.size), Image.Resampling.BICUBIC
        )
        return np.asarray(crop, np.float64)[..., None] * rng.uniform(0.6, 1.2, 3)

    def _placed(self, rng: np.random.Generator, cutout: Cutout) -> list[NDArray[np.float64]]:
        """An object at a random size and place: grey values and opacity over the scene."""
        low, high = (np.log(max(4, part * self.size)) for part in SIDE)
        grown = np.exp(rng.uniform(low, high)) / cutout[0].shape[0]
        height, width = (min(self.size, round(side * grown)) for side in cutout[0].shape)
        y, x = (int(rng.integers(self.size - extent + 1)) for extent in (height, width))
        placed = [np.zeros((self.size, self.size)) for _ in cutout]
        for canvas, part in zip(placed, cutout):
            resized = np.asarray(Image.fromarray(part).resize((width, height), Image.Resampling.BILINEAR))
            canvas[y : y + height, x : x + width] = resized
        return placed


def boxes_of(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(N, H, W) masks, none of them empty -> (N, 4), the smallest boxes around them.

    Example:
        >>> mask = np.zeros((1, 6, 8), bool); mask[0, 2:4, 3:7] = True
        >>> boxes_of(mask).tolist()
        [[3.0, 2.0, 7.0, 4.0]]
    """
    found = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(found, masks):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return found

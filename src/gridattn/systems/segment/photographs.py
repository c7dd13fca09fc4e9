"""Embedded photographs as a segmentation task: collages of five materials whose masks are exact.

A collage is a Voronoi diagram of random sites; every cell shows a random part of one of five photographs, in grey, with
its brightness and contrast drawn at random. Neither grey levels nor shapes or places tell the material: only its
structure does. The right 30 % of every photograph is for validation alone.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

MATERIALS = {
    "brick": "brick",
    "grass": "grass",
    "gravel": "gravel",
    "tissue": "immunohistochemistry",
    "stars": "hubble_deep_field",
}
"""Class name -> photograph in `skimage.data`."""

TRAIN_SIZE = (96, 96)
VAL_SIZE = (128, 96)
TRAIN_COUNT = 480
VAL_COUNT = 40
_TRAIN_PART = 0.7


@cache
def photographs() -> tuple[NDArray[np.float32], ...]:
    """The photographs in grey, one a class, values 0..255."""
    from skimage import data

    pictures = [np.asarray(getattr(data, name)(), dtype=np.float32) for name in MATERIALS.values()]
    return tuple(picture if picture.ndim == 2 else picture[..., :3].mean(-1) for picture in pictures)


def collage(
    rng: np.random.Generator, size: tuple[int, int], *, held_out: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draws one collage.

    Args:
        rng: every random choice comes from it.
        size: height and width, pixels; at most 512 and 153.
        held_out: takes the pixels from the photographs' right parts, which are for validation.

    Returns:
        The image, (H, W), and its mask, (H, W): the class of every pixel, an index into `MATERIALS`.

    Example:
        >>> image, mask = collage(np.random.default_rng(0), (64, 80), held_out=True)
        >>> image.shape, sorted(set(mask.flat)) <= [0, 1, 2, 3, 4]
        ((64, 80), True)
    """
    height, width = size
    count = int(rng.integers(3, 7))
    sites = rng.random((count, 2)) * size
    labels = rng.permutation(np.arange(count) % len(MATERIALS) + rng.integers(len(MATERIALS))) % len(MATERIALS)
    rows, columns = np.mgrid[:height, :width]
    distances = (rows - sites[:, :1, None]) ** 2 + (columns - sites[:, 1:, None]) ** 2
    cells = distances.argmin(0)
    image = np.zeros(size, np.float32)
    for cell, label in enumerate(labels):
        image[cells == cell] = _piece(rng, photographs()[label], size, held_out)[cells == cell]
    return image.clip(0, 255).astype(np.uint8), labels[cells].astype(np.uint8)


def _piece(
    rng: np.random.Generator, photograph: NDArray[np.float32], size: tuple[int, int], held_out: bool
) -> NDArray[np.float32]:
    """A random part of a photograph, mirrored at random, with mean and deviation drawn at random."""
    height, width = photograph.shape
    edge = round(_TRAIN_PART * width)
    first, last = (edge, width) if held_out else (0, edge)
    y = rng.integers(0, height - size[0] + 1)
    x = rng.integers(first, last - size[1] + 1)
    piece = photograph[y : y + size[0], x : x + size[1]]
    piece = piece[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]
    return (piece - piece.mean()) / (piece.std() + 1e-3) * rng.uniform(25, 45) + rng.uniform(90, 165)

"""Objects cut out of pictures that come with our dependencies: handwritten digits, faces and coins."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

CLASSES = ("digit", "face", "coin")

Cutout = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Grey values 0..1 and opacity 0..1, both (H, W)."""


@cache
def cutouts(name: str) -> list[Cutout]:
    """The objects of a class.

    * digit: the 1797 handwritten digits of scikit-learn, 8x8 pixels; strokes are white and the rest is transparent.
    * face: the 100 faces of scikit-image's subset of Labeled Faces in the Wild, 25x25 pixels, cut to an ellipse.
    * coin: the coins of scikit-image's photograph, some 60 pixels wide, cut out along their edge.
    """
    return {"digit": _digits, "face": _faces, "coin": _coins}[name]()


def _digits() -> list[Cutout]:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    alphas = (digits.images / 16).astype(np.float32)
    return [(np.ones_like(alpha), alpha) for alpha in alphas]


def _faces() -> list[Cutout]:
    from skimage.data import lfw_subset

    faces = lfw_subset()[:100].astype(np.float32)
    y, x = np.mgrid[-1 : 1 : faces.shape[1] * 1j, -1 : 1 : faces.shape[2] * 1j]
    alpha = ((x / 0.75) ** 2 + y**2 <= 1).astype(np.float32)
    return [(face, alpha) for face in faces]


def _coins() -> list[Cutout]:
    from scipy.ndimage import binary_fill_holes
    from skimage.data import coins
    from skimage.filters import threshold_otsu
    from skimage.measure import label, regionprops
    from skimage.morphology import closing, footprint_rectangle
    from skimage.segmentation import clear_border

    photograph = coins()
    bright = closing(photograph > threshold_otsu(photograph), footprint_rectangle((3, 3)))
    found: list[Cutout] = []
    for region in regionprops(label(clear_border(binary_fill_holes(bright)))):
        if region.area >= 800:
            grey = photograph[region.slice].astype(np.float32) / 255
            found.append((grey, region.image_filled.astype(np.float32)))
    return found

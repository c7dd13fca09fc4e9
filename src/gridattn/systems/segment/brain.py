"""Slices of the MNI152 brain template with its tissue maps, as nilearn ships them (the extra `medical`).

Axial slices of the T1 image at 2 mm. A pixel is grey or white matter where that map is at least 1/2, other brain
(mostly fluid) where the brain mask holds and neither is, background elsewhere. The slices alternate between blocks of
10 for training and blocks of 5 for validation, with 2 slices between blocks that belong to neither.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

CLASSES = ("background", "other_brain", "grey_matter", "white_matter")
_BLOCK, _TRAIN, _GAP, _VAL = 19, 10, 2, 5


@cache
def slices() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """All axial slices with brain: images and masks, each (N, H, W), front of the head at the top.

    Raises:
        ModuleNotFoundError: nilearn is not installed.
    """
    try:
        from nilearn import datasets  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ModuleNotFoundError("data='mni152' needs nilearn; install gridattn[medical]") from None
    t1 = np.asarray(datasets.load_mni152_template(resolution=2).get_fdata(), np.float32)
    maps = (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template, datasets.load_mni152_brain_mask)
    grey, white, brain = (np.asarray(load(resolution=2).get_fdata(), np.float32) for load in maps)
    mask = np.where(brain >= 0.5, 1, 0)
    mask = np.where(grey >= 0.5, 2, mask)
    mask = np.where(white >= 0.5, 3, mask).astype(np.uint8)
    image = (t1 / t1.max() * 255).astype(np.uint8)
    kept = (mask > 0).mean((0, 1)) > 0.02
    upright = [np.ascontiguousarray(volume.transpose(2, 1, 0)[kept][:, ::-1]) for volume in (image, mask)]
    return upright[0], upright[1]


def part(held_out: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The slices of training, or those of validation: images and masks, each (N, H, W)."""
    images, masks = slices()
    place = np.arange(len(images)) % _BLOCK
    first = _TRAIN + _GAP
    chosen = (place >= first) & (place < first + _VAL) if held_out else place < _TRAIN
    return images[chosen], masks[chosen]

"""Validation images of a dataset as files, so that a trained model can be run on what it has not seen."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from gridattn.data import ImageDataset, load_dataset


def to_picture(pixels: Tensor, data: ImageDataset) -> Image.Image:
    """(3, H, W), normalised as `data` does -> the picture."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    array = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(array.movedim(0, -1).numpy())


def write_unseen(spec: str, image_size: int, folder: Path) -> list[Path]:
    """Writes one validation image of every class as PNG, named by its class.

    Args:
        spec: dataset, as `load_dataset` takes it.
        image_size: height and width, pixels.
        folder: where to.

    Returns:
        The files.

    Raises:
        ValueError: an unknown dataset or a size that it refuses.
    """
    data = load_dataset(spec, image_size)
    folder.mkdir(parents=True, exist_ok=True)
    labels = data.val.source.labels
    written = []
    for label in sorted(set(labels)):
        # The middle one of a class: textures are cut on a raster, and its first crop touches the border of the photograph.
        members = [index for index, other in enumerate(labels) if other == label]
        pixels, _ = data.val[members[len(members) // 2]]
        path = folder / f"{data.classes[label]}.png"
        to_picture(pixels, data).save(path)
        written.append(path)
    return written

"""Validation images of a dataset as files, so that a trained model can be run on what it has not seen."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from gridattn.data import ImageDataset, load_dataset
from gridattn.systems.classify import load_classifier


def to_picture(pixels: Tensor, data: ImageDataset) -> Image.Image:
    """(3, H, W), normalised as `data` does -> the picture."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    array = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(array.movedim(0, -1).numpy())


def write_unseen(spec: str, checkpoint: Path, folder: Path) -> list[Path]:
    """Writes one image of every class that the training of a classifier did not see, as PNG named by its class.

    Args:
        spec: dataset, as `load_dataset` takes it.
        checkpoint: of the classifier; its image size and its split are used.
        folder: where to.

    Returns:
        The files.

    Raises:
        ValueError: an unknown dataset, or a checkpoint that holds no classifier.
    """
    classifier = load_classifier(checkpoint)
    data = load_dataset(spec, classifier.preprocess.image_size, seed=classifier.seed)
    folder.mkdir(parents=True, exist_ok=True)
    labels = data.val.source.labels
    written = []
    for label in sorted(set(labels)):
        # The middle one: textures are cut on a raster, whose first crop touches the border of the photograph.
        members = [index for index, other in enumerate(labels) if other == label]
        pixels, _ = data.val[members[len(members) // 2]]
        path = folder / f"{data.classes[label]}.png"
        to_picture(pixels, data).save(path)
        written.append(path)
    return written

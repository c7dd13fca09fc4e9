"""Dataset readers and embedded real samples."""

from gridattn.data.datasets import ImageDataset, list_datasets, load_dataset
from gridattn.data.images import find_images, read_image, usable_images
from gridattn.data.sampling import Draws, EpochSampler, SeededSamples, seeded
from gridattn.data.transforms import Preprocess, train_transform

__all__ = [
    "Draws",
    "EpochSampler",
    "ImageDataset",
    "Preprocess",
    "SeededSamples",
    "find_images",
    "list_datasets",
    "load_dataset",
    "read_image",
    "seeded",
    "train_transform",
    "usable_images",
]

"""Labelled images by name: embedded real ones that need no download, and the user's own class folders."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import Compose

from gridattn.data.folder import read_folder
from gridattn.data.images import read_image
from gridattn.data.sampling import Draws
from gridattn.data.transforms import PLAIN, Preprocess, train_transform


class Pictures:
    """Labelled pictures, in memory or on disk: `self[i] -> (PIL image, label)`."""

    def __init__(self, pictures: Sequence[Any], labels: Sequence[int], read: Callable[[Any], Image.Image]) -> None:
        self.pictures, self.labels, self.read = pictures, [int(label) for label in labels], read

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.read(self.pictures[index]), self.labels[index]


@dataclass(frozen=True)
class ImageDataset:
    """A labelled image dataset, ready for training.

    Attributes:
        spec: the name it was loaded by.
        classes: class names; a label is an index into them.
        train: training samples by draw number, `(tensor (3, H, W), label)`.
        val: validation samples by index.
        preprocess: how a picture becomes a tensor in validation; stored with the trained model.
    """

    spec: str
    classes: tuple[str, ...]
    train: Draws
    val: Draws
    preprocess: Preprocess

    @property
    def image_size(self) -> int:
        """Height and width of the tensors, pixels."""
        return self.preprocess.image_size

    @property
    def in_chans(self) -> int:
        """Channels of the tensors."""
        return len(self.preprocess.mean)

    @property
    def mean(self) -> tuple[float, ...]:
        """What was subtracted from each channel."""
        return self.preprocess.mean

    @property
    def std(self) -> tuple[float, ...]:
        """What each channel was divided by."""
        return self.preprocess.std


@dataclass(frozen=True)
class _Source:
    """What one reader gives: pictures of both splits, and how to turn them into tensors."""

    classes: Sequence[str]
    train: Pictures
    val: Pictures
    preprocess: Preprocess
    augment: Mapping[str, Any] = field(default_factory=dict)
    tile: Callable[[Image.Image], Image.Image] | None = None


def split_stratified(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits indices so that every class has `fraction` of its members, at least one, in the second part.

    Returns:
        Indices of the first and of the second part, each ascending. The same for the same labels and seed.

    Raises:
        ValueError: a class with a single member.

    Example:
        >>> split_stratified([0, 0, 0, 0, 1, 1], fraction=0.25, seed=0)[1]
        [2, 4]
    """
    held: list[int] = []
    for label in sorted(set(labels)):
        members = np.flatnonzero(np.asarray(labels) == label)
        if len(members) < 2:
            raise ValueError(f"class {label} has a single image; a split into training and validation needs two")
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held += np.random.default_rng((seed, label)).permutation(members)[:count].tolist()
    return sorted(set(range(len(labels))) - set(held)), sorted(held)


def _arrays(images: NDArray[np.uint8], labels: Sequence[int], seed: int) -> tuple[Pictures, Pictures]:
    first, second = split_stratified(labels, fraction=0.25, seed=seed)
    parts = [Pictures([images[i] for i in part], [labels[i] for i in part], _picture) for part in (first, second)]
    return parts[0], parts[1]


def _picture(array: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(array).convert("RGB")


def _digits(image_size: int, seed: int, verify: bool) -> _Source:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    train, val = _arrays((digits.images * (255 / 16)).astype(np.uint8), digits.target.tolist(), seed)
    preprocess = Preprocess(image_size, mean=(0.305,) * 3, std=(0.376,) * 3, crop=1.0, interpolation="bilinear")
    augment = PLAIN | {"scale": (0.7, 1.0), "ratio": (0.9, 1.1)}
    return _Source([str(i) for i in range(10)], train, val, preprocess, augment)


def _faces(image_size: int, seed: int, verify: bool) -> _Source:
    from skimage.data import lfw_subset

    train, val = _arrays((lfw_subset() * 255).astype(np.uint8), [1] * 100 + [0] * 100, seed)
    preprocess = Preprocess(image_size, mean=(0.377,) * 3, std=(0.273,) * 3, crop=1.0, interpolation="bilinear")
    augment = PLAIN | {"scale": (0.6, 1.0), "ratio": (0.8, 1.25), "hflip": 0.5, "color_jitter": 0.4}
    return _Source(["other", "face"], train, val, preprocess, augment)


@cache
def _photographs() -> dict[str, Image.Image]:
    from skimage import data

    return {name: _picture(getattr(data, name)()) for name in ("brick", "grass", "gravel")}


def _textures(image_size: int, seed: int, verify: bool) -> _Source:
    return texture_source(_photographs(), image_size)


def texture_source(photographs: Mapping[str, Image.Image], image_size: int, crops: int = 320) -> _Source:
    """Crops of photographs, one class a photograph: training crops at random, validation crops on a fixed raster.

    The right 30 % of every photograph is for validation alone: no training crop reaches into it, and the other way
    round.

    Args:
        photographs: class name -> picture.
        image_size: side of the crops, pixels.
        crops: training crops of each class in an epoch.
    """
    regions: list[Image.Image] = []
    held: list[Image.Image] = []
    labels: list[int] = []
    for label, (name, photograph) in enumerate(photographs.items()):
        width, height = photograph.size
        edge = round(0.7 * width)
        if image_size > min(width - edge, height):
            raise ValueError(f"image_size={image_size} exceeds the {width - edge} pixels of validation in {name!r}")
        regions.append(photograph.crop((0, 0, edge, height)))
        step = max(32, image_size // 2)
        corners = [
            (x, y) for y in range(0, height - image_size + 1, step) for x in range(edge, width - image_size + 1, step)
        ]
        held += [photograph.crop((x, y, x + image_size, y + image_size)) for x, y in corners]
        labels += [label] * len(corners)
    train = Pictures(regions * crops, list(range(len(regions))) * crops, _same)
    preprocess = Preprocess(image_size, mean=(0.466,) * 3, std=(0.139,) * 3, crop=None)
    tile = RandomTile(image_size)
    return _Source(list(photographs), train, Pictures(held, labels, _same), preprocess, tile=tile)


def _same(picture: Image.Image) -> Image.Image:
    return picture


@dataclass(frozen=True)
class RandomTile:
    """A square of `image_size` pixels at a random place of a picture, turned and mirrored in one of the eight ways."""

    image_size: int

    def __call__(self, picture: Image.Image) -> Image.Image:
        x, y = (random.randint(0, extent - self.image_size) for extent in picture.size)
        tile = picture.crop((x, y, x + self.image_size, y + self.image_size))
        for turn in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE):
            if random.random() < 0.5:
                tile = tile.transpose(turn)
        return tile


def _folder(path: str, image_size: int, seed: int, verify: bool) -> _Source:
    classes, train, val = read_folder(path, seed=seed, verify=verify, split=split_stratified)
    pictures = [Pictures([f for f, _ in part], [label for _, label in part], read_image) for part in (train, val)]
    augment = {"scale": (0.35, 1.0)}
    return _Source(classes, pictures[0], pictures[1], Preprocess(image_size), augment)


_EMBEDDED: dict[str, Callable[[int, int, bool], _Source]] = {
    "digits": _digits,
    "faces": _faces,
    "textures": _textures,
}


def list_datasets() -> list[str]:
    """Names that `load_dataset` takes, `folder:PATH` for the user's own pictures among them."""
    return [*sorted(_EMBEDDED), "folder:PATH"]


def load_dataset(
    spec: str,
    image_size: int = 64,
    *,
    seed: int = 0,
    augment: Mapping[str, Any] | None = None,
    verify: bool = True,
) -> ImageDataset:
    """Loads a labelled image dataset.

    * `digits`: the 1797 handwritten digits, 8x8 pixels, that come with scikit-learn; ten classes.
    * `faces`: 200 photographs, 25x25 pixels, of faces and of other things, that come with scikit-image.
    * `textures`: crops of scikit-image's 512x512 photographs of brick, grass and gravel, at their own scale.
    * `folder:PATH`: PATH/<class>/**/<image>, or PATH/train/<class>/** and PATH/val/<class>/**. Without the two
      sub-folders a fifth of every class, drawn by `seed`, is held out for validation.

    Args:
        spec: one of `list_datasets()`.
        image_size: height and width of the tensors, pixels; at least 8.
        seed: of the split and of every augmentation.
        augment: keywords of `timm.data.create_transform` for training, laid over the dataset's own.
        verify: decode every file of a folder once, to name and pass over the damaged ones. Without it a damaged file
            stops the training with its name.

    Raises:
        ValueError: an unknown name, a size out of range, an unknown augmentation, or a folder without a usable dataset.

    Example:
        >>> data = load_dataset("textures", image_size=32)
        >>> data.classes, data.train[0][0].shape
        (('brick', 'grass', 'gravel'), torch.Size([3, 32, 32]))
    """
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 8:
        raise ValueError(f"image_size={image_size!r} is not allowed; it must be an int of at least 8")
    name, _, path = spec.partition(":")
    if name == "folder" and path:
        source = _folder(path, image_size, seed, verify)
    elif spec in _EMBEDDED:
        source = _EMBEDDED[spec](image_size, seed, verify)
    else:
        raise ValueError(f"data={spec!r} is not known; allowed: {', '.join(list_datasets())}")
    if source.tile is None:
        transform = train_transform(source.preprocess, {**source.augment, **(augment or {})})
    else:
        # A tile is random and of the right size already; timm's transform, slower than the tile, comes only on demand.
        after = train_transform(source.preprocess, {**PLAIN, **augment}) if augment else source.preprocess.transform()
        transform = Compose([source.tile, after])
    return ImageDataset(
        spec,
        tuple(source.classes),
        Draws(source.train, transform, seed),
        Draws(source.val, source.preprocess.transform(), seed),
        source.preprocess,
    )

"""Image and mask files on disk: ADE20K's folders, and a plain pair of folders `images` and `masks`."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gridattn.data.images import find_images, read_image
from gridattn.systems.segment.losses import IGNORE

log = logging.getLogger("gridattn")

ADE20K_CLASSES = 150
HELD_OUT = 0.2


@dataclass(frozen=True)
class FilePair:
    """An image file and its mask file."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class MaskRule:
    """How the numbers in mask files become labels.

    Attributes:
        classes: class names; a label is an index into them.
        reduce_zero: 0 in a file means "no class" and k means class k - 1, as in ADE20K.
    """

    classes: tuple[str, ...]
    reduce_zero: bool

    def labels(self, values: NDArray[np.int64], path: Path) -> NDArray[np.uint8]:
        """Numbers of a file -> class indices, and 255 for "no class".

        Raises:
            ValueError: a number that belongs to no class.
        """
        labels = np.where(values == IGNORE, IGNORE, values - 1) if self.reduce_zero else values
        if self.reduce_zero:
            labels = np.where(labels == -1, IGNORE, labels)
        wrong = labels[(labels >= len(self.classes)) & (labels != IGNORE)]
        if wrong.size:
            value = int(wrong[0]) + self.reduce_zero
            least = int(self.reduce_zero)
            raise ValueError(
                f"mask {str(path)!r} holds the number {value}; {least} to {len(self.classes) - 1 + least} are classes "
                "and 255 is none"
            )
        return labels.astype(np.uint8)


def read_mask(path: Path) -> NDArray[np.int64]:
    """The numbers in a mask file, (H, W): grey values of 1, 8 or 16 bits, or palette indices.

    Raises:
        ValueError: a file that is missing, cannot be decoded whole, or has colours.
    """
    if not path.is_file():
        raise ValueError(f"mask {str(path)!r} does not exist")
    try:
        with Image.open(path) as image:
            image.load()
            mode, values = image.mode, np.asarray(image)
    except Exception as error:  # Pillow's plugins raise many kinds of errors on damaged files
        raise ValueError(f"mask {str(path)!r} cannot be read: {error}") from None
    if values.ndim != 2 or values.dtype.kind not in "iub":
        raise ValueError(f"mask {str(path)!r} has the mode {mode}; one channel of class numbers is needed")
    return values.astype(np.int64)


def read_pair(pair: FilePair) -> tuple[Image.Image, NDArray[np.int64]]:
    """The image and the numbers of its mask.

    Raises:
        ValueError: a file that cannot be read, or two sizes.
    """
    image, values = read_image(pair.image), read_mask(pair.mask)
    if image.size != values.shape[::-1]:
        raise ValueError(
            f"mask {str(pair.mask)!r} is {values.shape[1]}x{values.shape[0]} but its image is "
            f"{image.size[0]}x{image.size[1]}"
        )
    return image, values


def ade20k(root: Path) -> tuple[list[FilePair], list[FilePair], tuple[str, ...]]:
    """Files and classes of ADE20K's scene parsing folder (ADEChallengeData2016).

    `images/training/*.jpg` with `annotations/training/*.png`, and the same for `validation`. Class names come from
    `classes.txt` or from the release's `objectInfo150.txt`; without either they are numbers.

    Raises:
        ValueError: a folder that is missing or empty.
    """
    parts = [match(root / "images" / part, root / "annotations" / part) for part in ("training", "validation")]
    names = class_names(root) or _ade_names(root) or tuple(str(i) for i in range(1, ADE20K_CLASSES + 1))
    return parts[0], parts[1], names


def _ade_names(root: Path) -> tuple[str, ...]:
    file = root / "objectInfo150.txt"
    if not file.is_file():
        return ()
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    return tuple(line.rsplit("\t", 1)[-1].split(",")[0].strip() for line in lines if line.strip())


def plain(root: Path) -> tuple[list[FilePair], list[FilePair] | None, tuple[str, ...]]:
    """Files and classes of `images/` and `masks/`.

    With `images/train`, `images/val` and the same in `masks`, or with `train/images`, `train/masks` and the same in
    `val`, these are the two parts; otherwise the second one is None. `classes.txt` names the classes, one a line in the
    order of their numbers; without it they are numbers up to the largest in any mask.

    Raises:
        ValueError: a folder that is missing or empty.
    """
    names = class_names(root)
    if (root / "train" / "images").is_dir():
        train, val = (match(root / part / "images", root / part / "masks") for part in ("train", "val"))
        return train, val, names
    if (root / "images" / "train").is_dir():
        train, val = (match(root / "images" / part, root / "masks" / part) for part in ("train", "val"))
        return train, val, names
    return match(root / "images", root / "masks"), None, names


def split_pairs(pairs: Sequence[FilePair], seed: int) -> tuple[list[FilePair], list[FilePair]]:
    """Holds out a fifth of the pairs, at least one, drawn by `seed`.

    Raises:
        ValueError: a single pair.
    """
    if len(pairs) < 2:
        raise ValueError(f"image {str(pairs[0].image)!r} is the only one with a usable mask; a split needs two")
    count = max(1, round(HELD_OUT * len(pairs)))
    held = set(np.random.default_rng(seed).permutation(len(pairs))[:count].tolist())
    return [p for i, p in enumerate(pairs) if i not in held], [p for i, p in enumerate(pairs) if i in held]


def class_names(root: Path) -> tuple[str, ...]:
    """The lines of `classes.txt`, none where it is absent.

    Raises:
        ValueError: no name at all, or one that comes twice.
    """
    file = root / "classes.txt"
    if not file.is_file():
        return ()
    names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not names or twice is not None:
        raise ValueError(f"{str(file)!r} {'holds no names' if not names else f'names {twice!r} twice'}")
    if len(names) > IGNORE:
        raise ValueError(f"{str(file)!r} holds {len(names)} names; at most {IGNORE} are allowed")
    return tuple(names)


def match(images: Path, masks: Path) -> list[FilePair]:
    """Images and masks of the same name (but for the suffix), nested folders included; those without are named.

    Raises:
        ValueError: a missing folder, or no pair.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(f"data folder {str(folder)!r} does not exist or is not a folder")
    found = {path.relative_to(masks).with_suffix(""): path for path in find_images(masks)}
    files = {path.relative_to(images).with_suffix(""): path for path in find_images(images)}
    pairs = [FilePair(path, found[name]) for name, path in files.items() if name in found]
    if not pairs:
        raise ValueError(f"{str(images)!r} holds no image whose mask is in {str(masks)!r}")
    alone = [path for name, path in files.items() if name not in found]
    alone += [path for name, path in found.items() if name not in files]
    if alone:
        names = ", ".join(map(str, alone))
        log.warning("%d files of %s are skipped, they have no partner: %s", len(alone), images.parent, names)
    return pairs


def usable_pairs(pairs: Sequence[FilePair]) -> tuple[list[FilePair], int]:
    """The pairs that can be read and fit, and the largest number in their masks; others are named in one warning.

    Raises:
        ValueError: nothing is left.
    """

    def look(pair: FilePair) -> tuple[str | None, int]:
        try:
            values = read_pair(pair)[1]
        except ValueError as error:
            return str(error), -1
        return None, int(np.where(values == IGNORE, -1, values).max())

    with ThreadPoolExecutor() as pool:
        looks = list(pool.map(look, pairs))
    problems = [problem for problem, _ in looks if problem is not None]
    kept = [pair for pair, (problem, _) in zip(pairs, looks) if problem is None]
    if not kept:
        raise ValueError(f"none of the {len(pairs)} images with masks can be used; the first: {problems[0]}")
    if problems:
        log.warning("%d of %d images are skipped: %s", len(problems), len(pairs), "; ".join(problems))
    return kept, max(largest for _, largest in looks)

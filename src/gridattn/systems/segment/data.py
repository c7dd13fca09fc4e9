"""Images with masks by name: embedded samples, ADE20K, and the user's own folders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gridattn.data.sampling import SeededSamples
from gridattn.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from gridattn.systems.segment import brain, photographs
from gridattn.systems.segment.augment import Augment, TrainTransform
from gridattn.systems.segment.folders import FilePair, MaskRule, ade20k, plain, read_pair, split_pairs, usable_pairs
from gridattn.systems.segment.losses import IGNORE

Pair = tuple[Any, NDArray[np.uint8]]
"""A picture (PIL image or array) and its labels (H, W)."""

EMBEDDED_MEAN, EMBEDDED_STD = 0.5, 0.2
PADDING_SIDE = 32


class Pairs:
    """Pictures and labels by index, `name(i)` says which one it is."""

    def __init__(self, items: Sequence[Any], read: Callable[[Any], Pair], name: Callable[[Any], str] = str) -> None:
        self.items, self.read, self._name = items, read, name

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Pair:
        return self.read(self.items[index])

    def name(self, index: int) -> str:
        return self._name(self.items[index])


@dataclass(frozen=True)
class Normalise:
    """From a picture to the network's input.

    Attributes:
        mean: of every channel, for values in 0..1; its length is the number of channels: 3 (RGB) or 1 (grey).
        std: of every channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, picture: Any) -> Tensor:
        """A PIL image or an array (H, W) or (H, W, 3) of 8 bits -> (C, H, W) uint8."""
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        array = np.array(image.convert("RGB" if len(self.mean) == 3 else "L"))
        return torch.from_numpy(array.reshape(*array.shape[:2], -1)).movedim(-1, 0).contiguous()

    def __call__(self, pixels: Tensor) -> Tensor:
        """(C, H, W) uint8 -> the same, normalised, float32."""
        mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


class TrainSamples(SeededSamples):
    """Augmented crops (C, h, w) and their labels (h, w) int64, by draw number."""

    def __init__(self, pairs: Any, normalise: Normalise, transform: TrainTransform, seed: int) -> None:
        super().__init__(seed)
        self.pairs, self.normalise, self.transform = pairs, normalise, transform

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        picture, labels = self.pairs[index]
        image, mask = self.transform(self.normalise.pixels(picture), torch.from_numpy(labels))
        return self.normalise(image), mask.long()


class WholeSamples(SeededSamples):
    """Whole images (C, H, W) of any size and their labels (H, W) int64; a batch is a list.

    Padding is an image of zeros all of whose pixels are labelled 255.
    """

    def __init__(self, pairs: Any, normalise: Normalise, seed: int = 0) -> None:
        super().__init__(seed)
        self.pairs, self.normalise = pairs, normalise

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        picture, labels = self.pairs[index]
        return self.normalise(self.normalise.pixels(picture)), torch.from_numpy(labels).long()

    def padding(self) -> tuple[Tensor, Tensor]:
        side = PADDING_SIDE
        return torch.zeros(len(self.normalise.mean), side, side), torch.full((side, side), IGNORE)

    @staticmethod
    def collate(samples: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return samples


@dataclass(frozen=True)
class SegmentationData:
    """A segmentation dataset.

    Attributes:
        spec: the name it was loaded by.
        classes: class names; a label is an index into them.
        train: pictures and labels for training, of any size.
        val: the same for validation.
        normalise: how a picture becomes the network's input.
    """

    spec: str
    classes: tuple[str, ...]
    train: Any
    val: Any
    normalise: Normalise

    def training(
        self,
        crop_size: tuple[int, int],
        augment: Mapping[str, Any],
        resize: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> TrainSamples:
        """Augmented crops of one size, by draw number; arguments as in `TrainTransform` and `Augment`."""
        fill = [255 * value for value in self.normalise.mean]
        transform = TrainTransform(crop_size, fill, Augment.of(augment), resize)
        return TrainSamples(self.train, self.normalise, transform, seed)

    def validation(self) -> WholeSamples:
        """Whole images, by index."""
        return WholeSamples(self.val, self.normalise)


class Collages:
    """Collages of photographs: for training new ones at every look, for validation a fixed set."""

    def __init__(self, held_out: bool) -> None:
        self.held_out = held_out

    def __len__(self) -> int:
        return photographs.VAL_COUNT if self.held_out else photographs.TRAIN_COUNT

    def __getitem__(self, index: int) -> Pair:
        if self.held_out:
            return photographs.collage(np.random.default_rng((1, index)), photographs.VAL_SIZE, held_out=True)
        # The caller seeds torch's generator for every look at a sample.
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        return photographs.collage(rng, photographs.TRAIN_SIZE, held_out=False)

    def name(self, index: int) -> str:
        return f"photographs-{index}"


def _photographs(in_chans: int) -> SegmentationData:
    classes = tuple(photographs.MATERIALS)
    return SegmentationData("photographs", classes, Collages(False), Collages(True), _embedded_normalise(in_chans))


def _mni152(in_chans: int) -> SegmentationData:
    train, val = (
        Pairs(list(enumerate(zip(*brain.part(held_out)))), lambda item: item[1], lambda item: f"mni152-{item[0]}")
        for held_out in (False, True)
    )
    return SegmentationData("mni152", brain.CLASSES, train, val, _embedded_normalise(in_chans))


def _embedded_normalise(in_chans: int) -> Normalise:
    return Normalise((EMBEDDED_MEAN,) * in_chans, (EMBEDDED_STD,) * in_chans)


_EMBEDDED: dict[str, Callable[[int], SegmentationData]] = {"photographs": _photographs, "mni152": _mni152}


def list_segmentation_data() -> list[str]:
    """Names that `load_segmentation` takes."""
    return [*sorted(_EMBEDDED), "ade20k:PATH", "folder:PATH"]


def is_embedded(spec: str) -> bool:
    """Whether a dataset needs no files."""
    return spec in _EMBEDDED


def load_segmentation(
    spec: str, *, in_chans: int = 3, seed: int = 0, reduce_zero_label: bool | None = None, verify: bool = True
) -> SegmentationData:
    """Loads images with masks.

    * `photographs`: collages of five photographs of scikit-image, see `photographs`.
    * `mni152`: brain slices with tissue classes, see `brain`; needs nilearn.
    * `ade20k:PATH`: PATH/images/{training,validation} with PATH/annotations/{training,validation}, see `ade20k`.
    * `folder:PATH`: PATH/images with PATH/masks, see `plain`.

    Args:
        spec: one of the above.
        in_chans: 3 reads images in colour, 1 in grey.
        seed: of the split of a folder that has none.
        reduce_zero_label: 0 in masks is no class and k is class k - 1; None: in ade20k alone.
        verify: reads every file once, to name and pass over the damaged ones and those whose sizes differ. Without it
            such a file stops the training with its name.

    Raises:
        ValueError: an unknown name, or a folder without a usable dataset.

    Example:
        >>> data = load_segmentation("photographs")
        >>> data.classes, data.training((64, 64), {})[0][0].shape
        (('brick', 'grass', 'gravel', 'tissue', 'stars'), torch.Size([3, 64, 64]))
    """
    if in_chans not in (1, 3):
        raise ValueError(f"in_chans={in_chans!r} is not allowed; images are read with 3 channels or 1")
    kind, _, path = spec.partition(":")
    if spec in _EMBEDDED:
        return _EMBEDDED[spec](in_chans)
    if kind not in ("ade20k", "folder") or not path:
        raise ValueError(f"data={spec!r} is not known; allowed: {', '.join(list_segmentation_data())}")
    return _files(spec, Path(path).expanduser(), in_chans, seed, reduce_zero_label, verify)


def _files(
    spec: str, root: Path, in_chans: int, seed: int, reduce_zero_label: bool | None, verify: bool
) -> SegmentationData:
    if not root.is_dir():
        raise ValueError(f"data folder {str(root)!r} does not exist or is not a folder")
    ade = spec.startswith("ade20k:")
    reduce_zero = ade if reduce_zero_label is None else reduce_zero_label
    train, val, names = ade20k(root) if ade else plain(root)
    if verify or not names:
        train, largest = usable_pairs(train)
        if val is not None:
            val, other = usable_pairs(val)
            largest = max(largest, other)
        if largest < reduce_zero:
            raise ValueError(f"data={spec!r} has no labelled pixel in any mask")
        names = names or tuple(str(i) for i in range(int(reduce_zero), largest + 1))
        if largest - reduce_zero >= len(names):
            for pair in [*train, *(val or ())]:  # the mask at fault gives its name
                MaskRule(names, reduce_zero).labels(read_pair(pair)[1], pair.mask)
    if val is None:
        train, val = split_pairs(train, seed)
    rule = MaskRule(names, reduce_zero)

    def read(pair: FilePair) -> Pair:
        image, values = read_pair(pair)
        return image, rule.labels(values, pair.mask)

    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if in_chans == 3 else ((0.449,), (0.226,))
    parts = [Pairs(part, read, lambda pair: str(pair.image)) for part in (train, val)]
    return SegmentationData(spec, names, parts[0], parts[1], Normalise(mean, std))

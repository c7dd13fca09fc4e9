"""Random scale, crop, mirror and colours of a training image together with its mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from gridattn.systems.segment.inference import fitted_size
from gridattn.systems.segment.losses import IGNORE
from gridattn.systems.settings import check_least, check_names

TRIES = 10


@dataclass(frozen=True)
class Augment:
    """How training images vary.

    Attributes:
        scale: smallest and largest factor of the size, drawn uniformly.
        hflip: probability of mirroring left and right.
        vflip: probability of mirroring top and bottom.
        photometric: strength of the changes of brightness, contrast, saturation and hue, each made with probability
            1/2; 1 for what is usual (at most 12.5 %, 50 %, 50 % and 18 degrees), 0 for none.
        max_class_share: a crop of which one class covers more is drawn again, up to ten times; 1 takes any.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    hflip: float = 0.5
    vflip: float = 0.0
    photometric: float = 1.0
    max_class_share: float = 1.0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Augment":
        """Checks plain values and lays them over the defaults."""
        check_names("augment option", values, {entry.name for entry in fields(cls)})
        kept = dict(values)
        if "scale" in kept:
            single = isinstance(kept["scale"], int | float)
            scale = kept["scale"] = (kept["scale"],) * 2 if single else tuple(kept["scale"])
            if len(scale) != 2 or scale[1] < scale[0]:
                raise ValueError(f"augment scale={scale} is not allowed; two ascending factors are needed")
            check_least("augment scale", scale[0], 0.05)
        for name, most in {"hflip": 1, "vflip": 1, "photometric": 2, "max_class_share": 1}.items():
            value = kept.get(name, 0)
            check_least(f"augment {name}", value, 0)
            if value > most:
                raise ValueError(f"augment {name}={value} is not allowed; it must be at most {most}")
        return cls(**kept)


class TrainTransform(nn.Module):
    """Scale, crop, mirror, colours: an image and a mask of any size become a crop of one size.

    All random numbers come from torch's CPU generator. What a crop lacks is filled with `fill` and the label 255.

    Args:
        crop_size: height and width of the crop, pixels.
        fill: colour of padding, one 8-bit value a channel.
        augment: how images vary.
        resize: (longer side, shorter side) that an image is fitted to before it is scaled; None keeps its size.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        fill: Sequence[float],
        augment: Augment,
        resize: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.augment, self.base = augment, resize
        self.crop = v2.RandomCrop(
            crop_size,
            pad_if_needed=True,
            fill={tv_tensors.Image: [round(value) for value in fill], tv_tensors.Mask: IGNORE},
        )
        strength = augment.photometric
        colours = [{"brightness": 0.125}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.05}] if strength else []
        self.after = v2.Compose(
            [
                v2.RandomHorizontalFlip(augment.hflip),
                v2.RandomVerticalFlip(augment.vflip),
                *(v2.RandomApply([v2.ColorJitter(**{n: v * strength for n, v in c.items()})], 0.5) for c in colours),
            ]
        )

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(C, H, W) uint8 and (H, W) uint8 -> the same of the crop's size."""
        pair = tv_tensors.Image(image), tv_tensors.Mask(mask)
        low, high = self.augment.scale
        ratio = low + (high - low) * float(torch.rand(()))
        size = list(image.shape[1:])
        scaled = fitted_size(size, self.base or (max(size), min(size)), ratio)
        if list(scaled) != size:
            pair = v2.Resize(list(scaled), antialias=True)(*pair)
        image, mask = self.after(*self._cropped(*pair))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)

    def _cropped(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(TRIES):
            crop = self.crop(image, mask)
            counts = torch.bincount(crop[1].as_subclass(Tensor).flatten().long(), minlength=IGNORE + 1)[:IGNORE]
            if counts.max() <= self.augment.max_class_share * counts.sum():
                return crop
        return crop

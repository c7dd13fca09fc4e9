"""From an RGB picture to the tensor that a network takes: the fixed preprocessing and the random augmentation."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms.functional import center_crop

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PLAIN = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "color_jitter": 0.0}


@dataclass(frozen=True)
class Preprocess:
    """What turns a picture of any size into the network's input; stored with every trained model.

    Attributes:
        image_size: height and width of the input, pixels.
        mean: per channel, subtracted after scaling to 0..1.
        std: per channel, divided by afterwards.
        crop: part of the resized picture's side that the centre crop keeps, in (0, 1]; None keeps the picture's own
            scale and only crops (or pads with black) to `image_size`.
        interpolation: of the resize: "bilinear", "bicubic" or "nearest".
    """

    image_size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float | None = 0.875
    interpolation: str = "bicubic"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Preprocess":
        """Builds it from what `to_config` gave."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()}
        return cls(**values)

    def to_config(self) -> dict[str, Any]:
        """A dict of plain values for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Picture -> (3, image_size, image_size), the same for validation, evaluation and prediction."""
        if self.crop is None:
            return self._at_own_scale
        return create_transform(  # pyright: ignore[reportReturnType]
            self.image_size,
            crop_pct=self.crop,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
        )

    def _at_own_scale(self, picture: Image.Image) -> Tensor:
        if picture.size != (self.image_size, self.image_size):
            picture = center_crop(picture, [self.image_size])  # pyright: ignore[reportArgumentType, reportAssignmentType]
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return torch.from_numpy((np.asarray(picture) / np.float32(255) - mean) / std).permute(2, 0, 1).contiguous()


def train_transform(preprocess: Preprocess, augment: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """The random transform of training.

    Args:
        preprocess: size and normalisation.
        augment: keywords of `timm.data.create_transform`, such as scale, ratio, hflip, vflip, color_jitter, re_prob,
            re_mode, and auto_augment ("rand-m9-mstd0.5-inc1").

    Raises:
        ValueError: a keyword that timm does not have, or a value that it refuses.
    """
    fixed = ("input_size", "is_training", "mean", "std", "interpolation", "use_prefetcher", "separate", "normalize")
    allowed = [name for name in inspect.signature(create_transform).parameters if name not in fixed]
    for name in augment:
        if name not in allowed:
            near = get_close_matches(name, allowed, 3) or allowed
            raise ValueError(f"augment has no option {name!r}; did you mean: {', '.join(near)}?")
    try:
        return create_transform(  # pyright: ignore[reportReturnType]
            preprocess.image_size,
            is_training=True,
            mean=preprocess.mean,
            std=preprocess.std,
            interpolation=preprocess.interpolation,
            **augment,
        )
    except (AssertionError, TypeError, KeyError) as error:
        raise ValueError(f"augment={dict(augment)!r} is not allowed: {type(error).__name__} {error}") from None

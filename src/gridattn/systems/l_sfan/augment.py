"""Noise, stretching and loss of sensors in training windows."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gridattn.systems.settings import check_least, check_names


@dataclass(frozen=True)
class SignalAugment:
    """How standardised training windows vary; the defaults leave them as they are.

    Attributes:
        jitter: deviation of normal noise.
        shortest: least part of the frames that a random crop keeps; it is stretched back by linear interpolation.
        sensor_dropout: probability that a sensor reads zero (its mean) throughout.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """

    jitter: float = 0.0
    shortest: float = 1.0
    sensor_dropout: float = 0.0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "SignalAugment":
        """Checks plain values and lays them over the defaults."""
        check_names("augment option", values, {entry.name for entry in fields(cls)})
        made = cls(**values)
        for name, (least, most) in {"jitter": (0, 10), "shortest": (0.1, 1), "sensor_dropout": (0, 0.9)}.items():
            check_least(f"augment {name}", getattr(made, name), least)
            if getattr(made, name) > most:
                raise ValueError(f"augment {name}={getattr(made, name)} is not allowed; it must be at most {most}")
        return made

    def __call__(self, x: Tensor) -> Tensor:
        """(V, T) -> the same shape; random numbers come from torch's CPU generator."""
        frames = x.shape[1]
        if self.shortest < 1:
            kept = round(frames * (self.shortest + (1 - self.shortest) * float(torch.rand(()))))
            start = int(torch.randint(frames - kept + 1, ()))
            x = F.interpolate(x[None, :, start : start + kept], frames, mode="linear", align_corners=True)[0]
        if self.jitter:
            x = x + self.jitter * torch.randn_like(x)
        if self.sensor_dropout:
            x = x * (torch.rand(len(x), 1) >= self.sensor_dropout)
        return x

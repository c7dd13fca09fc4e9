"""From a trained network to the classes of an image of any size: whole or in windows, at one scale or several."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.ops.common import per_axis
from gridattn.systems.segment.heads import resize
from gridattn.systems.settings import check_least

WINDOWS_AT_ONCE = 8


def fitted_size(size: Sequence[int], within: Sequence[int], ratio: float = 1.0) -> tuple[int, int]:
    """The size (H, W) of an image that is scaled to just fit `within`, a (longer side, shorter side), times `ratio`.

    Example:
        >>> fitted_size((300, 400), (2048, 512))
        (512, 683)
    """
    longer, shorter = max(within) * ratio, min(within) * ratio
    factor = min(longer / max(size), shorter / min(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


@dataclass(frozen=True)
class View:
    """How a network looks at an image.

    Attributes:
        resize: (longer side, shorter side) in pixels that the image is scaled to fit; None keeps its size.
        window: height and width of the windows that the image is cut into; None shows it whole.
        stride: step between windows; None takes two thirds of the window.
        ratios: further factors of the size; the class probabilities of all are averaged.
        flip: whether the mirrored image is averaged in.

    Raises:
        ValueError: sizes or factors that are not positive, or a stride that leaves gaps between windows.
    """

    resize: tuple[int, int] | None = None
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False

    @classmethod
    def of(cls, **values: Any) -> "View":
        """Checks and completes plain values: an int stands for both axes."""
        kept: dict[str, Any] = {k: v for k, v in values.items() if v is not None}
        for name in ("resize", "window", "stride"):
            if name in kept:
                kept[name] = per_axis(kept[name], 2, name)
        if "ratios" in kept:
            kept["ratios"] = tuple(kept["ratios"])
            for ratio in kept["ratios"]:
                check_least("ratios", ratio, 0.05)
        if kept.get("ratios") == ():
            raise ValueError("ratios=() is empty; at least one factor is needed")
        if "window" in kept:
            kept.setdefault("stride", tuple(max(1, side * 2 // 3) for side in kept["window"]))
            if any(step > side for step, side in zip(kept["stride"], kept["window"])):
                raise ValueError(f"stride={kept['stride']} exceeds window={kept['window']}; windows may not leave gaps")
        elif "stride" in kept:
            raise ValueError(f"stride={kept['stride']} is given without a window")
        return cls(**kept)

    def but(self, **values: Any) -> "View":
        """The same with the values that are not None laid over it."""
        given = {name: value for name, value in values.items() if value is not None}
        if "window" in given:
            given.setdefault("stride", None)
        return View.of(**{**asdict(self), **given})

    def to_config(self) -> Mapping[str, Any]:
        """Plain values for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def class_probabilities(network: nn.Module, image: Tensor, view: View) -> Tensor:
    """Probability of every class at every pixel: the mean over scales and mirror images of softmax(scores).

    Args:
        network: images (B, C, H, W) -> scores (B, K, H, W).
        image: (C, H, W), normalised as in the training.
        view: how it is shown.

    Returns:
        (K, H, W), float32, summing to 1 over the classes.

    Example:
        >>> view = View.of(window=16, stride=8)
        >>> class_probabilities(nn.Conv2d(3, 5, 1), torch.randn(3, 20, 31), view).shape
        torch.Size([5, 20, 31])
    """
    size = tuple(image.shape[1:])
    base = size if view.resize is None else fitted_size(size, view.resize)
    total: Tensor | None = None
    for ratio in view.ratios:
        scaled = tuple(max(1, round(side * ratio)) for side in base)
        shown = image[None]
        if scaled != size:
            shown = F.interpolate(shown, scaled, mode="bilinear", align_corners=False, antialias=True)
        for mirrored in (False, True) if view.flip else (False,):
            scores = _scores(network, shown.flip(3) if mirrored else shown, view)
            probabilities = resize(scores.flip(3) if mirrored else scores, size).softmax(1)[0]
            total = probabilities if total is None else total + probabilities
    assert total is not None
    return total / (len(view.ratios) * (1 + view.flip))


def _scores(network: nn.Module, shown: Tensor, view: View) -> Tensor:
    """Scores of one image (1, C, H, W), the mean where windows overlap, in float32."""
    if view.window is None or view.stride is None:
        return network(shown).float()
    size = shown.shape[2:]
    window = [min(side, extent) for side, extent in zip(view.window, size)]
    corners = list(_corners(size, window, view.stride))
    total, count = shown.new_zeros(()), shown.new_zeros(size)
    for start in range(0, len(corners), WINDOWS_AT_ONCE):
        places = [(slice(y, y + window[0]), slice(x, x + window[1])) for y, x in corners[start:][:WINDOWS_AT_ONCE]]
        scores = network(torch.cat([shown[..., rows, columns] for rows, columns in places])).float()
        if not total.ndim:
            total = scores.new_zeros(1, scores.shape[1], *size)
        for (rows, columns), score in zip(places, scores):
            total[0, :, rows, columns] += score
            count[rows, columns] += 1
    return total / count


def _corners(size: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Top left corners of windows that cover everything; the last one of each axis ends at the border."""
    axes = []
    for extent, side, step in zip(size, window, stride):
        steps = -(-(extent - side) // step)
        axes.append([min(i * step, extent - side) for i in range(steps + 1)])
    yield from ((y, x) for y in axes[0] for x in axes[1])

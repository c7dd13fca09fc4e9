"""Pictures of a segmentation: the image beside its classes in colour, with a legend."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image

from gridattn.systems.output import atomic
from gridattn.systems.segment.losses import IGNORE

OPACITY = 0.55


@cache
def palette(count: int) -> NDArray[np.uint8]:
    """A colour for every class, (count, 3): twenty that are easy to tell apart, then hues of ever other shades."""
    base = [colour for name in ("tab10", "Set3") for colour in matplotlib.colormaps[name].colors]  # pyright: ignore
    colours = [np.asarray(colour[:3]) for colour in base[:20]]
    hues = matplotlib.colormaps["hsv"]
    while len(colours) < count:
        place = len(colours) * 0.618034 % 1.0  # steps of the golden ratio keep neighbours apart
        colours.append(np.asarray(hues(place)[:3]) * (0.55 + 0.45 * (len(colours) % 3) / 2))
    return (np.stack(colours[:count]) * 255).round().astype(np.uint8)


def write_mask(labels: NDArray[np.uint8], count: int, path: Path) -> None:
    """Writes the class indices as a palette PNG: numbers for programs, colours for people."""
    image = Image.fromarray(labels)
    image.putpalette(palette(count).flatten().tolist())
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")


def overlay(image: NDArray[np.uint8], labels: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """The image (H, W, 3) tinted in the colours of its classes; pixels labelled 255 keep their colour."""
    colours = palette(count)[np.minimum(labels, count - 1)]
    mixed = (1 - OPACITY) * image + OPACITY * colours
    return np.where((labels == IGNORE)[..., None], image, mixed).round().astype(np.uint8)


def draw(
    image: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    classes: Sequence[str],
    shares: Sequence[float],
    path: Path,
    truth: NDArray[np.uint8] | None = None,
) -> None:
    """Writes a PNG: image, tinted image, and the true classes where they are known, over a legend with area shares.

    Args:
        image: (H, W, 3).
        labels: (H, W), class indices.
        classes: class names.
        shares: part of the area of each class, in 0..1.
        path: of the picture.
        truth: (H, W), true class indices, or 255.
    """
    panels = [("image", image), ("prediction", overlay(image, labels, len(classes)))]
    if truth is not None:
        panels.append(("truth", overlay(image, truth, len(classes))))
    height = 3.4 * min(2.0, max(0.5, image.shape[0] / image.shape[1]))
    present = sorted((i for i, share in enumerate(shares) if share), key=lambda i: -shares[i])[:24]
    rows = -(-len(present) // 4)
    figure = Figure(figsize=(3.4 * len(panels), height + 0.5 + 0.25 * rows), layout="constrained")
    for axis, (title, picture) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        axis.imshow(picture)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    colours = palette(len(classes)) / 255
    patches = [Patch(color=tuple(colours[i]), label=f"{classes[i]} {shares[i]:.1%}") for i in present]
    legend = figure.legend(handles=patches, loc="outside lower center", ncols=min(4, len(patches)), fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")

"""Pictures of a super-resolution: the centre view before and after, an epipolar plane, and quality against shear."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from gridattn.systems.output import atomic

_STRIP_HEIGHT = 60


def to_bytes(view: Any) -> NDArray[np.uint8]:
    """A view (3, H, W), RGB in 0..1, clipped -> (H, W, 3) uint8."""
    return (np.asarray(view).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def write_image(pixels: NDArray[np.uint8], path: Path) -> None:
    """Writes a PNG, atomically."""
    with atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def epipolar_strip(field: Any, height: int = _STRIP_HEIGHT) -> NDArray[np.uint8]:
    """The epipolar plane (v, x) of the middle row of pixels of the middle row of views; a scene point is a line in it.

    Args:
        field: (3, U, V, H, W), RGB in 0..1.
        height: least height of the result; every view is repeated as often as that needs.

    Returns:
        (k V, W, 3), uint8.

    Example:
        >>> epipolar_strip(np.zeros((3, 5, 5, 32, 40))).shape
        (60, 40, 3)
    """
    _, rows, columns, pixels, _ = field.shape
    plane = to_bytes(np.asarray(field)[:, rows // 2, :, pixels // 2])
    return plane.repeat(max(1, -(-height // columns)), axis=0)


def centre_view(field: Any) -> NDArray[np.uint8]:
    """The middle view of (3, U, V, H, W) as (H, W, 3) uint8."""
    return to_bytes(field[:, field.shape[1] // 2, field.shape[2] // 2])


def draw_comparison(fields: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG: for every light field its centre view above its epipolar plane.

    Args:
        fields: by title, each (3, U, V, H, W) of the same size, RGB.
        path: of the picture.
    """
    first = next(iter(fields.values()))
    ratio = min(2.0, max(0.5, first.shape[-2] / first.shape[-1]))
    figure = Figure(figsize=(3.0 * len(fields), 3.0 * ratio + 1.3), layout="constrained")
    axes = figure.subplots(2, len(fields), squeeze=False, height_ratios=[ratio, 0.3])
    for (above, below), (title, field) in zip(axes.T, fields.items()):
        above.imshow(centre_view(field), interpolation="nearest")
        above.axhline(first.shape[-2] // 2, color="white", linewidth=0.6, linestyle=":")
        above.set_title(title, fontsize=10, parse_math=False)
        below.imshow(epipolar_strip(field), interpolation="nearest", aspect="auto")
        for axis in (above, below):
            axis.set_axis_off()
    _save(figure, path)


def draw_shears(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Writes a PNG: PSNR of the network and of bicubic upsampling against the shear.

    Args:
        rows: with `shear`, `psnr` and `bicubic_psnr`.
        path: of the picture.
    """
    figure = Figure(figsize=(5.0, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, title in (("psnr", "network"), ("bicubic_psnr", "bicubic")):
        axis.plot([row["shear"] for row in rows], [row[name] for row in rows], marker="o", label=title)
    axis.set_xlabel("disparity added, pixels per view")
    axis.set_ylabel("PSNR of Y, dB")
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")

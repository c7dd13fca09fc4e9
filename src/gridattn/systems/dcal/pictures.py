"""Pictures of where the class token looks, and of ranked galleries."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from gridattn.systems.output import atomic

SHOWN = 12
RIGHT, WRONG = "tab:green", "tab:red"


@dataclass(frozen=True)
class Look:
    """A picture as the network sees it, and where its class token looks.

    Attributes:
        picture: cut to the network's input.
        response: (h, w), the rollout of the class token.
        selected: (R, 2), row and column of the selected patches.
        title: text above.
    """

    picture: Image.Image
    response: NDArray[np.float32]
    selected: NDArray[np.int64]
    title: str = ""


@dataclass(frozen=True)
class Found:
    """An item of a gallery: the picture, a text, and whether it shows the identity looked for (None: not known)."""

    picture: Image.Image
    title: str
    right: bool | None


def draw_looks(looks: Sequence[Look], path: Path) -> None:
    """Writes a PNG: every picture beside its rollout, with the selected patches framed."""
    columns = min(3, len(looks))
    rows = -(-len(looks) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, 2 * columns, squeeze=False).reshape(-1, 2)
    for axis in axes.flat:
        axis.set_axis_off()
    for (left, right), look in zip(axes, looks):
        left.imshow(look.picture, interpolation="nearest")
        left.set_title(look.title, fontsize=8, parse_math=False)
        _rollout(right, look)
    _save(figure, path)


def draw_rankings(rankings: Sequence[tuple[Look, Sequence[Found]]], path: Path) -> None:
    """Writes a PNG: a row for each query with its rollout and its list, right items in green, wrong ones in red."""
    columns = 2 + max(len(found) for _, found in rankings)
    width, height = rankings[0][0].picture.size
    figure = Figure(figsize=(1.5 * columns, (1.5 * height / width + 0.35) * len(rankings)), layout="constrained")
    axes = figure.subplots(len(rankings), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for row, (look, found) in zip(axes, rankings):
        row[0].imshow(look.picture, interpolation="nearest")
        row[0].set_title(look.title, fontsize=7, parse_math=False)
        _rollout(row[1], look)
        for axis, item in zip(row[2:], found):
            axis.imshow(item.picture, interpolation="nearest")
            axis.set_title(item.title, fontsize=7, parse_math=False)
            if item.right is not None:
                axis.set_frame_on(True)
                for side in axis.spines.values():
                    side.set(color=RIGHT if item.right else WRONG, linewidth=3)
    _save(figure, path)


def _rollout(axis: Any, look: Look) -> None:
    (width, height), (rows, columns) = look.picture.size, look.response.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(look.picture.convert("L"), cmap="gray", extent=extent)
    axis.imshow(look.response, cmap="inferno", alpha=0.6, extent=extent, interpolation="nearest")
    for row, column in look.selected:
        corner = column * width / columns - 0.5, row * height / rows - 0.5
        axis.add_patch(Rectangle(corner, width / columns, height / rows, fill=False, edgecolor="cyan", linewidth=0.8))
    axis.set_title("rollout, selection", fontsize=7)


def _save(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=80, format="png")

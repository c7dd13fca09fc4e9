"""Pictures of continued texts and completed images."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from gridattn.systems.output import atomic

COLUMNS = 96
SHOWN_TEXTS = 4


def draw_text(
    texts: Sequence[tuple[list[str], np.ndarray, int]],
    maps: Sequence[tuple[np.ndarray, list[str]]] | None,
    path: Path,
) -> None:
    """Draws symbols on a background of their bits, and where the last text looks for its first new symbol.

    Args:
        texts: pieces of text, the bits of each, and the number of those that were given; the others are in bold.
        maps: attention weights of one position, (heads, positions), and the kind of every head, by block.
        path: PNG file.
    """
    blocks = [_lines(*text) for text in texts[:SHOWN_TEXTS]]
    heights = [0.16 * max(2, len(lines)) + 0.3 for lines in blocks]
    if maps is not None:
        heights.append(0.22 * sum(len(m) for m, _ in maps) + 0.8)
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights).ravel()
    color = colormaps["YlOrRd"]
    for axis, lines in zip(axes, blocks):
        axis.set(xlim=(0, COLUMNS), ylim=(max(2, len(lines)), 0))
        axis.set_axis_off()
        axis.set_title("bits: white 0, red 8 and more; bold: made by the model", fontsize=8, loc="left")
        for row, line in enumerate(lines):
            column = 0
            for piece, bits, made in line:
                shade = (*color(min(float(bits), 8.0) / 8)[:3], 0.6 * min(1.0, float(bits)))
                axis.text(
                    column,
                    row + 0.5,
                    piece,
                    family="monospace",
                    fontsize=7,
                    weight="bold" if made else "normal",
                    va="center",
                    parse_math=False,
                    bbox={"facecolor": shade, "edgecolor": "none", "pad": 0.6},
                )
                column += len(piece)
    if maps is not None:
        weights = np.concatenate([m for m, _ in maps])
        axes[-1].imshow(weights, aspect="auto", cmap="magma", vmin=0, interpolation="nearest")
        labels = [f"block {i} {kind}" for i, (_, kinds) in enumerate(maps, 1) for kind in kinds]
        axes[-1].set_yticks(range(len(weights)), labels)
        axes[-1].tick_params(labelsize=7)
        axes[-1].set_title("where the position of the first new symbol looks", fontsize=8, loc="left")
        axes[-1].set_xlabel("position", fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _lines(pieces: Sequence[str], bits: np.ndarray, given: int) -> list[list[tuple[str, float, bool]]]:
    """Pieces in lines of at most COLUMNS characters; other characters than printable ones become a sign."""
    lines: list[list[tuple[str, float, bool]]] = [[]]
    used = 0
    for i, (piece, value) in enumerate(zip(pieces, bits)):
        shown = "".join("¶" if c == "\n" else c if " " <= c < "\x7f" else "·" for c in piece) or "·"
        if used + len(shown) > COLUMNS:
            lines.append([])
            used = 0
        lines[-1].append((shown, float(value), i >= given))
        used += len(shown)
        if piece == "\n":
            lines.append([])
            used = 0
    return [line for line in lines if line]


def draw_completions(rows: Sequence[Sequence[Image.Image]], kept: float, path: Path) -> None:
    """Draws images beside their completions, with a line under what was given.

    Args:
        rows: the image, then its completions.
        kept: part of the rows that was given.
        path: PNG file.
    """
    columns, per_row = len(rows[0]), 2 if len(rows) > 3 else 1
    lines = ceil(len(rows) / per_row)
    figure = Figure(figsize=(1.1 * columns * per_row, 1.25 * lines), layout="constrained")
    axes = figure.subplots(lines, columns * per_row, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for i, pictures in enumerate(rows):
        for j, picture in enumerate(pictures):
            axis = axes[i // per_row, i % per_row * columns + j]
            values = np.asarray(picture)
            axis.imshow(values, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_title("image" if j == 0 else f"sample {j}", fontsize=7)
            axis.axhline(kept * values.shape[0] - 0.5, color="tab:red", linewidth=1)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")

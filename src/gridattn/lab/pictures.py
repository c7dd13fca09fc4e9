"""Pictures of what a query sees: the pattern of any registered attention, and the heat map over an image.

python -m gridattn.lab.pictures --out docs/mechanisms/img
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, FuncNorm, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from numpy.typing import NDArray

from gridattn.layers import attention_info, create_attention, list_attentions
from gridattn.ops.common import per_axis

UNSEEN = "#e9e8ee"
SEEN = LinearSegmentedColormap.from_list("seen", colormaps["magma_r"](np.linspace(0.05, 0.95, 256)))
HEAT = colormaps["inferno"]
QUERY = "#12b5cb"
FLOOR = 1e-6  # of the largest weight: below it lies rounding
# Weight times the number of positions: 1 is uniform attention. One scale for all mechanisms, so that pictures compare.
TIMES_UNIFORM = FuncNorm(
    (lambda r: r / (r + 4), lambda level: 4 * level / np.maximum(1 - level, 1e-9)), vmin=0, vmax=400
)


def pattern_weights(
    name: str,
    grid: Sequence[int] = (14, 14),
    query: Sequence[int] | None = None,
    *,
    samples: int = 8,
    seed: int = 0,
    **options: Any,
) -> tuple[NDArray[np.floating], bool]:
    """Weights of one query of an untrained layer, averaged over heads and random inputs: where the mechanism can look.

    Args:
        name: a registered attention.
        grid: grid size; its length is the rank.
        query: grid index; the middle when None.
        samples: random inputs that are averaged.
        seed: of the layer's weights and of the inputs.
        **options: keywords of the layer.

    Returns:
        The weights, shaped like `grid`, summing to one where anything is seen; and whether they are the mechanism's own
        rather than gradients.

    Raises:
        ValueError: an unknown name, or a grid, query or option that the layer refuses.

    Example:
        >>> weights, exact = pattern_weights("neighborhood", (9, 9), (4, 4), kernel_size=3)
        >>> int((weights > 0).sum()), exact
        (9, True)
    """
    query = tuple(size // 2 for size in grid) if query is None else tuple(query)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = create_attention(name, 32, 4, grid=grid, **options).eval()
        maps = layer.attention_map(torch.randn(samples, *grid, 32), query).detach()
    weights = maps.float().mean((0, 1)).numpy()
    return weights / max(weights.sum(), np.finfo(np.float32).tiny), layer.exact_map


def draw_pattern(
    name: str,
    grid: Sequence[int] = (14, 14),
    query: Sequence[int] | None = None,
    *,
    samples: int = 8,
    seed: int = 0,
    **options: Any,
) -> Figure:
    """Picture of the positions that queries of an attention reach, and with what weight.

    Args:
        name: a registered attention.
        grid: sizes; of more than two axes the plane of the last two that holds the query is drawn.
        query: grid index; when None, one panel each for a query in the middle, at an edge and in a corner.
        samples: random inputs that are averaged.
        seed: of the layer's weights and of the inputs.
        **options: keywords of the layer.

    Returns:
        The figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: as `pattern_weights`.

    Example:
        >>> [panel.get_title() for panel in draw_pattern("global", (6, 6), (2, 3), samples=1).axes]
        ['query 2, 3', '']
    """
    queries = [tuple(query)] if query is not None else _typical_queries(tuple(grid))
    figure = Figure(figsize=(3.0 * len(queries) + 0.7, 3.5), layout="constrained")
    panels = figure.subplots(1, len(queries), squeeze=False, gridspec_kw={"wspace": 0.08})[0]
    exact = True
    for axes, at in zip(panels, queries):
        weights, exact = pattern_weights(name, grid, at, samples=samples, seed=seed, **options)
        cell_axes(axes, _plane(weights, at), (0, *at)[-2:])
        axes.set_title(f"query {', '.join(map(str, at))}", fontsize=9, color="#555")
    colour_bar(figure, panels, SEEN)
    figure.suptitle(f"{name}: {kind_of_map(exact)}", fontsize=11)
    return figure


def save_pattern(name: str, path: str | Path, size: int = 14) -> None:
    """Writes the pattern of a registered attention as PNG: on a plane where it works on planes, else a line or volume.

    Args:
        name: a registered attention.
        path: the file.
        size: positions per axis; a line has four times as many.

    Raises:
        ValueError: an unknown name.
    """
    ranks = attention_info(name).ranks
    grid = (size, size) if 2 in ranks else (4 * size,) if 1 in ranks else (5, size, size)
    draw_pattern(name, grid).savefig(path, dpi=110)


def kind_of_map(exact: bool) -> str:
    """What a map shows, for titles."""
    return "attention weights" if exact else "gradients, as it has no weights"


def colour_bar(figure: Figure, axes: Sequence[Axes], colours: Colormap) -> None:
    """Adds the scale that `cell_axes` (SEEN) and `heat_axes` (HEAT) share: weight in multiples of uniform attention."""
    bar = figure.colorbar(
        ScalarMappable(TIMES_UNIFORM, colours), ax=list(axes), ticks=[0, 1, 4, 16, 100], shrink=0.8, aspect=24, pad=0.02
    )
    bar.ax.set_yticklabels(["0", "1", "4", "16", "100"])
    bar.ax.tick_params(labelsize=8, length=2)
    bar.set_label("times uniform", fontsize=8)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def cell_axes(axes: Axes, weights: NDArray[np.floating], query: Sequence[int]) -> None:
    """Draws weights as cells: pale where nothing is seen, darker the more weight, the query ringed.

    Args:
        axes: where.
        weights: (rows, columns), not negative.
        query: (row, column).
    """
    seen = np.ma.masked_less_equal(weights * weights.size, float(weights.max()) * weights.size * FLOOR)
    axes.set_facecolor(UNSEEN)
    edges = [np.arange(size + 1) - 0.5 for size in reversed(weights.shape)]
    axes.pcolormesh(*edges, seen, cmap=SEEN, norm=TIMES_UNIFORM, edgecolors="white", linewidth=0.4)
    _clean(axes, weights.shape)
    row, column = query
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=QUERY, linewidth=2.2))


def heat_axes(
    axes: Axes, image: NDArray[np.uint8], weights: NDArray[np.floating], query: Sequence[int], *, opacity: float = 0.85
) -> None:
    """Draws an image darkened and heated by weights: transparent where nothing is seen, bright where most is.

    Args:
        axes: where.
        image: (H, W, 3) uint8.
        weights: (rows, columns) of the attention grid, not negative.
        query: (row, column) of the attention grid.
        opacity: of the hottest position.
    """
    height, width = image.shape[:2]
    rows, columns = weights.shape
    grey = image.astype(np.float32).mean(-1, keepdims=True)
    axes.imshow((0.35 * image + 0.65 * grey) / 255 * 0.75, extent=(0, width, height, 0), interpolation="lanczos")
    level = np.asarray(TIMES_UNIFORM(weights * weights.size)).clip(0, 1)
    heat = HEAT(level)
    heat[..., 3] = np.where(weights > weights.max() * FLOOR, 0.18 + (opacity - 0.18) * level**0.7, 0.0)
    axes.imshow(heat, extent=(0, width, height, 0), interpolation="nearest")
    _clean(axes, (height, width), offset=0.0)
    centre = ((query[1] + 0.5) * width / columns, (query[0] + 0.5) * height / rows)
    radius = max(width / columns, height / rows) * 0.9
    axes.add_patch(Circle(centre, radius, fill=False, edgecolor="black", linewidth=3.2))
    axes.add_patch(Circle(centre, radius, fill=False, edgecolor="#5ee7f7", linewidth=1.8))


def _clean(axes: Axes, shape: Sequence[int], offset: float = 0.5) -> None:
    axes.set(xlim=(-offset, shape[1] - offset), ylim=(shape[0] - offset, -offset), xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _plane(weights: NDArray[np.floating], at: Sequence[int]) -> NDArray[np.floating]:
    return np.atleast_2d(weights[tuple(at[:-2])])


def _typical_queries(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    middle = tuple(size // 2 for size in grid)
    return list(dict.fromkeys([middle, (*middle[:-1], 0), tuple(0 for _ in grid)]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws every registered attention into a folder of PNG files."""
    parser = argparse.ArgumentParser(prog="python -m gridattn.lab.pictures", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.png")
    parser.add_argument("--attention", default="*", help="shell pattern of names")
    parser.add_argument("--grid", type=int, default=14, help="positions per axis")
    settings = parser.parse_args(arguments)
    (size,) = per_axis(settings.grid, 1, "grid")
    settings.out.mkdir(parents=True, exist_ok=True)
    for name in list_attentions(settings.attention):
        save_pattern(name, settings.out / f"{name}.png", size)


if __name__ == "__main__":
    main()

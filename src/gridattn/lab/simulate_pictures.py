"""Pictures of the tile model: speed-up against window and stride along each axis, and the front of windows."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from gridattn.lab.simulate_sweep import AxisTable, StrideChoice, WindowChoice

COLOURS = "viridis"
BEST, PLAIN, BOUND, MARK = "#1864ab", "#f08c00", "#868e96", "#e03131"


def draw_sweep(
    tables: Sequence[AxisTable],
    choices: Sequence[WindowChoice] | Sequence[StrideChoice],
    kernel_size: Sequence[int] | None = None,
) -> Figure:
    """A panel an axis with the speed-up against window and stride, and a panel for the whole grid.

    Args:
        tables: of `axis_tables`.
        choices: of `sweep_windows`, drawn against the share of the grid that a query sees; or of `sweep_strides`, drawn
            against the number of queries that share a window.
        kernel_size: the window of `sweep_strides`, which is among those of the tables.
    """
    widths = [max(2.0, 0.48 * len(table.strides)) for table in tables] + [3.8]
    figure = Figure(figsize=(sum(widths) + 0.6 * len(widths), 4.2), layout="constrained", dpi=110)
    *panels, last = figure.subplots(1, len(widths), width_ratios=widths)
    for number, (panel, table) in enumerate(zip(panels, tables)):
        _draw_table(panel, table)
        panel.set_title(f"axis {number}, {table.length} positions", fontsize=10)
        panel.set_xlabel("stride")
        if kernel_size is not None:
            row = table.windows.index(kernel_size[number])
            panel.axhspan(row - 0.5, row + 0.5, fill=False, edgecolor=MARK, linewidth=2)
    panels[0].set_ylabel("window")
    last.grid(color="#e9ecef", linewidth=0.8)
    last.set_axisbelow(True)
    last.set_ylabel("speed-up over dense attention, at most")
    windows = [choice for choice in choices if isinstance(choice, WindowChoice)]
    strides = [choice for choice in choices if isinstance(choice, StrideChoice)]
    if windows:
        _draw_windows(last, windows)
    else:
        _draw_strides(last, strides)
    last.legend(fontsize=8, frameon=False)
    return figure


def _draw_windows(axes: Axes, choices: Sequence[WindowChoice]) -> None:
    tokens = float(choices[0].simulation.flop_speedup * choices[0].visible)
    share = np.array([100 * choice.visible / tokens for choice in choices])
    best, plain = (
        np.array([float(of.speedup) for of in column])
        for column in zip(*((choice.simulation, choice.unstrided) for choice in choices))
    )
    bound = np.array([share.min(), 100.0])
    axes.plot(bound, 100 / bound, color=BOUND, linestyle="--", linewidth=1, label="arithmetic")
    axes.plot(share, plain, ".", color=PLAIN, markersize=4, alpha=0.6, label="stride 1")
    axes.plot(share, best, ".", color=BEST, markersize=4, alpha=0.6, label="best stride")
    front = np.array([choice.on_front for choice in choices])
    axes.step(share[front], best[front], where="pre", color=BEST, linewidth=1.5, label="front")
    axes.set(xscale="log", yscale="log", xlabel="visible tokens, % of the grid", title="windows of the whole grid")


def _draw_strides(axes: Axes, choices: Sequence[StrideChoice]) -> None:
    shared = [int(np.prod(choice.stride)) for choice in choices]
    speedup = [float(choice.simulation.speedup) for choice in choices]
    sparse = [choice.simulation.fully_block_sparse for choice in choices]
    bound = float(choices[0].simulation.flop_speedup)
    axes.axhline(bound, color=BOUND, linestyle="--", linewidth=1, label="arithmetic")
    axes.plot(shared, speedup, "o", color=PLAIN, markersize=5, label="needs masks")
    whole = [(x, y) for x, y, of in zip(shared, speedup, sparse) if of]
    if whole:
        axes.plot(*zip(*whole), "s", color=BEST, markersize=7, label="block-sparse")
    names: dict[tuple[int, float], list[str]] = {}
    for choice, x, y in zip(choices, shared, speedup):
        names.setdefault((x, y), []).append("x".join(map(str, choice.stride)))
    for point, of_point in names.items():
        axes.annotate("\n".join(of_point), point, xytext=(5, -3), textcoords="offset points", va="top", fontsize=7)
    axes.set(xscale="log", ylim=(0, None), xlabel="queries that share a window", title="strides worth trying")
    axes.margins(x=0.25)


def _draw_table(axes: Axes, table: AxisTable) -> None:
    """Cells with the speed-up along the axis, with a star where no visited tile needs a mask."""
    most = max(2.0, float(np.nanmax(table.speedup)))
    axes.imshow(table.speedup, cmap=COLOURS, norm=LogNorm(1, most), origin="lower", aspect="auto")
    for (i, j), speedup in np.ndenumerate(table.speedup):
        if not np.isnan(speedup):
            colour = "black" if speedup > most**0.5 else "white"
            weight = "bold" if table.block_sparse[i, j] else "normal"
            text = f"{speedup:.3g}" + ("*" if table.block_sparse[i, j] else "")
            axes.text(j, i, text, ha="center", va="center", color=colour, weight=weight, fontsize=7)
    axes.set_xticks(range(len(table.strides)), map(str, table.strides), fontsize=8)
    axes.set_yticks(range(len(table.windows)), map(str, table.windows), fontsize=8)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)

"""Picture of a signal with what the network says about it, all over the same time."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gridattn.systems.output import atomic
from gridattn.systems.segment.pictures import palette

_MOST_NAMES = 30


def draw_behaviour(
    signal: NDArray[np.float32],
    probabilities: NDArray[np.float64],
    relevance: NDArray[np.float32],
    path: Path,
    *,
    classes: Sequence[str],
    channels: Sequence[str],
    attention: NDArray[np.float32] | None = None,
    truth: NDArray[np.int64] | None = None,
) -> None:
    """Writes a PNG: signals over bands in the colours of the predicted classes, probabilities, attention, relevance.

    Args:
        signal: (V, frames), standardised.
        probabilities: (K, frames), NaN where unknown.
        relevance: (V, frames), Grad-CAM.
        path: of the picture.
        classes: names of the classes.
        channels: names of the sensors.
        attention: (V, frames), weight of each sensor; None draws none.
        truth: (frames,), true classes; None draws none.
    """
    sensors, frames = signal.shape
    maps = [] if attention is None else [("attention to each sensor", attention, "viridis")]
    maps.append(("relevance for the prediction (Grad-CAM)", relevance, "magma"))
    tall = min(5.0, max(1.6, 0.14 * sensors))
    figure = Figure(figsize=(9, tall + 1.6 + tall * len(maps)), layout="constrained")
    heights = [tall, 1.6, *(tall for _ in maps)]
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    colours = palette(len(classes)) / 255
    _signals(axes[0], signal, channels)
    chosen = np.where(np.isnan(probabilities[0]), -1, np.nan_to_num(probabilities, nan=-1.0).argmax(0))
    _bands(axes[0], chosen, colours, 0.25)
    for name, values, colour in zip(classes, probabilities, colours):
        axes[1].plot(values, color=colour, label=name, linewidth=1.4)
    if truth is not None:
        _bands(axes[1], truth, colours, 0.25)
    axes[1].set(ylim=(-0.03, 1.03), title="probability" + (", bands: truth" if truth is not None else ""))
    legend = axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
    for text in legend.get_texts():
        text.set_parse_math(False)
    for axis, (title, values, colours_of) in zip(axes[2:], maps):
        extent = (-0.5, frames - 0.5, sensors - 0.5, -0.5)
        shown = axis.imshow(values, aspect="auto", interpolation="nearest", cmap=colours_of, extent=extent)
        axis.set_title(title, fontsize=9)
        _sensor_ticks(axis, range(sensors), channels)
        figure.colorbar(shown, ax=axis, pad=0.01, fraction=0.03)
    axes[0].set_title("signals, bands: predicted class", fontsize=9)
    axes[1].title.set_fontsize(9)
    axes[-1].set(xlabel="frame", xlim=(-0.5, frames - 0.5))
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=80, format="png")


def _signals(axis: Any, signal: NDArray[np.float32], channels: Sequence[str]) -> None:
    """One line a sensor, each in a strip of its own, the first on top."""
    for row, values in enumerate(signal):
        span = max(float(np.abs(values - values.mean()).max()), 1e-6)
        axis.plot(row - 0.45 * (values - values.mean()) / span, color="black", linewidth=0.6)
    axis.set_ylim(len(signal) - 0.4, -0.6)
    _sensor_ticks(axis, range(len(signal)), channels)


def _sensor_ticks(axis: Any, rows: Sequence[int], channels: Sequence[str]) -> None:
    step = -(-len(rows) // _MOST_NAMES)
    axis.set_yticks(list(rows)[::step], list(channels)[::step], fontsize=5 if len(rows) > 12 else 7, parse_math=False)


def _bands(axis: Any, classes: NDArray[Any], colours: NDArray[Any], opacity: float) -> None:
    edges = [0, *(np.flatnonzero(np.diff(classes)) + 1).tolist(), len(classes)]
    for start, end in pairwise(edges):
        if classes[start] >= 0:
            axis.axvspan(start - 0.5, end - 0.5, color=colours[classes[start]], alpha=opacity, linewidth=0)

"""Behaviour over time in the user's own signals: JSON, a table by frame, and a picture."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gridattn.systems.base import pick_device
from gridattn.systems.l_sfan.data import EMBEDDED, load_sensors
from gridattn.systems.l_sfan.evaluate import BATCH, TrainedSensors, load_network
from gridattn.systems.l_sfan.files import read_csv, read_npz
from gridattn.systems.l_sfan.model import relevance, sensor_weights
from gridattn.systems.l_sfan.pictures import draw_behaviour
from gridattn.systems.l_sfan.windows import Recording, Windows, frame_scores
from gridattn.systems.output import write_csv, write_json

log = logging.getLogger("gridattn")

SAMPLES = 3
_JOINED = 4  # embedded recordings of one window are shown a few in a row


@dataclass(frozen=True)
class Behaviour:
    """What the network says about one recording, by frame; NaN where no window covers a frame.

    Attributes:
        probabilities: (K, frames), mean of the windows that cover a frame.
        attention: (V, frames), how much each sensor is attended to; None where sensors do not attend.
        relevance: (V, frames), Grad-CAM of the predicted class, at most 1.
    """

    probabilities: Tensor
    attention: Tensor | None
    relevance: Tensor


def predict_behaviour(
    signals: list[str] | None = None,
    *,
    checkpoint: str,
    output: str = "predictions",
    hop: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Classifies signals over time; writes predictions.json and, for each signal, NAME.csv (by frame) and NAME.png.

    Args:
        signals: CSV files of sensors x time (a row is a sensor, its first field may be a name), or .npz recordings,
            sampled and scaled like the training data; none takes three held-out samples of the embedded dataset that
            the network was trained on.
        checkpoint: run folder, or folder of an exported network.
        output: folder to write to.
        hop: frames between windows; None does as the training did.
        device: such as "cpu" or "cuda:0"; None takes the accelerator where there is one.

    Returns:
        `classes` and `channels`, by index; `predictions`: for each signal `signal`, `table`, `picture`, `frames`,
        `segments` (stretches of one class: start, end (not included), class, mean probability), `shares` (class -> part
        of the frames), `sensors` (the five most attended to, with their weight) and, where the truth is known,
        `accuracy` over the frames; `skipped`: damaged files with the `reason`; `output`: the folder.

    Raises:
        ValueError: a path that does not exist, no readable signal, or a checkpoint that cannot be used.
    """
    for path in signals or ():
        if not Path(path).is_file():
            raise ValueError(f"signal {path!r} does not exist")
    loaded = load_network(checkpoint)
    where, step = pick_device(device), hop if hop is not None else loaded.hop
    if isinstance(step, bool) or step < 1:
        raise ValueError(f"hop={hop!r} is not allowed; it must be at least 1")
    skipped: list[dict[str, str]] = []
    recordings = _readable(signals, loaded, skipped) if signals else _held_out(loaded)
    if not recordings:
        raise ValueError(f"none of the {len(signals or [])} signals can be read; the first: {skipped[0]['reason']}")
    if skipped:
        reasons = "; ".join(entry["reason"] for entry in skipped)
        log.warning("%d of %d signals are skipped: %s", len(skipped), len(signals or []), reasons)
    folder = Path(output)
    predictions = []
    for stem, recording in _named(recordings):
        behaviour = behaviour_of(loaded, recording, step, where)
        described = _describe(recording, behaviour, loaded, folder / stem)
        _write(recording, behaviour, described, loaded)
        predictions.append(described)
    result = {
        "checkpoint": checkpoint,
        "output": output,
        "classes": list(loaded.classes),
        "channels": list(loaded.channels),
        "predictions": predictions,
        "skipped": skipped,
    }
    write_json(folder / "predictions.json", result)
    return result


def behaviour_of(loaded: TrainedSensors, recording: Recording, hop: int, device: torch.device) -> Behaviour:
    """Probabilities, attention and relevance of a recording, averaged by frame over the windows that cover it."""
    windows = Windows([recording], loaded.window, hop)
    network = loaded.network.to(device).eval()
    parts: list[list[Tensor]] = [[], [], []]
    for first in range(0, len(windows), BATCH):
        chosen = range(first, min(first + BATCH, len(windows)))
        x = torch.stack([loaded.standardise(windows.frames(i), loaded.window) for i in chosen]).to(device)
        with torch.no_grad():
            steps = network.steps(x)
        among_sensors = steps.attention is not None and network.attend == "sensors" and network.pool == "time"
        weights = sensor_weights(steps.attention) if among_sensors and steps.attention is not None else x[:, :0, 0]
        for part, value in zip(parts, (steps.logits.softmax(1)[..., None], weights[..., None], relevance(network, x))):
            part.append(value.float().cpu())
    starts = [start for _, start in windows.places]
    means = [frame_scores(torch.cat(part), starts, len(recording.y), loaded.window) for part in parts]
    peak = means[2].nan_to_num(0.0).max()
    return Behaviour(means[0], means[1] if len(means[1]) else None, means[2] / peak if peak > 0 else means[2])


def _readable(signals: Sequence[str], loaded: TrainedSensors, skipped: list[dict[str, str]]) -> list[Recording]:
    """The signals that the network can take; the others are added to `skipped`."""
    found: list[Recording] = []
    sensors, needed = len(loaded.channels), -(-loaded.window // 2)
    for path in signals:
        try:
            file = Path(path)
            recording = read_npz(file, labelled=False) if file.suffix == ".npz" else read_csv(file, sensors)
            if recording.x.shape[1] != sensors:
                raise ValueError(f"{path!r} has {recording.x.shape[1]} sensors; the network needs {sensors}")
            if len(recording.y) < needed:
                raise ValueError(f"{path!r} has {len(recording.y)} frames; at least {needed} are needed")
        except ValueError as error:
            skipped.append({"signal": path, "reason": str(error)})
            continue
        found.append(recording)
    return found


def _held_out(loaded: TrainedSensors) -> list[Recording]:
    """Recordings of held-out subjects; those of a single window are joined a few in a row."""
    if loaded.data not in EMBEDDED:
        raise ValueError("signals is empty; name CSV files or .npz recordings")
    data = load_sensors(loaded.data)
    own = [r for r in data.recordings if r.subject in loaded.held_out] or list(data.recordings)
    joined = _JOINED if len(own[0].y) <= loaded.window else 1
    found = []
    for first in np.linspace(0, len(own) - joined, SAMPLES + 2).round().astype(int)[1:-1].tolist():
        row = [r for r in own[first : first + joined] if r.subject == own[first].subject]
        x, y = np.concatenate([r.x for r in row]), np.concatenate([r.y for r in row])
        found.append(Recording(x, y, row[0].subject, row[0].activity, row[0].name))
    return found


def _named(recordings: Sequence[Recording]) -> list[tuple[str, Recording]]:
    """The recordings with stems of files that differ."""
    named: dict[str, Recording] = {}
    for recording in recordings:
        base = recording.name.removesuffix(".npz").removesuffix(".csv")
        stem, number = base, 1
        while stem in named:
            number += 1
            stem = f"{base}-{number}"
        named[stem] = recording
    return list(named.items())


def _describe(recording: Recording, behaviour: Behaviour, loaded: TrainedSensors, path: Path) -> dict[str, Any]:
    p = behaviour.probabilities
    covered = ~p[0].isnan()
    chosen = torch.where(covered, p.nan_to_num(-1.0).argmax(0), -1)
    described: dict[str, Any] = {
        "signal": recording.name,
        "table": f"{path}.csv",
        "picture": f"{path}.png",
        "frames": len(chosen),
        "segments": _segments(chosen, p, loaded.classes),
        "shares": {
            name: round(float((chosen == i).sum() / covered.sum().clamp_min(1)), 6)
            for i, name in enumerate(loaded.classes)
        },
    }
    if behaviour.attention is not None:
        mean = behaviour.attention.nanmean(1)
        order = mean.argsort(descending=True)[:5].tolist()
        described["sensors"] = {loaded.channels[i]: round(float(mean[i]), 6) for i in order}
    truth = torch.from_numpy(recording.y)
    known = covered & (truth >= 0)
    if known.any():
        described["accuracy"] = round(float((chosen == truth)[known].float().mean()), 6)
    return described


def _segments(chosen: Tensor, probabilities: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Stretches of one predicted class; frames that no window covers belong to none."""
    changes = (chosen[1:] != chosen[:-1]).nonzero()[:, 0] + 1
    edges = [0, *changes.tolist(), len(chosen)]
    found = []
    for start, end in pairwise(edges):
        label = int(chosen[start])
        if label >= 0:
            mean = round(float(probabilities[label, start:end].mean()), 6)
            found.append({"start": start, "end": end, "class": classes[label], "probability": mean})
    return found


def _write(recording: Recording, behaviour: Behaviour, described: dict[str, Any], loaded: TrainedSensors) -> None:
    values: NDArray[np.float64] = behaviour.probabilities.double().numpy()
    names = [f"p {name}" for name in loaded.classes]
    rows = [
        {"frame": frame, **{n: "" if np.isnan(v) else round(float(v), 6) for n, v in zip(names, column)}}
        for frame, column in enumerate(values.T)
    ]
    write_csv(described["table"], rows)
    z = loaded.standardise(recording.x).numpy()
    attention = None if behaviour.attention is None else behaviour.attention.numpy()
    draw_behaviour(
        z,
        values,
        behaviour.relevance.numpy(),
        Path(described["picture"]),
        classes=loaded.classes,
        channels=loaded.channels,
        attention=attention,
        truth=recording.y if (recording.y >= 0).all() else None,
    )

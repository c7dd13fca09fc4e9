"""Measuring a trained L-SFAN on the windows of subjects that it has not seen."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gridattn.systems.base import pick_device
from gridattn.systems.l_sfan.data import load_sensors
from gridattn.systems.l_sfan.metrics import subject_report, window_confusion
from gridattn.systems.l_sfan.model import LSFAN, build_lsfan
from gridattn.systems.l_sfan.windows import Standardise, Windows, WindowSamples
from gridattn.systems.output import write_json
from gridattn.systems.trained import load_trained

BATCH = 256


@dataclass(frozen=True)
class TrainedSensors:
    """A trained network with its windows, statistics and names."""

    network: LSFAN
    data: str
    window: int
    hop: int
    held_out: tuple[str, ...]
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    standardise: Standardise


def load_network(checkpoint: str) -> TrainedSensors:
    """Loads a run folder or an exported network.

    Raises:
        ValueError: a path without a trained L-SFAN, or damaged files.
    """
    trained = load_trained(checkpoint, "l-sfan", build_lsfan)
    about = trained.about
    try:
        held_out, classes, channels = (tuple(map(str, about[name])) for name in ("held_out", "classes", "channels"))
        window, hop = int(about["window"]), int(about["hop"])
        standardise = Standardise(tuple(about["mean"]), tuple(about["std"]))
        data = str(about["data"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint={checkpoint!r} is damaged: {type(error).__name__} {error}") from None
    network: Any = trained.model
    return TrainedSensors(network, data, window, hop, held_out, classes, channels, standardise)


def class_probabilities(loaded: TrainedSensors, windows: Windows, device: torch.device) -> Tensor:
    """Class probabilities (N, K) of windows, on the CPU."""
    network = loaded.network.to(device).eval()
    with torch.inference_mode():
        batches = DataLoader(WindowSamples(windows, loaded.standardise), BATCH)
        return torch.cat([network(x.to(device)).float().softmax(1).cpu() for x, _ in batches])


def confusions(probabilities: Tensor, windows: Windows, num_classes: int) -> dict[str, Tensor]:
    """Confusion matrix of every subject, in the order of the windows."""
    chosen, labels = probabilities.argmax(1), torch.from_numpy(windows.labels)
    matrices: dict[str, Tensor] = {}
    for subject in dict.fromkeys(windows.subjects):
        own = torch.tensor([name == subject for name in windows.subjects])
        confusion = window_confusion(num_classes)
        confusion.update(chosen[own], labels[own])
        matrices[subject] = confusion.compute()
    return matrices


def evaluate_sensors(
    checkpoint: str,
    data: str | None = None,
    *,
    subjects: list[int | str] | None = None,
    device: str | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Accuracy, F1 and Matthews correlation of a trained network, pooled and by subject.

    Args:
        checkpoint: run folder, or folder of an exported network.
        data: recordings, as `load_sensors` takes them; None takes those it was trained on.
        subjects: whose windows to measure; None takes the subjects held out from training, or all of other `data`.
        device: such as "cpu" or "cuda:0"; None takes the accelerator where there is one.
        output: file for the metrics, JSON; None writes none.

    Returns:
        What `subject_report` gives, with the `data` measured.

    Raises:
        ValueError: a checkpoint or recordings that cannot be used, an unknown subject, or other classes or sensors than
            the network's.
    """
    loaded = load_network(checkpoint)
    where = pick_device(device)
    spec = data or loaded.data
    found = load_sensors(spec)
    for name in ("classes", "channels"):
        if len(getattr(found, name)) != len(getattr(loaded, name)):
            counts = f"{len(getattr(found, name))} {name}; the network knows {len(getattr(loaded, name))}"
            raise ValueError(f"data={spec!r} has {counts}")
    chosen = [str(subject) for subject in subjects or ()]
    for subject in chosen:
        if subject not in found.subjects:
            raise ValueError(f"subject {subject!r} is not in data={spec!r}; allowed: {', '.join(found.subjects)}")
    if not chosen:
        chosen = list(loaded.held_out) if spec == loaded.data and loaded.held_out else found.subjects
    windows = found.windows(chosen, loaded.window, loaded.hop)
    probabilities = class_probabilities(loaded, windows, where)
    report = {"data": spec, **subject_report(confusions(probabilities, windows, len(loaded.classes)), loaded.classes)}
    if output is not None:
        write_json(output, report)
    return report

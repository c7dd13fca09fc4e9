"""Training of L-SFAN: on some subjects for others, or once for every subject."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from gridattn.systems.base import start_run
from gridattn.systems.l_sfan.augment import SignalAugment
from gridattn.systems.l_sfan.data import SensorData, load_sensors
from gridattn.systems.l_sfan.evaluate import class_probabilities, confusions, load_network
from gridattn.systems.l_sfan.metrics import subject_report
from gridattn.systems.l_sfan.model import build_lsfan
from gridattn.systems.l_sfan.task import SensorSettings, SensorTask
from gridattn.systems.l_sfan.windows import WindowSamples, class_weights
from gridattn.systems.output import RunFolder, write_csv, write_json
from gridattn.systems.trained import train_and_export, trained_exporter

SAME = (
    *("data", "seed", "batch_size", "window", "hop", "protocol", "val_subjects", "channels", "num_heads", "attend"),
    *("pool", "hidden", "batch_norm", "residual"),
)
"""Settings that a resumed run shares with its checkpoint: they shape the weights or the order of the samples."""


def train_sensors(settings: SensorSettings) -> dict[str, Any]:
    """Trains L-SFAN and exports it.

    `protocol="split"` trains one network and keeps what `RunFolder` lists; best is the epoch with the highest mean F1
    on the held-out subjects. `protocol="loso"` trains one network for every subject, on all others and for a fixed
    number of epochs, in folders `fold-00`, `fold-01`, ...; the last epoch of each predicts the windows of its subject,
    and the predictions of all are joined (predictions.csv, result.json).

    Args:
        settings: what to train, on what, and how.

    Returns:
        split: metrics of the best epoch (val_accuracy, val_macro_f1, val_mcc, val_loss, train_loss), `parameters`, and
        `model`, the folder of the exported network; an empty dict in all processes but the first. loso: what
        `subject_report` gives, `parameters` and `folds` (subject -> folder).

    Raises:
        ValueError: settings that are not allowed, or recordings or a run folder that cannot be used.
    """
    data = load_sensors(settings.data)
    return _leave_one_out(settings, data) if settings.protocol == "loso" else _train_split(settings, data)


def _train_split(settings: SensorSettings, data: SensorData) -> dict[str, Any]:
    named = None if settings.val_subjects is None else [str(name) for name in settings.val_subjects]
    held_out = data.validation_subjects(named, settings.seed)
    train, val, standardise = data.split(held_out, settings.window, settings.hop)
    folder = start_run(settings, SAME)
    network = {
        "sensors": len(data.channels),
        "frames": settings.window,
        "num_classes": len(data.classes),
        **settings.architecture(),
    }
    weights = (
        class_weights(train.labels, len(data.classes)) if settings.class_weights else torch.ones(len(data.classes))
    )
    task = SensorTask(build_lsfan(**network), settings, weights)
    about = {
        "data": settings.data,
        "window": settings.window,
        "hop": settings.hop,
        "held_out": held_out,
        "classes": list(data.classes),
        "channels": list(data.channels),
        "mean": list(standardise.mean),
        "std": list(standardise.std),
    }
    samples = WindowSamples(train, standardise, SignalAugment.of(settings.augment), settings.seed)
    export = trained_exporter(task, network, about)
    return train_and_export(task, samples, WindowSamples(val, standardise), folder, export, monitor="val_macro_f1")


def _leave_one_out(settings: SensorSettings, data: SensorData) -> dict[str, Any]:
    outer = _prepare(settings)
    matrices, rows, folds, parameters = {}, [], {}, 0
    for number, subject in enumerate(data.subjects):
        fold = RunFolder(outer.path / f"fold-{number:02d}")
        folds[subject] = str(fold.path)
        if not fold.result.is_file():
            resume = "auto" if fold.last.is_file() else None
            own = replace(settings, protocol="split", val_subjects=[subject], output=str(fold.path), resume=resume)
            _train_split(replace(own, overwrite=True), data)
        loaded = load_network(str(fold.last_model))
        parameters = sum(p.numel() for p in loaded.network.parameters())
        windows = data.windows([subject], settings.window, settings.hop)
        probabilities = class_probabilities(loaded, windows, torch.device("cpu"))
        matrices |= confusions(probabilities, windows, len(data.classes))
        for (recording, start), label, p in zip(windows.places, windows.labels.tolist(), probabilities):
            name = windows.recordings[recording].name
            row = {"subject": subject, "recording": name, "start": start, "label": label, "predicted": int(p.argmax())}
            rows.append(row | {f"p{i}": round(float(value), 6) for i, value in enumerate(p)})
    write_csv(outer.path / "predictions.csv", rows)
    result = {**subject_report(matrices, data.classes), "parameters": parameters, "folds": folds}
    write_json(outer.result, result)
    return result


def _prepare(settings: SensorSettings) -> RunFolder:
    """The outer folder, holding the folds of this same run or none.

    Raises:
        ValueError: a folder that holds another run, or nothing to resume.
    """
    folder = RunFolder(settings.output)
    if settings.resume not in (None, "auto"):
        raise ValueError(f"resume={settings.resume!r} is not allowed with protocol='loso'; 'auto' is")
    folder.check(resume=settings.resume is not None, overwrite=settings.overwrite)
    if settings.resume is None:
        folder.clear()
        for fold in Path(settings.output).glob("fold-*"):
            shutil.rmtree(fold, ignore_errors=True)
        folder.write_settings("l-sfan", settings.stored())
        return folder
    if not folder.settings.is_file():
        raise ValueError(f"output={settings.output!r} holds no run to resume")
    stored, own = yaml.safe_load(folder.settings.read_text(encoding="utf-8")), settings.stored()
    for name in (*SAME, "epochs", "lr"):
        if stored.get(name) != own[name]:
            raise ValueError(f"{name}={own[name]!r} differs from {stored.get(name)!r}, that of the run to resume")
    return folder

"""A trained network as a folder that needs nothing else, and the run that ends in one."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from safetensors.torch import save_file
from torch import nn

from gridattn.models.state import CheckpointError, load_checkpoint, load_strict
from gridattn.systems.base import Task, fit, model_state
from gridattn.systems.output import RunFolder, atomic, load_run_checkpoint, write_json


@dataclass
class Trained:
    """A trained network with what is needed to build it again and to use it.

    Attributes:
        system: slug of the system.
        model: the network, in eval mode.
        network: keywords from which the system builds the network; plain values.
        about: whatever else its use needs: preprocessing, names of classes, the dataset; plain values.
        metrics: of the validation after the exported epoch.
    """

    system: str
    model: nn.Module
    network: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


def save_trained(trained: Trained, folder: str | Path) -> None:
    """Writes model.safetensors and trained.json, each atomically."""
    folder = Path(folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.model.state_dict().items()}
    about = {name: getattr(trained, name) for name in ("system", "network", "about", "metrics")}
    with atomic(folder / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    write_json(folder / "trained.json", about)


def load_trained(path: str | Path, system: str, build: Callable[..., nn.Module]) -> Trained:
    """Loads what `save_trained` wrote.

    Args:
        path: the folder, its `model.safetensors`, or a run folder, of which the best epoch's model is taken.
        system: slug of the system that must have written it.
        build: gives the network for its keywords.

    Raises:
        ValueError: a path without a trained network, one of another system, or damaged files.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if not (folder / "trained.json").is_file():
        folder = RunFolder(folder).model
    file = folder / "trained.json"
    if not file.is_file():
        raise ValueError(f"checkpoint={str(path)!r} holds no trained network (a folder with trained.json)")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        found, network, about, metrics = (stored[name] for name in ("system", "network", "about", "metrics"))
        if found == system:
            model = build(**network)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {type(error).__name__} {error}") from None
    if found != system:
        raise ValueError(f"checkpoint={str(path)!r} is of the system {found!r}; {system!r} is needed")
    try:
        load_strict(model, load_checkpoint(folder / "model.safetensors"))
    except CheckpointError as error:
        raise CheckpointError(f"{error} (in {str(folder)!r})") from None
    return Trained(system, model.eval(), network, about, metrics)


def train_and_export(
    task: Task,
    train: Any,
    val: Any,
    folder: RunFolder,
    export: Callable[[Path, dict[str, float]], None],
    *,
    monitor: str,
    mode: str = "max",
) -> dict[str, Any]:
    """Trains `task` and exports the networks of the best and of the last epoch.

    Args:
        task: the network under training.
        train: training samples, by draw number (`gridattn.data.sampling.Draws`).
        val: validation samples, by index.
        folder: the run folder, from `start_run`.
        export: writes `task.model`, as it then is, with the given metrics to the given folder.
        monitor: the logged validation metric that decides which epoch is best.
        mode: "max" or "min".

    Returns:
        Metrics of the best epoch, `parameters` (size of the network) and `model` (folder of the exported network), also
        written to result.json. An empty dict in all processes but the first.

    Raises:
        ValueError: settings that Lightning or timm refuse.
    """
    history = fit(task, train, val, folder, monitor=monitor, mode=mode)
    if rank_zero_only.rank != 0:
        return {}
    validated = [row for row in history if monitor in row]
    choose = max if mode == "max" else min
    known = folder.best.is_file() and bool(validated)
    best = choose(validated, key=lambda row: row[monitor]) if known else history[-1]
    for checkpoint, target, metrics in (
        (folder.last, folder.last_model, history[-1]),
        (folder.best if known else folder.last, folder.model, best),
    ):
        task.model.load_state_dict(model_state(load_run_checkpoint(checkpoint)))
        export(target, dict(metrics))
    result: dict[str, Any] = {**best, "parameters": sum(p.numel() for p in task.model.parameters())}
    result["model"] = str(folder.model)
    write_json(folder.result, result)
    return result


def trained_exporter(
    task: Task, network: Mapping[str, Any], about: Mapping[str, Any]
) -> Callable[[Path, dict[str, float]], None]:
    """The `export` of `train_and_export` for a network that its keywords rebuild."""

    def export(folder: Path, metrics: dict[str, float]) -> None:
        save_trained(Trained(task.system, task.model, dict(network), dict(about), metrics), folder)

    return export

"""Saving a model with what is needed to build it again."""

import json
import os
import tempfile
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from gridattn.models.registry import create_model
from gridattn.models.state import CheckpointError, load_checkpoint, load_strict


def save_model(model: nn.Module, path: str | PathLike[str]) -> Path:
    """Writes weights (safetensors) and, beside them, the call of `create_model` that rebuilds the model (JSON).

    Either file appears whole or not at all: it is written under another name and then renamed.

    Args:
        model: built by `create_model`.
        path: a folder, which then holds `model.safetensors` and `config.json`, or a `*.safetensors` file, beside which
            a `*.json` of the same name is put.

    Returns:
        The path of the weights.

    Raises:
        ValueError: a model that `create_model` did not build, or one with options that JSON cannot hold.

    Example:
        >>> folder = tempfile.mkdtemp()
        >>> save_model(create_model("grid_vit_micro", num_classes=3), folder).name
        'model.safetensors'
        >>> load_model(folder).num_classes
        3
    """
    config = getattr(model, "config", None)
    if not config:
        raise ValueError(
            f"model of class {type(model).__name__} has no config; only models of create_model can be saved"
        )
    try:
        text = json.dumps(config, indent=2)
    except TypeError as error:
        raise ValueError(f"config of model {config['name']!r} cannot be written as JSON: {error}") from None
    weights, config_file = _paths(Path(path))
    weights.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _write_whole(weights, lambda temporary: save_file(state, temporary, metadata={"format": "pt"}))
    _write_whole(config_file, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
    return weights


def load_model(path: str | PathLike[str]) -> Any:
    """Rebuilds a model that `save_model` wrote, with its weights, in eval mode.

    Args:
        path: the folder or the `*.safetensors` file.

    Raises:
        CheckpointError: a missing or damaged file, or weights that do not belong to the configured model.
    """
    weights, config_file = _paths(Path(path))
    if not config_file.is_file():
        raise CheckpointError(f"config {str(config_file)!r} is missing; it is written beside the weights by save_model")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not isinstance(config.get("name"), str):
            raise ValueError("an object with the model's name is needed")
        model = create_model(**config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config {str(config_file)!r} builds no model: {error}") from None
    try:
        load_strict(model, load_checkpoint(weights))
    except CheckpointError as error:
        raise CheckpointError(f"{error} (weights {str(weights)!r})") from None
    return model.eval()


def _paths(path: Path) -> tuple[Path, Path]:
    if path.suffix == ".safetensors":
        return path, path.with_suffix(".json")
    return path / "model.safetensors", path / "config.json"


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

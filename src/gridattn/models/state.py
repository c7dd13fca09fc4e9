"""Weight files: reading them without running code, and loading them with an error that says what differs."""

import pickle
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Entries under which training programs keep the weights, the averaged ones first."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers put before every name."""


class CheckpointError(ValueError):
    """A weight file that is missing, damaged, unsafe, or of another model; the message is one line."""


def load_checkpoint(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Reads the state dict of a weight file.

    Args:
        path: a safetensors file, or a pickled one of PyTorch, of which tensors and plain containers alone are read.
            Weights nested under `state_dict` or `model` and prefixes of wrappers (`module.`) are unwrapped.

    Returns:
        Names and tensors, on the CPU.

    Raises:
        CheckpointError: no such file, a damaged one, one with objects that could run code, or one without weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint {str(path)!r} is {'a folder' if path.is_dir() else 'missing'}; a file is needed"
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise CheckpointError(f"checkpoint {str(path)!r} holds no state dict; names and tensors are needed")
    state = dict(content)
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def load_strict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state dict whose names and shapes must be the model's own.

    Raises:
        CheckpointError: the names that are missing, unexpected or of another shape, in one line.
    """
    own = model.state_dict()
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    found = [f"{len(names)} {kind} ({_first(names)})" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"state dict does not fit {type(model).__name__}: {'; '.join(found)}")
    model.load_state_dict(state)


def official_state(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`model.from_official(state)`, with one kind of error for files that are not of the family.

    Raises:
        CheckpointError: names or shapes that the family's key map cannot handle.
    """
    try:
        return model.from_official(state)
    except CheckpointError:
        raise
    except (LookupError, TypeError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"state dict is none of {type(model).__name__}: {type(error).__name__} {_line(error)}"
        ) from None


def with_own_head(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with the model's own classifier in place of one for another number of classes."""
    head = {name: tensor for name, tensor in own.items() if name.startswith("head.")}
    if head and all(name not in state or state[name].shape == tensor.shape for name, tensor in head.items()):
        return dict(state)
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")} | head


def load_weights(model: Any, path: str | PathLike[str], *, keep_head: bool = True) -> None:
    """Loads a weight file in our names or in those that the family was published with.

    Args:
        model: a `Backbone` or a `FeatureMaps`.
        path: the file.
        keep_head: with False, a classifier for another number of classes is left out and the model's own stays.

    Raises:
        CheckpointError: see `load_checkpoint` and `load_strict`.
    """
    state = load_checkpoint(path)
    own = model.state_dict()
    try:
        if any(name not in own for name in state) and hasattr(model, "from_official"):
            state = official_state(model, state)
        if not keep_head:
            state = with_own_head(state, own)
        if {k: t.shape for k, t in state.items()} == {k: t.shape for k, t in own.items()}:
            model.load_state_dict(state)
        else:
            model.load_official(state)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {str(path)!r}: {error}") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {str(path)!r} is damaged or no safetensors file: {_line(error)}") from None


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        refused = re.search(r"GLOBAL\s+(\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise CheckpointError(
                f"checkpoint {str(path)!r} holds {refused[1]}, which could run code; files of tensors alone are allowed"
            ) from None
        raise CheckpointError(f"checkpoint {str(path)!r} is damaged or no weight file: {_line(error)}") from None


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

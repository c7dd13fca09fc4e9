"""Checkpoints in the layout of the public adaptation (`conv1`, `attention.in_proj_weight`, `fc`) as our folders."""

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from gridattn.models.state import CheckpointError, load_checkpoint, load_strict
from gridattn.systems.l_sfan.model import build_lsfan
from gridattn.systems.trained import Trained, save_trained

RENAMED = (
    (r"^conv([12])\.", r"block\1.conv."),
    (r"^bn([12])\.", r"block\1.norm."),
    (r"^attention\.in_proj_", "attention.qkv."),
    (r"^attention\.out_proj\.", "attention.proj."),
    (r"^fc\.", "head."),
    (r"^fc1\.", "head.0."),
    (r"^fc2\.", "head.3."),
)
"""Published name -> ours; the packed projection has the same rows (query, key, value) in both."""


def convert_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the public adaptation -> ours.

    Raises:
        CheckpointError: a name without counterpart.

    Example:
        >>> import torch
        >>> list(convert_state({"attention.in_proj_weight": torch.ones(48, 16)}))
        ['attention.qkv.weight']
    """
    ours = {}
    for name, tensor in state.items():
        pattern = next(((old, new) for old, new in RENAMED if re.match(old, name)), None)
        if pattern is None:
            raise CheckpointError(f"{name!r} has no counterpart in LSFAN")
        ours[re.sub(*pattern, name)] = tensor
    return ours


def network_of(state: Mapping[str, Tensor], num_heads: int = 4, frames: int = 180) -> dict[str, Any]:
    """Keywords of `LSFAN` for a state in the layout of the adaptation, from the shapes of its tensors.

    Args:
        state: names and tensors.
        num_heads: heads of the attention, which no shape tells.
        frames: length of a window.

    Raises:
        CheckpointError: a state of another network.
    """
    try:
        first, second = (len(state[f"conv{i}.weight"]) for i in (1, 2))
        hidden = len(state["fc1.weight"]) if "fc1.weight" in state else None
        flat = state["fc.weight" if hidden is None else "fc1.weight"].shape[1]
        classes = len(state["fc.weight" if hidden is None else "fc2.weight"])
    except KeyError as error:
        raise CheckpointError(f"the state dict is not that of an L-SFAN; {error} is missing") from None
    if flat % second:
        raise CheckpointError(f"the classifier takes {flat} values; a multiple of the {second} channels is needed")
    return {
        "sensors": flat // second,
        "frames": frames,
        "num_classes": classes,
        "channels": [first, second],
        "num_heads": num_heads if "attention.in_proj_weight" in state else 0,
        "hidden": hidden,
        "batch_norm": "bn1.weight" in state,
    }


def convert_checkpoint(
    checkpoint: str | PathLike[str],
    output: str | PathLike[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str],
    channels: Sequence[str] | None = None,
    num_heads: int = 4,
    window: int = 180,
    hop: int = 45,
    data: str = "tension",
) -> dict[str, Any]:
    """Writes a checkpoint in the layout of the adaptation as a folder that `evaluate` and `predict` take.

    Args:
        checkpoint: a safetensors file or a pickled one of tensors alone.
        output: folder to write.
        mean: of every sensor over the training subjects, in the sensors' units.
        std: of every sensor, the same.
        classes: names, by index.
        channels: names of the sensors; None numbers them.
        num_heads: heads of the attention.
        window: frames of a window.
        hop: frames between windows.
        data: dataset to measure it on unless told otherwise.

    Returns:
        Keywords of `LSFAN`.

    Raises:
        CheckpointError: a file that cannot be read, could run code, or holds another network.
        ValueError: statistics or names of another number than the network's.
    """
    state = load_checkpoint(checkpoint)
    try:
        network = network_of(state, num_heads, window)
        model = build_lsfan(**network)
        load_strict(model, convert_state(state))
    except ValueError as error:
        raise CheckpointError(f"checkpoint {str(checkpoint)!r}: {error}") from None
    names = list(channels) if channels is not None else [f"sensor {i}" for i in range(network["sensors"])]
    for label, values, count in (
        ("mean", mean, network["sensors"]),
        ("std", std, network["sensors"]),
        ("channels", names, network["sensors"]),
        ("classes", classes, network["num_classes"]),
    ):
        if len(values) != count:
            raise ValueError(f"{label} has {len(values)} entries; the network needs {count}")
    about = {
        "data": data,
        "window": window,
        "hop": hop,
        "held_out": [],
        "classes": list(classes),
        "channels": names,
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
    }
    save_trained(Trained("l-sfan", model, network, about), Path(output))
    return network

"""Weights as the authors published them, under our names."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from gridattn.layers.epipolar import load_official_epipolar
from gridattn.models.state import CheckpointError, load_checkpoint, load_strict
from gridattn.systems.epit.model import EPIT
from gridattn.systems.output import RunFolder

_BLOCK = re.compile(r"^altblock\.(\d+)\.(.+)$")
_RENAMED = {
    "conv_init0.0.weight": "conv_first.weight",
    "upsampling.0.weight": "expand.weight",
    "upsampling.3.weight": "conv_last.weight",
}


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the authors' network, our names; their kernels (1, 3, 3) become 2-D.

    Example:
        >>> import torch
        >>> list(convert_official({"altblock.0.conv.2.weight": torch.ones(8, 8, 1, 3, 3)}))
        ['filters.0.conv.2.weight']
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = _BLOCK.match(name)
        if block:
            ((inner, converted),) = load_official_epipolar({block[2]: tensor}).items()
            ours[f"filters.{block[1]}.{inner}"] = converted
        else:
            flat = tensor.squeeze(2) if name.startswith("conv_init") else tensor
            ours[_RENAMED.get(name, name)] = flat
    return ours


def start_from(network: EPIT, weights: str | Path) -> None:
    """Loads weights to start from, strictly.

    Args:
        network: takes the weights.
        weights: a file as published (`EPIT_5x5_2x_model.pth`) or of our own, a run folder or an exported network.

    Raises:
        CheckpointError: a file that cannot be read, could run code, or belongs to another network.
    """
    path = Path(weights)
    if path.is_dir():
        folder = RunFolder(path).model
        path = (folder if folder.is_dir() else path) / "model.safetensors"
    state = load_checkpoint(path)
    if any(name.startswith("altblock.") for name in state):
        state = convert_official(state)
    try:
        load_strict(network, state)
    except CheckpointError as error:
        raise CheckpointError(f"weights={str(weights)!r}: {error}") from None

"""Which backend "auto" takes on a GPU: the one that was measured to be fastest on that model, else a fixed order."""

import json
from functools import lru_cache
from importlib.resources import files

import torch

from gridattn.ops.constants import constant_in_traces

ORDER = ("triton", "flex", "tiled")
"""Where nothing was measured; the first that can run a problem is taken."""


@constant_in_traces
def preferred_backends(device: torch.device) -> tuple[str, ...]:
    """Backends to try on a device, in order.

    `measured_gpus.json` names a device as PyTorch does (`torch.cuda.get_device_name`) and the backend that was fastest
    on it in `python benchmarks/neighborhood.py --device cuda --suite natten`.

    Example:
        >>> preferred_backends(torch.device("meta"))
        ('triton', 'flex', 'tiled')
    """
    choice = measured().get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return ORDER if choice is None else (choice, *(name for name in ORDER if name != choice))


@lru_cache(maxsize=1)
def measured() -> dict[str, str]:
    """The measured choices by the name of the device."""
    return json.loads((files("gridattn.ops.neighborhood") / "measured_gpus.json").read_text())

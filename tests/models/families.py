"""Every registered family, found in the register, and a variant of each that is small enough for tests."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from gridattn.models import list_models, model_info

SIZE = 64
"""Image size at which the small variants are used."""

SHRUNK: dict[str, Callable[[Any], Any]] = {
    "depths": lambda depths: tuple(2 - d % 2 for d in depths) if isinstance(depths, list | tuple) else 1,
    "agent_depths": lambda depths: tuple(min(d, 1) for d in depths),
    "depth": lambda depth: 3,
    "local_up_to_layer": lambda layers: 2,
    "halo_blocks": lambda places: None,
    "exchanges": lambda counts: (1,) * len(counts),
    "blocks": lambda blocks: 1,
    "width": lambda width: 0.25 if isinstance(width, float) else 8,
    "width_mult": lambda width: 0.25,
}
"""Keywords of families that set how many blocks there are and how wide these are, and smaller values for them."""


def full_config(name: str) -> dict[str, Any]:
    """All keywords of a variant, those that it leaves to its family's defaults included."""
    info = model_info(name)
    parameters = inspect.signature(info.build).parameters
    return {key: p.default for key, p in parameters.items() if key in info.options} | info.config


def numbers(value: Any) -> list[float]:
    """All numbers in a nested sequence."""
    if isinstance(value, list | tuple):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, int | float) else []


@cache
def small_variants() -> dict[str, str]:
    """Family -> the variant whose keywords have the smallest sum, for wide, deep and large variants have large ones."""
    found: dict[str, tuple[float, str]] = {}
    for name in list_models():
        family = model_info(name).build.__name__
        size = sum(numbers([v for key, v in full_config(name).items() if key != "num_classes"])), name
        found[family] = min(found.get(family, size), size)
    return {family: name for family, (_, name) in sorted(found.items())}


def small_options(name: str) -> dict[str, Any]:
    """Keywords that make a variant small, its nominal image size among them."""
    info = model_info(name)
    config = full_config(name)
    options = {key: shrink(config[key]) for key, shrink in SHRUNK.items() if config.get(key) is not None}
    return options | ({"img_size": SIZE} if "img_size" in info.options else {})

"""Complete task systems: model, data, training, evaluation and prediction behind one command.

A folder of this package with a `SYSTEM` record is a system; its name, with dashes for underscores, is its slug.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gridattn.systems.base import System
    from gridattn.systems.settings import recipe_names

__all__ = ["System", "get_system", "list_systems", "recipe_names"]


def list_systems() -> list[str]:
    """Slugs of all systems, in alphabetical order.

    Example:
        >>> "classify" in list_systems()
        True
    """
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if module.ispkg)


def get_system(slug: str) -> "System":
    """The record of one system.

    Raises:
        ValueError: an unknown slug; the message lists the known ones.
    """
    if slug not in list_systems():
        raise ValueError(f"system {slug!r} is not known; allowed: {', '.join(list_systems())}")
    return importlib.import_module(f"{__name__}.{slug.replace('-', '_')}").SYSTEM


def __getattr__(name: str) -> Any:
    # What needs Lightning is imported on first use: the writers of `output` are used without it.
    homes = {"System": "base", "recipe_names": "settings"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)

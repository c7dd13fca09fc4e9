"""Finds the adapters of a paper: `adapters/<slug with underscores>.py` with `ADAPTERS` and, if needed, `PENDING`.

`DISPUTED` names single tensors of single cases that are held to be wrong, with the reason; they must keep differing.
Where the names of its variants are not ours, `variant_call(name, config)` gives the name and the keywords for
`create_model`.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from case import Adapter


def load_adapters(slug: str) -> tuple[dict[str, Adapter] | None, dict[str, str]]:
    """Returns (adapters by class, reasons by class that has none yet); (None, {}) for a paper without a module."""
    name = f"adapters.{slug.replace('-', '_')}"
    if importlib.util.find_spec(name) is None:
        return None, {}
    module = importlib.import_module(name)
    return module.ADAPTERS, getattr(module, "PENDING", {})


def load_disputed(slug: str) -> dict[tuple[str, str], str]:
    """Returns reasons by (case, full name of the tensor) for tensors that are held to be wrong."""
    return getattr(importlib.import_module(f"adapters.{slug.replace('-', '_')}"), "DISPUTED", {})


def load_variant_call(slug: str) -> Callable[[str, dict[str, Any]], tuple[str, dict[str, Any]]] | None:
    """The function `variant_call` of a paper's adapters, if it has one."""
    name = f"adapters.{slug.replace('-', '_')}"
    if importlib.util.find_spec(name) is None:
        return None
    return getattr(importlib.import_module(name), "variant_call", None)

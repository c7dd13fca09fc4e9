"""Finds the adapters of a paper: `adapters/<slug with underscores>.py` with `ADAPTERS` and, if needed, `PENDING`."""

import importlib
import importlib.util

from case import Adapter


def load_adapters(slug: str) -> tuple[dict[str, Adapter] | None, dict[str, str]]:
    """Returns (adapters by class, reasons by class that has none yet); (None, {}) for a paper without a module."""
    name = f"adapters.{slug.replace('-', '_')}"
    if importlib.util.find_spec(name) is None:
        return None, {}
    module = importlib.import_module(name)
    return module.ADAPTERS, getattr(module, "PENDING", {})

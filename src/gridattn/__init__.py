"""Attention for data on grids: images, volumes, light fields, multi-view sets, video and sequences."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gridattn.layers import attention_info, create_attention, list_attentions
    from gridattn.models import create_model, list_models, load_model, save_model

__version__ = "0.1.0"

__all__ = [
    "attention_info",
    "create_attention",
    "create_model",
    "list_attentions",
    "list_models",
    "load_model",
    "save_model",
]

_HOME = {
    "attention_info": "gridattn.layers",
    "create_attention": "gridattn.layers",
    "list_attentions": "gridattn.layers",
    "create_model": "gridattn.models",
    "list_models": "gridattn.models",
    "load_model": "gridattn.models",
    "save_model": "gridattn.models",
}


def __getattr__(name: str) -> Any:
    # Rooms are imported when first used, so that `import gridattn` itself costs nothing.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

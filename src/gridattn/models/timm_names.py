"""Importing this module registers every model with timm as `gridattn_<name>`.

Example:
    >>> import timm
    >>> import gridattn.models.timm_names
    >>> timm.create_model("gridattn_nat_mini", num_classes=10, depths=(1, 1, 1, 1)).num_classes
    10
"""

import sys
from typing import Any

from timm.models import register_model

from gridattn.models import create_model, list_models


def _register(name: str) -> None:
    def build(pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise ValueError(f"pretrained=True is not allowed; {name!r} comes without weights, give checkpoint=PATH")
        # What timm's factory passes on about the weights that it could download.
        for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            options.pop(key, None)
        return create_model(name, **options)

    build.__name__ = build.__qualname__ = f"gridattn_{name}"
    build.__doc__ = f"gridattn's {name}; see `gridattn.create_model`."
    setattr(sys.modules[__name__], build.__name__, build)
    register_model(build)


for _name in list_models():
    _register(_name)

"""The register of models: one name a variant, built with the keywords that timm's users know."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatch
from os import PathLike
from typing import Any

from gridattn.models.common import Backbone
from gridattn.models.features import FeatureMaps
from gridattn.models.state import load_weights
from gridattn.ops.common import per_axis

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic", "crop_pct": 0.875}


@dataclass(frozen=True)
class ModelInfo:
    """A registered variant.

    Attributes:
        name: registry name.
        build: the family's class, or a function that returns a backbone.
        config: its keywords for this variant.
        source: title or arXiv id of the paper; "" for a model of our own.
        default_cfg: what differs from ImageNet's usual preprocessing.
    """

    name: str
    build: Callable[..., Backbone]
    config: dict[str, Any]
    source: str = ""
    default_cfg: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keywords that the family takes."""
        return tuple(name for name in inspect.signature(self.build).parameters if name != "self")


_REGISTRY: dict[str, ModelInfo] = {}


def register_variants(
    build: Callable[..., Backbone], variants: Mapping[str, Mapping[str, Any]], *, source: str = "", **default_cfg: Any
) -> None:
    """Enters the variants of a family.

    Args:
        build: the family's class.
        variants: registry name -> keywords of the class.
        source: title or arXiv id of the paper.
        **default_cfg: preprocessing that differs from ImageNet's usual one (`mean`, `std`, `interpolation`, `crop_pct`,
            `first_conv`), and `img_size` where the class does not take it.

    Raises:
        ValueError: a name that is taken.
    """
    for name, config in variants.items():
        if name in _REGISTRY:
            raise ValueError(f"model {name!r} is registered twice")
        _REGISTRY[name] = ModelInfo(name, build, dict(config), source, default_cfg)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, in alphabetical order.

    Example:
        >>> list_models("dinat_s_*large")
        ['dinat_s_large']
    """
    return sorted(name for name in _REGISTRY if fnmatch(name, pattern))


def model_info(name: str) -> ModelInfo:
    """The record of one registered model.

    Raises:
        ValueError: an unknown name; the message offers the closest ones.
    """
    if name not in _REGISTRY:
        close = get_close_matches(str(name), _REGISTRY, n=5, cutoff=0.5)
        hint = f"close to it: {', '.join(close)}" if close else "list_models() gives all names"
        raise ValueError(f"model={name!r} is not known; {hint}")
    return _REGISTRY[name]


def create_model(
    name: str,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | Sequence[int] | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    drop_path_rate: float | None = None,
    checkpoint: str | PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """Builds a registered model.

    Args:
        name: one of `list_models()`.
        num_classes: classes of the head; 0 leaves it out. None takes the variant's own number, 1000 in most.
        in_chans: image channels; None takes the variant's own number, 3 in most.
        img_size: nominal image size, for the tables that depend on it. Models take other sizes too.
        features_only: returns a `FeatureMaps`: images in, a list of (B, C, H, W) maps out.
        out_indices: which maps, with `features_only`; all when None.
        drop_path_rate: stochastic depth; None takes the variant's own rate.
        checkpoint: a weight file, ours or the family's published one. Where `num_classes` is given and the file has
            another number, the head keeps its initial weights.
        **options: further keywords of the family (`model_info(name).options`).

    Returns:
        A `Backbone`, or a `FeatureMaps` with `features_only`. Its `config` holds this call's arguments.

    Raises:
        ValueError: an unknown name or option, or a value that the family refuses.
        CheckpointError: a weight file that cannot be read or belongs to another model.

    Example:
        >>> import torch
        >>> model = create_model("nat_mini", num_classes=10, depths=(1, 1, 1, 1))
        >>> model(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """
    info = model_info(name)
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices={out_indices} is not allowed without features_only=True")
    common = {"num_classes": num_classes, "in_chans": in_chans, "drop_path_rate": drop_path_rate}
    if "img_size" in info.options:
        common["img_size"] = img_size
    if img_size is not None:
        per_axis(img_size, 1 if isinstance(img_size, int) else len(img_size), "img_size")
    given = options | {key: value for key, value in common.items() if value is not None}
    unknown = sorted(set(given) - set(info.options))
    if unknown:
        raise ValueError(f"model {name!r} has no option {unknown[0]!r}; allowed: {', '.join(info.options)}")

    model: Any = info.build(**(info.config | given))
    # The call, for a rebuild; the image size also where the family has no tables that depend on it.
    config: dict[str, Any] = {"name": name, **given, **({} if img_size is None else {"img_size": img_size})}
    model.default_cfg = _default_cfg(info, model, config)
    if features_only:
        model = FeatureMaps(model, out_indices)
        config["features_only"] = True
        if out_indices is not None:
            config["out_indices"] = tuple(out_indices)
    model.config = config
    if checkpoint is not None:
        load_weights(model, checkpoint, keep_head=num_classes is None)
    return model


def _default_cfg(info: ModelInfo, model: Backbone, given: Mapping[str, Any]) -> dict[str, Any]:
    own = dict(info.default_cfg)
    size = own.pop("img_size", info.config.get("img_size", 224))
    size = given.get("img_size", size)
    axes = (size,) * model.rank if isinstance(size, int) else tuple(size)
    cfg = {"architecture": info.name, "num_classes": model.num_classes, "input_size": (model.in_chans, *axes)}
    return cfg | {"first_conv": "patch_embed.proj", "classifier": "head"} | IMAGENET | own

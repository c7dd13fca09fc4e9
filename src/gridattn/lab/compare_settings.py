"""The settings of a comparison, from a recipe and from the command line."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from gridattn.lab.selection import check_options
from gridattn.systems.classify import ClassifySettings
from gridattn.systems.settings import check_least, check_names


@dataclass
class CompareSettings:
    """What a comparison of attentions can be told.

    Args:
        attention: names or patterns of the mechanisms (`select_attentions`).
        out: folder of the results.
        data: dataset, as `load_dataset` takes it.
        image_size: height and width of the images, pixels.
        host: backbone whose attention is exchanged.
        epochs: passes over the training set.
        batch_size: images per step.
        lr: highest learning rate.
        seeds: one training each.
        limit_batches: at most so many batches in every epoch of training and validation; 0 for all.
        options: keywords of single mechanisms, by name.
        train: further settings of `gridattn train classify`.
        image: picture for the attention maps: a file or an embedded photograph; None takes the first validation image.
        query: (row, column) of the query point; two ints are pixels of the picture, floats are fractions of it.
        resume: reuses what `out` holds of trainings with the same settings.
        overwrite: replaces what `out` holds.
    """

    attention: list[str] = field(default_factory=lambda: ["all"])
    out: str = "runs/compare"
    data: str = "textures"
    image_size: int = 64
    host: str = "grid_vit_micro"
    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    seeds: list[int] = field(default_factory=lambda: [0])
    limit_batches: int = 0
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    image: str | None = None
    query: tuple[float, float] = (0.5, 0.5)
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_least("limit_batches", self.limit_batches, 0)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} is not allowed; at least one seed, each once")
        check_options(self.options)
        own = {"data", "image_size", "model", "epochs", "batch_size", "lr", "seed", "output", "attention", "resume"}
        check_names("train setting", self.train, {entry.name for entry in fields(ClassifySettings)} - own)

    def training(self, attention: str, seed: int, output: Path) -> ClassifySettings:
        """The settings of one training."""
        limit = {"limit_train_batches": self.limit_batches, "limit_val_batches": self.limit_batches}
        return ClassifySettings(
            **{
                **self.train,
                "data": self.data,
                "image_size": self.image_size,
                "model": self.host,
                "attention": attention,
                "model_options": {
                    **self.train.get("model_options", {}),
                    **({"attention_options": self.options[attention]} if attention in self.options else {}),
                },
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "lr": self.lr,
                "seed": seed,
                "output": str(output),
                "overwrite": True,
                "trainer": {**(limit if self.limit_batches else {}), **self.train.get("trainer", {})},
            }
        )


def read_settings(recipe: str | None, given: Mapping[str, Any]) -> CompareSettings:
    """Settings from a recipe, with what was given laid over it.

    Args:
        recipe: one of `recipe_names()`, the path of a YAML file, or None.
        given: settings by name; None stands for not given.

    Raises:
        ValueError: an unknown recipe or setting, or a value that is not allowed.
    """
    base: dict[str, Any] = {}
    if recipe is not None:
        own = Path(str(files("gridattn.lab") / "recipes" / f"{recipe}.yaml"))
        path = own if recipe in recipe_names() else Path(recipe)
        if not path.is_file():
            raise ValueError(f"recipe={recipe!r} is not known; allowed: {', '.join(recipe_names())}, or a YAML file")
        base = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(base, dict):
            raise ValueError(f"recipe {recipe!r} is not a mapping of settings")
        check_names(f"setting of recipe {recipe!r}", base, {entry.name for entry in fields(CompareSettings)})
    return CompareSettings(**{**base, **{name: value for name, value in given.items() if value is not None}})


def recipe_names() -> list[str]:
    """Names of the recipes of comparisons that come with the package."""
    folder = files("gridattn.lab") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))

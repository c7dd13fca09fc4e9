"""Settings of a training run: one flat dataclass, filled from a YAML recipe and then from the command line."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import lightning as L
import yaml

from gridattn.ops.common import check_probability

# Set by the run itself from settings of other names, or from its folder.
_OWN_TRAINER_OPTIONS = {
    "max_epochs": "epochs",
    "gradient_clip_val": "clip_grad",
    "callbacks": None,
    "logger": None,
    "plugins": None,
    "default_root_dir": "output",
    "use_distributed_sampler": None,
    "enable_checkpointing": None,
}


@dataclass
class RunSettings:
    """What every trained system can be told; a system adds its own settings in a subclass.

    Args:
        data: dataset, as `load_dataset` takes it.
        output: folder of the run: settings, history, checkpoints, exported weights.
        seed: of the weights, the order of the samples, their augmentation and every other random choice.
        epochs: passes over the training set, warm-up included.
        cooldown_epochs: further passes at the lowest learning rate.
        batch_size: samples per step and process.
        workers: processes that load data; 0 loads in the training process.
        opt: optimiser, a name of timm's factory.
        opt_options: further keywords of the optimiser, such as betas or momentum.
        lr: highest learning rate.
        weight_decay: weight decay; one-dimensional parameters are exempt.
        clip_grad: largest norm of the gradient; 0 for no limit.
        schedule: course of the learning rate, a name of timm's factory, stepped once per optimiser step.
        schedule_options: further keywords of the schedule, such as decay_milestones (epochs) or decay_rate.
        min_lr: lowest learning rate of the schedule.
        warmup_epochs: passes in which the learning rate rises to `lr`.
        warmup_lr: learning rate at the start of the warm-up.
        ema_decay: decay per step of the moving average of the weights that is validated and exported; 0 for none.
        checkpoint_every: steps between checkpoints inside an epoch; 0 keeps to the ends of epochs.
        resume: "auto" goes on from the last checkpoint of `output`; a path goes on from that checkpoint.
        overwrite: replaces the run that `output` holds.
        trainer: any argument of `lightning.Trainer`, such as precision, devices, strategy, accumulate_grad_batches.
    """

    data: str = "textures"
    output: str = "runs/latest"
    seed: int = 0
    epochs: int = 10
    cooldown_epochs: int = 0
    batch_size: int = 64
    workers: int = 0
    opt: str = "adamw"
    opt_options: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    weight_decay: float = 0.05
    clip_grad: float = 0.0
    schedule: str = "cosine"
    schedule_options: dict[str, Any] = field(default_factory=dict)
    min_lr: float = 0.0
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    ema_decay: float = 0.0
    checkpoint_every: int = 0
    resume: str | None = None
    overwrite: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in {"epochs": 1, "batch_size": 1, "cooldown_epochs": 0, "workers": 0, "seed": 0}.items():
            check_least(name, getattr(self, name), least)
        for name in ("lr", "weight_decay", "clip_grad", "min_lr", "warmup_epochs", "warmup_lr", "checkpoint_every"):
            check_least(name, getattr(self, name), 0)
        check_probability("ema_decay", self.ema_decay)
        allowed = set(inspect.signature(L.Trainer).parameters)
        check_names("trainer option", self.trainer, allowed)
        for name in self.trainer:
            if name in _OWN_TRAINER_OPTIONS:
                instead = _OWN_TRAINER_OPTIONS[name]
                raise ValueError(f"trainer.{name} is set by the run" + (f"; use {instead} instead" if instead else ""))

    def stored(self) -> dict[str, Any]:
        """The settings as plain values, without those that only say where and how this one call runs."""
        return {name: value for name, value in asdict(self).items() if name not in ("output", "resume", "overwrite")}


Settings = TypeVar("Settings", bound=RunSettings)


def check_least(name: str, value: Any, least: float) -> None:
    """Raises ValueError unless `value` is a finite number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
        raise ValueError(f"{name}={value!r} is not allowed; it must be at least {least}")


def check_names(kind: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises ValueError, with the nearest allowed names, for the first of `given` that is not in `allowed`."""
    allowed = sorted(allowed)
    for name in given:
        if name not in allowed:
            near = get_close_matches(str(name), allowed, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"allowed: {', '.join(allowed)}"
            raise ValueError(f"{kind} {name!r} is not known; {hint}")


def recipe_names(slug: str) -> list[str]:
    """Names of the recipes that come with a system."""
    folder = files("gridattn.systems") / slug.replace("-", "_") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(slug: str, recipe: str) -> dict[str, Any]:
    """The settings that a recipe sets.

    Args:
        slug: the system.
        recipe: one of `recipe_names(slug)`, or the path of a YAML file.

    Raises:
        ValueError: a recipe that does not exist or is not a YAML mapping.
    """
    own = Path(str(files("gridattn.systems") / slug.replace("-", "_") / "recipes" / f"{recipe}.yaml"))
    path = own if recipe in recipe_names(slug) else Path(recipe)
    if not path.is_file():
        raise ValueError(
            f"recipe={recipe!r} is not known; allowed: {', '.join(recipe_names(slug))}, or the path of a YAML file"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"recipe {str(path)!r} is not a mapping of settings")
    return dict(content)


def parse_settings(slug: str, kind: type[Settings], argv: Sequence[str]) -> Settings:
    """Fills settings from command line arguments.

    `--recipe NAME_OR_PATH` comes first whatever its place, every other `--name value` is laid over it; entries of a
    mapping are set by `--name.key value`. A flag without a value means true (`--overwrite`), or auto (`--resume`).
    `--resume` without a recipe starts from the settings that the run folder holds.

    Raises:
        ValueError: an unknown setting or recipe, or a value of the wrong kind.
    """
    parser = jsonargparse.ArgumentParser(prog=f"gridattn train {slug}", exit_on_error=False)
    help_text = f"settings to start from: {', '.join(recipe_names(slug))}, or the path of a YAML file"
    parser.add_argument("--recipe", type=str, help=help_text)
    parser.add_class_arguments(kind)
    known = {entry.name for entry in fields(kind)}
    argv = _split_flags(argv)
    check_names("setting", (a[2:].split(".")[0] for a in argv if a.startswith("--")), {*known, "recipe", "help"})
    given = dict(pairwise(argv))
    recipe = given.get("--recipe")
    if recipe is None and "--resume" in given:
        stored = Path(given.get("--output", kind.output)) / "settings.yaml"
        recipe = str(stored) if stored.is_file() else None
    base = read_recipe(slug, recipe) if recipe else {}
    check_names(f"setting of recipe {recipe!r}", base, known)
    try:
        parser.set_defaults(base)
        values = parser.parse_args(argv).as_dict()
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    values.pop("recipe")
    return kind(**values)


def _split_flags(argv: Sequence[str]) -> list[str]:
    """Writes `--name=value` as two arguments and gives flags without a value one."""
    parts: list[str] = []
    for argument in argv:
        parts += argument.split("=", 1) if argument.startswith("--") else [argument]
    out: list[str] = []
    for argument, following in zip(parts, [*parts[1:], "--"]):
        out.append(argument)
        if argument.startswith("--") and following.startswith("--") and argument != "--help":
            out.append("auto" if argument == "--resume" else "true")
    return out

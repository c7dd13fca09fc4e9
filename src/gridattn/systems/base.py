"""What all systems share: the record of a system, the optimisation of its network, and the run of its training."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from gridattn.data.sampling import EpochSampler, seed_generators
from gridattn.systems.callbacks import AtomicCheckpointIO, Keeper, StepSeed
from gridattn.systems.output import RunFolder, load_run_checkpoint
from gridattn.systems.settings import RunSettings, parse_settings

# Remarks that do not apply here: the order of samples is resumed by EpochSampler, data loads in the training process by
# choice, short epochs are normal for embedded data, and tree specifications are Lightning's own affair.
TERMINATED = 143  # what a shell reports of a process that SIGTERM ended; Lightning itself would exit with 0
_NO_NEWS = ("dataloader is not", "does not have many workers", "smaller than the logging interval", "LeafSpec")


@dataclass(frozen=True)
class Demo:
    """What the recipe `demo` of a system shows, on embedded data in minutes.

    Attributes:
        metric: entry of what `train` returns.
        threshold: what a working implementation reaches.
        baseline: what `metric` is without learning, and how that is found.
        ablation: settings that take the mechanism out and leave the rest.
        margin: by how much the ablated run ends worse, at least.
        higher_is_better: whether large values of the metric are good.
    """

    metric: str
    threshold: float
    baseline: str
    ablation: Mapping[str, Any] = field(default_factory=dict)
    margin: float = 0.0
    higher_is_better: bool = True


@dataclass(frozen=True)
class System:
    """A task that can be trained, evaluated and run.

    Attributes:
        slug: its name on the command line.
        summary: one line on what it does.
        settings: its settings, a subclass of `RunSettings`.
        train: takes the settings; returns the metrics of the finished run.
        evaluate: takes an exported model (`checkpoint`) and `data`; returns metrics.
        predict: takes an exported model (`checkpoint`), inputs and an `output` folder; returns the predictions.
        demo: what its recipe `demo` shows.
    """

    slug: str
    summary: str
    settings: type[RunSettings]
    train: Callable[[Any], dict[str, Any]]
    evaluate: Callable[..., dict[str, Any]]
    predict: Callable[..., Any]
    demo: Demo | None = None

    def parse(self, argv: Sequence[str]) -> RunSettings:
        """The settings that command line arguments of `gridattn train` describe (`parse_settings`)."""
        return parse_settings(self.slug, self.settings, argv)


class Task(L.LightningModule):
    """A network under training: optimiser and schedule from the settings; a subclass adds the steps.

    Args:
        system: slug of the system, stored in the checkpoints.
        model: the network.
        settings: of the run.
    """

    def __init__(self, system: str, model: nn.Module, settings: RunSettings) -> None:
        super().__init__()
        self.system = system
        self.model = model
        self.settings = settings

    def configure_optimizers(self) -> Any:
        epochs = self.settings.epochs + self.settings.cooldown_epochs
        return self.optimization(max(1, round(self.trainer.estimated_stepping_batches / epochs)))

    def optimization(self, steps_per_epoch: int) -> Any:
        """Optimiser and schedule, as Lightning takes them.

        Raises:
            ValueError: a name or an option that timm refuses.
        """
        settings = self.settings
        options = {"lr": settings.lr, "weight_decay": settings.weight_decay, **settings.opt_options}
        try:
            optimizer = create_optimizer_v2(self.model, settings.opt, **options)
        except (AssertionError, TypeError) as error:
            raise ValueError(f"opt={settings.opt!r} with {options} is not allowed: {error}") from None
        course = {
            "num_epochs": settings.epochs,
            "cooldown_epochs": settings.cooldown_epochs,
            "min_lr": settings.min_lr,
            "warmup_epochs": settings.warmup_epochs,
            "warmup_lr": settings.warmup_lr,
            **settings.schedule_options,
        }
        try:
            scheduler, _ = create_scheduler_v2(
                optimizer, settings.schedule, step_on_epochs=False, updates_per_epoch=steps_per_epoch, **course
            )
        except (AssertionError, TypeError) as error:
            raise ValueError(f"schedule={settings.schedule!r} with {course} is not allowed: {error}") from None
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(num_updates=self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["gridattn"] = {"system": self.system, "settings": self.settings.stored()}


class Loaders(L.LightningDataModule):
    """Batches of a training and a validation set, in an order that depends on the seed and the epoch only.

    Args:
        train: training samples, by draw number.
        val: validation samples, by index.
        settings: of the run.
        position: epoch and batch to begin with. The trainer prefetches before it tells the sampler its epoch, so that a
            resumed run has to say it here.
    """

    def __init__(self, train: Any, val: Any, settings: RunSettings, position: tuple[int, int]) -> None:
        super().__init__()
        self.train, self.val, self.settings, self.position = train, val, settings, position

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train, shuffle=True, epoch=self.position[0], skip=self.position[1])

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val, shuffle=False)

    def _loader(self, data: Any, **order: Any) -> DataLoader:
        settings, trainer = self.settings, self.trainer
        assert trainer is not None
        sampler = EpochSampler(
            data,
            settings.batch_size,
            seed=settings.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            **order,
        )
        return DataLoader(
            data,
            settings.batch_size,
            sampler=sampler,
            collate_fn=getattr(data, "collate", None),
            num_workers=settings.workers,
            persistent_workers=settings.workers > 0,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )


def start_run(settings: RunSettings, same: Sequence[str]) -> RunFolder:
    """Checks the run folder and the checkpoint to resume from, then seeds the generators.

    Args:
        settings: of the run.
        same: settings that a resumed run must share with its checkpoint.

    Raises:
        ValueError: a folder that holds another run, nothing to resume from, or a checkpoint of other settings.
    """
    folder = RunFolder(settings.output)
    path = resume_path(settings)
    if not _is_follower():
        folder.check(resume=path is not None, overwrite=settings.overwrite)
    if path is not None:
        stored = load_run_checkpoint(path)["gridattn"]["settings"]
        for name in same:
            if stored.get(name) != getattr(settings, name):
                raise ValueError(
                    f"{name}={getattr(settings, name)!r} differs from {stored.get(name)!r}, that of the run to resume"
                )
    seed_generators(settings.seed)
    return folder


def resume_path(settings: RunSettings) -> str | None:
    """The checkpoint that `settings.resume` names, None where the run starts anew."""
    if settings.resume is None:
        return None
    if settings.resume != "auto":
        return settings.resume
    last = RunFolder(settings.output).last
    if not last.is_file():
        raise ValueError(f"output={settings.output!r} holds no checkpoint to resume from")
    return str(last)


def _is_follower() -> bool:
    """Whether another process of this run owns the run folder."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    return rank_zero_only.rank != 0


def fit(task: Task, train: Any, val: Any, folder: RunFolder, *, monitor: str, mode: str) -> list[dict[str, float]]:
    """Trains `task` until its settings are met.

    Args:
        task: the network under training.
        train: training samples, by draw number.
        val: validation samples, by index; a draw of -1 must give a sample that the metrics pass over.
        folder: the run folder.
        monitor: the logged validation metric that decides which epoch is best.
        mode: "max" or "min".

    Returns:
        The history, one row an epoch. The states of the best and of the last epoch lie in `folder`.

    Raises:
        ValueError: settings that Lightning or timm refuse.
    """
    settings = task.settings
    path = resume_path(settings)
    keeper = Keeper(folder, monitor, mode, settings.checkpoint_every)
    if path is not None:
        keeper.load_state_dict(load_run_checkpoint(path)["callbacks"][keeper.state_key])
    callbacks: list[Callback] = [StepSeed(settings.seed), keeper]
    if settings.ema_decay:
        if "fsdp" in str(settings.trainer.get("strategy", "")):
            raise ValueError(f"ema_decay={settings.ema_decay} is not available with the strategy fsdp; 0 is allowed")
        callbacks.append(WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay)))
    with _quiet():
        try:
            trainer = L.Trainer(**_trainer_options(settings, folder), callbacks=callbacks)
            # What cannot work is found out before an earlier run is removed.
            task.optimization(steps_per_epoch=1)
            EpochSampler(train, settings.batch_size, shuffle=True, world_size=trainer.world_size)
            if trainer.is_global_zero:
                if path is None:
                    folder.clear()
                folder.write_settings(task.system, settings.stored())
            trainer.fit(
                task, datamodule=Loaders(train, val, settings, keeper.position), ckpt_path=path, weights_only=True
            )
        except MisconfigurationException as error:
            raise ValueError(" ".join(str(error).split())) from None
        except SIGTERMException:
            raise SystemExit(TERMINATED) from None
    return keeper.history


def _trainer_options(settings: RunSettings, folder: RunFolder) -> dict[str, Any]:
    return {
        "devices": 1,
        "log_every_n_steps": 10,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "enable_progress_bar": sys.stderr.isatty(),
        "max_epochs": settings.epochs + settings.cooldown_epochs,
        "gradient_clip_val": settings.clip_grad or None,
        "use_distributed_sampler": False,
        "default_root_dir": str(folder.path),
        "logger": TensorBoardLogger(str(folder.path), name=folder.tensorboard.name, version=""),
        "plugins": [AtomicCheckpointIO()],
        **settings.trainer,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Holds back Lightning's banner and the remarks of `_NO_NEWS`."""
    banner = logging.getLogger("lightning.pytorch"), logging.getLogger("lightning.fabric")
    levels = [logger.level for logger in banner]
    with warnings.catch_warnings():
        for text in _NO_NEWS:
            warnings.filterwarnings("ignore", message=f"(?s).*{text}")
        try:
            for logger in banner:
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(banner, levels):
                logger.setLevel(level)


def model_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of `Task.model` in a run's checkpoint; the averaged ones where the run averages."""
    return {name.removeprefix("model."): t for name, t in checkpoint["state_dict"].items() if name.startswith("model.")}


def pick_device(device: str | None) -> torch.device:
    """The named device; without a name the accelerator of this machine, else the CPU.

    Raises:
        ValueError: a name that torch does not know.
    """
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not allowed: {str(error).splitlines()[0]}") from None

"""What a training run adds to Lightning: seeds by step, whole checkpoints, and a history that survives a kill."""

import logging
import time
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gridattn.data.sampling import seed_generators
from gridattn.systems.output import RunFolder, atomic, write_csv

log = logging.getLogger("gridattn")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then moves it there: a kill leaves the old one or the new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic(path) as temporary:
            torch.save(checkpoint, temporary)


class StepSeed(Callback):
    """Seeds every generator from (seed, process, epoch, batch) before each step.

    Dropout, drop path and mixup then do not depend on how the process came to that step.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        key = (self.seed, trainer.global_rank, trainer.current_epoch, batch_idx)
        seed_generators(*key)
        torch.manual_seed(torch.default_generator.initial_seed())  # the accelerators' generators too


class Keeper(Checkpoint):
    """Keeps the run folder: one history row an epoch, the last checkpoint and the best one.

    Lightning's own ModelCheckpoint stores absolute paths, so that a moved run folder cannot be resumed; this one stores
    the best value and the history in the checkpoint itself.

    Args:
        folder: the run folder.
        monitor: validation metric that decides which epoch is best; the first of equal ones wins.
        mode: "max" or "min".
        every: batches between checkpoints inside an epoch; 0 for none. They are taken where no gradient is pending.

    Attributes:
        position: epoch and batch that come next, as of the last checkpoint.
    """

    def __init__(self, folder: RunFolder, monitor: str, mode: str, every: int) -> None:
        self.folder, self.monitor, self.every = folder, monitor, every
        self.sign = 1.0 if mode == "max" else -1.0
        self.best: float | None = None
        self.history: list[dict[str, float]] = []
        self.position = (0, 0)
        self._validated = False
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "history": self.history, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.history = state_dict["best"], list(state_dict["history"])
        self.position = state_dict["position"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()  # an epoch that is resumed in its middle has no start of its own

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        if not self.every or done % self.every or done % trainer.accumulate_grad_batches:
            return
        # After the last batch the checkpoint of the epoch's end follows at once.
        if done < trainer.num_training_batches:
            self.position = (trainer.current_epoch, done)
            trainer.save_checkpoint(self.folder.last)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        seconds = round(time.monotonic() - self._started, 3)
        epoch = trainer.current_epoch + 1
        self.history.append({"epoch": epoch, "step": trainer.global_step, **metrics, "seconds": seconds})
        value = self.sign * metrics[self.monitor] if self._validated and self.monitor in metrics else None
        self._validated = False
        self.position = (epoch, 0)
        if value is not None and (self.best is None or value > self.best):
            self.best = value
            trainer.save_checkpoint(self.folder.best)
        trainer.save_checkpoint(self.folder.last)
        if trainer.is_global_zero:
            write_csv(self.folder.history, self.history)
        text = "  ".join(f"{name} {number:.4g}" for name, number in metrics.items())
        rank_zero_only(log.info)("epoch %d/%s  %s  (%.1f s)", epoch, trainer.max_epochs, text, seconds)

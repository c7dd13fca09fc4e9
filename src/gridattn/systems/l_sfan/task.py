"""Settings and the training step of L-SFAN."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric

from gridattn.ops.common import check_choice
from gridattn.systems.base import Task
from gridattn.systems.l_sfan.augment import SignalAugment
from gridattn.systems.l_sfan.metrics import NOT_LABELLED, overall, weighted_loss, window_confusion
from gridattn.systems.l_sfan.model import LSFAN, MIN_FRAMES
from gridattn.systems.settings import RunSettings, check_least

PROTOCOLS = ("split", "loso")


@dataclass
class SensorSettings(RunSettings):
    """Settings of the training of L-SFAN.

    Args:
        data: recordings: tension, watch, emopain:PATH or folder:PATH.
        window: frames of a window.
        hop: frames between the starts of windows of one recording.
        protocol: split trains one network and validates it on val_subjects; loso trains one for every subject, on all
            others.
        val_subjects: subjects held out from training; None takes the dataset's own, else a fifth drawn by the seed.
        channels: channels of the two convolutions.
        num_heads: heads of the attention; 0 takes the attention out.
        attend: what attends to each other: sensors or channels.
        pool: axis that is averaged before the attention: time, sensor or both.
        hidden: width of a hidden layer of the classifier; None for a linear classifier.
        batch_norm: batch normalisation after the convolutions.
        residual: adds the tokens to the attended ones.
        dropout: after each convolution and before the classifier.
        class_weights: weighs classes by their inverse frequency in training.
        focal_gamma: exponent of the focal loss; 0 for cross entropy.
        augment: jitter, shortest and sensor_dropout.
    """

    data: str = "tension"
    window: int = 180
    hop: int = 45
    protocol: str = "split"
    val_subjects: list[int | str] | None = None
    channels: list[int] = field(default_factory=lambda: [4, 16])
    num_heads: int = 4
    attend: str = "sensors"
    pool: str = "time"
    hidden: int | None = None
    batch_norm: bool = True
    residual: bool = False
    dropout: float = 0.25
    class_weights: bool = True
    focal_gamma: float = 0.0
    augment: dict[str, Any] = field(default_factory=dict)
    opt: str = "adam"
    lr: float = 3e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("window", self.window, MIN_FRAMES)
        check_least("hop", self.hop, 1)
        check_least("focal_gamma", self.focal_gamma, 0)
        check_choice("protocol", self.protocol, PROTOCOLS)
        SignalAugment.of(self.augment)
        if self.val_subjects is not None:
            self.val_subjects = [str(name) for name in self.val_subjects]
            if not self.val_subjects:
                raise ValueError("val_subjects=[] is not allowed; at least one subject is needed, or none named")
        if self.protocol == "loso":
            if self.val_subjects is not None:
                raise ValueError(f"val_subjects={self.val_subjects} is not allowed with protocol='loso'")
            if self.trainer.get("devices", 1) not in (1, "1") or self.trainer.get("num_nodes", 1) != 1:
                raise ValueError("protocol='loso' trains on one device; trainer.devices=1 is allowed")
        LSFAN(self.window, self.window, **self.architecture())  # checks what does not depend on the data

    def architecture(self) -> dict[str, Any]:
        """Keywords of `LSFAN` that do not depend on the data."""
        names = ("channels", "num_heads", "attend", "pool", "hidden", "batch_norm", "residual", "dropout")
        return {name: getattr(self, name) for name in names}


class SensorTask(Task):
    """Class-weighted cross entropy on windows.

    Logs train_loss, val_loss (weighted as in training), val_accuracy, val_macro_f1, val_mcc and lr.

    Args:
        model: the network.
        settings: of the run.
        weights: (K), a weight for every class.
    """

    def __init__(self, model: LSFAN, settings: SensorSettings, weights: Tensor) -> None:
        super().__init__("l-sfan", model, settings)
        self.gamma = settings.focal_gamma
        self.register_buffer("weights", weights, persistent=False)
        self.confusion = window_confusion(len(weights))
        self.val_loss = MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, labels = batch
        loss = weighted_loss(self.model(x), labels, self.weights, self.gamma)  # pyright: ignore[reportArgumentType]
        common: dict[str, Any] = {"on_epoch": True, "on_step": False, "batch_size": len(x)}
        self.log("train_loss", loss, prog_bar=True, sync_dist=True, **common)
        optimizer: Any = self.optimizers()
        self.log("lr", optimizer.param_groups[0]["lr"], reduce_fx=max, **common)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, labels = batch
        logits = self.model(x)
        self.confusion.update(logits.argmax(1), labels)
        known = labels != NOT_LABELLED
        if known.any():
            loss = weighted_loss(logits, labels, self.weights, self.gamma)  # pyright: ignore[reportArgumentType]
            self.val_loss.update(loss, known.sum())

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", self.val_loss.compute(), sync_dist=True)
        for name, value in overall(self.confusion.compute().cpu()).items():
            self.log(f"val_{name}", value, prog_bar=name == "accuracy", sync_dist=True)
        self.val_loss.reset()
        self.confusion.reset()

"""The training step of a classifier."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from gridattn.ops.common import check_probability
from gridattn.systems.base import Task
from gridattn.systems.settings import RunSettings, check_least

PADDING = -1


@dataclass
class ClassifySettings(RunSettings):
    """Settings of the training of an image classifier.

    Args:
        model: backbone, a name that `create_model` takes.
        attention: attention mechanism, for backbones that take any of them.
        model_options: further keywords of the backbone.
        weights: weight file, or folder of an exported model, to start from; the head is new where the number of classes
            differs.
        image_size: height and width of the images, pixels.
        augment: keywords of `timm.data.create_transform` for training, laid over the dataset's own.
        verify: decodes every file of a folder before training, to pass over the damaged ones.
        drop_path_rate: probability of passing over the deepest residual branch; None takes the backbone's own.
        label_smoothing: part of the target spread over all classes.
        mixup: parameter of the Beta distribution of mixup; 0 for none.
        cutmix: the same for cutmix; where both are set, each batch takes one of them at random.
    """

    model: str = "grid_vit_micro"
    attention: str | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    image_size: int = 64
    augment: dict[str, Any] = field(default_factory=dict)
    verify: bool = True
    drop_path_rate: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_path_rate is not None:
            check_probability("drop_path_rate", self.drop_path_rate)
        check_probability("label_smoothing", self.label_smoothing)
        check_least("mixup", self.mixup, 0)
        check_least("cutmix", self.cutmix, 0)
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"batch_size={self.batch_size} is odd; mixup and cutmix pair samples and need an even one")


class ClassifyTask(Task):
    """Cross entropy on images, with mixup, cutmix and label smoothing.

    Logs train_loss, val_loss, val_accuracy (top 1, in 0..1) and lr.

    Args:
        model: images (B, 3, H, W) -> logits (B, num_classes).
        settings: of the run.
        num_classes: number of classes.
    """

    def __init__(self, model: nn.Module, settings: ClassifySettings, num_classes: int) -> None:
        super().__init__("classify", model, settings)
        self.smoothing = settings.label_smoothing
        self.mixup = None
        if settings.mixup or settings.cutmix:
            self.mixup = Mixup(settings.mixup, settings.cutmix, label_smoothing=self.smoothing, num_classes=num_classes)
        self.val_loss = MeanMetric()
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=PADDING)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, target = batch
        if self.mixup is None:
            loss = F.cross_entropy(self(images), target, label_smoothing=self.smoothing)
        else:
            images, target = self.mixup(images, target)
            loss = F.cross_entropy(self(images), target)
        self.log(
            "train_loss", loss, on_epoch=True, on_step=False, prog_bar=True, batch_size=len(images), sync_dist=True
        )
        optimizer: Any = self.optimizers()
        self.log(
            "lr", optimizer.param_groups[0]["lr"], on_epoch=True, on_step=False, batch_size=len(images), reduce_fx=max
        )
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, target = batch
        logits = self(images).float()
        count = (target != PADDING).sum()
        loss = F.cross_entropy(logits, target, ignore_index=PADDING, reduction="sum") / count.clamp_min(1)
        self.val_loss.update(loss, count)
        self.val_accuracy.update(logits, target)
        self.log("val_loss", self.val_loss, batch_size=len(images))
        self.log("val_accuracy", self.val_accuracy, prog_bar=True, batch_size=len(images))


def classification_report(logits: Tensor, target: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Metrics of a set of predictions.

    Args:
        logits: (N, classes).
        target: (N,), class indices.
        classes: class names.

    Returns:
        images, loss (mean cross entropy), accuracy (top 1), balanced_accuracy (mean of the classes' recalls), per_class
        (name -> images, recall, precision; None where there is nothing to divide by) and confusion (row: true class,
        column: predicted class).
    """
    n = len(classes)
    predicted = logits.argmax(1)
    confusion = torch.bincount(target * n + predicted, minlength=n * n).view(n, n)
    hits, true, claimed = confusion.diag().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
    recalls = [hit / count if count else None for hit, count in zip(hits, true)]
    present = [recall for recall in recalls if recall is not None]
    return {
        "images": len(target),
        "loss": float(F.cross_entropy(logits.double(), target)),
        "accuracy": sum(hits) / len(target),
        "balanced_accuracy": sum(present) / len(present),
        "per_class": {
            name: {"images": true[i], "recall": recalls[i], "precision": hits[i] / claimed[i] if claimed[i] else None}
            for i, name in enumerate(classes)
        },
        "confusion": confusion.tolist(),
    }

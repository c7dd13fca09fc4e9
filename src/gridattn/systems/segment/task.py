"""The training step of semantic segmentation."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from gridattn.ops.common import check_choice, check_probability, per_axis
from gridattn.systems.base import Task
from gridattn.systems.segment.augment import Augment
from gridattn.systems.segment.heads import HEADS
from gridattn.systems.segment.inference import View, class_probabilities
from gridattn.systems.segment.losses import IGNORE, pixel_cross_entropy
from gridattn.systems.segment.metrics import overall, pixel_confusion
from gridattn.systems.segment.model import Segmenter
from gridattn.systems.settings import RunSettings, check_least


@dataclass
class SegmentSettings(RunSettings):
    """Settings of the training of a segmentation network.

    Args:
        data: dataset: photographs, mni152, ade20k:PATH or folder:PATH.
        model: backbone, a name that `create_model` takes.
        attention: attention mechanism, for backbones that take any of them.
        model_options: further keywords of the backbone; img_size is the crop's where no weights are given.
        out_indices: which maps of the backbone the head takes, finest first; None takes the last four.
        in_chans: 3 reads images in colour, 1 in grey.
        weights: to start from: weights of the backbone (ours or as published), a whole segmentation network as
            published, or a run or exported model of this system or of classify.
        drop_path_rate: probability of passing over the deepest residual branch; None takes the backbone's own.
        head: upernet or semantic_fpn.
        head_options: keywords of the head: channels, dropout, norm (batch or layer), pool_scales or fpn_channels.
        aux_weight: weight of the loss of an auxiliary head on the map before the coarsest; 0 for no such head.
        aux_channels: channels of the auxiliary head.
        crop_size: height and width of the training crops, pixels; one number for both.
        resize: longer and shorter side that images are fitted to, in training times a random factor; None keeps sizes.
        window: height and width of the windows that validation images are cut into; None shows them whole.
        stride: step between windows; None takes two thirds of the window.
        augment: scale ([least, most]), hflip, vflip, photometric and max_class_share.
        reduce_zero_label: 0 in masks is no class and k is class k - 1; None does so in ade20k alone.
        verify: reads every file of a folder before training, to pass over the damaged ones.
    """

    data: str = "photographs"
    model: str = "grid_vit_4stage_micro"
    attention: str | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    out_indices: list[int] | None = None
    in_chans: int = 3
    weights: str | None = None
    drop_path_rate: float | None = None
    head: str = "upernet"
    head_options: dict[str, Any] = field(default_factory=dict)
    aux_weight: float = 0.4
    aux_channels: int = 256
    crop_size: int | list[int] = 64
    resize: list[int] | None = None
    window: int | list[int] | None = None
    stride: int | list[int] | None = None
    augment: dict[str, Any] = field(default_factory=dict)
    reduce_zero_label: bool | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("head", self.head, tuple(HEADS))
        if self.drop_path_rate is not None:
            check_probability("drop_path_rate", self.drop_path_rate)
        check_least("aux_weight", self.aux_weight, 0)
        check_least("aux_channels", self.aux_channels, 1)
        if self.batch_size == 1 and self.head == "upernet" and self.head_options.get("norm", "batch") == "batch":
            raise ValueError(
                "batch_size=1 leaves batch normalisation of the map's mean one value a channel; "
                "head_options.norm=layer or a batch_size of at least 2 is allowed"
            )
        per_axis(self.crop_size, 2, "crop_size", minimum=8)
        Augment.of(self.augment)
        _ = self.view

    @property
    def crop(self) -> tuple[int, int]:
        """Height and width of the training crops."""
        height, width = per_axis(self.crop_size, 2, "crop_size")
        return height, width

    @property
    def view(self) -> View:
        """How validation images are shown to the network."""
        return View.of(resize=self.resize, window=self.window, stride=self.stride)


class SegmentTask(Task):
    """Cross entropy on pixels, of the head and, with a smaller weight, of an auxiliary head.

    Logs train_loss, val_loss (mean over the labelled pixels), val_miou, val_pixel_accuracy, val_mean_class_accuracy (in
    0..1) and lr. Validation shows whole images, one after the other, at their own sizes.

    Args:
        model: the network.
        settings: of the run.
        num_classes: number of classes.
    """

    model: Segmenter

    def __init__(self, model: Segmenter, settings: SegmentSettings, num_classes: int) -> None:
        super().__init__("segment", model, settings)
        self.aux_weight, self.view = settings.aux_weight, settings.view
        self.confusion = pixel_confusion(num_classes)
        self.val_loss = MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, target = batch
        scores, aux = self.model.forward_with_aux(images)
        loss = pixel_cross_entropy(scores, target)
        if aux is not None:
            loss = loss + self.aux_weight * pixel_cross_entropy(aux, target)
        common: dict[str, Any] = {"on_epoch": True, "on_step": False, "batch_size": len(images)}
        self.log("train_loss", loss, prog_bar=True, sync_dist=True, **common)
        optimizer: Any = self.optimizers()
        self.log("lr", optimizer.param_groups[0]["lr"], reduce_fx=max, **common)
        return loss

    def validation_step(self, batch: list[tuple[Tensor, Tensor]], batch_idx: int) -> None:
        for image, target in batch:
            measure(class_probabilities(self.model, image, self.view), target, self.confusion, self.val_loss)

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", self.val_loss.compute(), sync_dist=True)
        for name, value in overall(self.confusion.compute()).items():
            self.log(f"val_{name}", value, prog_bar=name == "miou", sync_dist=True)
        self.val_loss.reset()
        self.confusion.reset()


def measure(probabilities: Tensor, target: Tensor, confusion: Any, loss: Any) -> None:
    """Adds one image to the confusion matrix and to the mean of -log p(true class) over the labelled pixels.

    Args:
        probabilities: (K, H, W).
        target: (H, W), class indices, or 255.
        confusion: from `pixel_confusion`.
        loss: a torchmetrics mean.
    """
    confusion.update(probabilities.argmax(0)[None], target[None])
    known = target != IGNORE
    if known.any():
        likelihood = probabilities.gather(0, target.where(known, 0)[None])[0][known]
        loss.update(-likelihood.clamp_min(torch.finfo(torch.float32).tiny).log())

"""The training step of a detector."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gridattn.ops.common import check_choice, check_probability
from gridattn.systems.base import Task
from gridattn.systems.detect.metrics import AveragePrecision, nothing_found
from gridattn.systems.detect.model import DETECTORS, Detector
from gridattn.systems.settings import RunSettings, check_least


@dataclass
class DetectSettings(RunSettings):
    """Settings of the training of a detector.

    Args:
        data: scenes, or coco:PATH (`load_detection_data`).
        detector: retinanet, faster_rcnn or mask_rcnn.
        model: backbone, a name that `create_model` takes.
        attention: attention mechanism, for backbones that take any of them.
        model_options: further keywords of the backbone.
        weights: weight file of the backbone to start from, ours or the family's published one.
        image_size: shorter side of the images outside of training, and the side of the scenes, pixels.
        max_size: the longer side does not exceed this.
        train_sizes: shorter sides in training, of which each image takes one at random; empty takes image_size.
        flip: probability of mirroring a training image.
        crop: smallest and largest side of the region that half of the training images are cut to; empty for none.
        crop_sizes: shorter sides before that cut.
        channels: of the feature pyramid.
        head_dim: width of the linear layers on regions (R-CNN).
        levels: of the feature pyramid.
        finest: smallest stride of the pyramid; None takes 8 for retinanet and 4 otherwise.
        anchor_scale: side of the smallest anchor over the stride; None takes 4 for retinanet and 8 otherwise.
        head_groups: groups of a GroupNorm in the towers of retinanet; 0 for none.
    """

    data: str = "scenes"
    detector: str = "retinanet"
    model: str = "grid_vit_4stage_micro"
    attention: str | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    image_size: int = 96
    max_size: int = 1333
    train_sizes: list[int] = field(default_factory=list)
    flip: float = 0.5
    crop: list[int] = field(default_factory=list)
    crop_sizes: list[int] = field(default_factory=list)
    channels: int = 256
    head_dim: int = 1024
    levels: int = 5
    finest: int | None = None
    anchor_scale: float | None = None
    head_groups: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("detector", self.detector, DETECTORS)
        check_probability("flip", self.flip)
        for name in ("image_size", "max_size", "channels", "head_dim", "levels"):
            check_least(name, getattr(self, name), 1)
        check_least("head_groups", self.head_groups, 0)
        if self.anchor_scale is not None:
            check_least("anchor_scale", self.anchor_scale, 0.5)
        for name in ("train_sizes", "crop", "crop_sizes"):
            for size in getattr(self, name):
                check_least(name, size, 1)
        if self.crop and (len(self.crop) != 2 or self.crop[0] > self.crop[1] or not self.crop_sizes):
            raise ValueError(
                f"crop={self.crop} is not allowed; it takes the least and the largest side, and crop_sizes"
            )


class DetectTask(Task):
    """The sum of the losses of a detector; COCO's average precision as validation.

    Logs train_loss and its parts, lr, and val_box_ap, val_box_ap50 ... val_mask_ap ... (`AveragePrecision`).

    Args:
        model: the detector.
        settings: of the run.
    """

    def __init__(self, model: Detector, settings: DetectSettings) -> None:
        super().__init__("detect", model, settings)
        self.has_masks = model.has_masks
        self.precision = AveragePrecision(model.has_masks)

    def training_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.model(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        parts = {f"train_{name.removeprefix('loss_')}": value for name, value in losses.items()}
        how = {"on_epoch": True, "on_step": False, "batch_size": len(images)}
        self.log("train_loss", loss, prog_bar=True, sync_dist=True, **how)
        self.log_dict(parts, sync_dist=True, **how)
        optimizer: Any = self.optimizers()
        self.log("lr", optimizer.param_groups[0]["lr"], reduce_fx=max, **how)
        return loss

    def validation_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> None:
        images, targets = batch
        # Every process adds the same number of images; of padding, one without objects and without detections.
        for image, target in zip(images, targets):
            padding = target["image_id"] < 0
            found = nothing_found(image, self.has_masks) if padding else self.model([image])[0]
            self.precision.update([found], [target])

    def on_validation_epoch_end(self) -> None:
        values = self.precision.compute()
        self.precision.reset()
        self.log_dict({f"val_{name}": value for name, value in values.items()})

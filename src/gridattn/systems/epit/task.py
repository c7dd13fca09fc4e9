"""The training step of light-field super-resolution."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gridattn.ops.common import check_choice
from gridattn.systems.base import Task
from gridattn.systems.epit.data import Degradation
from gridattn.systems.epit.metrics import SceneMeans, scene_scores
from gridattn.systems.epit.model import EPIT, SCALES
from gridattn.systems.epit.tiles import STRIDE, TILE, check_tiling, super_resolve
from gridattn.systems.settings import RunSettings, check_least


@dataclass
class EpitSettings(RunSettings):
    """Settings of the training of a super-resolution network for light fields.

    Args:
        data: dataset: photographs, sinusoids, motorcycle or folder:PATH.
        scale: how many times as high and wide the views become: 2, 3 or 4.
        ang_res: views along each axis in training and validation, those in the middle of the light fields.
        channels: channels of the network.
        blocks: alternating filters of the network.
        num_heads: heads of their transformers; must divide twice the channels.
        epipolar: with false the transformers are left out.
        weights: to start from: published ones, or a run or an exported model of this system.
        patch: height and width of the training patches, pixels of low resolution.
        augment: whether patches are mirrored and transposed at random.
        flicker: least and largest gain by which every low-resolution view is multiplied; the network has to undo it.
        noise: largest deviation of the noise of low-resolution light fields, grey levels of 255.
        tile: height and width of the tiles that validation scenes are cut into; 0 shows them whole.
        stride: step between tiles.
    """

    data: str = "photographs"
    scale: int = 2
    ang_res: int = 5
    channels: int = 64
    blocks: int = 5
    num_heads: int = 8
    epipolar: bool = True
    weights: str | None = None
    patch: int = 32
    augment: bool = True
    flicker: list[float] | None = None
    noise: float = 0.0
    tile: int = TILE
    stride: int = STRIDE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scale", self.scale, SCALES)
        for name, least in {"ang_res": 1, "channels": 1, "blocks": 1, "patch": 4, "noise": 0, "tile": 0}.items():
            check_least(name, getattr(self, name), least)
        if self.tile:
            check_tiling(self.tile, self.stride)
        if self.flicker is not None and not (len(self.flicker) == 2 and 0 < self.flicker[0] <= self.flicker[1]):
            raise ValueError(f"flicker={self.flicker!r} is not allowed; two gains above 0 in rising order are")

    @property
    def degradation(self) -> Degradation:
        """How low resolution is made of high resolution."""
        return Degradation(self.scale, tuple(self.flicker) if self.flicker else None, self.noise)  # pyright: ignore


class EpitTask(Task):
    """Mean absolute error of RGB: L = mean |SR - HR| over colours, views and pixels.

    Only Y is learned: Cb and Cr are the same whatever the weights, so that their part of the error is constant.

    Logs train_loss, val_psnr, val_ssim, val_ssim_range1, val_centre_psnr (means over views, scenes and sets) and lr.

    Args:
        model: the network.
        settings: of the run.
        groups: number of sets that the validation scenes belong to.
    """

    model: EPIT

    def __init__(self, model: EPIT, settings: EpitSettings, groups: int) -> None:
        super().__init__("epit", model, settings)
        self.tile, self.stride = settings.tile, settings.stride
        self.scores = SceneMeans(groups)

    def forward(self, fields: Tensor) -> Tensor:
        return self.model(fields)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        low, high = batch
        loss = F.l1_loss(self.model(low), high)
        common: dict[str, Any] = {"on_epoch": True, "on_step": False, "batch_size": len(low)}
        self.log("train_loss", loss, prog_bar=True, sync_dist=True, **common)
        optimizer: Any = self.optimizers()
        self.log("lr", optimizer.param_groups[0]["lr"], reduce_fx=max, **common)
        return loss

    def validation_step(self, batch: list[tuple[Tensor, Tensor, int]], batch_idx: int) -> None:
        for low, high, group in batch:
            if group >= 0:
                ours = super_resolve(self.model, low, self.model.scale, tile=self.tile, stride=self.stride)
                self.scores.update(scene_scores(ours, high), group)

    def on_validation_epoch_end(self) -> None:
        for name, value in self.scores.compute().items():
            self.log(f"val_{name}", torch.tensor(value), prog_bar=name == "psnr", sync_dist=True)
        self.scores.reset()

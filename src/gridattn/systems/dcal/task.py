"""Settings and the training steps of DCAL."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from gridattn.ops.common import check_choice, check_probability
from gridattn.systems.base import Task
from gridattn.systems.dcal.losses import batch_hard_triplet, dynamic_total
from gridattn.systems.dcal.metrics import PADDING, Retrieval
from gridattn.systems.dcal.model import DCAL, build_dcal
from gridattn.systems.dcal.transforms import Views
from gridattn.systems.settings import RunSettings, check_least

TINY = torch.finfo(torch.float32).tiny
CHOICES = ("sa", "sa+glca", "sa+pwca", "sa+glca+pwca")


@dataclass
class DualSettings(RunSettings):
    """Settings of the training of a vision transformer by dual cross-attention.

    Args:
        data: pictures by sort (beetles, marks, cub:PATH, cars:PATH, aircraft:PATH) or by identity (beetles-reid,
            marks-reid, market:PATH, duke:PATH, msmt17:PATH, veri:PATH).
        model: micro, deit_tiny, deit_small, deit_base, vit_base or r50_vit_base.
        model_options: further keywords of the network, such as depth or mlp_ratio.
        weights: pre-trained weights to start from: a timm or DeiT checkpoint, a Google .npz, or a trained folder.
        branches: sa, sa+glca, sa+pwca or sa+glca+pwca; sa alone is the plain vision transformer.
        ratio: part of the patches that the global-local branch selects.
        glca_depth: blocks of the global-local branch.
        pwca_depth: blocks that the pair-wise branch runs through; None for all.
        pair: what of the partner is attended to: stream or figure.
        readout: what is read of the global-local branch: cls or local_mean.
        image_size: height and width of the images, pixels.
        resize: height and width to bring pictures to before image_size is cut out; None brings them to image_size.
        flip: probability of mirroring a training picture.
        pad: pixels around a training picture before image_size is cut out at random.
        erase: probability of blanking a rectangle of a training picture.
        drop_path_rate: stochastic depth, growing linearly to this rate.
        instances: pictures of an identity in a batch, for data by identity; batch_size then counts identities.
        triplet_margin: for data by identity; None takes the soft margin.
    """

    data: str = "beetles"
    model: str = "deit_tiny"
    model_options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    branches: str = "sa+glca+pwca"
    ratio: float = 0.1
    glca_depth: int = 1
    pwca_depth: int | None = None
    pair: str = "stream"
    readout: str = "cls"
    image_size: list[int] = field(default_factory=lambda: [448, 448])
    resize: list[int] | None = None
    flip: float = 0.0
    pad: int = 0
    erase: float = 0.0
    drop_path_rate: float = 0.0
    instances: int = 4
    triplet_margin: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("branches", self.branches, CHOICES)
        for name in ("flip", "erase"):
            check_probability(name, getattr(self, name))
        check_least("pad", self.pad, 0)
        check_least("instances", self.instances, 2)
        if self.triplet_margin is not None:
            check_least("triplet_margin", self.triplet_margin, 0)
        if "pwca" in self.branches and self.pwca_depth == 0:
            raise ValueError(f"pwca_depth=0 is not allowed with branches={self.branches!r}; it leaves PWCA out")
        if "glca" in self.branches and self.glca_depth == 0:
            raise ValueError(f"glca_depth=0 is not allowed with branches={self.branches!r}; it leaves GLCA out")
        self.views()
        with torch.device("meta"):
            build_dcal(**self.network(2, neck=False))  # checks what does not depend on the data

    def views(self) -> Views:
        """How pictures become tensors."""
        resize = None if self.resize is None else (self.resize[0], self.resize[-1])
        return Views(tuple(self.image_size), resize)  # pyright: ignore[reportArgumentType]

    def network(self, num_classes: int, *, neck: bool) -> dict[str, Any]:
        """Keywords of `build_dcal`."""
        names = ("model", "ratio", "pair", "readout", "drop_path_rate")
        return {
            **{name: getattr(self, name) for name in names},
            "img_size": list(self.image_size),
            "glca_depth": self.glca_depth if "glca" in self.branches else 0,
            "pwca_depth": self.pwca_depth if "pwca" in self.branches else 0,
            "num_classes": num_classes,
            "neck": neck,
            **self.model_options,
        }


def partners(batch: int) -> Tensor:
    """The partner of each image of a batch, (B) int64: the one half a batch further.

    The order of the training samples is random, and so are the pairs. Two processes, between which a batch is dealt
    out in turn, make the same pairs as one.

    Example:
        >>> partners(4).tolist(), partners(1).tolist()
        ([2, 3, 0, 1], [0])
    """
    return torch.arange(batch).roll(batch // 2)


class DualTask(Task):
    """The branches' losses under dynamic weights; a subclass says what the loss of a branch is and what is measured.

    Logs train_loss (of all branches, weighed), train_loss_sa and so on, train_accuracy (of SA) and lr.

    Args:
        model: the network.
        settings: of the run.
    """

    model: DCAL

    def __init__(self, model: DCAL, settings: DualSettings) -> None:
        super().__init__("dcal", model, settings)

    def branch_loss(self, feature: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of one branch: features (B, D), logits (B, K), labels (B)."""
        raise NotImplementedError

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        features, logits = self.model(images, partners(len(images)).to(images.device))
        losses = {name: self.branch_loss(features[name], logits[name].float(), labels) for name in logits}
        loss = dynamic_total(losses, self.model.loss_w)
        common: dict[str, Any] = {"on_epoch": True, "on_step": False, "batch_size": len(images)}
        self.log("train_loss", loss, prog_bar=True, sync_dist=True, **common)
        for name, value in losses.items():
            self.log(f"train_loss_{name}", value, sync_dist=True, **common)
        self.log("train_accuracy", (logits["sa"].argmax(1) == labels).float().mean(), sync_dist=True, **common)
        optimizer: Any = self.optimizers()
        self.log("lr", optimizer.param_groups[0]["lr"], reduce_fx=max, **common)
        return loss


class SortTask(DualTask):
    """Cross entropy of every branch.

    Logs val_loss and val_accuracy of the mean of softmax over SA and GLCA, and val_accuracy_sa and _glca (each alone).
    """

    def __init__(self, model: DCAL, settings: DualSettings) -> None:
        super().__init__(model, settings)
        names = ("sa", "glca") if model.glca_depth else ("sa",)
        metric = MulticlassAccuracy(model.num_classes, average="micro", ignore_index=PADDING)
        self.val_accuracy = metric
        self.val_alone = torch.nn.ModuleDict({name: metric.clone() for name in names})
        self.val_loss = MeanMetric()

    def branch_loss(self, feature: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        each = {name: logits.float().softmax(1) for name, logits in self.model(images).logits.items()}
        joint = torch.stack(list(each.values())).mean(0)
        known = labels != PADDING
        if known.any():
            self.val_loss.update(F.nll_loss(joint[known].clamp_min(TINY).log(), labels[known]), known.sum())
        self.val_accuracy.update(joint, labels)
        self.log("val_loss", self.val_loss, batch_size=len(images))
        self.log("val_accuracy", self.val_accuracy, prog_bar=True, batch_size=len(images))
        for name, module in self.val_alone.items():
            metric: Any = module
            metric.update(each[name], labels)
            self.log(f"val_accuracy_{name}", metric, batch_size=len(images))


class IdentityTask(DualTask):
    """Cross entropy and a triplet loss of every branch; retrieval of identities that training does not see.

    Triplets are found among the batches of all processes. Logs val_map, val_minp and val_cmc1.
    """

    def __init__(self, model: DCAL, settings: DualSettings) -> None:
        super().__init__(model, settings)
        self.margin = settings.triplet_margin
        self.retrieval = Retrieval()

    def branch_loss(self, feature: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels)
        if self.trainer.world_size > 1:
            feature, labels = (self.all_gather(t, sync_grads=True).flatten(0, 1) for t in (feature, labels))  # pyright: ignore
        return loss + batch_hard_triplet(feature, labels, self.margin)

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        images, identities, cameras, kinds = batch
        self.retrieval.update(self.model.embedding(images), identities, cameras, kinds)

    def on_validation_epoch_end(self) -> None:
        report = self.retrieval.compute()
        for name, value in {"map": report["mAP"], "minp": report["mINP"], "cmc1": report["cmc"][0]}.items():
            self.log(f"val_{name}", value, prog_bar=name == "map", sync_dist=True)
        self.retrieval.reset()

"""RetinaNet, Faster R-CNN and Mask R-CNN on any backbone of the library."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from gridattn.models.registry import IMAGENET
from gridattn.ops.common import check_choice
from gridattn.systems.detect.pyramid import Pyramid, StridedAnchors
from gridattn.systems.detect.rcnn import build_rcnn

DETECTORS = ("retinanet", "faster_rcnn", "mask_rcnn")


class Detector(nn.Module):
    """A detector of torchvision behind one interface: labels count from 0, masks are boolean.

    Args:
        net: the detector.
        first_label: label of the first class inside of `net`.
        strides: of its pyramid.

    Attributes:
        mask_threshold: probability from which on a pixel belongs to an object.
    """

    def __init__(self, net: nn.Module, first_label: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.net = net
        self.first_label = first_label
        self.strides = list(strides)
        self.mask_threshold = 0.5
        regions = getattr(net, "roi_heads", None)
        self.has_masks = regions is not None and regions.has_mask()
        self.samplers = [s for s in (getattr(m, "fg_bg_sampler", None) for m in net.modules()) if s is not None]

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses in training, detections otherwise.

        Args:
            images: (3, H, W), values 0..1, of any sizes. In training they are taken as they are; otherwise each is
                resized and looked at alone, so that what is found in it does not depend on the batch.
            targets: in training, per image `boxes` (N, 4: x1, y1, x2, y2 in pixels), `labels` (N,), with a mask head
                `masks` (N, H, W), and optionally `seed`, a number from which the sampling of anchors is drawn.

        Returns:
            In training the losses by name, to be added up. Otherwise per image `boxes` (N, 4), `labels` (N,), `scores`
            (N,) and, with a mask head, `masks` (N, H, W) in the pixels of the image that was given.
        """
        if not self.training:
            return [self._detect(image) for image in images]
        assert targets is not None
        seeds = [int(target["seed"]) for target in targets] if all("seed" in t for t in targets) else None
        for sampler in self.samplers:
            sampler.seeds = seeds
        names = ("boxes", "labels", "masks") if self.has_masks else ("boxes", "labels")
        given = [{name: target[name] for name in names} for target in targets]
        return self.net(images, [{**t, "labels": t["labels"] + self.first_label} for t in given])

    def _detect(self, image: Tensor) -> dict[str, Tensor]:
        found = self.net([image])[0]
        found["labels"] = found["labels"] - self.first_label
        if "masks" in found:
            found["masks"] = found["masks"][:, 0] >= self.mask_threshold
        return found

    def set_thresholds(
        self,
        score: float | None = None,
        overlap: float | None = None,
        mask: float | None = None,
        count: int | None = None,
    ) -> None:
        """Sets what is reported: the least score, the overlap (intersection over union) above which the weaker of two
        boxes of a class is dropped, the least probability of a mask's pixel, and the most detections of an image. None
        leaves a value as it is."""
        owner: Any = getattr(self.net, "roi_heads", self.net)
        for name, value in {"score_thresh": score, "nms_thresh": overlap, "detections_per_img": count}.items():
            if value is not None:
                setattr(owner, name, value)
        if mask is not None:
            self.mask_threshold = mask


class Resize(GeneralizedRCNNTransform):
    """Normalises and batches; outside of training it also resizes, as the training data were.

    Args:
        image_size: shorter side, pixels.
        max_size: the longer side does not exceed this.
        mean: of the channels.
        std: of the channels.
        divisor: the batch is filled up to multiples of this.
    """

    def __init__(
        self, image_size: int, max_size: int, mean: Sequence[float], std: Sequence[float], divisor: int
    ) -> None:
        super().__init__(image_size, max_size, list(mean), list(std), size_divisible=divisor)
        self.sides = [image_size]

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        if not self.training:
            image = v2.RandomShortestSize(self.sides, self.max_size)(image)
        return image, target


def build_detector(
    backbone: str,
    num_classes: int,
    *,
    detector: str = "mask_rcnn",
    image_size: int = 800,
    max_size: int = 1333,
    channels: int = 256,
    head_dim: int = 1024,
    levels: int = 5,
    finest: int | None = None,
    anchor_scale: float | None = None,
    head_groups: int = 0,
    options: Mapping[str, Any] | None = None,
    mean: Sequence[float] = IMAGENET["mean"],
    std: Sequence[float] = IMAGENET["std"],
) -> Detector:
    """A detector.

    Args:
        backbone: name that `create_model` takes.
        num_classes: classes of objects.
        detector: one of `DETECTORS`.
        image_size: shorter side to which images are resized outside of training, pixels.
        max_size: the longer side does not exceed this.
        channels: of the pyramid.
        head_dim: width of the linear layers on regions (R-CNN).
        levels: of the pyramid.
        finest: smallest stride of the pyramid; None takes 8 for RetinaNet and 4 otherwise.
        anchor_scale: side of the smallest anchor over the stride; None takes 4 for RetinaNet and 8 otherwise.
        head_groups: groups of a GroupNorm after every convolution of RetinaNet's two towers; 0 for none, as in the
            paper.
        options: further keywords of `create_model`.
        mean: of the channels, for images of 0..1.
        std: of the channels.

    Raises:
        ValueError: an unknown detector, or what the backbone refuses.

    Example:
        >>> model = build_detector("grid_vit_4stage_micro", 3, detector="retinanet", channels=8, image_size=64).eval()
        >>> found = model([torch.rand(3, 50, 70)])[0]
        >>> found["boxes"].shape[1], model.strides
        (4, [8, 16, 32, 64, 128])
    """
    check_choice("detector", detector, DETECTORS)
    single = detector == "retinanet"
    if head_groups and (not single or channels % head_groups):
        raise ValueError(f"head_groups={head_groups} is for retinanet, and has to divide channels={channels}")
    pyramid = Pyramid(
        backbone,
        channels=channels,
        levels=levels,
        finest=finest or (8 if single else 4),
        learned=single,
        options=dict(options or {}),
    )
    divisor = max(32, pyramid.strides[pyramid.maps - 1])
    transform = Resize(image_size, max_size, mean, std, divisor)
    if single:
        anchors = StridedAnchors(pyramid.strides, anchor_scale or 4, octaves=3)
        norm = partial(nn.GroupNorm, head_groups) if head_groups else None
        head = RetinaNetHead(channels, anchors.num_anchors_per_location()[0], num_classes, norm_layer=norm)
        net = RetinaNet(pyramid, num_classes, anchor_generator=anchors, head=head, detections_per_img=100)
        net.transform = transform
    else:
        scale, masks = anchor_scale or 8, detector == "mask_rcnn"
        net = build_rcnn(pyramid, num_classes + 1, transform, masks=masks, head_dim=head_dim, scale=scale)
    for module in net.modules():
        if isinstance(module, Pyramid) or type(module).__name__ in _IN_FLOAT32:
            module.register_forward_hook(_to_float32)
    return Detector(net, 0 if single else 1, pyramid.strides)


# Boxes, scores and what regions are cut from stay in float32 under autocast: bfloat16 has no pixel 257.
_IN_FLOAT32 = ("RetinaNetHead", "RPNHead", "FastRCNNPredictor", "MaskRCNNPredictor")


def _to_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    return tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) else x, output)

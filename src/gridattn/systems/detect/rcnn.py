"""The two stages of Faster R-CNN and Mask R-CNN: torchvision's, the same on any number of processes."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from gridattn.data import seeded
from gridattn.systems.detect.losses import box_losses, mask_loss, proposal_losses
from gridattn.systems.detect.pyramid import Pyramid, StridedAnchors


class ImageSampler(BalancedPositiveNegativeSampler):
    """Samples positives and negatives of each image from a seed of that image's own.

    The choice then depends neither on the process, nor on the place in the batch, nor on the device.

    Attributes:
        seeds: one per image of the batch; None draws from torch's generators.
    """

    seeds: list[int] | None = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if self.seeds is None:
            return super().__call__(matched_idxs)
        positive, negative = [], []
        for seed, labels in zip(self.seeds, matched_idxs, strict=True):
            with seeded(seed):
                (own_positive,), (own_negative,) = super().__call__([labels.cpu()])
            positive.append(own_positive.to(labels.device))
            negative.append(own_negative.to(labels.device))
        return positive, negative


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's region proposal network with the losses of `proposal_losses`."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(found).bool() for found in self.fg_bg_sampler(labels))
        label, target = torch.cat(labels), torch.cat(regression_targets)
        return proposal_losses(objectness.flatten(), pred_bbox_deltas, label, target, positive, negative)


class RegionHeads(RoIHeads):
    """torchvision's heads on regions with the losses of `box_losses` and `mask_loss`."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        assert targets is not None
        regions, objects, labels, deltas = self.select_training_samples(proposals, targets)
        x = self.box_head(self.box_roi_pool(features, regions, image_shapes))
        logits, own_deltas = self.box_predictor(x)
        classification, regression = box_losses(logits, own_deltas, torch.cat(labels), torch.cat(deltas))
        losses = {"loss_classifier": classification, "loss_box_reg": regression}
        if self.mask_head is not None and self.mask_roi_pool is not None and self.mask_predictor is not None:
            positive = [torch.where(label > 0)[0] for label in labels]
            regions = [region[i] for region, i in zip(regions, positive)]
            objects = [matched[i] for matched, i in zip(objects, positive)]
            logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, regions, image_shapes)))
            own = [target["labels"] for target in targets]
            losses["loss_mask"] = mask_loss(logits, regions, [t["masks"] for t in targets], own, objects)
        return [], losses


def build_rcnn(
    pyramid: Pyramid, num_classes: int, transform: nn.Module, *, masks: bool, head_dim: int, scale: float
) -> GeneralizedRCNN:
    """Faster R-CNN, or Mask R-CNN, with the numbers of their papers' usual recipe.

    256 anchors and 512 regions are sampled per image (half, a quarter positive), 2000 candidates a level are reduced to
    1000 proposals of an image by non-maximum suppression at 0.7.

    Args:
        pyramid: the backbone; its own maps are those that regions are cut from.
        num_classes: the background, class 0, included.
        transform: resizes, normalises and batches.
        masks: whether there is a mask head.
        head_dim: width of the two linear layers on regions.
        scale: side of the anchors over the stride.
    """
    anchors, channels = StridedAnchors(pyramid.strides, scale, octaves=1), pyramid.out_channels
    kept = {"training": 1000, "testing": 1000}
    head = RPNHead(channels, anchors.num_anchors_per_location()[0])
    proposals = ProposalNetwork(anchors, head, 0.7, 0.3, 256, 0.5, {"training": 2000, "testing": 1000}, kept, 0.7)
    proposals.fg_bg_sampler = ImageSampler(256, 0.5)
    maps = [str(i) for i in range(pyramid.maps)]
    mask: dict[str, Any] = {}
    if masks:
        mask["mask_roi_pool"] = MultiScaleRoIAlign(maps, 14, sampling_ratio=2)
        mask["mask_head"] = MaskRCNNHeads(channels, (channels,) * 4, dilation=1)
        mask["mask_predictor"] = MaskRCNNPredictor(channels, channels, num_classes)
    regions = RegionHeads(
        MultiScaleRoIAlign(maps, 7, sampling_ratio=2),
        TwoMLPHead(channels * 7 * 7, head_dim),
        FastRCNNPredictor(head_dim, num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=512,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        **mask,
    )
    regions.fg_bg_sampler = ImageSampler(512, 0.25)
    return GeneralizedRCNN(pyramid, proposals, regions, transform)

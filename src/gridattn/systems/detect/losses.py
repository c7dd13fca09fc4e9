"""Losses of the two-stage detectors, the same for one process and for many."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.roi_heads import project_masks_on_boxes


def shared_count(count: Tensor) -> Tensor:
    """The mean of `count` over the processes of a training, at least 1 in all of them together.

    A sum over this process's samples, divided by it, becomes the mean over all samples of all processes when the
    gradients are averaged: sum_p (S_p / (N / P)) / P = (sum_p S_p) / N.
    """
    count = count.detach().float()
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes > 1:
        dist.all_reduce(count)
    return count.clamp_min(1) / processes


def box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy over the regions and L1 over the deltas of those with an object, both over the number of regions.

    Args:
        logits: (N, classes), class 0 is the background.
        deltas: (N, 4 * classes), a box of every class.
        labels: (N,).
        target: (N, 4), deltas to reach.
    """
    count = shared_count(torch.tensor(len(labels), device=labels.device))
    classification = F.cross_entropy(logits, labels, reduction="sum") / count
    positive = torch.where(labels > 0)[0]
    own = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
    return classification, F.l1_loss(own, target[positive], reduction="sum") / count


def mask_loss(logits: Tensor, regions: list[Tensor], masks: list[Tensor], labels: list[Tensor], objects: list[Tensor]):
    """Binary cross entropy of the mask of each region's class, its mean over pixels and regions.

    Args:
        logits: (N, classes, S, S), regions of all images in turn.
        regions: per image (n, 4), boxes.
        masks: per image (objects, H, W).
        labels: per image (objects,), classes.
        objects: per image (n,), which object a region belongs to.
    """
    size = logits.shape[-1]
    label = torch.cat([own[i] for own, i in zip(labels, objects)])
    # An image without objects has no masks to cut from, and no regions to cut for.
    target = [project_masks_on_boxes(m, r, i, size) for m, r, i in zip(masks, regions, objects) if len(i)]
    count = shared_count(torch.tensor(len(label), device=label.device))
    if not target:
        return logits.sum() * 0
    own = logits[torch.arange(len(label), device=label.device), label]
    return F.binary_cross_entropy_with_logits(own, torch.cat(target), reduction="sum") / (count * size * size)


def proposal_losses(
    logits: Tensor, deltas: Tensor, labels: Tensor, target: Tensor, positive: Tensor, negative: Tensor
) -> tuple[Tensor, Tensor]:
    """Binary cross entropy over the sampled anchors and L1 over the positive ones, both over the number of samples.

    Args:
        logits: (N,), objectness.
        deltas: (N, 4).
        labels: (N,), 1 for anchors on an object.
        target: (N, 4), deltas to reach.
        positive: (N,), the sampled anchors on an object.
        negative: (N,), the sampled anchors beside all objects.
    """
    sampled = positive | negative
    count = shared_count(sampled.sum())
    objectness = F.binary_cross_entropy_with_logits(logits[sampled], labels[sampled], reduction="sum") / count
    return objectness, F.l1_loss(deltas[positive], target[positive], reduction="sum") / count

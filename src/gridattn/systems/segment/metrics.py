"""Metrics of semantic segmentation, all from one confusion matrix over the pixels of a whole set."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from gridattn.systems.segment.losses import IGNORE


def pixel_confusion(num_classes: int) -> MulticlassConfusionMatrix:
    """Counts pixels by true class (row) and predicted class (column), without those labelled 255."""
    return MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False)


def class_scores(confusion: Tensor) -> dict[str, Tensor]:
    """Metrics of every class, NaN where there is nothing to divide by.

    With M[i, j] pixels of class i that are given class j: iou_i = M_ii / (sum_j M_ij + sum_j M_ji - M_ii),
    recall_i = M_ii / sum_j M_ij, precision_i = M_ii / sum_j M_ji.

    Args:
        confusion: M, (K, K), counts.

    Returns:
        `iou`, `recall`, `precision`, each (K), float64.
    """
    counts = confusion.double()
    hits, true, claimed = counts.diag(), counts.sum(1), counts.sum(0)
    return {"iou": hits / (true + claimed - hits), "recall": hits / true, "precision": hits / claimed}


def overall(confusion: Tensor) -> dict[str, float]:
    """miou and mean_class_accuracy (means over the classes that occur), and pixel_accuracy, all in 0..1.

    A class that is neither true nor predicted anywhere is left out of the means; without any labelled pixel all are 0.

    Example:
        >>> import torch
        >>> overall(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
        {'miou': 0.775, 'pixel_accuracy': 0.875, 'mean_class_accuracy': 0.875}
    """
    scores = class_scores(confusion)
    accuracy = confusion.diag().sum().double() / confusion.sum()
    means = {"miou": scores["iou"].nanmean(), "pixel_accuracy": accuracy, "mean_class_accuracy": scores["recall"]}
    means["mean_class_accuracy"] = means["mean_class_accuracy"].nanmean()
    return {name: float(value.nan_to_num(0.0)) for name, value in means.items()}


def segmentation_report(confusion: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Metrics of a set for people: `overall`, `per_class` (pixels, iou, recall, precision; None where undefined) and
    the confusion matrix (row: true class, column: predicted class)."""
    scores = class_scores(confusion)
    pixels = confusion.sum(1).tolist()
    values = {name: [None if v != v else v for v in tensor.tolist()] for name, tensor in scores.items()}
    return {
        **overall(confusion),
        "per_class": {
            name: {"pixels": pixels[i], **{metric: values[metric][i] for metric in scores}}
            for i, name in enumerate(classes)
        },
        "confusion": confusion.tolist(),
    }

"""Loss and metrics of the classification of windows; the metrics come from one confusion matrix."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

NOT_LABELLED = -1


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor, gamma: float = 0.0) -> Tensor:
    """-(1/N) sum_i w_y (1 - p_y)^gamma log p_y: class-weighted cross entropy, focal where gamma is above 0.

    The sum is divided by the number of windows, not by the sum of their weights, which average to 1 over the training
    set: so the loss does not depend on how a batch is spread over processes.

    Args:
        logits: (N, K); computed in float32.
        labels: (N,), class indices, or -1 for windows that count nothing.
        weights: (K).
        gamma: focus on what is hard.

    Returns:
        A scalar; 0 without labelled windows.
    """
    known = labels != NOT_LABELLED
    target = labels.where(known, 0)
    log_p = F.log_softmax(logits.float(), -1).gather(1, target[:, None])[:, 0]
    losses = -weights[target] * log_p
    if gamma:
        losses = losses * (-torch.expm1(log_p)).clamp_min(0) ** gamma
    return losses.where(known, 0.0).sum() / known.sum().clamp_min(1)


def window_confusion(num_classes: int) -> MulticlassConfusionMatrix:
    """Counts windows by true class (row) and predicted class (column), without those labelled -1."""
    return MulticlassConfusionMatrix(num_classes, ignore_index=NOT_LABELLED, validate_args=False)


def matthews(confusion: Tensor) -> float:
    """Matthews correlation for any number of classes (Gorodkin), 0 where its root is 0.

    MCC = (s c - sum_k t_k p_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2)), with s windows, c of them right, t_k of
    class k and p_k predicted as k.

    Example:
        >>> matthews(torch.tensor([[3, 0], [0, 5]])), matthews(torch.tensor([[0, 3], [5, 0]]))
        (1.0, -1.0)
    """
    counts = confusion.double()
    total, right, true, claimed = counts.sum(), counts.diag().sum(), counts.sum(1), counts.sum(0)
    root = math.sqrt(float((total**2 - (claimed**2).sum()) * (total**2 - (true**2).sum())))
    return float(total * right - (true * claimed).sum()) / root if root else 0.0


def class_f1(confusion: Tensor) -> Tensor:
    """F1 of every class, 2 TP / (2 TP + FP + FN), NaN for a class that is neither true nor predicted anywhere."""
    counts = confusion.double()
    return 2 * counts.diag() / (counts.sum(0) + counts.sum(1))


def overall(confusion: Tensor) -> dict[str, float]:
    """accuracy, macro_f1 (mean over the classes that occur) and mcc; zeros without any window.

    Example:
        >>> overall(torch.tensor([[2, 0], [0, 2]]))
        {'accuracy': 1.0, 'macro_f1': 1.0, 'mcc': 1.0}
    """
    accuracy = confusion.diag().sum().double() / confusion.sum()
    values = {"accuracy": accuracy, "macro_f1": class_f1(confusion).nanmean()}
    return {**{name: float(value.nan_to_num(0.0)) for name, value in values.items()}, "mcc": matthews(confusion)}


def subject_report(confusions: Mapping[str, Tensor], classes: Sequence[str]) -> dict[str, Any]:
    """Metrics of several subjects, for people.

    Args:
        confusions: confusion matrix of every subject.
        classes: class names.

    Returns:
        Pooled over all windows: `overall`, `windows`, `per_class` (windows and f1; None where undefined), `confusion`.
        `subjects`: the metrics of each. `over_subjects`: mean and std (of the population) of each metric, and the
        number of subjects in it; F1 and MCC leave out `undefined` subjects, those with windows of one class only.
    """
    pooled = torch.stack(list(confusions.values())).sum(0)
    subjects = {
        name: {**overall(matrix), "windows": int(matrix.sum()), "defined": int((matrix.sum(1) > 0).sum()) > 1}
        for name, matrix in confusions.items()
    }
    spread: dict[str, Any] = {"undefined": sum(not row["defined"] for row in subjects.values())}
    for metric in ("accuracy", "macro_f1", "mcc"):
        rows = [row for row in subjects.values() if row["windows"] and (row["defined"] or metric == "accuracy")]
        values = torch.tensor([row[metric] for row in rows], dtype=torch.float64)
        mean, std = (float(values.mean()), float(values.std(correction=0))) if rows else (None, None)
        spread[metric] = {"mean": mean, "std": std, "subjects": len(rows)}
    f1, counts = class_f1(pooled).tolist(), pooled.sum(1).tolist()
    return {
        **overall(pooled),
        "windows": int(pooled.sum()),
        "per_class": {
            name: {"windows": counts[i], "f1": None if f1[i] != f1[i] else f1[i]} for i, name in enumerate(classes)
        },
        "confusion": pooled.tolist(),
        "over_subjects": spread,
        "subjects": subjects,
    }

"""Losses of DCAL: branches weighed by learnt uncertainties, and the triplet loss of re-identification."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from gridattn.systems.dcal.model import BRANCHES


def dynamic_total(losses: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """L = sum_b (exp(-w_b) L_b + w_b) / 2, the loss of multi-task uncertainty; smallest at w_b = ln L_b.

    Args:
        losses: scalar loss of each branch, by the names of `BRANCHES`; those that are absent add nothing.
        weights: (3), w of SA, GLCA and PWCA.

    Returns:
        A scalar in float32 or wider: exp(-w) grows without bound where a loss goes to zero.

    Source: FairMOT, arXiv 2004.01888; used by DCAL, arXiv 2205.02151.

    Example:
        >>> losses = dict(zip(BRANCHES, torch.tensor([2.0, 1.5, 2.5])))
        >>> round(float(dynamic_total(losses, torch.tensor([0.3, -0.4, 0.2]))), 4)
        2.9331
    """
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    terms = [(-wide[BRANCHES.index(name)]).exp() * loss + wide[BRANCHES.index(name)] for name, loss in losses.items()]
    return 0.5 * torch.stack(terms).sum()


def batch_hard_triplet(features: Tensor, labels: Tensor, margin: float | None = None) -> Tensor:
    """Mean over the batch of the loss of the farthest positive and the nearest negative of every sample.

        softplus(d_p - d_n), or max(d_p - d_n + margin, 0)

    Args:
        features: (B, D); distances are Euclidean.
        labels: (B).
        margin: None takes the soft margin.

    Returns:
        A scalar; zero where no sample has a negative.

    Source: Hermans et al., In Defense of the Triplet Loss, arXiv 1703.07737.

    Example:
        >>> batch_hard_triplet(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1]), margin=2.0)
        tensor(0.3333)
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels[:, None] == labels
    farthest = distances.masked_fill(~same, 0).amax(1)
    nearest = distances.masked_fill(same, torch.inf).amin(1)
    gap = (farthest - nearest)[~same.all(1)]
    if not len(gap):
        return features.sum() * 0
    return (F.softplus(gap) if margin is None else (gap + margin).relu()).mean()

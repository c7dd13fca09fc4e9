"""Online spherical k-means: vectors belong to the centroid with the largest dot product; centroids move a bit a step.

Vectors come in the layout (B, *grid, heads, head_dim), centroids as (heads, K, head_dim): every head has its own.
Assignments are discrete and carry no gradient.

Source: Roy et al., Efficient Content-Based Sparse Attention with Routing Transformers, arXiv 2003.05997.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gridattn.ops.common import check_choice

NORMS = ("unit", "layer_norm")


def normalize_vectors(x: Tensor, norm: str = "unit") -> Tensor:
    """Gives all vectors of the last axis one length.

    Args:
        x: (..., head_dim).
        norm: "unit", x / max(|x|, 1e-12); "layer_norm", mean 0 and variance 1 (length sqrt(head_dim)).

    Example:
        >>> normalize_vectors(torch.tensor([3.0, 4.0])).tolist()
        [0.6000000238418579, 0.800000011920929]
    """
    check_choice("norm", norm, NORMS)
    return F.normalize(x, dim=-1, eps=1e-12) if norm == "unit" else F.layer_norm(x, x.shape[-1:], eps=1e-6)


def centroid_similarity(x: Tensor, means: Tensor) -> Tensor:
    """Dot products of all vectors with all centroids of their head, also under autocast in the precision of `x`.

    Args:
        x: (B, *grid, heads, head_dim).
        means: (heads, K, head_dim).

    Returns:
        (B, heads, N, K), positions in row-major order.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> centroid_similarity(torch.randn(2, 4, 5, 3, 8), torch.randn(3, 6, 8)).shape
        torch.Size([2, 3, 20, 6])
    """
    if means.ndim != 3 or x.ndim < 4 or means.shape[0] != x.shape[-2] or means.shape[2] != x.shape[-1]:
        raise ValueError(
            f"means {tuple(means.shape)} and x {tuple(x.shape)} must be (heads, K, head_dim) and "
            "(B, *grid, heads, head_dim)"
        )
    with torch.autocast(x.device.type, enabled=False):
        return x.flatten(1, -3).transpose(1, 2) @ means.to(x.dtype).transpose(1, 2)


def nearest_centroid(x: Tensor, means: Tensor) -> Tensor:
    """Index of the centroid of every vector: (B, *grid, heads, head_dim), (heads, K, head_dim) -> (B, heads, N)."""
    return centroid_similarity(x.detach(), means).argmax(-1)


def commitment_loss(x: Tensor, means: Tensor) -> Tensor:
    """Mean squared difference between vectors and their centroids; its gradient pulls the vectors, not the centroids.

    Args:
        x: (B, *grid, heads, head_dim), normalised.
        means: (heads, K, head_dim).

    Returns:
        A scalar.
    """
    rows = _rows(nearest_centroid(x, means), means.shape[1])
    assigned = means.detach().flatten(0, 1)[rows]
    return F.mse_loss(x.flatten(1, -3).transpose(1, 2), assigned.to(x.dtype))


class ClusterSums(NamedTuple):
    """What a batch adds to the clusters.

    Attributes:
        count: (heads, K), vectors assigned.
        total: (heads, K, head_dim), their sum.
    """

    count: Tensor
    total: Tensor


def cluster_sums(x: Tensor, means: Tensor) -> ClusterSums:
    """Counts and sums the vectors of every cluster over batch and positions; vectors of zeros are left out.

    Args:
        x: (B, *grid, heads, head_dim).
        means: (heads, K, head_dim).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 4.0]]).view(1, 3, 1, 2)
        >>> sums = cluster_sums(x, torch.eye(2).view(1, 2, 2))
        >>> sums.count.tolist(), sums.total.tolist()
        ([[1.0, 2.0]], [[[1.0, 0.0], [0.0, 6.0]]])
    """
    vectors = x.detach().flatten(1, -3).transpose(1, 2).to(means.dtype)
    rows = _rows(nearest_centroid(x, means), means.shape[1]).flatten()
    present = vectors.ne(0).any(-1).to(means.dtype).flatten()
    flat = means.new_zeros(means.shape[0] * means.shape[1], means.shape[2])
    count = flat[:, 0].index_add(0, rows, present).view(means.shape[:2])
    return ClusterSums(count, flat.index_add(0, rows, vectors.flatten(0, 2)).view(means.shape))


def kmeans_step(x: Tensor, means: Tensor) -> Tensor:
    """One step of spherical k-means: unit vectors along the sums of the clusters; an empty cluster keeps its centroid.

    Args:
        x: (B, *grid, heads, head_dim).
        means: (heads, K, head_dim).

    Returns:
        (heads, K, head_dim).
    """
    return sum_directions(cluster_sums(x, means), means)


def sum_directions(sums: ClusterSums, means: Tensor) -> Tensor:
    """Unit vectors along the sums of the clusters; `means`, (heads, K, head_dim), where a cluster is empty."""
    return torch.where(sums.count.unsqueeze(-1) > 0, F.normalize(sums.total, dim=-1), means)


class Averages(NamedTuple):
    """Running averages of `ClusterSums`, and the centroids that follow from them."""

    count: Tensor
    total: Tensor
    means: Tensor


def average_step(count: Tensor, total: Tensor, sums: ClusterSums, decay: float) -> Averages:
    """Moves exponential averages of counts and sums by one batch; a centroid is their smoothed quotient.

        count' = decay count + (1 - decay) n;   total' = decay total + (1 - decay) s
        means = total' / ((count' + 1e-5) / (sum count' + K 1e-5) * sum count')

    Args:
        count: (heads, K).
        total: (heads, K, head_dim).
        sums: of the batch.
        decay: of the averages.
    """
    count = torch.lerp(sums.count, count, decay)
    total = torch.lerp(sums.total, total, decay)
    whole = count.sum(-1, keepdim=True)
    smooth = (count + 1e-5) / (whole + count.shape[-1] * 1e-5) * whole
    return Averages(count, total, total / smooth.unsqueeze(-1))


def _rows(cluster: Tensor, num_clusters: int) -> Tensor:
    """(B, heads, N) cluster indices -> rows of the centroids of all heads."""
    heads = torch.arange(cluster.shape[1], device=cluster.device)
    return cluster + num_clusters * heads.view(-1, 1)

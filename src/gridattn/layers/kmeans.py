"""Centroids that follow the vectors of the training batches: online k-means, one set of centroids per head."""

import torch
from torch import Tensor, nn

from gridattn.ops.centroids import (
    ClusterSums,
    average_step,
    cluster_sums,
    kmeans_step,
    normalize_vectors,
)
from gridattn.ops.common import check_probability, per_axis


class OnlineKMeans(nn.Module):
    """Centroids of unit vectors that move by means = decay * means + (1 - decay) * (one k-means step on the batch).

    Batches between two updates count alike. Until the first batch or a checkpoint comes, the centroids are random
    directions; `initialize` places them on data.

    Args:
        num_heads: heads, each with its own centroids.
        num_clusters: centroids K per head.
        head_dim: length of the vectors.
        decay: of the moving average.

    Example:
        >>> kmeans = OnlineKMeans(2, 5, 8)
        >>> kmeans.accumulate(torch.randn(1, 6, 6, 2, 8))
        >>> kmeans.update()
        >>> kmeans.means.shape
        torch.Size([2, 5, 8])
    """

    norm = "unit"
    means: Tensor
    initted: Tensor

    def __init__(self, num_heads: int, num_clusters: int, head_dim: int, decay: float = 0.999) -> None:
        super().__init__()
        check_probability("decay", decay)
        shape = per_axis((num_heads, num_clusters, head_dim), 3, "(num_heads, num_clusters, head_dim)")
        self.decay = decay
        self.register_buffer("means", normalize_vectors(torch.randn(shape), self.norm))
        self.register_buffer("initted", torch.tensor(False))
        self.started = False
        self.pending: Tensor | None = None
        self.passes = 0
        self.register_load_state_dict_post_hook(lambda module, _: module._note_start())

    def _note_start(self) -> None:
        # A Python flag, so that a compiled graph need not look into a tensor.
        self.started = bool(self.initted)

    @torch.no_grad()
    def initialize(self, x: Tensor, iterations: int = 10) -> None:
        """Places the centroids on K random positions of x, (B, *grid, heads, head_dim), and runs k-means from there."""
        vectors = x.flatten(0, -3).to(self.means.dtype)
        count = self.means.shape[1]
        enough = len(vectors) >= count
        chosen = torch.randperm(len(vectors))[:count] if enough else torch.randint(len(vectors), (count,))
        means = vectors[chosen.to(x.device)].transpose(0, 1)
        for _ in range(iterations):
            means = kmeans_step(x, means)
        self.means.copy_(means)
        self.initted.fill_(True)
        self.started = True

    @torch.no_grad()
    def accumulate(self, x: Tensor) -> None:
        """Notes the k-means step of one batch, (B, *grid, heads, head_dim), not normalised."""
        step = kmeans_step(normalize_vectors(x.to(self.means.dtype), self.norm), self.means)
        self.pending = step if self.pending is None else torch.lerp(step, self.pending, self.passes / (self.passes + 1))
        self.passes += 1

    @torch.no_grad()
    def update(self) -> None:
        """Moves the centroids by what was accumulated, if anything was."""
        if self.pending is not None:
            self.means.lerp_(self.pending, 1 - self.decay)
        self.pending, self.passes = None, 0


class AveragedKMeans(nn.Module):
    """Centroids as quotients of moving averages: sums of the vectors of a cluster over their numbers, as in the paper.

    Vectors are normalised to mean 0 and variance 1. Arguments as in `OnlineKMeans`.

    Example:
        >>> kmeans = AveragedKMeans(2, 5, 8)
        >>> kmeans.accumulate(torch.randn(1, 6, 6, 2, 8))
        >>> kmeans.update()
    """

    norm = "layer_norm"
    means: Tensor
    ema_count: Tensor
    ema_means: Tensor

    def __init__(self, num_heads: int, num_clusters: int, head_dim: int, decay: float = 0.999) -> None:
        super().__init__()
        check_probability("decay", decay)
        shape = per_axis((num_heads, num_clusters, head_dim), 3, "(num_heads, num_clusters, head_dim)")
        self.decay = decay
        self.register_buffer("means", normalize_vectors(torch.randn(shape), self.norm))
        self.register_buffer("ema_count", torch.zeros(shape[:2]))
        self.register_buffer("ema_means", self.means.clone())
        self.started = True
        self.pending: ClusterSums | None = None

    @torch.no_grad()
    def accumulate(self, x: Tensor) -> None:
        """Adds the vectors of one batch, (B, *grid, heads, head_dim), to their clusters; zero vectors are padding."""
        sums = cluster_sums(normalize_vectors(x.to(self.means.dtype), self.norm), self.means)
        if self.pending is not None:
            sums = ClusterSums(self.pending.count + sums.count, self.pending.total + sums.total)
        self.pending = sums

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages and the centroids by what was accumulated, if anything was."""
        if self.pending is not None:
            averages = average_step(self.ema_count, self.ema_means, self.pending, self.decay)
            self.ema_count.copy_(averages.count)
            self.ema_means.copy_(averages.total)
            self.means.copy_(averages.means)
        self.pending = None

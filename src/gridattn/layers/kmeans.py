"""Centroids that follow the vectors of the training batches: online k-means, one set of centroids per head.

Where several processes train together, sums are taken over the batches of all of them, so that the centroids stay equal
on all and move as they would in one process with the whole batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gridattn.ops.centroids import (
    ClusterSums,
    average_step,
    cluster_sums,
    normalize_vectors,
    sum_directions,
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
        """Places the centroids on K random positions of x, (B, *grid, heads, head_dim), and runs k-means from there.

        In several processes x is the part of each, of one shape; sample b of process r is number b * processes + r.
        """
        means = self._random_vectors(x)
        for _ in range(iterations):
            means = sum_directions(_over_processes(cluster_sums(x, means)), means)
        self.means.copy_(means)
        self.initted.fill_(True)
        self.started = True

    def _random_vectors(self, x: Tensor) -> Tensor:
        """K of all vectors of x, (heads, K, head_dim), without one twice if there are enough."""
        vectors = x.flatten(1, -3).to(self.means.dtype)  # (B, N, heads, head_dim)
        size, rank = (dist.get_world_size(), dist.get_rank()) if _is_distributed() else (1, 0)
        count, total = self.means.shape[1], vectors.shape[0] * size * vectors.shape[1]
        chosen = torch.randperm(total)[:count] if total >= count else torch.randint(total, (count,))
        chosen = chosen.to(x.device)
        if size > 1:
            dist.broadcast(chosen, 0)
        sample, place = chosen // vectors.shape[1], chosen % vectors.shape[1]
        found = vectors[sample // size, place].transpose(0, 1) * (sample % size == rank).view(-1, 1)
        found = found.contiguous()
        if size > 1:
            dist.all_reduce(found)
        return found

    @torch.no_grad()
    def accumulate(self, x: Tensor) -> None:
        """Notes the k-means step of one batch, (B, *grid, heads, head_dim), not normalised."""
        sums = cluster_sums(normalize_vectors(x.to(self.means.dtype), self.norm), self.means)
        step = sum_directions(_over_processes(sums), self.means)
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
        sums = _over_processes(cluster_sums(normalize_vectors(x.to(self.means.dtype), self.norm), self.means))
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


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _over_processes(sums: ClusterSums) -> ClusterSums:
    """Sums over the batches of all processes; as they are in one."""
    if _is_distributed():
        for tensor in sums:
            dist.all_reduce(tensor)
    return sums

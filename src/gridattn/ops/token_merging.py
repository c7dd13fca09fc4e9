"""Merging similar tokens of a grid before an expensive step and copying the result back to all of them after it.

One token of every cell is a destination, all others are sources. Every source is matched with the destination that is
most similar to it; the best matched sources are averaged into their destinations.

Sources: ToMe for stable diffusion, arXiv 2303.17604; as used by Agent Attention, arXiv 2312.08874.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gridattn.ops.common import per_axis


class TokenMatching(NamedTuple):
    """Which tokens are destinations, and where every other token would go.

    Attributes:
        destinations: (D), positions in the grid.
        sources: (B, N - D), positions, those most similar to their destination first.
        targets: (B, N - D), for every source the index of its destination among the D.
    """

    destinations: Tensor
    sources: Tensor
    targets: Tensor

    def merge(self, x: Tensor, count: int) -> Tensor:
        """Averages the first `count` sources into their destinations.

        Args:
            x: (B, N, C).
            count: tokens to save, 0 ... N - D.

        Returns:
            (B, N - count, C): the sources that are left, most similar first, then the destinations.

        Raises:
            ValueError: a count out of range.
        """
        self._check(count)
        kept = _rows(x, self.sources[:, count:])
        destinations = x[:, self.destinations]
        merged, into = _rows(x, self.sources[:, :count]), self.targets[:, :count]
        sums = destinations.scatter_add(1, into.unsqueeze(-1).expand_as(merged), merged)
        sizes = x.new_ones(sums.shape[:2]).scatter_add(1, into, x.new_ones(into.shape))
        return torch.cat((kept, sums / sizes.unsqueeze(-1)), 1)

    def unmerge(self, x: Tensor, count: int) -> Tensor:
        """Puts merged tokens back to their places; a token that was merged takes what its destination has.

        Args:
            x: (B, N - count, C), in the order of `merge`.
            count: as given to `merge`.

        Returns:
            (B, N, C).

        Raises:
            ValueError: a count out of range.
        """
        self._check(count)
        batch, total = self.sources.shape
        left = total - count
        row = self.sources.new_empty(batch, total + len(self.destinations))
        places = torch.arange(x.shape[1], device=x.device).expand(batch, -1)
        row.scatter_(1, self.sources[:, count:], places[:, :left])
        row.scatter_(1, self.destinations.expand(batch, -1), places[:, left:])
        row.scatter_(1, self.sources[:, :count], left + self.targets[:, :count])
        return _rows(x, row)

    def _check(self, count: int) -> None:
        if not 0 <= count <= self.sources.shape[1]:
            raise ValueError(f"count={count} is not allowed; 0 to {self.sources.shape[1]} sources can be merged")


def choose_destinations(
    grid: Sequence[int], cell: Any, *, random: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """One position in every full cell of a grid: its first, or a random one.

    Args:
        grid: positions per axis.
        cell: positions of a cell per axis, one int or one per axis. Positions beyond the last full cell have none.
        random: draws the position in each cell.
        generator: of the draws, on the CPU.

    Returns:
        (D) positions, ascending in row-major order; D is the number of full cells.

    Raises:
        ValueError: a cell below 1 or longer than the grid.

    Example:
        >>> choose_destinations((4, 5), 2).tolist()
        [0, 2, 10, 12]
    """
    cell = per_axis(cell, len(grid), "cell")
    if any(c > n for c, n in zip(cell, grid)):
        raise ValueError(f"cell={cell} exceeds the grid {tuple(grid)}; no cell fits")
    counts = [n // c for n, c in zip(grid, cell)]
    within = torch.randint(prod(cell), counts, generator=generator) if random else torch.zeros(counts, dtype=torch.long)
    position = torch.zeros((), dtype=torch.long)
    for axis, (size, step) in enumerate(zip(grid, cell)):
        first = step * torch.arange(counts[axis]).view([-1 if a == axis else 1 for a in range(len(grid))])
        position = position * size + first + within // prod(cell[axis + 1 :]) % step
    return position.flatten().sort().values


@torch.no_grad()
def match_tokens(metric: Tensor, destinations: Tensor) -> TokenMatching:
    """Matches every token that is no destination with the destination of the largest cosine similarity.

    Args:
        metric: (B, N, C), the features compared.
        destinations: (D), positions; merged tokens keep their order.

    Returns:
        The matching; it carries no gradient. Of equal similarities the one first in row-major order comes first.

    Example:
        >>> metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.2]]])
        >>> match_tokens(metric, torch.tensor([0, 1])).targets.tolist()  # of tokens 2 and 3
        [[1, 0]]
    """
    destinations = destinations.to(metric.device)
    is_source = torch.ones(metric.shape[1], dtype=torch.bool, device=metric.device)
    is_source[destinations] = False
    positions = is_source.nonzero().squeeze(1)
    direction = metric / metric.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(metric.dtype).tiny)
    similarity, targets = (direction[:, positions] @ direction[:, destinations].mT).max(-1)
    order = similarity.argsort(dim=-1, descending=True, stable=True)
    return TokenMatching(destinations, positions[order], targets.gather(1, order))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

"""Samples of different sizes packed one after the other along the token axis, computed in groups of equal size."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


def map_groups(
    function: Callable[..., Sequence[Tensor]], sizes: Sequence[Hashable], *pieces: Sequence[Tensor]
) -> list[Tensor]:
    """Calls a function once for every set of samples of equal size, and packs what it returns in the samples' order.

    Args:
        function: takes a size, the list of the samples that have it and, for each of `pieces`, these samples' entries
            stacked along a new first axis; returns tensors (samples, tokens, ...).
        sizes: size of each sample, at least one.
        *pieces: lists of one tensor (tokens, ...) a sample, of equal shape where sizes are equal.

    Returns:
        For every tensor that the function returns, (all tokens, ...).

    Example:
        >>> pieces = torch.arange(5.0).split([2, 1, 2])
        >>> map_groups(lambda size, samples, x: [x - x.mean(dim=1, keepdim=True)], [2, 1, 2], pieces)
        [tensor([-0.5000,  0.5000,  0.0000, -0.5000,  0.5000])]
    """
    members = defaultdict(list)
    for sample, size in enumerate(sizes):
        members[size].append(sample)
    results: dict[int, tuple[Tensor, ...]] = {}
    for size, samples in members.items():
        stacked = (torch.stack([of_sample[s] for s in samples]) for of_sample in pieces)
        results.update(zip(samples, zip(*function(size, samples, *stacked))))
    return [torch.cat(parts) for parts in zip(*(results[sample] for sample in range(len(sizes))))]

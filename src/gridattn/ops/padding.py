"""Zeros around a grid."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def to_multiple(size: int, of: int) -> int:
    """How much is missing to the next multiple, in terms that a trace with dynamic sizes can follow.

    Example:
        >>> to_multiple(10, 4), to_multiple(8, 4)
        (2, 0)
    """
    return (size + of - 1) // of * of - size


def pad_grid(x: Tensor, amounts: Sequence[tuple[int, int]]) -> Tensor:
    """Appends zeros at both ends of grid axes; negative amounts cut.

    Args:
        x: (B, *grid, *features).
        amounts: zeros before and after each grid axis.

    Returns:
        The padded tensor; `x` itself where all amounts are 0, for which PyTorch's own padding copies.

    Example:
        >>> import torch
        >>> pad_grid(torch.ones(1, 2, 3), [(1, 0)]).squeeze(0).tolist()
        [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    # A symbolic amount, met while a graph with dynamic sizes is exported, pads: one graph serves all sizes.
    if all(isinstance(amount, int) and amount == 0 for pair in amounts for amount in pair):
        return x
    features = x.ndim - 1 - len(amounts)
    return F.pad(x, [0] * (2 * features) + [amount for pair in reversed(amounts) for amount in pair])

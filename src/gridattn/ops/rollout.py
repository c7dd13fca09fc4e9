"""Attention rollout: how much each token owes to each token after several layers, and which tokens respond most."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor


def attention_rollout(attentions: Sequence[Tensor]) -> Tensor:
    """Attention accumulated over layers: R_L = S'_L S'_(L-1) ... S'_1, S' = (mean over heads of S + I) / 2.

    The identity stands for the residual connection; later layers multiply from the left.

    Args:
        attentions: of each layer, first to last, (B, heads, n, n) with rows that sum to 1.

    Returns:
        (B, n, n); rows sum to 1.

    Raises:
        ValueError: no layers.

    Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers, arXiv 2005.00928; used by DCAL,
    arXiv 2205.02151.

    Example:
        >>> attention_rollout([torch.full((1, 3, 2, 2), 0.5)])[0].tolist()
        [[0.75, 0.25], [0.25, 0.75]]
    """
    first, *later = _head_means(attentions)
    rollout = (first + torch.eye(first.shape[-1], dtype=first.dtype, device=first.device)) / 2
    for attention in later:
        rollout = (attention @ rollout + rollout) / 2
    return rollout


def rollout_row(attentions: Sequence[Tensor], row: int = 0) -> Tensor:
    """One row of `attention_rollout` by products of a vector and a matrix, from the last layer to the first.

    L n^2 multiplications in place of L n^3.

    Args:
        attentions: of each layer, first to last, (B, heads, n, n).
        row: the token whose row is wanted; 0 is the class token.

    Returns:
        (B, n).

    Source: DCAL, arXiv 2205.02151.

    Example:
        >>> rollout_row([torch.full((1, 3, 2, 2), 0.5)])[0].tolist()
        [0.75, 0.25]
    """
    means = _head_means(attentions)
    last = means[-1]
    response = torch.zeros_like(last[:, row])
    response[:, row] = 1
    for attention in reversed(means):
        response = (torch.einsum("b i, b i j -> b j", response, attention) + response) / 2
    return response


def _head_means(attentions: Sequence[Tensor]) -> list[Tensor]:
    if not len(attentions):
        raise ValueError("attentions is empty; the attention of at least one layer is needed")
    return [attention.mean(1) for attention in attentions]


def top_responses(response: Tensor, part: tuple[int, int]) -> Tensor:
    """Indices of the largest entries, `part` of all and at least one, in falling order; the lower index wins a tie.

    Args:
        response: (B, N).
        part: numerator and denominator of the share R / N, from `share_of`; R is rounded down.

    Returns:
        (B, R) int64; no gradient flows through the choice.

    Source: DCAL, arXiv 2205.02151.

    Example:
        >>> top_responses(torch.tensor([[0.1, 0.3, 0.3, 0.2]]), share_of(0.5)).tolist()
        [[1, 2]]
    """
    return response.detach().argsort(dim=-1, descending=True, stable=True)[..., : count_of(response.shape[-1], part)]


def share_of(ratio: float) -> tuple[int, int]:
    """Numerator and denominator of a ratio in (0, 1]: with integers 0.29 of 100 is 29, which floats round to 28.

    Raises:
        ValueError: a ratio outside (0, 1].

    Example:
        >>> share_of(0.3)
        (3, 10)
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio!r} is not allowed; it must be a number in (0, 1]")
    fraction = Fraction(ratio).limit_denominator(10**6)
    return fraction.numerator, fraction.denominator


def count_of(positions: int, part: tuple[int, int]) -> int:
    """Number of positions that a share makes, rounded down, at least 1.

    Example:
        >>> count_of(784, share_of(0.1))
        78
    """
    return max(positions * part[0] // part[1], 1)

"""Subspace attention: blocks of channels, each weighted by its own softmax map over the grid."""

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def subspace_scores(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One score per position and subspace from the strongest features around it.

    score[p, n] = bias[n] + sum over channels c of subspace n of weight[c] max over the 3-wide neighborhood of p of
    max(features[., c], 0).

    Args:
        features: (B, *grid, C), grid of rank 1 to 3.
        weight: (C).
        bias: (g), one entry a subspace; g divides C. Subspace n owns the channels n C / g to (n + 1) C / g - 1.

    Returns:
        (B, *grid, g).

    Raises:
        ValueError: C not divisible by g, a weight of another length, or another rank.

    Example:
        >>> import torch
        >>> subspace_scores(torch.randn(2, 7, 9, 8), torch.randn(8), torch.zeros(4)).shape
        torch.Size([2, 7, 9, 4])
    """
    channels, num_subspaces, rank = features.shape[-1], bias.shape[0], features.ndim - 2
    _check_split(channels, num_subspaces)
    if rank not in _MAX_POOLS:
        raise ValueError(f"features has shape {tuple(features.shape)}; (batch, 1 to 3 grid axes, channels) is allowed")
    if weight.shape != (channels,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; ({channels},) is allowed")
    strongest = _MAX_POOLS[rank](features.relu().movedim(-1, 1), 3, stride=1, padding=1)
    kernel = weight.reshape(num_subspaces, -1, *[1] * rank)
    return _CONVOLUTIONS[rank](strongest, kernel, bias, groups=num_subspaces).movedim(1, -1)


def subspace_maps(scores: Tensor) -> Tensor:
    """Softmax over the grid of the positive part of scores: (B, *grid, g) -> (B, *grid, g), each map summing to one."""
    return scores.relu().flatten(1, -2).softmax(1).reshape(scores.shape)


def subspace_gate(x: Tensor, scores: Tensor) -> Tensor:
    """Adds to each subspace its share of its map: y = x + x * A, A = softmax over positions of max(score, 0).

    Args:
        x: (B, *grid, C).
        scores: (B, *grid, g), g divides C.

    Returns:
        (B, *grid, C); the gain y / x lies in (1, 2] and averages 1 + 1 / positions in every subspace.

    Example:
        >>> import torch
        >>> subspace_gate(torch.ones(1, 2, 2, 4), torch.zeros(1, 2, 2, 2))[0, 0, 0]
        tensor([1.2500, 1.2500, 1.2500, 1.2500])
    """
    _check_split(x.shape[-1], scores.shape[-1])
    gain = (1 + subspace_maps(scores)).unsqueeze(-1)
    return (x.unflatten(-1, (scores.shape[-1], -1)) * gain).flatten(-2)


def subspace_attention(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Ultra-lightweight subspace attention, all subspaces at once.

    For subspace n with channels X_n: A_n = softmax over positions of relu(bias_n + weight_n . maxpool(relu(scale X_n +
    shift))), Y_n = X_n + A_n X_n. At inference the batch normalisations of the layer are part of the four vectors.

    Args:
        x: (B, *grid, C), grid of rank 1 to 3.
        scale: (C).
        shift: (C).
        weight: (C).
        bias: (g), one entry a subspace; g divides C.

    Returns:
        (B, *grid, C).

    Source: ULSAM, arXiv 2006.15102.

    Example:
        >>> import torch
        >>> vector = torch.randn(8)
        >>> subspace_attention(torch.randn(2, 7, 9, 8), vector, vector, vector, torch.zeros(4)).shape
        torch.Size([2, 7, 9, 8])
    """
    return subspace_gate(x, subspace_scores(torch.addcmul(shift, x, scale), weight, bias))


def _check_split(channels: int, num_subspaces: int) -> None:
    if channels % num_subspaces:
        raise ValueError(f"{channels} channels cannot be split into num_subspaces={num_subspaces} equal blocks")

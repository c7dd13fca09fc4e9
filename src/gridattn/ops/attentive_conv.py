"""Attentive convolution: depth-wise kernels that every sample makes for itself from its whole grid."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from gridattn.ops.adaptive_pool import adaptive_average
from gridattn.ops.common import check_choice, per_axis
from gridattn.ops.large_kernel import depthwise_conv

CONTEXTS = ("bands", "grid")


def pool_context(x: Tensor, kernel_size: Any, *, context: str = "bands") -> Tensor:
    """Averages the grid to one vector per tap of the kernel that will be made from it.

    "bands" cuts the positions, in row-major order, into prod(kernel) runs: on an image these are horizontal bands. Run
    i of n holds the positions floor(i N / n) to ceil((i + 1) N / n) - 1 of N, so runs overlap where n does not divide
    N. "grid" averages the cells of a kernel-shaped raster laid over the grid.

    Args:
        x: (B, *grid, C), grid of rank 1 to 3.
        kernel_size: one int or one per axis.
        context: "bands" (official) or "grid".

    Returns:
        (B, prod(kernel), C), taps in row-major order.

    Example:
        >>> import torch
        >>> pool_context(torch.arange(8.0).view(1, 4, 2, 1), 2).flatten().tolist()
        [0.5, 2.5, 4.5, 6.5]
    """
    check_choice("context", context, CONTEXTS)
    rank = x.ndim - 2
    kernel = per_axis(kernel_size, rank, "kernel_size")
    if context == "grid":
        return adaptive_average(x.movedim(-1, 1), kernel).flatten(2).transpose(1, 2)
    sequence = rearrange(x, "b ... c -> b c (...) 1")
    return adaptive_average(sequence, (prod(kernel), 1)).squeeze(-1).transpose(1, 2)


def lateral_inhibition(kernel: Tensor, control: Tensor) -> Tensor:
    """Subtracts a learned share of its mean from every kernel: K - sigmoid(control) mean(K).

    Args:
        kernel: (B, C, *kernel).
        control: (C). Zero takes off half of the mean, large values make kernels that sum to zero.

    Returns:
        (B, C, *kernel).

    Example:
        >>> import torch
        >>> lateral_inhibition(torch.ones(1, 1, 3, 3), torch.zeros(1))[0, 0, 0]
        tensor([0.5000, 0.5000, 0.5000])
    """
    axes = list(range(2, kernel.ndim))
    share = control.sigmoid().view(-1, *[1] * len(axes))
    return kernel - share * kernel.mean(axes, keepdim=True)


def routed_conv(x: Tensor, kernel: Tensor) -> Tensor:
    """Depth-wise convolution in which every sample has its own kernels; zero padding keeps the size.

    y[b, p, c] = sum_j kernel[b, c, j] x[b, p + j - floor((k - 1) / 2), c].

    Args:
        x: (B, *grid, C), grid of rank 1 to 3.
        kernel: (B, C, *kernel).

    Returns:
        (B, *grid, C).

    Raises:
        ValueError: a kernel for other samples, channels or rank.

    Example:
        >>> import torch
        >>> routed_conv(torch.randn(2, 7, 9, 8), torch.randn(2, 8, 3, 3)).shape
        torch.Size([2, 7, 9, 8])
    """
    if kernel.ndim != x.ndim or kernel.shape[:2] != (x.shape[0], x.shape[-1]):
        raise ValueError(
            f"kernel has shape {tuple(kernel.shape)}; ({x.shape[0]}, {x.shape[-1]}, {x.ndim - 2} kernel sizes) is "
            f"allowed for x with shape {tuple(x.shape)}"
        )
    if x.shape[0] == 0:
        return torch.zeros_like(x)
    # Samples stand side by side as channels, innermost in memory: the layout with the fast depth-wise kernels.
    side_by_side = rearrange(x, "b ... c -> 1 ... (b c)")
    y = depthwise_conv(side_by_side, kernel.flatten(0, 1).unsqueeze(1))
    return rearrange(y, "1 ... (b c) -> b ... c", b=x.shape[0])


def attentive_kernels(
    x: Tensor,
    context_weight: Tensor,
    context_bias: Tensor | None,
    tap_weight: Tensor,
    tap_bias: Tensor | None,
    control: Tensor,
    *,
    kernel_size: Sequence[int],
    activation: Callable[[Tensor], Tensor] = F.gelu,
    context: str = "bands",
) -> Tensor:
    """The kernels of attentive convolution, one per sample and channel.

    K = inhibit(W_t act(pool(W_c x + b_c)) + b_t): the projected grid is averaged to one value per tap, mixed over the
    taps and made contrastive. Pooling comes before the projection here, which is the same and cheaper by positions over
    taps.

    Args:
        x: (B, *grid, C).
        context_weight: (C, C).
        context_bias: (C) or None.
        tap_weight: (taps, taps), shared by all channels.
        tap_bias: (taps) or None.
        control: (C), see `lateral_inhibition`.
        kernel_size: one int per axis; taps is their product.
        activation: between pooling and mixing.
        context: see `pool_context`.

    Returns:
        (B, C, *kernel).

    Source: Attentive Convolution, arXiv 2510.20092.

    Example:
        >>> import torch
        >>> x, control = torch.randn(2, 7, 9, 8), torch.zeros(8)
        >>> attentive_kernels(x, torch.eye(8), None, torch.eye(9), None, control, kernel_size=(3, 3)).shape
        torch.Size([2, 8, 3, 3])
    """
    pooled = F.linear(pool_context(x, kernel_size, context=context), context_weight, context_bias)
    taps = F.linear(activation(pooled).transpose(1, 2), tap_weight, tap_bias)
    return lateral_inhibition(taps.unflatten(-1, tuple(kernel_size)), control)

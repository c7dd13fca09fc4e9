"""Large kernels made of small ones: a depth-wise, a dilated depth-wise and a point-wise convolution, used as a gate."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from gridattn.ops.common import check_choice, per_axis
from gridattn.ops.padding import pad_grid

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
BACKENDS = ("auto", "direct", "phases")
_PHASE_AXES = {
    1: ("(x p)", "p", "x"),
    2: ("(x p) (y q)", "p q", "x y"),
    3: ("(x p) (y q) (z r)", "p q r", "x y z"),
}


def decompose_kernel(kernel_size: int, dilation: int) -> tuple[int, int]:
    """Splits a K kernel into a local kernel of 2d - 1 and a kernel of ceil(K / d) that is dilated by d.

    Returns:
        (local size, dilated size).

    Source: Visual Attention Network, arXiv 2202.09741.

    Example:
        >>> decompose_kernel(21, dilation=3)
        (5, 7)
    """
    return 2 * dilation - 1, -(-kernel_size // dilation)


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: Any = 1, backend: str = "auto"
) -> Tensor:
    """Depth-wise convolution of a channels-last grid with zero padding that keeps its size.

    y[p, c] = bias[c] + sum_j weight[c, 0, j] x[p + d j - floor(d (k - 1) / 2), c], with x = 0 outside the grid.

    Args:
        x: (B, *grid, C), grid of rank 1 to 3.
        weight: (C, 1, *kernel); kernels of any size, even ones too.
        bias: (C) or None.
        dilation: step between taps, one int or one per axis.
        backend: "direct" is the dilated convolution of torch. "phases" computes the same sums as a dense convolution
            of the d interleaved sub-grids of each axis: several times faster on a CPU, where dilated depth-wise
            convolutions have no fast kernel. "auto" takes phases for a dilated kernel on a CPU, but
            not in `torch.export`, whose program may run elsewhere and on any grid.

    Returns:
        (B, *grid, C).

    Raises:
        ValueError: a weight that does not fit the channels and the rank of `x`, an unknown backend, a wrong dilation.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(2, 9, 11, 8), torch.randn(8, 1, 7, 7)
        >>> depthwise_conv(x, weight, dilation=3).shape
        torch.Size([2, 9, 11, 8])
    """
    rank = x.ndim - 2
    check_choice("backend", backend, BACKENDS)
    if rank not in CONVOLUTIONS:
        raise ValueError(f"x has shape {tuple(x.shape)}; (batch, 1 to 3 grid axes, channels) is allowed")
    if weight.ndim != rank + 2 or tuple(weight.shape[:2]) != (x.shape[-1], 1):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; ({x.shape[-1]}, 1, {rank} kernel sizes) is allowed for x "
            f"with shape {tuple(x.shape)}"
        )
    steps = per_axis(dilation, rank, "dilation")
    conv = _conv_by_phases if _uses_phases(x.device, steps, backend) else _conv_direct
    return conv(x, weight, bias, steps)


def depthwise_conv_macs(weight: Tensor, grid: Sequence[int], *, dilation: Any = 1, backend: str = "auto") -> int:
    """Multiply-accumulates of `depthwise_conv` for one sample on the device of `weight`, (C, 1, *kernel).

    Phases work on a grid filled up to a multiple of the dilation.

    Example:
        >>> import torch
        >>> depthwise_conv_macs(torch.empty(8, 1, 3, 3), (14, 14))
        14112
    """
    steps = per_axis(dilation, len(grid), "dilation")
    if _uses_phases(weight.device, steps, backend):
        reach = [0 if k % 2 else d * (k - 1) for k, d in zip(weight.shape[2:], steps)]
        # Not -(-(n + r) // d): in ONNX a division of negative integers is cut off, not rounded down.
        grid = [(n + r + d - 1) // d * d - r for n, r, d in zip(grid, reach, steps)]
    return prod(grid) * weight.numel()


def large_kernel_attention(
    x: Tensor,
    local_weight: Tensor,
    local_bias: Tensor | None,
    dilated_weight: Tensor,
    dilated_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    *,
    dilation: Any = 3,
    backend: str = "auto",
) -> Tensor:
    """Large kernel attention: the grid times a map made from it by three small convolutions.

    y = x * P(D(L(x))), with L depth-wise, D depth-wise and dilated, P point-wise. No softmax, no sigmoid. L pads
    before D does, so near a border this is not one large convolution. The reach of 5 x 5 and 7 x 7 dilated by 3 is 11
    positions each way.

    Args:
        x: (B, *grid, C), grid of rank 1 to 3.
        local_weight: (C, 1, *kernel).
        local_bias: (C) or None.
        dilated_weight: (C, 1, *kernel).
        dilated_bias: (C) or None.
        pointwise_weight: (C, C).
        pointwise_bias: (C) or None.
        dilation: of the second convolution, one int or one per axis.
        backend: of the convolutions, see `depthwise_conv`.

    Returns:
        (B, *grid, C).

    Source: Visual Attention Network, arXiv 2202.09741.

    Example:
        >>> import torch
        >>> x = torch.randn(1, 14, 14, 8)
        >>> local, dilated, mix = torch.randn(8, 1, 5, 5), torch.randn(8, 1, 7, 7), torch.eye(8)
        >>> large_kernel_attention(x, local, None, dilated, None, mix, None).shape
        torch.Size([1, 14, 14, 8])
    """
    attention = depthwise_conv(x, local_weight, local_bias, backend=backend)
    attention = depthwise_conv(attention, dilated_weight, dilated_bias, dilation=dilation, backend=backend)
    return x * F.linear(attention, pointwise_weight, pointwise_bias)


def _uses_phases(device: torch.device, dilation: Sequence[int], backend: str) -> bool:
    if backend == "auto":
        return device.type == "cpu" and max(dilation) > 1 and not torch.compiler.is_exporting()
    return backend == "phases"


def _conv_direct(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Sequence[int]) -> Tensor:
    outer, inner = _padding(weight.shape[2:], dilation)
    return _convolve(pad_grid(x, outer), weight, bias, inner, dilation)


def _conv_by_phases(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Sequence[int]) -> Tensor:
    """Positions of one residue modulo d meet only each other: each residue class is a sample of a dense convolution."""
    rank, grid = len(dilation), x.shape[1:-1]
    outer, inner = _padding(weight.shape[2:], dilation)
    to_multiple = [-(size + sum(pad)) % d for size, pad, d in zip(grid, outer, dilation)]
    x = pad_grid(x, [(left, right + more) for (left, right), more in zip(outer, to_multiple)])

    together, phases, coarse = _PHASE_AXES[rank]
    steps = dict(zip("pqr", dilation))
    x = rearrange(x, f"b {together} c -> ({phases} b) {coarse} c", **steps)
    y = _convolve(x, weight, bias, [padding // d for padding, d in zip(inner, dilation)], [1] * rank)
    y = rearrange(y, f"({phases} b) {coarse} c -> b {together} c", **steps)
    return y[(slice(None), *[slice(size) for size in grid])]


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    conv = CONVOLUTIONS[len(padding)]
    y = conv(x.movedim(-1, 1), weight, bias, padding=tuple(padding), dilation=tuple(dilation), groups=x.shape[-1])
    return y.movedim(1, -1)


def _padding(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Zeros per axis that keep the size: those put on by hand (left, right) and those that the convolution adds itself.

    An odd kernel is symmetric and leaves all to the convolution; an even one reaches further to the right.
    """
    reach = [d * (k - 1) for k, d in zip(kernel, dilation)]
    outer = [(0, 0) if k % 2 else (r // 2, r - r // 2) for k, r in zip(kernel, reach)]
    return outer, [r // 2 if k % 2 else 0 for k, r in zip(kernel, reach)]

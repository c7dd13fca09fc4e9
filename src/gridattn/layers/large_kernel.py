"""Large kernel attention and its company in the Visual Attention Network: attention module, feed-forward, block."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.batch_norm import GridBatchNorm
from gridattn.layers.common import GridAttention
from gridattn.layers.drop_path import DropPath
from gridattn.layers.dropout import Dropout
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels, check_choice, check_probability, per_axis
from gridattn.ops.large_kernel import (
    BACKENDS,
    decompose_kernel,
    depthwise_conv,
    depthwise_conv_macs,
    large_kernel_attention,
)


class DepthwiseConv(nn.Module):
    """Depth-wise convolution of a channels-last grid that keeps its size; parameters as in `nn.Conv2d` with groups.

    Args:
        dim: channels C.
        kernel_size: one int per axis; its length is the rank.
        dilation: one int per axis.
        backend: see `gridattn.ops.large_kernel.depthwise_conv`.
    """

    def __init__(self, dim: int, kernel_size: Sequence[int], dilation: Any = 1, backend: str = "auto") -> None:
        super().__init__()
        check_choice("backend", backend, BACKENDS)
        self.dilation = per_axis(dilation, len(kernel_size), "dilation")
        self.backend = backend
        bound = prod(kernel_size) ** -0.5
        self.weight = nn.Parameter(torch.empty(dim, 1, *kernel_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        return depthwise_conv(x, self.weight, self.bias, dilation=self.dilation, backend=self.backend)

    def macs(self, grid: Sequence[int]) -> int:
        """Multiply-accumulates for one sample on `grid`."""
        return depthwise_conv_macs(self.weight, grid, dilation=self.dilation, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, kernel_size={tuple(self.weight.shape[2:])}, dilation={self.dilation}"


@register_attention(
    "large_kernel",
    summary="the grid times a map made by a depth-wise, a dilated depth-wise and a point-wise convolution (LKA)",
    source="arXiv 2202.09741",
    linear_cost=True,
)
class LargeKernelAttention(GridAttention):
    """Large kernel attention (LKA): y = x * P(D(L(x))), three convolutions that stand for one large one, as a gate.

    A K kernel with dilation d becomes L, depth-wise of size 2d - 1, D, depth-wise of size ceil(K / d) dilated by d,
    and P, point-wise. Nothing bounds the map. Positions further away than d - 1 + d (ceil(K / d) - 1) / 2 have no
    influence (11 for the default, a field of 23).

    Args:
        dim: channels C.
        num_heads: not used; the map has a value for every channel.
        grid: the nominal grid; only its length, the rank, is used.
        kernel_size: the nominal K, one int or one per axis.
        dilation: d, one int or one per axis.
        backend: of the convolutions, see `gridattn.ops.large_kernel.depthwise_conv`.

    Source: Visual Attention Network, arXiv 2202.09741.

    Example:
        >>> import torch
        >>> LargeKernelAttention(32)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        kernel_size: Any = 21,
        dilation: Any = 3,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_channels(dim, 1)
        kernels = per_axis(kernel_size, self.rank, "kernel_size")
        dilations = per_axis(dilation, self.rank, "dilation")
        local, dilated = zip(*(decompose_kernel(k, d) for k, d in zip(kernels, dilations)))
        self.backend = backend
        self.local = DepthwiseConv(dim, local, backend=backend)
        self.dilated = DepthwiseConv(dim, dilated, dilations, backend)
        self.pointwise = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        return large_kernel_attention(
            x,
            self.local.weight,
            self.local.bias,
            self.dilated.weight,
            self.dilated.bias,
            self.pointwise.weight,
            self.pointwise.bias,
            dilation=self.dilated.dilation,
            backend=self.backend,
        )

    def macs(self, grid: Sequence[int]) -> int:
        return self.local.macs(grid) + self.dilated.macs(grid) + prod(grid) * self.dim**2


@register_attention(
    "visual_attention",
    summary="large kernel attention between two projections, with its own shortcut (Visual Attention Network)",
    source="arXiv 2202.09741",
    linear_cost=True,
)
class VisualAttention(GridAttention):
    """Attention module of the Visual Attention Network: y = proj_2(LKA(GELU(proj_1(x)))) + x.

    The shortcut adds the module's own input, so in a pre-norm block it adds the normalised one.

    Args:
        dim: channels C.
        num_heads: not used.
        grid: the nominal grid; only its length, the rank, is used.
        kernel_size: nominal size of the large kernel, one int or one per axis.
        dilation: of the large kernel, one int or one per axis.
        backend: of the convolutions, see `gridattn.ops.large_kernel.depthwise_conv`.

    Source: Visual Attention Network, arXiv 2202.09741.

    Example:
        >>> import torch
        >>> VisualAttention(32)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        kernel_size: Any = 21,
        dilation: Any = 3,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_channels(dim, 1)
        self.proj_1 = nn.Linear(dim, dim)
        self.attention = LargeKernelAttention(
            dim, num_heads, grid=grid, kernel_size=kernel_size, dilation=dilation, backend=backend
        )
        self.proj_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        return self.proj_2(self.attention(F.gelu(self.proj_1(x)))) + x

    def macs(self, grid: Sequence[int]) -> int:
        return self.attention.macs(grid) + 2 * prod(grid) * self.dim**2


class ConvFeedForward(nn.Module):
    """Feed-forward with a 3-wide depth-wise convolution before its activation: fc2(GELU(DW(fc1(x)))), any rank.

    Args:
        dim: channels C.
        hidden_dim: channels between fc1 and fc2.
        rank: number of grid axes.
        dropout: dropout probability after the activation and after fc2.

    Source: Visual Attention Network, arXiv 2202.09741.
    """

    def __init__(self, dim: int, hidden_dim: int, rank: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        check_probability("dropout", dropout)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.conv = DepthwiseConv(hidden_dim, (3,) * rank)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        x = self.drop(F.gelu(self.conv(self.fc1(x))))
        return self.drop(self.fc2(x))


class VisualAttentionBlock(nn.Module):
    """Block of the Visual Attention Network: two batch-normalised branches with a learned scale per channel.

    x = x + drop_path(scale_1 * attention(BN_1(x))), then x = x + drop_path(scale_2 * feed_forward(BN_2(x))).

    Args:
        dim: channels C.
        grid: the nominal grid; only its length, the rank, is used.
        mlp_ratio: hidden channels of the feed-forward over C.
        kernel_size: nominal size of the large kernel, one int or one per axis.
        dilation: of the large kernel, one int or one per axis.
        dropout: dropout probability in the feed-forward.
        drop_path: probability of dropping a branch for a sample.
        layer_scale: first value of the scales.

    Source: Visual Attention Network, arXiv 2202.09741.

    Example:
        >>> import torch
        >>> VisualAttentionBlock(32)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        grid: Sequence[int] = (14, 14),
        mlp_ratio: float = 4.0,
        kernel_size: Any = 21,
        dilation: Any = 3,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float = 0.01,
    ) -> None:
        super().__init__()
        self.norm1 = GridBatchNorm(dim)
        self.attention = VisualAttention(dim, grid=grid, kernel_size=kernel_size, dilation=dilation)
        self.norm2 = GridBatchNorm(dim)
        self.feed_forward = ConvFeedForward(dim, int(dim * mlp_ratio), len(grid), dropout)
        self.scale1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.scale2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        x = x + self.drop_path(self.scale1 * self.attention(self.norm1(x)))
        return x + self.drop_path(self.scale2 * self.feed_forward(self.norm2(x)))


_OFFICIAL_NAMES = (
    ("spatial_gating_unit.", "attention."),
    ("attn.", "attention."),
    ("conv0.", "local."),
    ("conv_spatial.", "dilated."),
    ("conv1.", "pointwise."),
    ("mlp.dwconv.dwconv.", "feed_forward.conv."),
    ("mlp.", "feed_forward."),
    ("layer_scale_", "scale"),
)


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns official Visual Attention Network weights of `LKA`, `Attention` or `Block` into those of our modules.

    Point-wise convolutions become linear maps: their weights (out, in, 1, 1) lose the two trailing axes.
    """
    converted = {}
    for key, value in state.items():
        for theirs, ours in _OFFICIAL_NAMES:
            key = key.replace(theirs, ours)
        pointwise = any(part in key for part in ("pointwise.weight", "proj_", "fc1.weight", "fc2.weight"))
        converted[key] = value.flatten(1) if pointwise and key.endswith("weight") else value
    return converted

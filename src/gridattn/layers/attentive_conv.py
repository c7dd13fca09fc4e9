"""Attentive convolution (ATConv) and the block of AttNet."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.common import GridAttention
from gridattn.layers.drop_path import DropPath
from gridattn.layers.large_kernel import DepthwiseConv
from gridattn.layers.registry import register_attention
from gridattn.ops.attentive_conv import CONTEXTS, attentive_kernels, routed_conv
from gridattn.ops.common import check_channels, check_choice, check_probability, per_axis

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


@register_attention(
    "attentive_conv",
    summary="depth-wise convolution whose kernels each sample makes from its whole grid (ATConv)",
    source="arXiv 2510.20092",
    linear_cost=True,
)
class AttentiveConv(GridAttention):
    """Attentive convolution: y = proj(K(x) * x_proj(x)), * a depth-wise convolution with kernels K made from x itself.

    Adaptive routing: the grid, projected and averaged to one value per tap, is mixed over the taps into one kernel per
    sample and channel. Lateral inhibition: every kernel loses a learned share, at first half, of its mean. No softmax.

    Args:
        dim: channels C.
        num_heads: not used; every channel has its own kernel.
        grid: the nominal grid; only its length, the rank, is used.
        kernel_size: odd, one int or one per axis.
        activation: before the taps are mixed: "gelu" (AttNet), "gelu_tanh" (SiT) or "silu".
        context: "bands" averages runs of positions in row-major order (official), "grid" the cells of a raster.
        qkv_bias: bias in the three projections.

    Raises:
        ValueError: an even kernel, an unknown activation or context.

    Source: Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency,
        arXiv 2510.20092.

    Example:
        >>> import torch
        >>> AttentiveConv(32)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        kernel_size: Any = 3,
        activation: str = "gelu",
        context: str = "bands",
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_channels(dim, 1)
        check_choice("activation", activation, list(ACTIVATIONS))
        check_choice("context", context, CONTEXTS)
        self.kernel_size = per_axis(kernel_size, self.rank, "kernel_size")
        if any(size % 2 == 0 for size in self.kernel_size):
            raise ValueError(f"kernel_size={kernel_size!r} is not allowed; every entry must be odd")
        self.activation = activation
        self.context = context
        taps = prod(self.kernel_size)
        self.kernel_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.kernel_gen = nn.Linear(taps, taps)
        self.difference_control = nn.Parameter(torch.zeros(dim))
        self.x_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        value = self.x_proj(x)
        return self.proj(routed_conv(value, self.kernels(x).to(value.dtype)))

    def kernels(self, x: Tensor) -> Tensor:
        """The kernels that `x` makes for itself: (B, *grid, C) -> (B, C, *kernel)."""
        return attentive_kernels(
            x,
            self.kernel_proj.weight,
            self.kernel_proj.bias,
            self.kernel_gen.weight,
            self.kernel_gen.bias,
            self.difference_control,
            kernel_size=self.kernel_size,
            activation=ACTIVATIONS[self.activation],
            context=self.context,
        )

    def macs(self, grid: Sequence[int]) -> int:
        n, taps = prod(grid), prod(self.kernel_size)
        return n * self.dim * (2 * self.dim + taps) + self.dim * taps * (self.dim + taps)


class GatedFeedForward(nn.Module):
    """Gated feed-forward of AttNet: fc2(norm(GELU(DW(gate)) * value)), gate and value the two halves of fc1(x).

    Args:
        dim: channels C.
        expansion: the hidden width is int(2 int(C expansion) / 3).
        rank: number of grid axes.
        conv: 3-wide depth-wise convolution of the gate.
        norm: root mean square normalisation over the hidden channels of each position.

    Source: Attentive Convolution, arXiv 2510.20092.
    """

    def __init__(self, dim: int, expansion: float, rank: int = 2, *, conv: bool = True, norm: bool = False) -> None:
        super().__init__()
        hidden = int(2 * int(dim * expansion) / 3)
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.conv = DepthwiseConv(hidden, (3,) * rank) if conv else nn.Identity()
        self.norm = nn.RMSNorm(hidden, eps=1e-6) if norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.norm(F.gelu(self.conv(gate)) * value))


class ChannelScale(nn.Module):
    """One learned factor per channel."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return x * self.gamma


class AttentiveConvBlock(nn.Module):
    """Block of AttNet: x = x + scale_1 ATConv(LN_1(x)), then x = x + scale_2 feed_forward(LN_2(x)).

    Args:
        dim: channels C.
        grid: the nominal grid; only its length, the rank, is used.
        kernel_size: of the attentive convolution, one odd int or one per axis.
        expansion: of the gated feed-forward.
        layer_scale: first value of the scales per channel; None for none.
        conv: depth-wise convolution in the feed-forward.
        norm: normalisation in the feed-forward.
        drop_path: probability of dropping a branch for a sample.

    Source: Attentive Convolution, arXiv 2510.20092.

    Example:
        >>> import torch
        >>> AttentiveConvBlock(32)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        grid: Sequence[int] = (14, 14),
        kernel_size: Any = 3,
        expansion: float = 4.0,
        layer_scale: float | None = 1e-6,
        conv: bool = True,
        norm: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_probability("drop_path", drop_path)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = AttentiveConv(dim, grid=grid, kernel_size=kernel_size)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.feed_forward = GatedFeedForward(dim, expansion, len(grid), conv=conv, norm=norm)
        self.scale1, self.scale2 = (
            nn.Identity() if layer_scale is None else ChannelScale(dim, layer_scale) for _ in range(2)
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        x = x + self.drop_path(self.scale1(self.attention(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.feed_forward(self.norm2(x))))


_OFFICIAL_NAMES = (
    ("token_mixer.", "attention."),
    ("channel_mixer.dwconv.", "feed_forward.conv."),
    ("channel_mixer.norm_layer.", "feed_forward.norm."),
    ("channel_mixer.", "feed_forward."),
    ("layer_scale_", "scale"),
    ("norm_", "norm"),
)


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns official weights of an `ATConv` or of a `Block` into those of our modules.

    Point-wise convolutions become linear maps: their weights (out, in, 1, 1) lose the two trailing axes.
    """
    converted = {}
    for key, value in state.items():
        for theirs, ours in _OFFICIAL_NAMES:
            key = key.replace(theirs, ours)
        pointwise = value.ndim > 2 and "conv." not in key
        converted[key] = value.flatten(1) if pointwise else value
    return converted

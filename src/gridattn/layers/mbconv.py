"""The inverted residual with squeeze and excitation that precedes multi-axis attention."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.batch_norm import GridBatchNorm
from gridattn.layers.drop_path import DropPath
from gridattn.layers.linear import apply_linear, linear_activation
from gridattn.ops.common import check_channels, check_choice


class SqueezeExcitation(nn.Module):
    """x * sigmoid(fc2(SiLU(fc1(mean of x over the grid)))).

    Args:
        dim: channels C.
        hidden: channels in between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return x * self.fc2(F.silu(self.fc1(x.mean((1, 2), keepdim=True)))).sigmoid()


class MbConv(nn.Module):
    """Pre-normalised MBConv: BN, expand, BN, act, depth-wise 3 x 3, BN, act, squeeze-excitation, project; + shortcut.

    The shortcut of a stride of 2 is an average over 2 x 2 positions, and a projection where the channels change.

    Args:
        dim: channels of the input.
        dim_out: channels of the output; `dim` when None.
        stride: 1 or 2; the output has ceil(size / stride) positions an axis.
        hidden: channels of the depth-wise convolution; 4 * `dim_out` when None.
        squeezed: channels inside the squeeze-excitation; `dim_out` // 4 when None.
        activation: "gelu_tanh" or "silu".
        bias: in the two projections to the output channels.
        norm_eps: of the batch normalisations.
        norm_momentum: of the batch normalisations.
        pad_both_sides: a stride of 2 on an even size pads one position before it instead of one after it.
        drop_path: probability of dropping the residual branch for a sample.

    Source: Tu et al., MaxViT: Multi-Axis Vision Transformer, arXiv 2204.01697.

    Example:
        >>> import torch
        >>> MbConv(16, 32, stride=2)(torch.randn(2, 12, 20, 16)).shape
        torch.Size([2, 6, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        *,
        stride: int = 1,
        hidden: int | None = None,
        squeezed: int | None = None,
        activation: str = "gelu_tanh",
        bias: bool = True,
        norm_eps: float = 1e-3,
        norm_momentum: float = 0.01,
        pad_both_sides: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_channels(dim, 1)
        check_choice("stride", stride, (1, 2))
        check_choice("activation", activation, ("gelu_tanh", "silu"))
        dim_out = dim if dim_out is None else dim_out
        hidden = 4 * dim_out if hidden is None else hidden
        squeezed = dim_out // 4 if squeezed is None else squeezed
        self.stride = stride
        self.pad_both_sides = pad_both_sides
        self.pre_norm = GridBatchNorm(dim, norm_eps, norm_momentum)
        self.expand = nn.Linear(dim, hidden, bias=False)
        self.norm1 = GridBatchNorm(hidden, norm_eps, norm_momentum)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, groups=hidden, bias=False)
        self.norm2 = GridBatchNorm(hidden, norm_eps, norm_momentum)
        self.act = nn.GELU("tanh") if activation == "gelu_tanh" else nn.SiLU()
        self.squeeze_excitation = SqueezeExcitation(hidden, squeezed)
        self.project = nn.Linear(hidden, dim_out, bias=bias)
        self.shortcut = nn.Linear(dim, dim_out, bias=bias) if dim != dim_out else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), dim_out)."""
        shortcut = x if self.stride == 1 else _average_2x2(x)
        if self.shortcut is not None:
            shortcut = self.shortcut(shortcut)
        x = self._expand(x)
        x = self.act(self._depthwise(x))
        x = self.squeeze_excitation(x)
        return shortcut + self.drop_path(apply_linear(self.project, x))

    def _expand(self, x: Tensor) -> Tensor:
        """act(norm1(expand(pre_norm(x)))); with fixed statistics all but the activation are one affine map."""
        if self.training:
            return self.act(self.norm1(self.expand(self.pre_norm(x))))
        gain_in, offset_in = self.pre_norm.gain_and_offset()
        gain, offset = self.norm1.gain_and_offset()
        weight = gain[:, None] * self.expand.weight
        return linear_activation(x, weight * gain_in, weight @ offset_in + offset, self.act)

    def _depthwise(self, x: Tensor) -> Tensor:
        """norm2(depthwise(x)); with fixed statistics both are one convolution."""
        if self.training:
            return self.norm2(self._convolve(x, self.depthwise.weight, None))
        gain, offset = self.norm2.gain_and_offset()
        return self._convolve(x, gain.view(-1, 1, 1, 1) * self.depthwise.weight, offset)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        image, padding = x.movedim(-1, 1), 1
        if self.stride == 2 and not self.pad_both_sides:
            # Of the one position that an even size lacks, none comes before it.
            image = F.pad(image, [amount for size in reversed(x.shape[1:-1]) for amount in (size % 2, 1)])
            padding = 0
        return F.conv2d(image, weight, bias, self.stride, padding, groups=len(weight)).movedim(1, -1)


def mbconv_options(variant: str, dim: int) -> dict[str, Any]:
    """Keywords of `MbConv` for the published weights.

    Args:
        variant: "tf", the paper's models, or "rw", the variant that expands from the input's channels.
        dim: channels of the input.
    """
    check_choice("variant", variant, ("tf", "rw"))
    if variant == "tf":
        return {}
    return {
        "hidden": 4 * dim,
        "squeezed": 4 * dim // 16,
        "activation": "silu",
        "bias": False,
        "norm_eps": 1e-5,
        "norm_momentum": 0.1,
        "pad_both_sides": True,
    }


def mbconv_state_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of one published MBConv block (convolutions) to those of `MbConv`."""
    names = {
        "shortcut.expand": "shortcut",
        "conv1_1x1": "expand",
        "conv2_kxk": "depthwise",
        "se": "squeeze_excitation",
        "conv3_1x1": "project",
    }
    renamed = {}
    for key, tensor in state.items():
        old = next((name for name in names if key.startswith(f"{name}.")), None)
        name = key if old is None else names[old] + key.removeprefix(old)
        pointwise = tensor.ndim == 4 and old != "conv2_kxk"
        renamed[name] = tensor.flatten(1) if pointwise else tensor
    return renamed


def _average_2x2(x: Tensor) -> Tensor:
    """Means over blocks of 2 x 2 positions; those that an odd size cuts off have fewer."""
    return F.avg_pool2d(x.movedim(-1, 1), 2, ceil_mode=True, count_include_pad=False).movedim(1, -1)

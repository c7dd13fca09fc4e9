"""The inverted residual with squeeze and excitation that precedes multi-axis attention."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.batch_norm import GridBatchNorm
from gridattn.layers.drop_path import DropPath
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
        x = self.expand(self.pre_norm(x))
        x = self._depthwise(self.act(self.norm1(x)))
        x = self.squeeze_excitation(self.act(self.norm2(x)))
        return shortcut + self.drop_path(self.project(x))

    def _depthwise(self, x: Tensor) -> Tensor:
        # "Same" padding: of the one position that a stride of 2 on an even size needs, none comes before.
        centred = self.stride == 1 or self.pad_both_sides
        rows, columns = (1 if centred or size % 2 else 0 for size in x.shape[1:-1])
        padded = F.pad(x, (0, 0, columns, 1, rows, 1))
        return self.depthwise(padded.movedim(-1, 1)).movedim(1, -1)


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

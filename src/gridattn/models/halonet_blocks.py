"""Parts of HaloNet: stems, the bottleneck block, and attention over channels."""

from math import log2

from torch import Tensor, nn

from gridattn.layers.batch_norm import GridBatchNorm
from gridattn.layers.drop_path import DropPath
from gridattn.layers.halo import HaloAttention
from gridattn.models.common import conv_channels_last

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
STEMS: dict[str, tuple[int, tuple[float, ...]]] = {
    "7x7": (7, (1.0,)),
    "3x3": (3, (1.0,)),
    "tiered": (3, (0.375, 0.5, 1.0)),
}
"""Kernel, and the widths of the convolutions over the stem's width."""


class ConvNorm(nn.Module):
    """Convolution without bias, BN, activation, on channels-last maps; the size is divided by the stride, rounded up.

    Args:
        dim: channels of the input.
        dim_out: channels of the output.
        kernel_size: odd.
        stride: of the convolution.
        groups: of the convolution.
        activation: a name of `ACTIVATIONS`, or None for none.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.bn = GridBatchNorm(dim_out)
        self.act = nn.Identity() if activation is None else ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, h, w, dim_out)."""
        return self.act(self.bn(conv_channels_last(self.conv, x)))


class Stem(nn.Module):
    """One or three convolutions, the first of stride 2; a second stride of 2 is a max pool's, or the third's, or none.

    Args:
        in_chans: image channels.
        width: channels of the output.
        kind: a name of `STEMS`.
        pool: whether a 3 x 3 max pool of stride 2 ends the stem.
        activation: a name of `ACTIVATIONS`.
    """

    def __init__(self, in_chans: int, width: int, kind: str, pool: bool, activation: str) -> None:
        super().__init__()
        kernel, shares = STEMS[kind]
        dims = [round(share * width) for share in shares]
        strides = [2, 1, 1 if pool else 2][: len(dims)]
        self.names = [f"conv{i}" for i in range(1, len(dims) + 1)]
        for name, dim, dim_out, stride in zip(self.names, [in_chans, *dims], dims, strides):
            setattr(self, name, ConvNorm(dim, dim_out, kernel, stride, activation=activation))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if pool else None
        self.reduction = 2 * strides[-1] if len(dims) > 1 and not pool else 4 if pool else 2
        self.tap = max(i for i in range(len(dims)) if i == 0 or strides[i] == 1)
        self.tap_dim = dims[self.tap]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in_chans, H, W) -> the last map of stride 2, and the stem's output, both channels-last."""
        x = tap = images.movedim(1, -1)
        for i, name in enumerate(self.names):
            x = getattr(self, name)(x)
            tap = x if i == self.tap else tap
        return tap, x if self.pool is None else conv_channels_last(self.pool, x)


class Bottleneck(nn.Module):
    """1 x 1 convolution, halo attention or a 3 x 3 convolution with attention over channels, 1 x 1 convolution.

    The shortcut is the input, or a 1 x 1 convolution of it where the shape changes.

    Args:
        dim: channels of the input.
        hidden: channels after the first convolution.
        dim_out: channels of the output.
        stride: of the middle layer.
        middle: `HaloAttention` with that stride, or `ChannelMixingConv`.
        middle_dim: channels of the middle layer's output.
        activation: a name of `ACTIVATIONS`.
        inverted: no activation at the end, and no shortcut where the shape changes.
        drop_path: probability of dropping the branch.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        dim_out: int,
        stride: int,
        middle: nn.Module,
        middle_dim: int,
        activation: str,
        inverted: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        changes = dim != dim_out or stride != 1
        self.has_shortcut = not (changes and inverted)
        self.shortcut = ConvNorm(dim, dim_out, stride=stride) if changes and not inverted else nn.Identity()
        self.conv1 = ConvNorm(dim, hidden, activation=activation)
        self.middle = middle
        has_norm = isinstance(middle, HaloAttention)
        self.norm = GridBatchNorm(middle_dim) if has_norm else nn.Identity()
        self.act = ACTIVATIONS[activation]() if has_norm else nn.Identity()
        self.conv3 = ConvNorm(middle_dim, dim_out)
        self.drop_path = DropPath(drop_path)
        self.last_act = nn.Identity() if inverted else ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), dim_out)."""
        y = self.act(self.norm(self.middle(self.conv1(x))))
        y = self.drop_path(self.conv3(y))
        return self.last_act(self.shortcut(x) + y if self.has_shortcut else y)


class ChannelMixingConv(nn.Module):
    """3 x 3 convolution, BN, activation, and attention over channels.

    Args:
        dim: channels.
        stride: of the convolution.
        group_width: channels of a group; None for one group.
        activation: a name of `ACTIVATIONS`.
        channel_attention: `"se"`, `"eca"` or None.
        squeeze_ratio: channels inside `"se"` over `dim`, rounded to a multiple of 8.
    """

    def __init__(
        self,
        dim: int,
        stride: int,
        group_width: int | None,
        activation: str,
        channel_attention: str | None,
        squeeze_ratio: float,
    ) -> None:
        super().__init__()
        groups = dim // group_width if group_width else 1
        self.conv = ConvNorm(dim, dim, 3, stride, groups, activation)
        if channel_attention == "se":
            self.attn = SqueezeExcitation(dim, multiple_of_8(dim * squeeze_ratio))
        elif channel_attention == "eca":
            self.attn = EfficientChannelAttention(dim)
        else:
            self.attn = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), dim)."""
        return self.attn(self.conv(x))


class SqueezeExcitation(nn.Module):
    """x * sigmoid(fc2(ReLU(fc1(mean of x over the grid))))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return x * self.fc2(self.fc1(x.mean((1, 2), keepdim=True)).relu()).sigmoid()


class EfficientChannelAttention(nn.Module):
    """x * sigmoid(convolution along the channels of the mean of x over the grid)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        size = int((log2(dim) + 1) / 2)
        size = max(3, size + 1 - size % 2)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        gate = self.conv(x.mean((1, 2))[:, None]).sigmoid()
        return x * gate[:, None]


def multiple_of_8(value: float) -> int:
    """The multiple of 8 nearest to `value`, but at least 8 and at least 0.9 of it.

    Example:
        >>> multiple_of_8(36.0), multiple_of_8(511.5)
        (40, 512)
    """
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


def init_weights(module: nn.Module) -> None:
    """For `Module.apply`: convolutions keep the variance of their output's gradient; a classifier starts near zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, HaloAttention):
        module.reset_parameters()

"""MobileNet-V1 and -V2 in which subspace attention (ULSAM) takes the place of chosen blocks, or follows them.

stem -> numbered blocks, in levels of one resolution each -> mean -> linear

Sources: ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks, arXiv
2006.15102; MobileNets, arXiv 1704.04861; MobileNetV2, arXiv 1801.04381.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from gridattn.layers.drop_path import DropPath
from gridattn.layers.ulsam import UltraLightweightSubspaceAttention, convert_official
from gridattn.models.common import Backbone, Level, conv_channels_last, linear
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_probability


class Step(NamedTuple):
    """A numbered block: channels in and out, stride, and how much a bottleneck widens (MobileNet-V2 alone)."""

    dim: int
    out_dim: int
    stride: int
    expansion: int = 1

    @property
    def keeps_shape(self) -> bool:
        """Whether the output has the shape of the input."""
        return self.dim == self.out_dim and self.stride == 1


class ConvBlock(nn.Module):
    """Convolutions on a channels-last grid, with a shortcut around them or without."""

    def __init__(self, *layers: nn.Module, shortcut: bool = False, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Sequential(*layers)
        self.shortcut = shortcut
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, h, w, out)."""
        y = conv_channels_last(self.conv, x)
        return x + self.drop_path(y) if self.shortcut else y


class SubspaceMobileNet(Backbone):
    """What both networks share. Blocks are numbered from 1; a level begins with each block of stride 2.

    Args:
        stem_dim: channels of the first convolution.
        steps: the numbered blocks.
        replace: numbers of blocks that subspace attention takes the place of; they must keep the shape of their input.
        insert_after: numbers of blocks that subspace attention follows.
        num_subspaces: of the attention.
        bn_momentum: of the running statistics in the attention; the published 0.9 follows almost only the last batch,
            0.1 is usual elsewhere.
        drop_rate: dropout before the classifier.
        num_classes: 0 leaves the classifier out.
        in_chans: image channels.
    """

    def __init__(
        self,
        stem_dim: int,
        steps: Sequence[Step],
        replace: Sequence[int],
        insert_after: Sequence[int],
        num_subspaces: int,
        bn_momentum: float,
        drop_rate: float,
        num_classes: int,
        in_chans: int,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_probability("drop_rate", drop_rate)
        numbered = dict(enumerate(steps, start=1))
        _check_numbers("replace", replace, [n for n, step in numbered.items() if step.keeps_shape])
        _check_numbers("insert_after", insert_after, list(numbered))

        def attention(dim: int) -> nn.Module:
            return UltraLightweightSubspaceAttention(dim, num_subspaces=num_subspaces, momentum=bn_momentum)

        blocks: list[list[nn.Module]] = [[]]
        dims = [stem_dim]
        for number, step in numbered.items():
            if step.stride > 1:
                blocks.append([])
                dims.append(step.out_dim)
            dims[-1] = step.out_dim
            blocks[-1].append(attention(step.dim) if number in replace else self.make_block(step, number))
            if number in insert_after:
                blocks[-1].append(attention(step.out_dim))
        last = self.make_last_block(dims[-1])
        if last is not None:
            blocks[-1].append(last)
            dims[-1] = last.conv[0].out_channels

        self.patch_embed = ConvBlock(*self.make_unit(in_chans, stem_dim, 3, stride=2))
        self.levels = nn.ModuleList(Level(level) for level in blocks)
        self.feature_info = [
            {"num_chs": dim, "reduction": 2 * 2**i, "module": f"levels.{i}"} for i, dim in enumerate(dims)
        ]
        self.num_features = dims[-1]
        self.norm = nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.head = linear(self.num_features, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def make_unit(self, dim: int, out_dim: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
        """Convolution without bias, batch normalisation, the family's activation."""
        raise NotImplementedError

    def make_block(self, step: Step, number: int) -> ConvBlock:
        """The numbered block."""
        raise NotImplementedError

    def make_last_block(self, dim: int) -> ConvBlock | None:
        """What follows the numbered blocks, if anything."""
        return None

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the map of every level, (B, h, w, C)."""
        self.check_images(images)
        x = self.patch_embed(images.movedim(1, -1))
        maps = []
        for level in self.levels:
            x, _ = level(x, self.grad_checkpointing)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, h, w, num_features) -> the mean over positions and, unless `pre_logits`, its logits (B, num_classes)."""
        pooled = super().forward_head(x, pre_logits=True)
        return pooled if pre_logits else self.head(self.drop(pooled))

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict in the usual layout under our names; counters of batches that are missing keep their value.

        The usual layout counts stem, blocks and attentions in one sequence, `model.<k>.` (V1, with `fc`) or
        `features.<k>.` (V2, with `classifier.1`). Subspaces, modules of their own there, become vectors over all
        channels.
        """
        own = [f"levels.{i}.blocks.{j}." for i, level in enumerate(self.levels) for j in range(len(level.blocks))]  # type: ignore[arg-type]
        prefixes = ["patch_embed.", *own]
        converted = {name: t for name, t in self.state_dict().items() if name.endswith("num_batches_tracked")}
        numbered: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            match = re.match(r"^(?:model|features)\.(\d+)\.(?:conv\.)?(.+)", name)
            if match and int(match[1]) < len(prefixes):
                numbered.setdefault(int(match[1]), {})[match[2]] = tensor
            else:
                converted[re.sub(r"^(?:fc|classifier\.1)\.", "head.", name)] = tensor
        for number, part in numbered.items():
            subspaces = any(name.startswith("subspaces.") for name in part)
            inner = convert_official(part) if subspaces else {f"conv.{name}": t for name, t in part.items()}
            converted |= {prefixes[number] + name: tensor for name, tensor in inner.items()}
        return converted


class SubspaceMobileNetV1(SubspaceMobileNet):
    """MobileNet-V1 with subspace attention: 13 blocks of a depth-wise and a point-wise convolution.

    Args:
        width: factor of all channels.
        replace: as in `SubspaceMobileNet`; 3, 5, 7 to 11 and 13 are allowed.
        insert_after: as in `SubspaceMobileNet`.
        num_subspaces: as in `SubspaceMobileNet`.
        bn_momentum: as in `SubspaceMobileNet`.
        drop_rate: as in `SubspaceMobileNet`.
        num_classes: as in `SubspaceMobileNet`.
        in_chans: as in `SubspaceMobileNet`.

    Raises:
        ValueError: a block that cannot be replaced or does not exist, channels that the subspaces do not divide.

    Example:
        >>> import torch
        >>> model = SubspaceMobileNetV1(0.25, replace=(11,), num_classes=5).eval()
        >>> model(torch.randn(1, 3, 45, 37)).shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        width: float = 1.0,
        replace: Sequence[int] = (),
        insert_after: Sequence[int] = (),
        num_subspaces: int = 4,
        bn_momentum: float = 0.9,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        dims = [int(dim * width) for dim in (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)]
        steps = [Step(dims[i], dims[i + 1], stride=2 if i in (1, 3, 5, 11) else 1) for i in range(13)]
        super().__init__(
            dims[0], steps, replace, insert_after, num_subspaces, bn_momentum, drop_rate, num_classes, in_chans
        )

    def make_unit(self, dim: int, out_dim: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
        """Convolution without bias, batch normalisation, ReLU."""
        return _conv_unit(dim, out_dim, kernel_size, stride, groups, nn.ReLU())

    def make_block(self, step: Step, number: int) -> ConvBlock:
        """A depth-wise convolution, 3 wide, and a point-wise one."""
        depthwise = self.make_unit(step.dim, step.dim, 3, step.stride, groups=step.dim)
        return ConvBlock(*depthwise, *self.make_unit(step.dim, step.out_dim, 1))


class SubspaceMobileNetV2(SubspaceMobileNet):
    """MobileNet-V2 with subspace attention: 17 inverted residual bottlenecks, then a point-wise convolution.

    That convolution belongs to the last level, so the last map has its channels. Subspace attention replaces a
    bottleneck with its shortcut, for it has one of its own.

    Args:
        width_mult: factor of all channels.
        replace: as in `SubspaceMobileNet`; 3, 5, 6, 8, 9, 10, 12, 13, 15 and 16 are allowed.
        insert_after: as in `SubspaceMobileNet`.
        num_subspaces: as in `SubspaceMobileNet`.
        bn_momentum: as in `SubspaceMobileNet`.
        round_nearest: channels are rounded to multiples of this number.
        drop_rate: as in `SubspaceMobileNet`.
        drop_path_rate: stochastic depth of the bottlenecks with a shortcut, growing linearly to this rate.
        num_classes: as in `SubspaceMobileNet`.
        in_chans: as in `SubspaceMobileNet`.

    Raises:
        ValueError: a block that cannot be replaced or does not exist, channels that the subspaces do not divide.

    Example:
        >>> import torch
        >>> model = SubspaceMobileNetV2(0.25, replace=(13, 16), num_classes=5).eval()
        >>> model(torch.randn(1, 3, 45, 37)).shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        width_mult: float = 1.0,
        replace: Sequence[int] = (),
        insert_after: Sequence[int] = (),
        num_subspaces: int = 4,
        bn_momentum: float = 0.9,
        round_nearest: int = 8,
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        check_probability("drop_path_rate", drop_path_rate)
        self.last_dim = make_divisible(1280 * max(1.0, width_mult), round_nearest)
        stem_dim = dim = make_divisible(32 * width_mult, round_nearest)
        steps = []
        for expansion, channels, depth, stride in V2_STAGES:
            out_dim = make_divisible(channels * width_mult, round_nearest)
            for i in range(depth):
                steps.append(Step(dim, out_dim, stride if i == 0 else 1, expansion))
                dim = out_dim
        self.rates = [drop_path_rate * i / (len(steps) - 1) for i in range(len(steps))]
        super().__init__(
            stem_dim, steps, replace, insert_after, num_subspaces, bn_momentum, drop_rate, num_classes, in_chans
        )

    def make_unit(self, dim: int, out_dim: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
        """Convolution without bias, batch normalisation, ReLU6."""
        return _conv_unit(dim, out_dim, kernel_size, stride, groups, nn.ReLU6())

    def make_block(self, step: Step, number: int) -> ConvBlock:
        """Widening, a depth-wise convolution, 3 wide, and narrowing without activation."""
        hidden = step.dim * step.expansion
        widen = [self.make_unit(step.dim, hidden, 1)] if step.expansion > 1 else []
        depthwise = self.make_unit(hidden, hidden, 3, step.stride, groups=hidden)
        narrow = nn.Conv2d(hidden, step.out_dim, 1, bias=False), nn.BatchNorm2d(step.out_dim)
        return ConvBlock(*widen, depthwise, *narrow, shortcut=step.keeps_shape, drop_path=self.rates[number - 1])

    def make_last_block(self, dim: int) -> ConvBlock | None:
        """The point-wise convolution before the mean."""
        return ConvBlock(*self.make_unit(dim, self.last_dim, 1))

"""MobileNet-V1 and -V2 in which subspace attention (ULSAM) takes the place of chosen blocks, or follows them.

stem -> numbered blocks, in levels of one resolution each -> mean -> linear

Sources: ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks, arXiv
2006.15102; MobileNets, arXiv 1704.04861; MobileNetV2, arXiv 1801.04381.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gridattn.layers.drop_path import DropPath
from gridattn.layers.ulsam import UltraLightweightSubspaceAttention, convert_official
from gridattn.models.common import Backbone, Level, conv_channels_last, linear
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_probability


class ConvBlock(nn.Module):
    """Convolutions on a channels-last grid, with a shortcut around them or without.

    Args:
        dim: channels of the input.
        out_dim: channels of the output.
        stride: of all convolutions together.
        layers: the convolutions, channels first.
        shortcut: add the input.
        drop_path: probability of dropping what is added to the input.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        stride: int,
        layers: Iterable[nn.Module],
        shortcut: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.out_dim = out_dim
        self.stride = stride
        self.conv = nn.Sequential(*layers)
        self.shortcut = shortcut
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), out_dim)."""
        y = conv_channels_last(self.conv, x)
        return x + self.drop_path(y) if self.shortcut else y


class SubspaceMobileNet(Backbone):
    """What both networks share. Blocks are numbered from 1; a level begins with each block of stride 2.

    Args:
        stem: the first convolution, of stride 2.
        blocks: the numbered blocks.
        last: what follows them, if anything; it belongs to the last level, whose map has its channels.
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
        stem: ConvBlock,
        blocks: Sequence[ConvBlock],
        last: ConvBlock | None,
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
        numbered = dict(enumerate(blocks, start=1))
        same_shape = [n for n, block in numbered.items() if block.stride == 1 and block.dim == block.out_dim]
        _check_numbers("replace", replace, same_shape, "blocks that keep the shape of their input")
        _check_numbers("insert_after", insert_after, list(numbered), "blocks")

        levels: list[list[nn.Module]] = [[]]
        dims = [stem.out_dim]
        for number, block in numbered.items():
            if block.stride > 1:
                levels.append([])
                dims.append(block.out_dim)
            chosen = [block]
            if number in replace or number in insert_after:
                attention = UltraLightweightSubspaceAttention(
                    block.out_dim, num_subspaces=num_subspaces, momentum=bn_momentum
                )
                chosen = [attention] if number in replace else [block, attention]
            levels[-1].extend(chosen)
            dims[-1] = block.out_dim
        if last is not None:
            levels[-1].append(last)
            dims[-1] = last.out_dim

        self.patch_embed = stem
        self.levels = nn.ModuleList(Level(level) for level in levels)
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

        The usual layout numbers stem, blocks and inserted attention in one sequence, `model.<k>.` (V1, with `fc`) or
        `features.<k>.` (V2, with `classifier.1`). Each subspace is a module there; here they are joined.
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
            attention = all(name.startswith("subspaces.") for name in part)
            inner = convert_official(part) if attention else {f"conv.{name}": tensor for name, tensor in part.items()}
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
        ValueError: a block that cannot be replaced or does not exist, or channels that the subspaces do not divide.

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
        stem = ConvBlock(in_chans, dims[0], 2, _unit(in_chans, dims[0], 3, 2, act=nn.ReLU))
        blocks = [_separable(dims[i], dims[i + 1], stride=2 if i in (1, 3, 5, 11) else 1) for i in range(13)]
        super().__init__(
            stem, blocks, None, replace, insert_after, num_subspaces, bn_momentum, drop_rate, num_classes, in_chans
        )


V2_STAGES = (1, 6, 6, 6, 6, 6, 6), (16, 24, 32, 64, 96, 160, 320), (1, 2, 3, 4, 3, 3, 1), (1, 2, 2, 2, 1, 2, 1)
"""Of the runs of equal bottlenecks: how much they widen, channels, how many they are, stride of the first."""


class SubspaceMobileNetV2(SubspaceMobileNet):
    """MobileNet-V2 with subspace attention: 17 inverted residual bottlenecks, then a point-wise convolution.

    Subspace attention replaces a bottleneck together with its shortcut, for it has one of its own.

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
        ValueError: a block that cannot be replaced or does not exist, or channels that the subspaces do not divide.

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
        dim = make_divisible(32 * width_mult, round_nearest)
        stem = ConvBlock(in_chans, dim, 2, _unit(in_chans, dim, 3, 2))
        blocks: list[ConvBlock] = []
        for expansion, channels, depth, stride in zip(*V2_STAGES):
            out_dim = make_divisible(channels * width_mult, round_nearest)
            for i in range(depth):
                rate = drop_path_rate * len(blocks) / 16
                blocks.append(_bottleneck(dim, out_dim, stride if i == 0 else 1, expansion, rate))
                dim = out_dim
        last_dim = make_divisible(1280 * max(1.0, width_mult), round_nearest)
        last = ConvBlock(dim, last_dim, 1, _unit(dim, last_dim, 1))
        super().__init__(
            stem, blocks, last, replace, insert_after, num_subspaces, bn_momentum, drop_rate, num_classes, in_chans
        )


def make_divisible(channels: float, divisor: int) -> int:
    """The multiple of `divisor` that is nearest to `channels`, or the next one where that takes more than a tenth away.

    Example:
        >>> make_divisible(33.6, 8), make_divisible(10, 8), make_divisible(12, 8)
        (32, 16, 16)
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def _separable(dim: int, out_dim: int, stride: int) -> ConvBlock:
    """A depth-wise convolution, 3 wide, and a point-wise one."""
    depthwise = _unit(dim, dim, 3, stride, groups=dim, act=nn.ReLU)
    return ConvBlock(dim, out_dim, stride, [*depthwise, *_unit(dim, out_dim, 1, act=nn.ReLU)])


def _bottleneck(dim: int, out_dim: int, stride: int, expansion: int, drop_path: float) -> ConvBlock:
    """Widening, a depth-wise convolution, 3 wide, and narrowing without an activation."""
    hidden = dim * expansion
    widen = [_unit(dim, hidden, 1)] if expansion > 1 else []
    narrow = [nn.Conv2d(hidden, out_dim, 1, bias=False), nn.BatchNorm2d(out_dim)]
    layers = [*widen, _unit(hidden, hidden, 3, stride, groups=hidden), *narrow]
    return ConvBlock(dim, out_dim, stride, layers, shortcut=stride == 1 and dim == out_dim, drop_path=drop_path)


def _unit(
    dim: int, out_dim: int, kernel_size: int, stride: int = 1, groups: int = 1, act: type[nn.Module] = nn.ReLU6
) -> nn.Sequential:
    conv = nn.Conv2d(dim, out_dim, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_dim), act())


def _check_numbers(name: str, numbers: Sequence[int], allowed: Sequence[int], kind: str) -> None:
    wrong = sorted(set(numbers) - set(allowed))
    if wrong:
        raise ValueError(
            f"{name}={tuple(numbers)} is not allowed; {', '.join(map(str, allowed))} are the {kind}, {wrong[0]} is not"
        )


def _named(base: str, replaced: Sequence[tuple[int, ...]], inserted: Sequence[int], **config: Any) -> dict[str, Any]:
    """The plain network and its published forms, named after the blocks that are replaced or followed."""
    variants = {base: config}
    variants |= {f"{base}_ulsam_" + "_".join(map(str, blocks)): config | {"replace": blocks} for blocks in replaced}
    return variants | {f"{base}_ulsam_after_{n}": config | {"insert_after": (n,)} for n in inserted}


V1_VARIANTS = {
    **_named("mobilenet_v1_100", [(11,)], [11, 13], width=1.0),
    **_named("mobilenet_v1_075", [(11,)], [], width=0.75),
    **_named("mobilenet_v1_050", [(11,)], [], width=0.5),
}
V2_REPLACED = [(13,), (16,), (10, 13), (15, 16), (13, 16), (12, 13, 15, 16)]
V2_VARIANTS = _named("mobilenet_v2_100", V2_REPLACED, [16], width_mult=1.0)

for _family, _variants in ((SubspaceMobileNetV1, V1_VARIANTS), (SubspaceMobileNetV2, V2_VARIANTS)):
    register_variants(_family, _variants, source="arXiv 2006.15102", first_conv="patch_embed.conv.0")

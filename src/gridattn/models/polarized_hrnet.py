"""HRNet with polarized self-attention in its blocks, as a backbone of four maps and as a network for human pose.

stem -> bottlenecks -> [new branch of half the resolution -> exchange modules] x 3: all resolutions are kept to the end.
Attention stands between the two convolutions of every basic block.

Sources: Polarized Self-Attention: Towards High-quality Pixel-wise Regression, arXiv 2107.00782; Deep High-Resolution
Representation Learning, arXiv 1902.09212 (pose) and 1908.07919 (four maps).
"""

import re
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gridattn.layers import PolarizedSelfAttention
from gridattn.layers.drop_path import DropPath
from gridattn.models.common import Backbone, Level, drop_path_rates, linear
from gridattn.models.conv_norm import batch_counters, conv_norm
from gridattn.models.patches import check_level_lists
from gridattn.models.polarized_resnet import (
    Bottleneck,
    channels_first,
    conv_names,
    convert_attention,
    init_pose,
    polarized,
)
from gridattn.models.polarized_variants import HRNET_VARIANTS, POSE_HRNET_VARIANTS
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_probability


class PolarizedHRNet(Backbone):
    """High-resolution network with polarized self-attention. Any image size is taken.

    Maps have `width`, 2, 4, 8 times as many channels and the image's size over 4, 8, 16, 32, rounded up; inside, images
    are channels-first. The classifier acts on the mean of all four maps, resized to the finest and joined.

    Args:
        width: channels of the finest branch.
        depths: bottlenecks of the first level, then exchange modules of the levels with 2, 3, 4 branches.
        blocks: basic blocks in every branch of a module.
        layout: of the attention, see `PolarizedSelfAttention`; None for the plain network.
        variant: of the attention, "official" or "paper".
        bottleneck_width: channels of the 3x3 convolutions of the bottlenecks.
        bottleneck_attention: whether the bottlenecks have attention too, after their 3x3 convolution.
        drop_path_rate: stochastic depth, growing linearly to this rate over the bottlenecks and modules.
        num_classes: 0 leaves the classifier out.
        in_chans: image channels.

    Raises:
        ValueError: a number of levels other than 4, or a setting that the attention refuses.

    Example:
        >>> import torch
        >>> model = PolarizedHRNet(8, depths=(1, 1, 1, 1), blocks=1, num_classes=5).eval()
        >>> model(torch.randn(1, 3, 45, 37)).shape
        torch.Size([1, 5])
    """

    stem_dim = 64
    every_branch = True
    upsampling = "bilinear"

    def __init__(
        self,
        width: int = 48,
        depths: Sequence[int] = (4, 1, 4, 3),
        blocks: int = 4,
        layout: str | None = "parallel",
        variant: str = "official",
        bottleneck_width: int = 64,
        bottleneck_attention: bool = False,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_level_lists(**{"levels of an HRNet": range(4), "depths": depths})
        check_probability("drop_path_rate", drop_path_rate)
        dims = [width * 2**i for i in range(4)]
        rates = drop_path_rates(drop_path_rate, depths)
        self.patch_embed = nn.Sequential(
            conv_norm(in_chans, self.stem_dim, stride=2, activation=nn.ReLU()),
            conv_norm(self.stem_dim, self.stem_dim, stride=2, activation=nn.ReLU()),
        )
        bottlenecks, dim = [], self.stem_dim
        for rate in rates[0]:
            attention = polarized(bottleneck_width, layout if bottleneck_attention else None, variant)
            bottlenecks.append(Bottleneck(dim, bottleneck_width, attention=attention, drop_path=rate))
            dim = Bottleneck.expansion * bottleneck_width
        levels: list[nn.Module] = [Level(bottlenecks)]
        incoming = [dim]
        for i in range(1, 4):
            branches = dims[: i + 1]
            modules = []
            for j, rate in enumerate(rates[i]):
                last = i == 3 and j == len(rates[i]) - 1
                outputs = len(branches) if self.every_branch or not last else 1
                paths = [
                    nn.Sequential(*[BasicBlock(c, polarized(c, layout, variant), rate) for _ in range(blocks)])
                    for c in branches
                ]
                modules.append(ExchangeModule(paths, branches, outputs, self.upsampling))
            levels.append(BranchLevel(Transition(incoming, branches), modules))
            incoming = branches
        self.levels = nn.ModuleList(levels)
        kept = dims if self.every_branch else dims[:1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": "levels.3"} for i, dim in enumerate(kept)
        ]
        self.num_features = sum(kept)
        self.norm = nn.Identity()
        self.head = linear(self.num_features, num_classes) if num_classes else nn.Identity()
        init_pose(self)

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the map of every branch that is kept, (B, h, w, C), finest first."""
        self.check_images(images)
        x, _ = self.levels[0](self.patch_embed(images), self.grad_checkpointing)
        branches = [x]
        for level in self.levels[1:]:
            branches = level(branches, self.grad_checkpointing)
        return [branch.movedim(1, -1) for branch in branches]

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> all maps, bilinearly resized to the finest and joined, (B, h, w, num_features)."""
        maps = [x.movedim(-1, 1) for x in self.forward_maps(images)]
        resized = [resize(x, maps[0].shape[2:], "bilinear") for x in maps]
        return torch.cat(resized, 1).movedim(1, -1)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict under our names; counters of batches that are missing keep their value."""
        renamed = {_official_name(name): tensor for name, tensor in convert_attention(state).items()}
        return batch_counters(self) | {k: t.flatten(1) if k == "head.weight" else t for k, t in renamed.items()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into a sequence of groups; a new branch goes with the module after it."""
        groups = super().group_matcher(coarse)
        if not coarse:
            groups["blocks"] = [(r"^levels\.(\d+)\.transition", (0,)), *groups["blocks"]]
        return groups


class PoseHRNet(PolarizedHRNet):
    """Heatmaps of joints from the finest branch: (B, in_chans, H, W) -> (B, num_classes, ceil(H / 4), ceil(W / 4)).

    Arguments as in `PolarizedHRNet`; `num_classes` is the number of joints. Positions of coarse branches are
    repeated, not interpolated, where they join finer ones.

    Source: arXiv 1902.09212, with the attention of arXiv 2107.00782.

    Example:
        >>> import torch
        >>> model = PoseHRNet(8, depths=(1, 1, 1, 1), blocks=1, num_classes=5).eval()
        >>> model(torch.randn(1, 3, 45, 37)).shape
        torch.Size([1, 5, 12, 10])
    """

    every_branch = False
    upsampling = "nearest"

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, h, w, num_features) -> heatmaps (B, num_classes, h, w); with `pre_logits`, `x` channels-first."""
        return (x if pre_logits else self.head(x)).movedim(-1, 1)


class BasicBlock(nn.Module):
    """y = ReLU(conv(attention(conv(x))) + x), both convolutions 3x3 and followed by batch normalisation."""

    def __init__(self, dim: int, attention: PolarizedSelfAttention | None = None, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv1 = conv_norm(dim, dim, activation=nn.ReLU())
        self.attn = attention
        self.conv2 = conv_norm(dim, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return (self.drop_path(self.conv2(channels_first(self.attn, self.conv1(x)))) + x).relu()


class Transition(nn.Module):
    """Adds a branch of half the resolution, made from the last, and changes the channels of the others if needed."""

    def __init__(self, dims: Sequence[int], out_dims: Sequence[int]) -> None:
        super().__init__()
        same = [
            nn.Identity() if dim == out_dim else conv_norm(dim, out_dim, activation=nn.ReLU())
            for dim, out_dim in zip(dims, out_dims)
        ]
        self.paths = nn.ModuleList([*same, conv_norm(dims[-1], out_dims[-1], stride=2, activation=nn.ReLU())])

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        """n tensors (B, C, H, W), each half the size of the one before -> n + 1 such."""
        return [path(x) for path, x in zip(self.paths, [*branches, branches[-1]])]


class ExchangeModule(nn.Module):
    """Blocks in every branch, then y_i = ReLU(sum_j f_ij(x_j)).

    f_ij is the identity for j = i, a pointwise convolution and upsampling for a coarser branch j > i, and i - j
    convolutions of stride 2 for a finer one, with ReLU between them.

    Args:
        branches: blocks of each branch, finest first.
        dims: channels of each branch.
        outputs: how many branches are given out, from the finest.
        upsampling: "bilinear" or "nearest".
    """

    def __init__(self, branches: Sequence[nn.Module], dims: Sequence[int], outputs: int, upsampling: str) -> None:
        super().__init__()
        self.upsampling = upsampling
        self.branches = nn.ModuleList(branches)
        self.fuse = nn.ModuleList(
            nn.ModuleList(fuse_path(dims, source, target) for source in range(len(dims))) for target in range(outputs)
        )

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        """n tensors (B, C, H, W), each half the size of the one before -> the first `outputs` of them, exchanged."""
        branches = [branch(x) for branch, x in zip(self.branches, branches)]
        fused = []
        for i, paths in enumerate(self.fuse):
            size = branches[i].shape[2:]
            terms = [path(x) for path, x in zip(paths, branches)]  # pyright: ignore[reportArgumentType]
            fused.append(reduce(torch.add, (resize(term, size, self.upsampling) for term in terms)).relu())
        return fused


class BranchLevel(nn.Module):
    """A new branch, then exchange modules."""

    def __init__(self, transition: Transition, blocks: Sequence[ExchangeModule]) -> None:
        super().__init__()
        self.transition = transition
        self.blocks = nn.ModuleList(blocks)

    def forward(self, branches: list[Tensor], recompute: bool = False) -> list[Tensor]:
        """n tensors (B, C, H, W) -> n + 1, or as many as the last module gives out."""
        branches = self.transition(branches)
        for block in self.blocks:
            if recompute and torch.is_grad_enabled():
                branches = checkpoint(block, branches, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                branches = block(branches)
        return branches


def fuse_path(dims: Sequence[int], source: int, target: int) -> nn.Module:
    """f_ij of `ExchangeModule` for j = source, i = target, without the upsampling."""
    if source == target:
        return nn.Identity()
    if source > target:
        return conv_norm(dims[source], dims[target], kernel_size=1)
    kept = [conv_norm(dims[source], dims[source], stride=2, activation=nn.ReLU()) for _ in range(target - source - 1)]
    return nn.Sequential(*kept, conv_norm(dims[source], dims[target], stride=2))


def resize(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """(B, C, h, w) -> (B, C, *size); nearest repeats by a power of two and crops, so that strides stay aligned."""
    if x.shape[2:] == torch.Size(size):
        return x
    if mode == "bilinear":
        return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
    factor = 1
    while x.shape[2] * factor < size[0] or x.shape[3] * factor < size[1]:
        factor *= 2
    return F.interpolate(x, scale_factor=float(factor), mode="nearest")[:, :, : size[0], : size[1]]


def _official_name(name: str) -> str:
    """Our name of a published parameter outside of the attention."""
    name = re.sub(r"^conv(\d)\.", lambda m: f"patch_embed.{int(m[1]) - 1}.", conv_names(name))
    name = re.sub(r"^layer1\.", "levels.0.blocks.", name)
    # A new branch lies one level deeper in the files than a path that changes channels.
    name = re.sub(r"^transition(\d)\.(\d)\.(?:0\.)?(\d\.\w+)$", r"levels.\1.transition.paths.\2.\3", name)
    name = re.sub(r"^stage(\d)\.", lambda m: f"levels.{int(m[1]) - 1}.blocks.", name)
    name = name.replace(".fuse_layers.", ".fuse.")
    return re.sub(r"^final_layer\.", "head.", name)


register_variants(PolarizedHRNet, HRNET_VARIANTS, source="arXiv 2107.00782", first_conv="patch_embed.0.0")
for _size, _variants in POSE_HRNET_VARIANTS.items():
    register_variants(
        PoseHRNet,
        _variants,
        source="arXiv 2107.00782, arXiv 1902.09212",
        first_conv="patch_embed.0.0",
        img_size=_size,
        interpolation="bilinear",
        crop_pct=1.0,
    )

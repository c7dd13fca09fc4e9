"""Visual Attention Network (VAN): large kernel attention in a pyramid of four levels.

stem -> [blocks -> LN -> downsampler] x levels -> mean -> linear. The LayerNorm of a level lies on the main path.

Source: Visual Attention Network, arXiv 2202.09741.
"""

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor, nn

from gridattn.layers.batch_norm import GridBatchNorm
from gridattn.layers.large_kernel import DepthwiseConv, VisualAttentionBlock, convert_official
from gridattn.models.common import Backbone, Level, conv_channels_last, drop_path_rates, linear
from gridattn.models.patches import check_level_lists
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_probability


class VAN(Backbone):
    """Visual Attention Network. Any image size is taken; maps have the image's size over 4, 8, 16, 32, rounded up.

    Args:
        embed_dims: channels per level.
        depths: blocks per level.
        mlp_ratios: hidden width of the convolutional MLPs over the channels, per level.
        kernel_size: nominal size of the large kernel.
        dilation: of the large kernel.
        norm_eps: epsilon of the levels' LayerNorm: 1e-6 in the published classifiers, 1e-5 in the published
            segmentation backbones.
        drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth, growing linearly to this rate.
        num_classes: 0 leaves the classifier out.
        in_chans: image channels.

    Raises:
        ValueError: lists that do not have one entry per level, or a setting outside its range.

    Example:
        >>> import torch
        >>> model = VAN((8, 16), depths=(1, 1), mlp_ratios=(4, 2), num_classes=5).eval()
        >>> model(torch.randn(1, 3, 45, 37)).shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 3, 12, 3),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        kernel_size: int = 21,
        dilation: int = 3,
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_level_lists(embed_dims=embed_dims, depths=depths, mlp_ratios=mlp_ratios)
        check_probability("drop_path_rate", drop_path_rate)
        rates = drop_path_rates(drop_path_rate, depths)
        self.patch_embed = OverlapPatchEmbed(in_chans, embed_dims[0], kernel_size=7, stride=4)
        self.levels = nn.ModuleList()
        for i, dim in enumerate(embed_dims):
            blocks = [
                VisualAttentionBlock(
                    dim,
                    mlp_ratio=mlp_ratios[i],
                    kernel_size=kernel_size,
                    dilation=dilation,
                    dropout=drop_rate,
                    drop_path=rate,
                )
                for rate in rates[i]
            ]
            last = i == len(embed_dims) - 1
            downsample = None if last else OverlapPatchEmbed(dim, embed_dims[i + 1], kernel_size=3, stride=2)
            self.levels.append(Level(blocks, downsample, norm=nn.LayerNorm(dim, norm_eps)))
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"levels.{i}"} for i, dim in enumerate(embed_dims)
        ]
        self.num_features = embed_dims[-1]
        self.norm = nn.Identity()
        self.apply(_init_convolutions)
        self.head = linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the normalised map of every level, (B, h, w, C)."""
        self.check_images(images)
        x = self.patch_embed(images.movedim(1, -1))
        maps = []
        for level in self.levels:
            tap, x = level(x, self.grad_checkpointing)
            maps.append(tap)
        return maps

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict under our names; counters of batches that are missing keep their value."""
        counters = {name: t for name, t in self.state_dict().items() if name.endswith("num_batches_tracked")}
        renamed = {_official_name(name): tensor for name, tensor in state.items()}
        return counters | convert_official(renamed)


class OverlapPatchEmbed(nn.Module):
    """Convolution wider than its stride, then batch normalisation."""

    def __init__(self, dim: int, out_dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = GridBatchNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), out_dim)."""
        return self.norm(conv_channels_last(self.proj, x))


def _init_convolutions(module: nn.Module) -> None:
    """Weights normal with variance 2 over a filter's taps times the output channels of its group, biases zero."""
    if isinstance(module, nn.Conv2d):
        fan_out = prod(module.kernel_size) * module.out_channels
    elif isinstance(module, DepthwiseConv):
        fan_out = prod(module.weight.shape[2:])
    elif isinstance(module, nn.Linear):  # a convolution of width 1
        fan_out = module.out_features
    else:
        return
    nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _official_name(name: str) -> str:
    """Our name of a published parameter, but for those inside of a block."""
    name = name.replace("patch_embed1.", "patch_embed.")
    name = re.sub(r"^patch_embed(\d+)\.", lambda m: f"levels.{int(m[1]) - 2}.downsample.", name)
    name = re.sub(r"^block(\d+)\.", lambda m: f"levels.{int(m[1]) - 1}.blocks.", name)
    return re.sub(r"^norm(\d+)\.", lambda m: f"levels.{int(m[1]) - 1}.norm.", name)


NARROW = {"embed_dims": (32, 64, 160, 256)}
MIDDLE = {"embed_dims": (64, 128, 320, 512)}
WIDE = {"embed_dims": (96, 192, 480, 768)}

VAN_VARIANTS: dict[str, dict[str, Any]] = {
    "van_b0": NARROW | {"depths": (3, 3, 5, 2), "drop_path_rate": 0.1},
    "van_b1": MIDDLE | {"depths": (2, 2, 4, 2), "drop_path_rate": 0.1},
    "van_b2": MIDDLE | {"depths": (3, 3, 12, 3), "drop_path_rate": 0.1},
    "van_b3": MIDDLE | {"depths": (3, 5, 27, 3), "drop_path_rate": 0.2},
    "van_b4": MIDDLE | {"depths": (3, 6, 40, 3), "drop_path_rate": 0.2},
    "van_b5": WIDE | {"depths": (3, 3, 24, 3), "drop_path_rate": 0.2},
    "van_b6": {"embed_dims": (96, 192, 384, 768), "depths": (6, 6, 90, 6), "drop_path_rate": 0.3},
}
"""Stochastic depth as published for B0 to B3; that of B4 to B6 is our choice."""

register_variants(VAN, VAN_VARIANTS, source="arXiv 2202.09741", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.9)

"""AttNet: a convolutional pyramid whose depth-wise kernels each sample makes from its whole grid.

stem -> [blocks -> downsampler] x levels -> mean -> LN -> linear, with attentive convolution in every block.

Source: Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency, arXiv
2510.20092.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gridattn.layers.attentive_conv import AttentiveConvBlock, convert_official
from gridattn.layers.large_kernel import DepthwiseConv
from gridattn.models.common import Backbone, Level, conv_channels_last, drop_path_rates, init_linear, linear
from gridattn.models.conv_norm import batch_counters, conv_norm
from gridattn.models.patches import check_level_lists
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_probability


class AttNet(Backbone):
    """Attentive convolution network. Any image size is taken; maps have its size over 4, 8, 16, 32, rounded up.

    Args:
        embed_dims: channels per level.
        depths: blocks per level.
        mlp_ratios: expansion of the gated feed-forwards, per level; the hidden width is int(2 int(C ratio) / 3).
        kernel_sizes: width of the attentive convolutions, odd, per level.
        feed_forward_conv: per level, whether a depth-wise convolution acts on the gate of the feed-forwards.
        feed_forward_norm: per level, whether the feed-forwards normalise their hidden channels.
        layer_scale: initial value of the residual branches' learned factors; None for none.
        drop_path_rate: stochastic depth, growing linearly to this rate.
        num_classes: 0 leaves the classifier out.
        in_chans: image channels.

    Raises:
        ValueError: lists that do not have one entry per level, or a setting outside its range.

    Example:
        >>> import torch
        >>> small = {"kernel_sizes": (3, 3), "feed_forward_conv": (True, True), "feed_forward_norm": (False, False)}
        >>> model = AttNet((8, 16), depths=(1, 1), mlp_ratios=(4, 2), num_classes=5, **small).eval()
        >>> model(torch.randn(1, 3, 45, 37)).shape
        torch.Size([1, 5])
    """

    tap_norm = True

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 288, 512),
        depths: Sequence[int] = (3, 3, 16, 3),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        kernel_sizes: Sequence[int] = (3, 3, 3, 3),
        feed_forward_conv: Sequence[bool] = (True, True, True, True),
        feed_forward_norm: Sequence[bool] = (True, True, True, True),
        layer_scale: float | None = 1e-6,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_level_lists(
            embed_dims=embed_dims,
            depths=depths,
            mlp_ratios=mlp_ratios,
            kernel_sizes=kernel_sizes,
            feed_forward_conv=feed_forward_conv,
            feed_forward_norm=feed_forward_norm,
        )
        check_probability("drop_path_rate", drop_path_rate)
        rates = drop_path_rates(drop_path_rate, depths)
        self.patch_embed = nn.Sequential(
            conv_norm(in_chans, embed_dims[0] // 2, stride=2),
            nn.GELU(),
            conv_norm(embed_dims[0] // 2, embed_dims[0], stride=2),
        )
        self.levels = nn.ModuleList()
        for i, dim in enumerate(embed_dims):
            blocks = [
                AttentiveConvBlock(
                    dim,
                    kernel_size=kernel_sizes[i],
                    expansion=mlp_ratios[i],
                    layer_scale=layer_scale,
                    conv=feed_forward_conv[i],
                    norm=feed_forward_norm[i],
                    drop_path=rate,
                )
                for rate in rates[i]
            ]
            last = i == len(embed_dims) - 1
            self.levels.append(Level(blocks, None if last else Downsample(dim, embed_dims[i + 1])))
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"levels.{i}"} for i, dim in enumerate(embed_dims)
        ]
        self.num_features = embed_dims[-1]
        self.norm = nn.LayerNorm(self.num_features)
        self.head = linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(_init_weights)

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the map of every level, (B, h, w, C), before its downsampler."""
        self.check_images(images)
        x = self.patch_embed(images).movedim(1, -1)
        maps = []
        for level in self.levels:
            tap, x = level(x, self.grad_checkpointing)
            maps.append(tap)
        return maps

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the last map, (B, h, w, num_features); the norm acts on its mean."""
        return self.forward_maps(images)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, h, w, num_features) -> the normalised mean over positions and, unless `pre_logits`, its logits."""
        pooled = self.norm(x.flatten(1, -2).mean(1))
        return pooled if pre_logits else self.head(pooled)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict under our names; counters of batches that are missing keep their value."""
        renamed = {_official_name(name): tensor for name, tensor in state.items()}
        blocks = {name: tensor for name, tensor in renamed.items() if ".blocks." in name}
        return batch_counters(self) | {k: v for k, v in renamed.items() if k not in blocks} | convert_official(blocks)


class Downsample(nn.Module):
    """Convolution of width 3 and stride 2 without bias, then batch normalisation."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = conv_norm(dim, out_dim, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H / 2), ceil(W / 2), out_dim)."""
        return conv_channels_last(self.reduction, x)


def _init_weights(module: nn.Module) -> None:
    """Weights truncated normal of deviation 0.02 and zero bias, in linear maps and in convolutions."""
    init_linear(module)
    if isinstance(module, nn.Conv2d | DepthwiseConv):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _official_name(name: str) -> str:
    """Our name of a published parameter, but for those inside of a block."""
    name = name.replace("downsample_layers.0.", "patch_embed.")
    name = re.sub(r"^downsample_layers\.(\d+)\.", lambda m: f"levels.{int(m[1]) - 1}.downsample.reduction.", name)
    return re.sub(r"^stages\.(\d+)\.", r"levels.\1.blocks.", name)


EXTRA_SMALL = {"embed_dims": (40, 80, 160, 320), "feed_forward_norm": (False, False, False, False)}

ATTNET_VARIANTS: dict[str, dict[str, Any]] = {
    "attnet_xxs": EXTRA_SMALL
    | {"embed_dims": (32, 64, 128, 240), "depths": (2, 2, 4, 2), "layer_scale": None, "drop_path_rate": 0.02},
    "attnet_xs": EXTRA_SMALL | {"depths": (2, 2, 7, 2), "drop_path_rate": 0.02},
    "attnet_s": EXTRA_SMALL | {"depths": (2, 3, 10, 3), "layer_scale": None, "drop_path_rate": 0.1},
    "attnet_t1": {"embed_dims": (48, 96, 224, 384), "depths": (2, 3, 12, 3), "drop_path_rate": 0.1},
    "attnet_t2": {"embed_dims": (64, 128, 288, 512), "depths": (3, 3, 16, 3), "drop_path_rate": 0.2},
    "attnet_t3": {"embed_dims": (72, 144, 320, 576), "depths": (4, 4, 26, 4), "drop_path_rate": 0.4},
    "attnet_t4": {"embed_dims": (96, 192, 384, 768), "depths": (5, 5, 28, 5), "drop_path_rate": 0.5},
}
"""Stochastic depth as in the published configurations; the training scripts of XXS and S set 0 and 0.05."""

register_variants(AttNet, ATTNET_VARIANTS, source="arXiv 2510.20092", first_conv="patch_embed.0.0")

"""PPMA: a pyramid whose attention decays along straight paths, as the content decides.

stem -> [blocks -> downsampler] x levels -> linear, BN, SiLU -> mean -> linear

Source: Polyline Path Masked Attention for Vision Transformer, arXiv 2506.15940.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.batch_norm import GridBatchNorm
from gridattn.layers.drop_path import DropPath
from gridattn.layers.large_kernel import DepthwiseConv
from gridattn.layers.path_mask import PolylinePathAttention
from gridattn.models.common import Backbone, Level, conv_channels_last, drop_path_rates, init_linear, linear
from gridattn.models.conv_norm import batch_counters
from gridattn.models.patches import check_level_lists
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_probability


class PPMA(Backbone):
    """Polyline path masked attention pyramid. Any image size is taken; maps have the image's size over 4, 8, 16, 32,
    rounded up.

    `forward_features` gives the last map after the projection of the head, `projection` channels wide. Feature
    extractors stop before it.

    Args:
        embed_dims: channels per level; those of the first level even.
        depths: blocks per level.
        num_heads: heads per level; each of an even number of channels.
        mlp_ratios: hidden width of the feed-forwards over the channels, per level.
        decomposed: per level, whether attention goes along rows, then columns, and the other way, instead of over all
            pairs of positions.
        layer_scale: per level, initial value of the residual branches' learned factors; None for none.
        projection: channels of the head's hidden layer.
        mask: of the attention: "polyline" as published, or "one_way", "shared", "manhattan", "none", see
            `PolylinePathAttention`.
        masking: "added" to the logits as in the published weights, or "multiplied" to the weights.
        decay_spread: per level, with the mask "manhattan", the range of decays over the heads.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, growing linearly to this rate.
        num_classes: 0 leaves the classifier out; the projection stays.
        in_chans: image channels.

    Raises:
        ValueError: lists that do not have one entry per level, or a setting outside its range.

    Example:
        >>> from gridattn.models import create_model
        >>> model = create_model("ppma_t", embed_dims=(8, 16, 16, 32), num_heads=(2, 2, 4, 4), num_classes=5).eval()
        >>> model(torch.randn(1, 3, 45, 37)).shape
        torch.Size([1, 5])
    """

    tap_norm = True
    official_ignored: ClassVar[Mapping[str, str]] = {
        r"\.Relpos\.angle$": "angles of the rotation, constants that are computed here"
    }

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        decomposed: Sequence[bool] = (True, True, False, False),
        layer_scale: Sequence[float | None] = (None, None, None, None),
        projection: int = 1024,
        mask: str = "polyline",
        masking: str = "added",
        decay_spread: Sequence[float] = (4, 4, 6, 6),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_level_lists(
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            decomposed=decomposed,
            layer_scale=layer_scale,
            decay_spread=decay_spread,
        )
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            check_probability(name, rate)
        if projection < 1:
            raise ValueError(f"projection={projection} is not allowed; it must be at least 1")
        if embed_dims[0] < 2 or embed_dims[0] % 2:
            raise ValueError(f"embed_dims={tuple(embed_dims)} is not allowed; its first entry must be even")
        self.patch_embed = Stem(in_chans, embed_dims[0])
        self.levels = nn.ModuleList()
        for i, (dim, rates) in enumerate(zip(embed_dims, drop_path_rates(drop_path_rate, depths))):
            blocks = [
                PathBlock(
                    PolylinePathAttention(
                        dim,
                        num_heads[i],
                        decomposed=decomposed[i],
                        mask=mask,
                        masking=masking,
                        decay_spread=decay_spread[i],
                    ),
                    mlp_ratios[i],
                    rate,
                    layer_scale[i],
                )
                for rate in rates
            ]
            last = i == len(embed_dims) - 1
            self.levels.append(Level(blocks, None if last else Downsample(dim, embed_dims[i + 1])))
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"levels.{i}"} for i, dim in enumerate(embed_dims)
        ]
        self.num_features = projection
        layers = {"proj": nn.Linear(embed_dims[-1], projection), "norm": GridBatchNorm(projection), "act": nn.SiLU()}
        self.norm = nn.Sequential(OrderedDict(layers))
        self.head_drop = nn.Dropout(drop_rate)
        self.head = linear(projection, num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the map of every level, (B, h, w, C), before its downsampler."""
        self.check_images(images)
        x = self.patch_embed(images)
        maps = []
        for level in self.levels:
            tap, x = level(x, self.grad_checkpointing)
            maps.append(tap)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, h, w, projection) -> the mean over positions and, unless `pre_logits`, its logits (B, num_classes)."""
        pooled = self.head_drop(super().forward_head(x, pre_logits=True))
        return pooled if pre_logits else self.head(pooled)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict under our names; counters of batches that are missing keep their value.

        `outnorm{i}` of a dense backbone becomes `norm{i}`.
        """
        renamed = {
            _official_name(name): tensor.flatten() if re.search(r"\.gamma_\d$", name) else tensor
            for name, tensor in super().from_official(state).items()
        }
        return batch_counters(self) | renamed


class PathBlock(nn.Module):
    """x + DWConv(x), then x + g1 * attention(LN(x)), then x + g2 * feed_forward(LN(x)).

    Args:
        attention: a layer (B, H, W, C) -> (B, H, W, C).
        mlp_ratio: hidden width of the feed-forward over C.
        drop_path: probability of dropping a branch other than the convolution.
        layer_scale: initial value of g1 and g2, one learned factor a channel; None for none.
    """

    def __init__(
        self,
        attention: PolylinePathAttention,
        mlp_ratio: float,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        dim = attention.dim
        self.position = DepthwiseConv(dim, (3, 3))
        self.norm1 = nn.LayerNorm(dim, 1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, 1e-6)
        self.mlp = PathFeedForward(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.position(x)
        attended = self.attn(self.norm1(x))
        x = x + self.drop_path(attended if self.gamma1 is None else self.gamma1 * attended)
        mixed = self.mlp(self.norm2(x))
        return x + self.drop_path(mixed if self.gamma2 is None else self.gamma2 * mixed)


class PathFeedForward(nn.Module):
    """u = GELU(fc1(x)); fc2(u + DWConv(u)), the convolution 3 wide."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden, (3, 3))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class Stem(nn.Module):
    """Four convolutions of width 3, the first and the third of stride 2, each with BN, and GELU between them."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, out, stride in (
            (in_chans, dim // 2, 2),
            (dim // 2, dim // 2, 1),
            (dim // 2, dim, 2),
            (dim, dim, 1),
        ):
            layers += [nn.Conv2d(channels, out, 3, stride, padding=1), nn.BatchNorm2d(out), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, ceil(H / 4), ceil(W / 4), dim)."""
        return conv_channels_last(self.proj, images.movedim(1, -1).contiguous())


class Downsample(nn.Module):
    """Convolution of width 3 and stride 2, then BN."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = GridBatchNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H / 2), ceil(W / 2), out_dim)."""
        return self.norm(conv_channels_last(self.reduction, x))


_OFFICIAL_PATTERNS = (
    (r"^proj\.", "norm.proj."),
    (r"^norm\.(?=weight|bias|running_|num_batches_tracked)", "norm.norm."),
    (r"^outnorm(\d)\.", r"norm\1."),
    (r"^layers\.", "levels."),
    (r"\.retention_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.pos\.conv\.", ".position."),
    (r"\.retention\.", ".attn."),
    (r"\.lepe\.conv\.", ".lepe."),
    (r"\.ffn\.", ".mlp."),
    (r"\.dwconv\.conv\.", ".dwconv."),
    (r"\.gamma_(\d)$", r".gamma\1"),
)


def _official_name(name: str) -> str:
    """Our name of a published parameter; names that are ours already stay."""
    for pattern, replacement in _OFFICIAL_PATTERNS:
        name = re.sub(pattern, replacement, name)
    return name


TINY: dict[str, Any] = {"depths": (2, 2, 8, 2), "drop_path_rate": 0.1}
SMALL: dict[str, Any] = {
    "depths": (3, 4, 18, 4),
    "mlp_ratios": (4, 4, 3, 3),
    "decomposed": (True, True, True, False),
    "drop_path_rate": 0.15,
}
BASE = SMALL | {
    "embed_dims": (80, 160, 320, 512),
    "depths": (4, 8, 25, 8),
    "num_heads": (5, 5, 10, 16),
    "layer_scale": (None, None, 1e-6, 1e-6),
    "decay_spread": (5, 5, 6, 6),
    "drop_path_rate": 0.4,
}

PPMA_VARIANTS: dict[str, dict[str, Any]] = {"ppma_t": TINY, "ppma_s": SMALL, "ppma_b": BASE}

register_variants(PPMA, PPMA_VARIANTS, source="arXiv 2506.15940", first_conv="patch_embed.proj.0")

"""Dual attention vision transformer (DaViT): attention among positions and attention among channels take turns.

stem -> [(spatial block -> channel block) x depth -> downsampler] x levels -> mean -> LN -> linear

Source: DaViT: Dual Attention Vision Transformers, arXiv 2204.03645.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gridattn.layers.channel import ChannelAttention
from gridattn.layers.dual import DualAttentionBlock, PaddedWindowAttention
from gridattn.models.common import Backbone, Level, drop_path_rates, init_linear, linear
from gridattn.models.patches import check_level_lists, pad_to_multiple
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_choice, check_probability


class DaViT(Backbone):
    """Dual attention vision transformer.

    Any image size is taken. Windows that a grid does not fill see its zero padding, as in the networks that were
    published.

    Args:
        embed_dims: channels per level.
        depths: pairs of a spatial and a channel block per level.
        num_heads: heads of the spatial blocks and groups of the channel blocks, per level.
        window_size: side of the windows.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: bias in the query/key/value projections.
        down_kernel_size: width of the downsampling convolutions, 2 or, overlapping, 3.
        channel_attn_v2: channel attention whose scale follows the number of positions, see `ChannelAttention`.
        drop_path_rate: stochastic depth, growing linearly over all blocks to this rate.
        num_classes: 0 leaves the classifier out.
        in_chans: image channels.

    Raises:
        ValueError: lists that do not have one entry per level, or a setting outside its range.

    Example:
        >>> import torch
        >>> model = DaViT((8, 16), depths=(1, 1), num_heads=(2, 4), num_classes=5)
        >>> model(torch.randn(1, 3, 45, 37)).shape
        torch.Size([1, 5])
    """

    tap_norm = True

    def __init__(
        self,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (1, 1, 3, 1),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        down_kernel_size: int = 2,
        channel_attn_v2: bool = False,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_level_lists(embed_dims=embed_dims, depths=depths, num_heads=num_heads)
        check_choice("down_kernel_size", down_kernel_size, (2, 3))
        check_probability("drop_path_rate", drop_path_rate)
        rates = drop_path_rates(drop_path_rate, [2 * depth for depth in depths])
        self.patch_embed = Stem(in_chans, embed_dims[0])
        self.levels = nn.ModuleList()
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads)):
            blocks = []
            for spatial_rate, channel_rate in zip(rates[i][::2], rates[i][1::2]):
                within_windows = PaddedWindowAttention(
                    dim, heads, window_size=window_size, bias=False, qkv_bias=qkv_bias
                )
                among_channels = ChannelAttention(dim, heads, qkv_bias=qkv_bias, dynamic_scale=channel_attn_v2)
                blocks.append(DualAttentionBlock(within_windows, mlp_ratio, spatial_rate))
                blocks.append(DualAttentionBlock(among_channels, mlp_ratio, channel_rate))
            last = i == len(embed_dims) - 1
            self.levels.append(Level(blocks, None if last else Downsample(dim, embed_dims[i + 1], down_kernel_size)))
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"levels.{i}"} for i, dim in enumerate(embed_dims)
        ]
        self.num_features = embed_dims[-1]
        self.norm = nn.LayerNorm(self.num_features)
        self.head = linear(self.num_features, num_classes) if num_classes else nn.Identity()
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

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the last map, (B, h, w, num_features), not normalised: the head averages first."""
        return self.forward_maps(images)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, h, w, num_features) -> the normalised mean and, unless `pre_logits`, its logits (B, num_classes)."""
        pooled = self.norm(x.flatten(1, -2).mean(1))
        return pooled if pre_logits else self.head(pooled)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict under our names: of the authors' code, of timm, or of the vision tower of Florence-2.

        The tower is used without a final norm; where its file has none, ours keeps its values.
        """
        renamed = {_official_name(name): tensor for name, tensor in state.items()}
        tower = any(".window_attn.fn." in name for name in state)
        norm = {f"norm.{name}": tensor for name, tensor in self.norm.state_dict().items()} if tower else {}
        return norm | renamed


class Stem(nn.Module):
    """Convolution of width 7 and stride 4, then LayerNorm."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, ceil(H / 4), ceil(W / 4), dim)."""
        return self.norm(self.proj(images).movedim(1, -1))


class Downsample(nn.Module):
    """LayerNorm, then a convolution of stride 2; zeros fill an odd axis after the norm."""

    def __init__(self, dim: int, out_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Conv2d(dim, out_dim, kernel_size, stride=2, padding=kernel_size // 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H / 2), ceil(W / 2), out_dim)."""
        x = pad_to_multiple(self.norm(x).movedim(-1, 1), 2)
        return self.proj(x).movedim(1, -1)


_FLORENCE_NAMES = (
    ("vision_tower.", ""),
    (".window_attn.norm.", ".norm1."),
    (".channel_attn.norm.", ".norm1."),
    (".window_attn.fn.", ".attn."),
    (".channel_attn.fn.", ".attn."),
    (".ffn.norm.", ".norm2."),
    (".ffn.fn.net.", ".mlp."),
    (".conv1.fn.dw.", ".cpe1.proj."),
    (".conv2.fn.dw.", ".cpe2.proj."),
)
_OFFICIAL_PATTERNS = (
    (r"^(?:convs|patch_embeds)\.", "downsample."),
    (r"^stages\.(\d+)\.downsample\.conv\.", r"downsample.\1.proj."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample.\1."),
    (r"^stem\.conv\.", "downsample.0.proj."),
    (r"^stem\.", "downsample.0."),
    (r"^(?:main_blocks|blocks)\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.spatial_block\.", ".0."),
    (r"\.channel_block\.", ".1."),
    (r"\.cpe\.0\.", ".cpe1."),
    (r"\.cpe\.1\.", ".cpe2."),
    (r"^(?:norms|head\.norm)\.", "norm."),
    (r"^head\.fc\.", "head."),
)


def _official_name(name: str) -> str:
    """Our name of a published parameter; names that are ours already stay."""
    for theirs, ours in _FLORENCE_NAMES:
        name = name.replace(theirs, ours)
    for pattern, replacement in _OFFICIAL_PATTERNS:
        name = re.sub(pattern, replacement, name)
    name = re.sub(r"^downsample\.0\.", "patch_embed.", name)
    name = re.sub(r"^downsample\.(\d+)\.", lambda m: f"levels.{int(m[1]) - 1}.downsample.", name)
    pair = r"^stages\.(\d+)\.blocks\.(\d+)\.([01])\."
    return re.sub(pair, lambda m: f"levels.{m[1]}.blocks.{2 * int(m[2]) + int(m[3])}.", name)


def _widths(embed_dim: int, heads: int) -> dict[str, Any]:
    return {"embed_dims": tuple(embed_dim * 2**i for i in range(4)), "num_heads": tuple(heads * 2**i for i in range(4))}


TINY = _widths(96, 3) | {"depths": (1, 1, 3, 1), "drop_path_rate": 0.1}
SMALL = _widths(96, 3) | {"depths": (1, 1, 9, 1), "drop_path_rate": 0.2}
BASE = SMALL | _widths(128, 4) | {"drop_path_rate": 0.4}
HUGE = BASE | _widths(256, 8)
FLORENCE = {"window_size": 12, "down_kernel_size": 3, "channel_attn_v2": True, "num_classes": 0}

DAVIT_VARIANTS: dict[str, dict[str, Any]] = {
    "davit_tiny": TINY,
    "davit_small": SMALL,
    "davit_base": BASE,
    "davit_huge": HUGE,
    "davit_giant": _widths(384, 12) | {"depths": (1, 1, 12, 3), "drop_path_rate": 0.4},
}
"""Stochastic depth is published for the tiny variant alone; that of the others is our choice."""

SOURCE = "arXiv 2204.03645"
register_variants(DaViT, DAVIT_VARIANTS, source=SOURCE, crop_pct=0.9)
register_variants(
    DaViT, {"davit_large": BASE | _widths(192, 6) | {"window_size": 12}}, source=SOURCE, img_size=384, crop_pct=0.9
)
register_variants(
    DaViT,
    {"davit_base_fl": BASE | FLORENCE, "davit_huge_fl": HUGE | FLORENCE},
    source=SOURCE,
    img_size=768,
    crop_pct=1.0,
)

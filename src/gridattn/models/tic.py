"""TiC: a vision transformer that attends in sliding windows and links far positions by cyclic shifts and pooling.

stem -> [blocks -> pooling] x levels -> mean -> LN -> linear, with MSA-Conv in every block and no position encoding.

The paper's network was not released. What is known of it is built here: windows with dilation, shifts in several
directions, pooling between levels; the arrangement and the sizes are our own.

Source: TiC: Exploring Vision Transformer in Convolution, arXiv 2310.04134.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gridattn.layers.msa_conv import MSAConv
from gridattn.models.common import Backbone, Block, Level, drop_path_rates, init_linear, linear
from gridattn.models.patches import PatchEmbed, check_level_lists
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_choice, check_probability
from gridattn.ops.msa_conv import inter_pool, multi_directional_shift, window_reach

SHIFTS = ("multi", "none")


class TiC(Backbone):
    """Transformer in convolution. Any image size is taken with the same weights; no parameter depends on it.

    Args:
        embed_dims: channels per level.
        depths: blocks per level.
        num_heads: heads per level.
        kernel_size: side of the windows.
        dilations: of the windows, repeated over the blocks of the whole network.
        mlp_ratio: hidden width of the MLPs over the channels.
        stem: "patches" of 4x4 and LayerNorm, or "conv", one convolution of width 3 and stride 2.
        shift: "multi" rolls the grid of each block by the reach of its window, in a direction that changes from block
            to block, so that positions on opposite borders become neighbours; "none" does not.
        pool: whether levels are pooled by averages of 2x2 positions; otherwise every second position is kept.
        border: see `MSAConv`.
        projection: see `MSAConv`; "conv" tells directions apart, "pointwise" does only at the border.
        drop_path_rate: stochastic depth, growing linearly to this rate.
        num_classes: 0 leaves the classifier out.
        in_chans: image channels.

    Raises:
        ValueError: lists that do not have one entry per level, an unknown stem or shift, or a setting that the
            attention refuses.

    Example:
        >>> import torch
        >>> model = TiC((16, 32), depths=(1, 1), num_heads=(2, 4), num_classes=5).eval()
        >>> model(torch.randn(1, 3, 45, 37)).shape
        torch.Size([1, 5])
    """

    tap_norm = True

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | Sequence[int] = 3,
        dilations: Sequence[int] = (1, 2),
        mlp_ratio: float = 4.0,
        stem: str = "patches",
        shift: str = "multi",
        pool: bool = True,
        border: str = "zero",
        projection: str = "pointwise",
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_level_lists(embed_dims=embed_dims, depths=depths, num_heads=num_heads)
        check_choice("stem", stem, tuple(STEMS))
        check_choice("shift", shift, SHIFTS)
        check_probability("drop_path_rate", drop_path_rate)
        rates = drop_path_rates(drop_path_rate, depths)
        self.patch_embed = STEMS[stem](in_chans, embed_dims[0])
        self.levels = nn.ModuleList()
        for i, dim in enumerate(embed_dims):
            blocks = []
            for j, rate in enumerate(rates[i]):
                index = sum(depths[:i]) + j
                dilation = dilations[index % len(dilations)]
                reach = window_reach(kernel_size, dilation, rank=2)
                attention = MSAConv(
                    dim,
                    num_heads[i],
                    kernel_size=kernel_size,
                    dilation=dilation,
                    shift=multi_directional_shift(index, reach) if shift == "multi" else None,
                    border=border,
                    projection=projection,
                )
                blocks.append(Block(attention, mlp_ratio, rate, norm_eps=1e-6))
            last = i == len(embed_dims) - 1
            self.levels.append(Level(blocks, None if last else InterPool(dim, embed_dims[i + 1], pool)))
        stride = self.patch_embed.stride
        self.feature_info = [
            {"num_chs": dim, "reduction": stride * 2**i, "module": f"levels.{i}"} for i, dim in enumerate(embed_dims)
        ]
        self.num_features = embed_dims[-1]
        self.norm = nn.LayerNorm(self.num_features, 1e-6)
        self.head = linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the map of every level, (B, h, w, C), before its pooling."""
        self.check_images(images)
        x = self.patch_embed(images)
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


class PatchStem(nn.Module):
    """Patches of 4x4, the image padded with zeros at its end, then LayerNorm."""

    stride = 4

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.patches = PatchEmbed(in_chans, dim, self.stride, norm=False)
        self.norm = nn.LayerNorm(dim, 1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, ceil(H / 4), ceil(W / 4), dim)."""
        return self.norm(self.patches(images))


class ConvStem(nn.Module):
    """One convolution of width 3 and stride 2, for small images."""

    stride = 2

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 3, stride=self.stride, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, ceil(H / 2), ceil(W / 2), dim)."""
        return self.proj(images).movedim(1, -1)


STEMS: dict[str, type[PatchStem] | type[ConvStem]] = {"patches": PatchStem, "conv": ConvStem}


class InterPool(nn.Module):
    """Halves the grid; where the channels change, a linear map and LayerNorm follow.

    Args:
        dim: input channels.
        out_dim: output channels.
        average: averages of 2x2 positions, or the first of each.
    """

    def __init__(self, dim: int, out_dim: int, average: bool = True) -> None:
        super().__init__()
        self.average = average
        self.widen = nn.Identity()
        if dim != out_dim:
            self.widen = nn.Sequential(nn.Linear(dim, out_dim), nn.LayerNorm(out_dim, 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H / 2), ceil(W / 2), out_dim)."""
        return self.widen(inter_pool(x) if self.average else x[:, ::2, ::2])


TINY = {"drop_path_rate": 0.1}
MINI: dict[str, Any] = {
    "embed_dims": (32, 32),
    "depths": (2, 2),
    "num_heads": (4, 4),
    "dilations": (1,),
    "mlp_ratio": 2.0,
    "stem": "conv",
}
register_variants(TiC, {"tic_t": TINY}, source="arXiv 2310.04134", first_conv="patch_embed.patches.proj")
register_variants(TiC, {"tic_mini": MINI}, source="arXiv 2310.04134", first_conv="patch_embed.proj", img_size=32)

"""GridViT: one plain transformer that hosts any registered attention, to compare mechanisms on equal terms."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gridattn.layers import attention_info
from gridattn.layers.raster import create_on_grid
from gridattn.models.common import Backbone, Block, Level, conv_channels_last, drop_path_rates, init_linear, linear
from gridattn.models.patches import PatchEmbed, check_level_lists, conv_of_rank
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_probability, per_axis


class GridViT(Backbone):
    """Vision transformer on a grid of 1, 2 or 3 axes, with one resolution or several.

    patches -> [position encoding -> blocks of attention and MLP -> downsampling by 2] per level -> LN -> mean -> linear

    Position enters once per level as x + depthwise_conv3(x) (conditional position encoding, arXiv 2102.10882): the same
    for every mechanism, and for any grid size. Images that patches do not fill are padded with zeros at their end.

    Args:
        img_size: nominal image size, an int (two equal axes) or one int per axis; its length is the rank. Other sizes
            of that rank can be fed to the model.
        patch_size: side of the non-overlapping patches.
        in_chans: image channels.
        num_classes: 0 leaves the classifier out.
        dims: channels per level, doubled or otherwise; an int for a single level.
        depths: blocks per level.
        num_heads: heads per level.
        mlp_ratio: hidden width of the MLPs over the channels.
        attention: registry name, one for all levels or one per level; `"a+b"` alternates over the blocks. One that is
            for sequences only reads a grid of more axes in row-major order.
        attention_options: keywords of the attention's constructor, one mapping for all levels or one per level.
        drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth, growing linearly to this rate.

    Raises:
        ValueError: lists of different lengths, or whatever the attention refuses.

    Example:
        >>> import torch
        >>> model = GridViT((16, 32, 32), patch_size=8, in_chans=1, dims=32, depths=2, num_heads=2, attention="window")
        >>> model(torch.randn(1, 1, 16, 40, 32)).shape
        torch.Size([1, 1000])
    """

    tap_norm = True

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        dims: int | Sequence[int] = 192,
        depths: int | Sequence[int] = 12,
        num_heads: int | Sequence[int] = 3,
        mlp_ratio: float = 4.0,
        attention: str | Sequence[str] = "global",
        attention_options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        rank = len(size)
        super().__init__(in_chans, num_classes, rank)
        dims, depths, heads = (tuple(v) if isinstance(v, Sequence) else (v,) for v in (dims, depths, num_heads))
        check_level_lists(dims=dims, depths=depths, num_heads=heads)
        check_probability("drop_path_rate", drop_path_rate)
        names = (attention,) * len(dims) if isinstance(attention, str) else tuple(attention)
        shared = attention_options is None or isinstance(attention_options, Mapping)
        options: Any = (attention_options or {},) * len(dims) if shared else tuple(attention_options or ())
        check_level_lists(dims=dims, attention=names, attention_options=options)
        for name in (part for level in names for part in level.split("+")):
            attention_info(name)

        self.patch_embed = PatchEmbed(in_chans, dims[0], patch_size, rank)
        grid = tuple(-(-s // patch_size) for s in per_axis(size, rank, "img_size"))
        rates = drop_path_rates(drop_path_rate, depths)
        levels = []
        for i, dim in enumerate(dims):
            mechanisms = names[i].split("+")
            blocks = [
                Block(
                    create_on_grid(mechanisms[j % len(mechanisms)], dim, heads[i], grid=grid, **options[i]),
                    mlp_ratio,
                    rates[i][j],
                    drop_rate,
                )
                for j in range(depths[i])
            ]
            last = i == len(dims) - 1
            levels.append(Level(blocks, None if last else Downsample(dim, dims[i + 1], rank), ConvPosition(dim, rank)))
            grid = tuple(-(-s // 2) for s in grid)
        self.levels = nn.ModuleList(levels)
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**i, "module": f"levels.{i}"} for i, dim in enumerate(dims)
        ]
        self.num_features = dims[-1]
        self.norm = nn.LayerNorm(dims[-1])
        self.head = linear(dims[-1], num_classes) if num_classes else nn.Identity()
        # An attention layer keeps the initialisation that its mechanism asks for.
        for module in (module for level in levels for block in level.blocks for module in block.mlp.modules()):
            init_linear(module)

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, *size) -> the map of every level, (B, *grid, C), before its downsampler."""
        self.check_images(images)
        x = self.patch_embed(images)
        maps = []
        for level in self.levels:
            tap, x = level(x, self.grad_checkpointing)
            maps.append(tap)
        return maps


class ConvPosition(nn.Module):
    """x + depthwise convolution of width 3 with zero padding, from which a network can read where it is."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.proj = conv_of_rank(rank)(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        return x + conv_channels_last(self.proj, x)


class Downsample(nn.Module):
    """2 positions to 1 along every axis: LayerNorm, then non-overlapping patches of width 2; odd axes are padded."""

    def __init__(self, dim: int, out: int, rank: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reduction = PatchEmbed(dim, out, 2, rank, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *ceil(grid / 2), out)."""
        return self.reduction(self.norm(x).movedim(-1, 1))


VARIANTS: dict[str, dict[str, Any]] = {
    "grid_vit_micro": {"img_size": 64, "patch_size": 4, "dims": 48, "depths": 4, "num_heads": 4, "mlp_ratio": 2.0},
    "grid_vit_tiny": {"dims": 192, "depths": 12, "num_heads": 3, "drop_path_rate": 0.1},
    "grid_vit_4stage_micro": {
        "img_size": 64,
        "patch_size": 2,
        "dims": (16, 32, 48, 64),
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 4),
        "mlp_ratio": 2.0,
    },
    "grid_vit_4stage_tiny": {
        "patch_size": 4,
        "dims": (64, 128, 256, 512),
        "depths": (2, 2, 6, 2),
        "num_heads": (2, 4, 8, 16),
        "attention": "neighborhood",
        "drop_path_rate": 0.2,
    },
}
register_variants(GridViT, VARIANTS)

"""NAT, DiNAT, DiNAT_s, their isotropic forms, and ViT with relative position biases.

stem -> [blocks -> downsampler] x levels -> LN -> mean -> linear, with neighborhood attention in every block.

Sources: Neighborhood Attention Transformer, arXiv 2204.07143; Dilated Neighborhood Attention Transformer, arXiv
2209.15001.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import ClassVar, Literal

from einops import rearrange
from torch import Tensor, nn

from gridattn.layers import NeighborhoodAttention
from gridattn.models.common import Backbone, Block, Level, conv_channels_last, drop_path_rates, init_linear, linear
from gridattn.models.nat_variants import (
    DENSE_DILATIONS,
    DINAT_S_384_VARIANTS,
    DINAT_S_VARIANTS,
    ISOTROPIC_VARIANTS,
    NAT_384_VARIANTS,
    NAT_VARIANTS,
)
from gridattn.models.patches import PatchEmbed, check_level_lists, pad_to_multiple
from gridattn.models.registry import register_variants
from gridattn.models.tile_level import TileLevel
from gridattn.ops.common import check_choice, check_probability
from gridattn.ops.relative_bias import resize_relative_bias


class NAT(Backbone):
    """Neighborhood attention pyramid: overlapping convolutions as stem and downsamplers, widths doubled at every level.

    Any image size is taken. Where a level's grid is smaller than kernel_size * dilation, the input of its attention is
    padded with zeros that take part in it, as in the networks that were published.

    Args:
        embed_dim: channels E of the first level.
        depths: blocks per level.
        num_heads: heads per level.
        kernel_size: side of the windows.
        dilations: per level, dilations of its blocks, repeated as often as needed; or a preset for dense prediction,
            one of `"coco"`, `"ade20k"`, `"ade20k_640"`, `"mask2former"`. None: 1 everywhere.
        mlp_ratio: hidden width of the MLPs over the channels.
        layer_scale: initial value of the residual branches' learned factors; None for none.
        qkv_bias: bias in the query/key/value projections.
        drop_rate: dropout in the MLPs and after the attention's projection.
        drop_path_rate: stochastic depth, growing linearly to this rate.
        num_classes: 0 leaves the classifier out.
        in_chans: image channels.
        small_grid: see `NeighborhoodAttention`.
        backend: implementation of the attention.
        tile: keep the tokens of every level in tiles of this size, one int or one per axis, so that attention on a GPU
            does not have to reorder them; see `gridattn.ops.TileLayout`. The results are the same.

    Raises:
        ValueError: lists that do not have one entry per level, an unknown preset, or a setting outside its range.

    Example:
        >>> import torch
        >>> model = NAT(16, depths=(1, 1), num_heads=(1, 2), kernel_size=3, dilations=((2,), (1,)), num_classes=5)
        >>> model(torch.randn(1, 3, 45, 37)).shape
        torch.Size([1, 5])
    """

    tap_norm = True
    official_ignored: ClassVar[Mapping[str, str]] = {
        r"relative_position_index$": "places of the relative positions in their table, computed for every grid here"
    }
    presets = "nat"
    patch_size = 4

    def __init__(
        self,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | Sequence[int] = 7,
        dilations: Sequence[Sequence[int]] | str | None = None,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        small_grid: Literal["shrink", "pad", "error"] = "pad",
        backend: str = "auto",
        tile: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes)
        if isinstance(dilations, str):
            check_choice("dilations", dilations, tuple(DENSE_DILATIONS[self.presets]))
            dilations = DENSE_DILATIONS[self.presets][dilations]
        dilations = ((1,),) * len(depths) if dilations is None else dilations
        check_level_lists(depths=depths, num_heads=num_heads, dilations=dilations)
        check_probability("drop_path_rate", drop_path_rate)

        dims = [embed_dim * 2**i for i in range(len(depths))]
        rates = drop_path_rates(drop_path_rate, depths)
        self.patch_embed = self.make_stem(embed_dim)
        self.levels = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = [
                Block(
                    NeighborhoodAttention(
                        dim,
                        num_heads[i],
                        kernel_size=kernel_size,
                        dilation=dilation,
                        qkv_bias=qkv_bias,
                        projection_dropout=drop_rate,
                        small_grid=small_grid,
                        backend=backend,
                    ),
                    mlp_ratio,
                    rate,
                    drop_rate,
                    layer_scale,
                )
                for dilation, rate in zip(islice(cycle(dilations[i]), depths[i]), rates[i])
            ]
            downsample = self.make_downsampler(dim) if i < len(dims) - 1 else None
            self.levels.append(Level(blocks, downsample) if tile is None else TileLevel(blocks, downsample, tile))
        self.feature_info = [
            {"num_chs": dim, "reduction": self.patch_size * 2**i, "module": f"levels.{i}"} for i, dim in enumerate(dims)
        ]
        self.num_features = dims[-1]
        self.norm = nn.LayerNorm(dims[-1])
        self.head = linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)

    def make_stem(self, dim: int) -> nn.Module:
        """(B, in_chans, H, W) -> (B, ceil(H / patch_size), ceil(W / patch_size), dim)."""
        return ConvStem(self.in_chans, dim)

    def make_downsampler(self, dim: int) -> nn.Module:
        """(B, H, W, dim) -> (B, ceil(H / 2), ceil(W / 2), 2 * dim)."""
        return ConvDownsample(dim)

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the map of every level, (B, h, w, C), before its downsampler."""
        self.check_images(images)
        x = self.patch_embed(images)
        maps = []
        for level in self.levels:
            tap, x = level(x, self.grad_checkpointing)
            maps.append(tap)
        return maps

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict under our names; position tables of another kernel size are interpolated."""
        renamed = {self.official_name(name): tensor for name, tensor in super().from_official(state).items()}
        for name, module in self.named_modules():
            table = renamed.get(f"{name}.relative_position_bias")
            if isinstance(module, NeighborhoodAttention) and table is not None and table.ndim == 3:
                renamed[f"{name}.relative_position_bias"] = resize_relative_bias(table, module.kernel_size)
        return renamed

    def official_name(self, name: str) -> str:
        """Our name of a published parameter; names that are ours already stay."""
        name = re.sub(r"^layers\.", "levels.", name)
        return re.sub(r"\.rpb$", ".relative_position_bias", name)


class DiNATs(NAT):
    """DiNAT_s: dilated neighborhood attention in the layout of a window transformer, with patches that merge 2x2.

    Arguments as in `NAT`. Source: arXiv 2209.15001.

    Example:
        >>> import torch
        >>> model = DiNATs(12, depths=(1, 1), num_heads=(2, 3), kernel_size=3, dilations=((2,), (1,)), num_classes=5)
        >>> model(torch.randn(1, 3, 43, 50)).shape
        torch.Size([1, 5])
    """

    presets = "dinat_s"

    def make_stem(self, dim: int) -> nn.Module:
        """(B, in_chans, H, W) -> (B, ceil(H / patch_size), ceil(W / patch_size), dim)."""
        return PatchEmbed(self.in_chans, dim, self.patch_size)

    def make_downsampler(self, dim: int) -> nn.Module:
        """(B, H, W, dim) -> (B, ceil(H / 2), ceil(W / 2), 2 * dim)."""
        return PatchMerging(dim)


class IsotropicNAT(DiNATs):
    """Neighborhood attention at a single resolution, in the layout of ViT: every second block is dilated.

    Args:
        img_size: nominal image size; it sets the window where `kernel_size` is None.
        patch_size: side of the patches.
        embed_dim: channels.
        depth: blocks.
        num_heads: heads.
        kernel_size: side of the windows; None for full attention over the nominal grid, with a bias for each of its
            offsets (ViT-rpb). On a smaller grid it stays full; for a larger one build the model with that `img_size`:
            tables of another size are interpolated on loading.
        dilation: of the odd blocks; the even ones have 1.
        mlp_ratio: as in `NAT`.
        qkv_bias: as in `NAT`.
        drop_rate: as in `NAT`.
        drop_path_rate: as in `NAT`.
        num_classes: as in `NAT`.
        in_chans: as in `NAT`.
        backend: as in `NAT`.
        tile: as in `NAT`.

    Source: arXiv 2209.15001.

    Example:
        >>> import torch
        >>> model = IsotropicNAT(64, 8, embed_dim=32, depth=2, num_heads=2, kernel_size=3, dilation=2, num_classes=5)
        >>> model(torch.randn(1, 3, 70, 64)).shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        kernel_size: int | None = 7,
        dilation: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        backend: str = "auto",
        tile: int | Sequence[int] | None = None,
    ) -> None:
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_size = patch_size
        super().__init__(
            embed_dim,
            depths=(depth,),
            num_heads=(num_heads,),
            kernel_size=tuple(-(-s // patch_size) for s in size) if kernel_size is None else kernel_size,
            dilations=((1, dilation),),
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            num_classes=num_classes,
            in_chans=in_chans,
            small_grid="shrink" if kernel_size is None else "pad",
            backend=backend,
            tile=tile,
        )

    def official_name(self, name: str) -> str:
        """Our name of a published parameter; names that are ours already stay."""
        return super().official_name(re.sub(r"^layers\.(\d+)\.", r"levels.0.blocks.\1.", name))


class ConvStem(nn.Module):
    """Two convolutions of width 3 and stride 2 with nothing between them, then LayerNorm."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, ceil(H / 4), ceil(W / 4), dim)."""
        return self.norm(self.proj(images).movedim(1, -1))


class ConvDownsample(nn.Module):
    """Convolution of width 3 and stride 2 to twice the channels, without bias, then LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2C)."""
        return self.norm(conv_channels_last(self.reduction, x))


class PatchMerging(nn.Module):
    """Each 2x2 block becomes one position: concatenation, column by column, LayerNorm, linear to twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2C)."""
        x = pad_to_multiple(x.movedim(-1, 1), 2)
        x = rearrange(x, "b c (h row) (w column) -> b h w (column row c)", row=2, column=2)
        return self.reduction(self.norm(x))


register_variants(NAT, NAT_VARIANTS, source="arXiv 2204.07143, arXiv 2209.15001", first_conv="patch_embed.proj.0")
register_variants(
    NAT, NAT_384_VARIANTS, source="arXiv 2209.15001", first_conv="patch_embed.proj.0", img_size=384, crop_pct=1.0
)
register_variants(DiNATs, DINAT_S_VARIANTS, source="arXiv 2209.15001")
register_variants(DiNATs, DINAT_S_384_VARIANTS, source="arXiv 2209.15001", img_size=384, crop_pct=1.0)
register_variants(IsotropicNAT, ISOTROPIC_VARIANTS, source="arXiv 2209.15001")

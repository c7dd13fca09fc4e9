"""SG-Former: in pairs of blocks the first finds out which positions matter, the second spends its tokens there.

stem + positions -> [(hybrid-scale block -> guided block) x depth / 2 -> LN -> merging] x levels -> mean -> linear. The
last level has plain attention. The LayerNorm of a level lies on the main path.

Source: SG-Former: Self-guided Transformer with Evolving Token Reallocation, arXiv 2308.12216.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from math import isqrt, prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gridattn.layers.hybrid_scale import LepeAttention
from gridattn.layers.large_kernel import DepthwiseConv
from gridattn.layers.self_guided import SelfGuidedBlock, SelfGuidedPair, convert_official_block
from gridattn.models.common import Backbone, Level, conv_channels_last, drop_path_rates, init_linear, linear
from gridattn.models.convit import resize_grid
from gridattn.models.patches import check_level_lists
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_choice, check_probability, per_axis
from gridattn.ops.hybrid_scale import GROUP_SIZES
from gridattn.ops.sine_position import grid_code

WINDOW = 7


class SGFormer(Backbone):
    """Self-guided transformer. Any image size is taken; maps have the image's size over 4, 8, 16, 32, rounded up.

    The position embedding is interpolated for a grid other than the nominal one; windows and patches that a grid does
    not fill are padded, and the padding of windows is masked.

    Args:
        img_size: nominal image size, an int or (height, width); it sets the size of the position embedding.
        embed_dims: channels per level; those of the first level a multiple of 4.
        num_heads: heads per level; even where the level has pairs of blocks.
        mlp_ratios: hidden width of the MLPs over the channels, per level.
        qkv_bias: bias in the query, key and value projections.
        depths: blocks per level; even where the level has pairs of blocks.
        sr_ratios: per level, positions per coarse key and axis: 8, 4 or 2, and the larger, the fewer tokens the guided
            blocks attend to; 1 for a level of plain attention.
        sizes: "any", or "official": the published network's own treatment of borders, and an error for images that it
            cannot take. For images that fill all windows and patches both are the same.
        drop_rate: dropout in the MLPs and after the attentions' projections.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth, growing linearly to this rate.
        num_classes: 0 leaves the classifier out.
        in_chans: image channels.

    Raises:
        ValueError: lists that do not have one entry per level, an odd depth of a level with pairs, or another setting
            outside its range.

    Example:
        >>> model = SGFormer(64, (8, 16), (2, 4), (2, 2), depths=(2, 1), sr_ratios=(4, 1), num_classes=5).eval()
        >>> model(torch.randn(1, 3, 45, 70)).shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        qkv_bias: bool = True,
        depths: Sequence[int] = (2, 4, 16, 1),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        sizes: Literal["any", "official"] = "any",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_level_lists(
            embed_dims=embed_dims, num_heads=num_heads, mlp_ratios=mlp_ratios, depths=depths, sr_ratios=sr_ratios
        )
        check_choice("sizes", sizes, ("any", "official"))
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            check_probability(name, rate)
        for depth, reduction in zip(depths, sr_ratios):
            check_choice("sr_ratios entry", reduction, (1, *sorted(GROUP_SIZES)))
            if reduction > 1 and depth % 2:
                raise ValueError(
                    f"depths={tuple(depths)} has {depth} blocks where they form pairs; an even number is allowed"
                )
        self.sizes = sizes
        self.sr_ratios = tuple(sr_ratios)
        self.grid = tuple(-(-size // 4) for size in per_axis(img_size, 2, "img_size"))
        self.patch_embed = Stem(in_chans, embed_dims[0])
        self.pos_embed = nn.Parameter(grid_code(self.grid, embed_dims[0]).unsqueeze(0))

        attention: dict[str, Any] = {
            "qkv_bias": qkv_bias,
            "attention_dropout": attn_drop_rate,
            "projection_dropout": drop_rate,
        }
        self.levels = nn.ModuleList()
        for i, (dim, rates) in enumerate(zip(embed_dims, drop_path_rates(drop_path_rate, depths))):
            block: dict[str, Any] = {"mlp_ratio": mlp_ratios[i], "dropout": drop_rate}
            if sr_ratios[i] == 1:
                blocks: list[nn.Module] = [
                    SelfGuidedBlock(LepeAttention(dim, num_heads[i], **attention), dim, drop_path=rate, **block)
                    for rate in rates
                ]
            else:
                border = "crop" if sizes == "official" else "pad"
                options = block | attention | {"reduction": sr_ratios[i], "border": border}
                blocks = [
                    SelfGuidedPair(dim, num_heads[i], drop_path=pair, **options)
                    for pair in zip(rates[::2], rates[1::2])
                ]
            last = i == len(embed_dims) - 1
            merging = None if last else Merging(dim, embed_dims[i + 1])
            self.levels.append(Level(blocks, merging, norm=nn.LayerNorm(dim, 1e-6)))
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"levels.{i}"} for i, dim in enumerate(embed_dims)
        ]
        self.num_features = embed_dims[-1]
        self.norm = nn.Identity()
        self.head = linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(_init_weights)

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the normalised map of every level, (B, h, w, C)."""
        self.check_images(images)
        x = self.patch_embed(images)
        x = x + self._positions(x.shape[1:-1])
        maps = []
        for level in self.levels:
            tap, x = level(x, self.grad_checkpointing)
            maps.append(tap)
        return maps

    def _positions(self, grid: Sequence[int]) -> Tensor:
        if self.sizes == "official":  # the published network adds the list of positions, whatever the sides of the grid
            return self.pos_embed.reshape(1, *grid, -1)
        return resize_grid(self.pos_embed, grid)

    @torch.no_grad()
    def significance_maps(self, images: Tensor) -> list[Tensor]:
        """How much attention every position receives: one map (B, h, w) a pair of blocks, in the order of the network.

        The guided blocks rank positions by these maps. Runs the network once in eval mode.
        """
        maps: list[Tensor] = []
        pairs = [module for module in self.modules() if isinstance(module, SelfGuidedPair)]
        hooks = [pair.hybrid.register_forward_hook(lambda _layer, _args, out: maps.append(out[1])) for pair in pairs]
        training = [module for module in self.modules() if module.training]
        try:
            self.eval()(images)
        finally:
            for hook in hooks:
                hook.remove()
            for module in training:
                module.training = True
        return maps

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError for images of another shape and, with the official sizes, for those that do not fit."""
        super().check_images(images)
        if self.sizes == "any":
            return
        grid = [-(-size // 4) for size in images.shape[2:]]
        fits = prod(grid) == prod(self.grid)
        for reduction in self.sr_ratios:
            if reduction > 1:
                groups = len(GROUP_SIZES[reduction])
                # Halves of 2 and 1, or a quarter, a half and a quarter, each cut into whole groups.
                whole = (4 if groups == 3 else 2) * GROUP_SIZES[reduction][0]
                fits = fits and all(n % WINDOW == 0 and n >= reduction for n in grid) and prod(grid) % whole == 0
            grid = [-(-n // 2) for n in grid]
        if not fits:
            raise ValueError(
                f"images of size {tuple(images.shape[2:])} do not fit sizes='official' with a position embedding of "
                f"{self.grid}; multiples of 224 that are the model's img_size are allowed, or any size with sizes='any'"
            )

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict under our names; a position embedding of another size is interpolated.

        An embedding with another number of positions than the nominal grid is taken to be of a square grid.
        """

        def block(name: str) -> str:
            match = re.match(r"block\d+\.\d+\.", name)
            return match[0] if match else ""

        renamed: dict[str, Tensor] = {}
        state = super().from_official(state)
        for prefix, names in groupby(sorted(state, key=block), block):
            part = {name.removeprefix(prefix): state[name] for name in names}
            if prefix:
                level, index = (int(number) for number in re.findall(r"\d+", prefix))
                path = self._block_path(level - 1, index)
                renamed |= {f"{path}.{name}": tensor for name, tensor in convert_official_block(part).items()}
            else:
                renamed |= {_official_name(name): tensor for name, tensor in part.items()}
        table = renamed.get("pos_embed")
        if table is not None:
            if table.ndim == 3:
                side = isqrt(table.shape[1])
                grid = self.grid if prod(self.grid) == table.shape[1] else (side, side)
                table = table.unflatten(1, grid) if prod(grid) == table.shape[1] else table
            renamed["pos_embed"] = resize_grid(table, self.grid) if table.ndim == 4 else table
        return renamed

    def _block_path(self, level: int, index: int) -> str:
        if level < len(self.sr_ratios) and self.sr_ratios[level] > 1:
            return f"levels.{level}.blocks.{index // 2}.{('hybrid', 'guided')[index % 2]}"
        return f"levels.{level}.blocks.{index}"

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into a sequence of groups, for layer-wise learning rates."""
        return super().group_matcher(coarse) | {"stem": r"^(?:patch_embed|pos_embed)"}


def _conv_norm(dim: int, out_dim: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, then normalisation over all channels and positions of a sample, channels first."""
    conv = nn.Conv2d(dim, out_dim, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(1, out_dim))


class Stem(nn.Module):
    """Three convolutions, the first and the last of stride 2, each with GroupNorm and GELU between them, then LN."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            _conv_norm(in_chans, dim, 3, stride=2),
            nn.GELU(),
            _conv_norm(dim, dim, 3),
            nn.GELU(),
            _conv_norm(dim, dim, 3, stride=2),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, ceil(H / 4), ceil(W / 4), dim)."""
        return self.norm(conv_channels_last(self.convs, images.movedim(1, -1).contiguous()))


class Merging(nn.Module):
    """Point-wise convolution to the new width, depth-wise one of stride 2, point-wise one; GroupNorm after each."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            _conv_norm(dim, out_dim, 1),
            nn.GELU(),
            _conv_norm(out_dim, out_dim, 3, stride=2, groups=out_dim),
            nn.GELU(),
            _conv_norm(out_dim, out_dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H / 2), ceil(W / 2), out_dim)."""
        return conv_channels_last(self.convs, x)


def _init_weights(module: nn.Module) -> None:
    """Convolutions normal with variance 2 over a filter's taps times the output channels of its group."""
    init_linear(module)
    if isinstance(module, nn.Conv2d):
        fan_out = prod(module.kernel_size) * module.out_channels // module.groups
    elif isinstance(module, DepthwiseConv):
        fan_out = prod(module.weight.shape[2:])
    else:
        return
    nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _official_name(name: str) -> str:
    """Our name of a published parameter, but for those inside of a block."""
    name = re.sub(r"^(patch_embed1\.conv\.\d)\.(c|bn)\.", lambda m: f"{m[1]}.{int(m[2] == 'bn')}.", name)
    name = name.replace("patch_embed1.conv.", "patch_embed.convs.").replace("patch_embed1.", "patch_embed.")
    name = re.sub(
        r"^patch_embed(\d)\.conv(\d)\.(c|bn)\.",
        lambda m: f"levels.{int(m[1]) - 2}.downsample.convs.{2 * int(m[2]) - 2}.{int(m[3] == 'bn')}.",
        name,
    )
    return re.sub(r"^norm(\d)\.", lambda m: f"levels.{int(m[1]) - 1}.norm.", name)


NARROW: dict[str, Any] = {"embed_dims": (64, 128, 256, 512), "num_heads": (2, 4, 8, 16)}
WIDE: dict[str, Any] = {"embed_dims": (96, 192, 384, 768), "num_heads": (4, 6, 12, 24)}

SG_FORMER_VARIANTS: dict[str, dict[str, Any]] = {
    "sgformer_s": NARROW | {"depths": (2, 4, 16, 1), "drop_path_rate": 0.1},
    "sgformer_m": NARROW | {"depths": (2, 6, 28, 2), "drop_path_rate": 0.2},
    "sgformer_b": WIDE | {"depths": (4, 6, 24, 2), "drop_path_rate": 0.4},
}

register_variants(
    SGFormer, SG_FORMER_VARIANTS, source="arXiv 2308.12216", first_conv="patch_embed.convs.0.0", crop_pct=0.9
)

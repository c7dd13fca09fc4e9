"""ConViT: a vision transformer whose first blocks begin as convolutions and may learn to look elsewhere.

patches + positions -> blocks of gated positional attention -> [class token ->] blocks of attention -> LN -> linear

Source: ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases, arXiv 2103.10697.
"""

import re
from collections.abc import Mapping, Sequence
from math import isqrt, prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gridattn.layers.gated_positional import GatedPositionalAttention, mean_attention
from gridattn.layers.global_attention import GlobalAttention
from gridattn.models.common import Backbone, Block, Level, drop_path_rates, init_linear, linear
from gridattn.models.patches import PatchEmbed
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_choice, check_probability, per_axis
from gridattn.ops.gated_positional import attention_distance
from gridattn.ops.resize import resize_table


class ConViT(Backbone):
    """Vision transformer with gated positional attention in its first blocks; the class token enters after them.

    Any image size is taken: images that patches do not fill are padded with zeros at their end, and the position
    embedding is interpolated for a grid other than the nominal one.

    Args:
        img_size: nominal image size, an int or (height, width); it sets the size of the position embedding.
        patch_size: side of the patches.
        embed_dim: channels of all heads together (timm's keyword of this name counts those of one head).
        depth: blocks.
        num_heads: heads.
        local_up_to_layer: number of blocks with gated positional attention, before the class token enters.
        locality_strength: how sharply their heads look at their taps at first.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: bias in the query, key and value projections.
        use_pos_embed: add a learned position embedding to the patches.
        drop_rate: dropout after the position embedding, in the MLPs and after the attention's projection.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth, growing linearly to this rate.
        num_classes: 0 leaves the classifier out.
        in_chans: image channels.

    Raises:
        ValueError: `local_up_to_layer` outside 0 to depth - 1, or another setting outside its range.

    Example:
        >>> model = ConViT(32, 8, embed_dim=16, depth=3, num_heads=4, local_up_to_layer=2, num_classes=5)
        >>> model(torch.randn(1, 3, 37, 50)).shape
        torch.Size([1, 5])
    """

    tap_norm = True
    official_ignored: ClassVar[Mapping[str, str]] = {
        r"\.rel_indices$": "relative positions of patches, computed for every grid here"
    }

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        local_up_to_layer: int = 10,
        locality_strength: float = 1.0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        use_pos_embed: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_probability("drop_path_rate", drop_path_rate)
        if not 0 <= local_up_to_layer < depth:
            raise ValueError(
                f"local_up_to_layer={local_up_to_layer} is not allowed; 0 to {depth - 1} are, "
                f"for the class token enters with one of the {depth} blocks"
            )
        self.grid = tuple(-(-size // patch_size) for size in per_axis(img_size, 2, "img_size"))
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, norm=False)
        self.pos_embed = nn.Parameter(torch.zeros(1, *self.grid, embed_dim)) if use_pos_embed else None
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)

        shared = {"qkv_bias": qkv_bias, "attention_dropout": attn_drop_rate, "projection_dropout": drop_rate}
        rates = drop_path_rates(drop_path_rate, (local_up_to_layer, depth - local_up_to_layer))
        local = [
            GatedPositionalAttention(
                embed_dim, num_heads, grid=self.grid, locality_strength=locality_strength, **shared
            )
            for _ in rates[0]
        ]
        dense = [GlobalAttention(embed_dim, num_heads, grid=(1 + prod(self.grid),), **shared) for _ in rates[1]]
        self.levels = nn.ModuleList(
            Level([Block(layer, mlp_ratio, rate, drop_rate, norm_eps=1e-6) for layer, rate in zip(layers, level_rates)])
            for layers, level_rates in zip((local, dense), rates)
        )
        self.feature_info = [{"num_chs": embed_dim, "reduction": patch_size, "module": "levels.1"}]
        self.num_features = embed_dim
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew; gated positional attention puts its heads on the taps of a convolution."""
        self.apply(init_linear)
        for layer in self.modules():
            if isinstance(layer, GatedPositionalAttention):
                layer.reset_parameters()
        for table in (self.pos_embed, self.cls_token):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the patches of the last block, (B, h, w, C), without the class token."""
        tokens, grid = self._forward_tokens(images)
        return [tokens[:, 1:].unflatten(1, grid)]

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> class token and patches in row-major order, normalised, (B, 1 + h * w, C)."""
        return self.norm(self._forward_tokens(images)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 1 + N, C) -> the class token and, unless `pre_logits`, its logits (B, num_classes)."""
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def _forward_tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        self.check_images(images)
        x = self.patch_embed(images)
        if self.pos_embed is not None:
            x = x + resize_grid(self.pos_embed, x.shape[1:-1])
        x, _ = self.levels[0](self.pos_drop(x), self.grad_checkpointing)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, -2)], 1)
        return self.levels[1](tokens, self.grad_checkpointing)[0], tuple(x.shape[1:-1])

    @torch.no_grad()
    def nonlocality(self, images: Tensor, mode: Literal["running", "official"] = "running") -> Tensor:
        """How far, in patches, each head looks on average, in eval mode.

        Args:
            images: (B, in_chans, H, W).
            mode: `"running"` gives every layer what it is given in the network, without the class token; `"official"`
                gives every layer the bare patch embeddings, as the published curves do.

        Returns:
            (depth, heads).

        Raises:
            ValueError: another mode.
        """
        check_choice("mode", mode, ("running", "official"))
        patches = self.patch_embed(images)
        distances = []
        for _, layer, x in self.attention_inputs(images):
            assert isinstance(layer, GatedPositionalAttention | GlobalAttention)
            if mode == "official":
                x = patches if isinstance(layer, GatedPositionalAttention) else patches.flatten(1, -2)
            elif isinstance(layer, GlobalAttention):
                x = x[:, 1:]  # rows and columns of the patches; the softmax over them alone renormalises the rows
            distances.append(attention_distance(mean_attention(layer, x), patches.shape[1:-1]))
        return torch.stack(distances)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict under our names; a position embedding of another size is interpolated.

        An embedding with another number of patches than the nominal grid is taken to be of a square grid.
        """
        local = len(self.levels[0].blocks)  # type: ignore[arg-type]
        renamed = {_official_name(name, local): t for name, t in super().from_official(state).items()}
        table = renamed.get("pos_embed")
        if table is not None and table.ndim == 3:
            side = isqrt(table.shape[1])
            for grid in (self.grid, (side, side)):
                if table.ndim == 3 and prod(grid) == table.shape[1]:
                    table = table.unflatten(1, grid)
        if table is not None and table.ndim == 4:
            renamed["pos_embed"] = resize_grid(table, self.grid)
        return renamed

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone besides biases and norms."""
        return {"cls_token"} if self.pos_embed is None else {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into a sequence of groups, for layer-wise learning rates."""
        return super().group_matcher(coarse) | {"stem": r"^(?:patch_embed|pos_embed|cls_token)"}


def resize_grid(table: Tensor, grid: Sequence[int]) -> Tensor:
    """Interpolates a table over positions, bicubic: (1, h, w, C) -> (1, *grid, C).

    Example:
        >>> resize_grid(torch.ones(1, 14, 14, 8), (20, 9)).shape
        torch.Size([1, 20, 9, 8])
    """
    return resize_table(table.movedim(-1, 1), grid).movedim(1, -1)


def _official_name(name: str, local: int) -> str:
    """Our name of a published parameter; names that are ours already stay."""

    def place(match: re.Match[str]) -> str:
        block = int(match[1])
        return f"levels.0.blocks.{block}." if block < local else f"levels.1.blocks.{block - local}."

    return re.sub(r"^blocks\.(\d+)\.", place, name)


def _heads(num_heads: int, head_dim: int) -> dict[str, Any]:
    return {"num_heads": num_heads, "embed_dim": num_heads * head_dim, "drop_path_rate": 0.1}


CONVIT_VARIANTS: dict[str, dict[str, Any]] = {
    "convit_tiny": _heads(4, 48),
    "convit_tiny_plus": _heads(4, 64),
    "convit_small": _heads(9, 48),
    "convit_small_plus": _heads(9, 64),
    "convit_base": _heads(16, 48),
    "convit_base_plus": _heads(16, 64),
}

register_variants(ConViT, CONVIT_VARIANTS, source="arXiv 2103.10697")

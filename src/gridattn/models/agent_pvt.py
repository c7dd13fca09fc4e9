"""Agent-PVT: a pyramid of patches with agent attention over the whole map of every level.

[patches + positions -> blocks] x levels -> mean -> linear

Sources: Agent Attention, arXiv 2312.08874; Pyramid Vision Transformer, arXiv 2102.12122.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gridattn.layers import GridAttention
from gridattn.layers.agent import AgentAttention
from gridattn.layers.global_attention import GlobalAttention
from gridattn.layers.spatial_reduction import SpatialReductionAttention
from gridattn.models.agent_common import (
    AGENTS,
    SOURCE,
    agent_sizes_of,
    check_levels,
    convert_attentions,
    fit_position_table,
    leading_agents,
    pad_short_axes,
)
from gridattn.models.common import Backbone, Block, Level, drop_path_rates, init_linear, linear
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_probability, per_axis
from gridattn.ops.resize import resize_table


class AgentPVT(Backbone):
    """Pyramid vision transformer with agent attention.

    Any image size is taken. Rows and columns that do not fill a last patch are left out, as in the published networks
    for dense prediction; an axis shorter than a patch is padded with zeros. For a grid other than the nominal one,
    position embeddings and biases of agents are interpolated linearly.

    Args:
        img_size: nominal image size, an int or (height, width); it sets the size of the position tables.
        patch_size: side of the first patches; later ones have side 2.
        embed_dims: channels per level.
        depths: blocks per level.
        num_heads: heads per level.
        mlp_ratios: hidden width of the MLPs over the channels, per level.
        agent_sizes: agents per axis, an int or a pair, per level.
        agent_depths: number of leading blocks with agents per level, the others are dense; None for all.
        agent_reductions: positions per key and axis of blocks with agents, per level.
        reductions: the same for dense blocks.
        dense_agent_sizes: agents per axis at run time where they differ from those trained, per level; the networks
            published for dense prediction have ((12, 12), (16, 16), (28, 28), (28, 28)).
        qkv_bias: bias in the query, key and value projections.
        drop_rate: dropout after the position embeddings, in the MLPs and after the attention's projection.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth, growing linearly over all blocks to this rate.
        num_classes: 0 leaves the classifier out.
        in_chans: image channels.

    Raises:
        ValueError: lists that do not have one entry per level, or a setting outside its range.

    Example:
        >>> model = AgentPVT(32, 4, (8, 16), (1, 1), (1, 2), (2, 2), (2, 2), None, (1, 1), (2, 1), num_classes=5)
        >>> model(torch.randn(1, 3, 45, 37)).shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 4,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        agent_sizes: Sequence[Any] = AGENTS,
        agent_depths: Sequence[int] | None = None,
        agent_reductions: Sequence[int] = (1, 1, 1, 1),
        reductions: Sequence[int] = (8, 4, 2, 1),
        dense_agent_sizes: Sequence[Any] | None = None,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_levels(
            depths,
            embed_dims=embed_dims,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            agent_reductions=agent_reductions,
            reductions=reductions,
        )
        check_probability("drop_rate", drop_rate)
        check_probability("drop_path_rate", drop_path_rate)
        trained = agent_sizes_of(agent_sizes, len(depths), "agent_sizes")
        dense = trained if dense_agent_sizes is None else dense_agent_sizes
        dense = agent_sizes_of(dense, len(depths), "dense_agent_sizes")
        leading = leading_agents(agent_depths, depths)
        (patch_size,) = per_axis(patch_size, 1, "patch_size")
        rates = drop_path_rates(drop_path_rate, depths)
        shared: Any = {"qkv_bias": qkv_bias, "attention_dropout": attn_drop_rate, "projection_dropout": drop_rate}

        self.patch_embed = FilledPatches(in_chans, embed_dims[0], patch_size)
        self.levels = nn.ModuleList()
        self.grids: list[tuple[int, ...]] = []
        grid = tuple(max(size // patch_size, 1) for size in per_axis(img_size, 2, "img_size"))
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads)):
            layers: list[GridAttention] = []
            for j in range(depths[i]):
                if j < leading[i]:
                    options: Any = {"agent_size": trained[i], "dense_agent_size": dense[i]}
                    options["reduction"] = agent_reductions[i]
                    layers.append(AgentAttention(dim, heads, grid=grid, **options, **shared))
                elif reductions[i] == 1:
                    layers.append(GlobalAttention(dim, heads, grid=grid, **shared))
                else:
                    layers.append(SpatialReductionAttention(dim, heads, reduction=reductions[i], grid=grid, **shared))
            blocks = [
                Block(layer, mlp_ratios[i], rate, drop_rate, norm_eps=1e-6) for layer, rate in zip(layers, rates[i])
            ]
            last = i == len(depths) - 1
            downsample = None if last else FilledPatches(dim, embed_dims[i + 1], 2)
            self.levels.append(Level(blocks, downsample, PositionEmbedding(dim, grid, drop_rate)))
            self.grids.append(grid)
            grid = tuple(max(size // 2, 1) for size in grid)
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**i, "module": f"levels.{i}"}
            for i, dim in enumerate(embed_dims)
        ]
        self.num_features = embed_dims[-1]
        self.norm = nn.Identity()
        self.head = linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the map of every level, (B, h, w, C), before its downsampler."""
        self.check_images(images)
        x = self.patch_embed(images.movedim(1, -1))
        maps = []
        for level in self.levels:
            tap, x = level(x, self.grad_checkpointing)
            maps.append(tap)
        return maps

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict under our names; position tables of another image size are interpolated.

        A position embedding with another number of patches than the nominal grid is taken to be of a square grid.
        """
        renamed = {_official_name(name): tensor for name, tensor in super().from_official(state).items()}
        ours = convert_attentions(self, renamed)
        for i, grid in enumerate(self.grids):
            name = f"levels.{i}.position.table"
            if name in ours:
                ours[name] = fit_position_table(ours[name], grid)
        return ours

    def no_weight_decay(self) -> set[str]:
        """None: the position embeddings were trained with weight decay."""
        return set()


class FilledPatches(nn.Module):
    """Convolution with kernel = stride, then LayerNorm; what does not fill a last patch is left out.

    Args:
        in_chans: channels of the input.
        dim: channels of the output.
        patch_size: side of a patch.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, in_chans) -> (B, max(H // patch_size, 1), max(W // patch_size, 1), dim)."""
        return self.norm(self.proj(pad_short_axes(x.movedim(-1, 1), self.patch_size)).movedim(1, -1))


class PositionEmbedding(nn.Module):
    """Adds a learned vector to every position, interpolated bilinearly on grids other than the nominal one.

    Args:
        dim: channels C.
        grid: the nominal grid.
        dropout: probability, after the addition.
    """

    def __init__(self, dim: int, grid: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, *grid, dim), std=0.02))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        table = resize_table(self.table.movedim(-1, 1), x.shape[1:-1], "linear").movedim(1, -1)
        return self.drop(x + table)


def _official_name(name: str) -> str:
    """Our name of a published parameter; names that are ours already stay."""

    def place(match: re.Match[str]) -> str:
        level = int(match[2]) - 1
        if match[1] == "pos_embed":
            return f"levels.{level}.position.table"
        if match[1] == "block":
            return f"levels.{level}.blocks"
        return "patch_embed" if level == 0 else f"levels.{level - 1}.downsample"

    return re.sub(r"^(patch_embed|pos_embed|block)(\d+)(?=\.|$)", place, name)


AGENT_PVT_VARIANTS: dict[str, dict[str, Any]] = {
    "agent_pvt_t": {"depths": (2, 2, 2, 2), "drop_path_rate": 0.1},
    "agent_pvt_s": {"depths": (3, 4, 6, 3), "drop_path_rate": 0.1},
    "agent_pvt_m": {"depths": (3, 4, 18, 3), "drop_path_rate": 0.3},
    "agent_pvt_m_256": {"depths": (3, 4, 18, 3), "drop_path_rate": 0.3, "img_size": 256},
    "agent_pvt_l": {"depths": (3, 8, 27, 3), "drop_path_rate": 0.3},
}

register_variants(AgentPVT, AGENT_PVT_VARIANTS, source=SOURCE, crop_mode="squash")

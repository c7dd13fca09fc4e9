"""Agent-CSWin: a convolutional pyramid with agents over the whole map first and crosses of two stripes later.

stem -> [agent blocks -> cross-window blocks -> convolution of stride 2] x levels -> LN -> mean -> linear

Sources: Agent Attention, arXiv 2312.08874; CSWin Transformer, arXiv 2107.00652.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gridattn.layers.agent_window import CrossWindowAttention
from gridattn.models.agent_common import (
    AGENTS,
    SOURCE,
    agent_sizes_of,
    check_levels,
    convert_attentions,
    leading_agents,
    pad_short_axes,
)
from gridattn.models.common import Backbone, Block, Level, conv_channels_last, drop_path_rates, init_linear, linear
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_probability, per_axis


class AgentCSWin(Backbone):
    """CSWin transformer with agent attention.

    Any image size is taken. For a map other than the nominal one the biases of agents are interpolated; padding of
    stripes that a map does not fill is masked.

    Args:
        img_size: nominal image size, an int or (height, width); it sets the size of the biases of agents.
        embed_dim: channels of the first level, doubled at every level.
        depths: blocks per level.
        num_heads: heads per level.
        window_sizes: width of the stripes of dense blocks, per level. Where it is the longer side of the nominal map,
            and in the last level, all heads see the whole map.
        mlp_ratio: hidden width of the MLPs over the channels.
        agent_sizes: agents per axis, an int or a pair, per level.
        agent_depths: number of leading blocks with agents per level; None for all.
        agent_window_sizes: width of the stripes of blocks with agents, per level; None for the whole map.
        qkv_bias: bias in the query, key and value projections.
        drop_rate: dropout in the MLPs and after the attention's projection.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth, growing linearly over all blocks to this rate.
        num_classes: 0 leaves the classifier out.
        in_chans: image channels.

    Raises:
        ValueError: lists that do not have one entry per level, or a setting outside its range.

    Example:
        >>> import torch
        >>> model = AgentCSWin(32, 8, (1, 1), (2, 4), (2, 2), agent_sizes=(2, 2), agent_depths=(1, 0), num_classes=5)
        >>> model(torch.randn(1, 3, 45, 37)).shape
        torch.Size([1, 5])
    """

    tap_norm = True

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        window_sizes: Sequence[int] = (1, 2, 7, 7),
        mlp_ratio: float = 4.0,
        agent_sizes: Sequence[Any] = AGENTS,
        agent_depths: Sequence[int] | None = None,
        agent_window_sizes: Sequence[int] | None = None,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_levels(depths, num_heads=num_heads, window_sizes=window_sizes, agent_window_sizes=agent_window_sizes)
        check_probability("drop_rate", drop_rate)
        check_probability("drop_path_rate", drop_path_rate)
        sizes = agent_sizes_of(agent_sizes, len(depths), "agent_sizes")
        leading = leading_agents(agent_depths, depths)
        rates = drop_path_rates(drop_path_rate, depths)
        stripes = per_axis(window_sizes, len(depths), "window_sizes")
        agent_stripes: Sequence[int | None] = (None,) * len(depths)
        if agent_window_sizes is not None:
            agent_stripes = per_axis(agent_window_sizes, len(depths), "agent_window_sizes")
        shared: Any = {"qkv_bias": qkv_bias, "attention_dropout": attn_drop_rate, "projection_dropout": drop_rate}

        self.patch_embed = Stem(in_chans, embed_dim)
        self.levels = nn.ModuleList()
        grid = tuple(max((size + 1) // 4, 1) for size in per_axis(img_size, 2, "img_size"))
        for i, heads in enumerate(num_heads):
            dim, last = embed_dim * 2**i, i == len(depths) - 1
            blocks = []
            for j, rate in enumerate(rates[i]):
                stripe, agents = (agent_stripes[i], sizes[i]) if j < leading[i] else (stripes[i], None)
                options: Any = {"window_size": None if last else stripe, "agent_size": agents}
                layer = CrossWindowAttention(dim, heads, grid=grid, **options, **shared)
                blocks.append(Block(layer, mlp_ratio, rate, drop_rate))
            self.levels.append(Level(blocks, None if last else Downsample(dim, 2 * dim)))
            grid = tuple(-(-size // 2) for size in grid)
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.feature_info = [
            {"num_chs": embed_dim * 2**i, "reduction": 4 * 2**i, "module": f"levels.{i}"} for i in range(len(depths))
        ]
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

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict under our names; biases of agents for another image size are interpolated."""
        renamed = {_official_name(name): tensor for name, tensor in super().from_official(state).items()}
        return convert_attentions(self, renamed)


class Stem(nn.Module):
    """Convolution of width 7 and stride 4, then LayerNorm."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 7, stride=4, padding=2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, (H + 1) // 4, (W + 1) // 4, dim), one position an axis at least."""
        return self.norm(self.proj(pad_short_axes(images, 3)).movedim(1, -1))


class Downsample(nn.Module):
    """Convolution of width 3 and stride 2, then LayerNorm."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H / 2), ceil(W / 2), out_dim)."""
        return self.norm(conv_channels_last(self.conv, x))


_BLOCK_NAMES = (
    (r"^stage1_conv_embed\.0\.", "patch_embed.proj."),
    (r"^stage1_conv_embed\.2\.", "patch_embed.norm."),
    (r"^stage(\d+)\.(\d+)\.(qkv|proj|attns)\.", lambda m: f"levels.{int(m[1]) - 1}.blocks.{m[2]}.attn.{m[3]}."),
    (r"^stage(\d+)\.(\d+)\.", lambda m: f"levels.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"^merge(\d+)\.", lambda m: f"levels.{int(m[1]) - 1}.downsample."),
)


def _official_name(name: str) -> str:
    """Our name of a published parameter, but for those of the stripes; names that are ours already stay."""
    for pattern, ours in _BLOCK_NAMES:
        name = re.sub(pattern, ours, name)
    return name


TINY: dict[str, Any] = {"agent_depths": (2, 4, 0, 0), "drop_path_rate": 0.2}
SMALL: dict[str, Any] = {"depths": (3, 6, 29, 2), "agent_depths": (3, 6, 0, 0), "drop_path_rate": 0.4}
BASE: dict[str, Any] = SMALL | {"embed_dim": 96, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}

AGENT_CSWIN_VARIANTS: dict[str, dict[str, Any]] = {
    "agent_cswin_t": TINY,
    "agent_cswin_s": SMALL,
    "agent_cswin_b": BASE,
}
LARGE_IMAGES: dict[str, Any] = {"img_size": 384, "window_sizes": (1, 2, 12, 12), "drop_path_rate": 0.7}

register_variants(AgentCSWin, AGENT_CSWIN_VARIANTS, source=SOURCE, crop_mode="squash")
register_variants(
    AgentCSWin, {"agent_cswin_b_384": BASE | LARGE_IMAGES}, source=SOURCE, crop_mode="squash", crop_pct=1.0
)

"""Agent-Swin: a pyramid whose first blocks attend to the whole map through agents and whose later ones inside windows.

stem -> [agent blocks -> window blocks -> merging] x levels -> LN -> mean -> linear

Sources: Agent Attention, arXiv 2312.08874; Swin Transformer, arXiv 2103.14030.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor, nn

from gridattn.layers import GridAttention
from gridattn.layers.agent import AgentAttention
from gridattn.layers.agent_window import AgentWindowAttention
from gridattn.layers.dual import PaddedWindowAttention
from gridattn.models.agent_common import (
    AGENTS,
    SOURCE,
    agent_sizes_of,
    check_levels,
    convert_attentions,
    leading_agents,
)
from gridattn.models.common import Backbone, Block, Level, drop_path_rates, init_linear, linear
from gridattn.models.patches import PatchEmbed, pad_to_multiple
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_probability, per_axis


class AgentSwin(Backbone):
    """Swin transformer with agent attention.

    Any image size is taken. On maps other than the nominal ones the biases of agents are interpolated and the whole map
    stays one window, as in the published networks for dense prediction. Windows that a map does not fill see its zero
    padding, as in those.

    Args:
        img_size: nominal image size, an int or (height, width); it sets the size of the position tables.
        patch_size: side of the first patches.
        embed_dim: channels of the first level, doubled at every level.
        depths: blocks per level.
        num_heads: heads per level.
        window_size: side of the windows of agent blocks; None for the shorter side of the first map, with which all
            maps are one window. Dense blocks have windows of an eighth of it, of 7 at least. A level whose shorter side
            is no longer than a window has one window of that side, which is never shifted.
        mlp_ratio: hidden width of the MLPs over the channels.
        agent_sizes: agents per axis, an int or a pair, per level.
        agent_depths: number of leading blocks with agents per level, the others attend inside windows; None for all.
        dense_agent_sizes: agents per axis at run time where they differ from those trained, per level; agent blocks
            then see the whole map whatever `window_size` says. The networks published for dense prediction have
            ((9, 9), (12, 12), (14, 14), (7, 7)).
        qkv_bias: bias in the query, key and value projections.
        drop_rate: dropout after the stem, in the MLPs and after the attention's projection.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth, growing linearly over all blocks to this rate.
        num_classes: 0 leaves the classifier out.
        in_chans: image channels.

    Raises:
        ValueError: lists that do not have one entry per level, or a setting outside its range.

    Example:
        >>> import torch
        >>> model = AgentSwin(32, 4, 8, (2, 2), (1, 2), agent_sizes=(2, 2), agent_depths=(2, 0), num_classes=5)
        >>> model(torch.randn(1, 3, 45, 37)).shape
        torch.Size([1, 5])
    """

    tap_norm = True
    official_ignored: ClassVar[Mapping[str, str]] = {
        r"\.relative_position_index$": "places of the relative positions in their table, computed for every map here",
        r"\.attn_mask$": "mask of the shifted windows, computed for every map here",
    }

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | None = None,
        mlp_ratio: float = 4.0,
        agent_sizes: Sequence[Any] = AGENTS,
        agent_depths: Sequence[int] | None = None,
        dense_agent_sizes: Sequence[Any] | None = None,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_levels(depths, num_heads=num_heads)
        check_probability("drop_rate", drop_rate)
        check_probability("drop_path_rate", drop_path_rate)
        (patch_size,) = per_axis(patch_size, 1, "patch_size")
        grid = tuple(-(-size // patch_size) for size in per_axis(img_size, 2, "img_size"))
        (window,) = per_axis(min(grid) if window_size is None else window_size, 1, "window_size")
        trained = agent_sizes_of(agent_sizes, len(depths), "agent_sizes")
        dense: Sequence[Any] = (None,) * len(depths)
        if dense_agent_sizes is not None:
            dense = agent_sizes_of(dense_agent_sizes, len(depths), "dense_agent_sizes")
        leading = leading_agents(agent_depths, depths)
        rates = drop_path_rates(drop_path_rate, depths)
        shared: Any = {"qkv_bias": qkv_bias, "attention_dropout": attn_drop_rate, "projection_dropout": drop_rate}

        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.pos_drop = nn.Dropout(drop_rate)
        self.levels = nn.ModuleList()
        for i, heads in enumerate(num_heads):
            dim = embed_dim * 2**i
            blocks = []
            for j, rate in enumerate(rates[i]):
                odd = j % 2 == 1
                layer = (
                    agent_layer(dim, heads, grid, window, odd, trained[i], dense[i], **shared)
                    if j < leading[i]
                    else window_layer(dim, heads, grid, max(7, window // 8), odd, **shared)
                )
                blocks.append(Block(layer, mlp_ratio, rate, drop_rate))
            self.levels.append(Level(blocks, None if i == len(depths) - 1 else Merging(dim)))
            grid = tuple(-(-size // 2) for size in grid)
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.feature_info = [
            {"num_chs": embed_dim * 2**i, "reduction": patch_size * 2**i, "module": f"levels.{i}"}
            for i in range(len(depths))
        ]
        self.norm = nn.LayerNorm(self.num_features)
        self.head = linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the map of every level, (B, h, w, C), before its merging."""
        self.check_images(images)
        x = self.pos_drop(self.patch_embed(images))
        maps = []
        for level in self.levels:
            tap, x = level(x, self.grad_checkpointing)
            maps.append(tap)
        return maps

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict under our names; position tables of another size are interpolated."""
        official = super().from_official(state)
        renamed = {
            f"levels.{name.removeprefix('layers.')}" if name.startswith("layers.") else name: tensor
            for name, tensor in official.items()
        }
        return convert_attentions(self, renamed)


def agent_layer(
    dim: int,
    num_heads: int,
    grid: Sequence[int],
    window: int,
    odd: bool,
    agent_size: Sequence[int],
    dense_agent_size: Sequence[int] | None,
    **shared: Any,
) -> GridAttention:
    """Agents over the whole map where one window holds it or dense prediction asks for it, else inside windows.

    Args:
        dim: channels.
        num_heads: heads.
        grid: nominal map.
        window: side of the windows.
        odd: the block is an odd one of its level; its windows are shifted.
        agent_size: agents per axis.
        dense_agent_size: agents per axis at run time in dense prediction; None for a classifier.
        **shared: further keywords of the layer.
    """
    one = window >= min(grid)
    stored = tuple(grid) if one else (window, window)
    if one or dense_agent_size is not None:
        options: Any = {"agent_size": agent_size, "dense_agent_size": dense_agent_size}
        return AgentAttention(dim, num_heads, grid=stored, **options, **shared)
    options = {"agent_size": agent_size, "window_size": window, "shifted": odd}
    return AgentWindowAttention(dim, num_heads, grid=stored, **options, **shared)


def window_layer(dim: int, num_heads: int, grid: Sequence[int], window: int, odd: bool, **shared: Any) -> GridAttention:
    """Attention inside windows, shifted in odd blocks unless one window is as long as the shorter side of the map."""
    shifted = odd and window < min(grid)
    return PaddedWindowAttention(dim, num_heads, grid=grid, window_size=min(window, *grid), shifted=shifted, **shared)


class Merging(nn.Module):
    """Four neighbours become one position of twice the channels: LayerNorm of all four, then a linear map without bias.

    Odd axes are padded with zeros.

    Args:
        dim: channels of the input.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 C)."""
        # The neighbour below comes before the one to the right.
        x = rearrange(pad_to_multiple(x.movedim(-1, 1), 2), "b c (h p) (w q) -> b h w (q p c)", p=2, q=2)
        return self.reduction(self.norm(x))


BASE: dict[str, Any] = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
SMALL: dict[str, Any] = {"depths": (2, 2, 18, 2), "agent_depths": (2, 2, 0, 0), "drop_path_rate": 0.3}
MIXED: dict[str, Any] = {"agent_depths": (2, 2, 2, 0), "drop_path_rate": 0.5}

AGENT_SWIN_VARIANTS: dict[str, dict[str, Any]] = {
    "agent_swin_t": {"agent_depths": (2, 2, 6, 0), "drop_path_rate": 0.2},
    "agent_swin_s": SMALL,
    "agent_swin_b": BASE | MIXED,
}
AGENT_SWIN_LARGE_IMAGE_VARIANTS: dict[str, dict[str, Any]] = {
    "agent_swin_s_288": SMALL | {"img_size": 288},
    "agent_swin_b_384": BASE | MIXED | {"img_size": 384},
}

register_variants(AgentSwin, AGENT_SWIN_VARIANTS, source=SOURCE, crop_mode="squash")
register_variants(AgentSwin, AGENT_SWIN_LARGE_IMAGE_VARIANTS, source=SOURCE, crop_mode="squash", crop_pct=1.0)

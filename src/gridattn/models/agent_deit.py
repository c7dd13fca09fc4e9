"""Agent-DeiT: a plain vision transformer in which a few agents stand between the patches.

patches + class token + positions -> blocks of agent attention -> [blocks of dense attention] -> LN -> linear

Source: Agent Attention: On the Integration of Softmax and Linear Attention, arXiv 2312.08874.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gridattn.layers.agent import ClassTokenAgentAttention
from gridattn.layers.global_attention import GlobalAttention
from gridattn.models.agent_common import (
    SOURCE,
    agent_sizes_of,
    check_levels,
    convert_attentions,
    fit_position_table,
    leading_agents,
)
from gridattn.models.common import Backbone, Block, drop_path_rates, init_linear, linear
from gridattn.models.convit import resize_grid
from gridattn.models.patches import PatchEmbed
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_probability, per_axis

PHASES = (0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3)
"""Which entry of `agent_sizes` a block uses; blocks beyond the table use the last."""


class AgentDeiT(Backbone):
    """Vision transformer with agent attention in its first blocks, or in all.

    Agents are pooled from the patches; the class token is one more query and key. Any image size is taken: images that
    patches do not fill are padded with zeros at their end, and for a grid other than the nominal one the position
    embedding is interpolated bicubically and the biases of the agents linearly.

    Args:
        img_size: nominal image size, an int or (height, width); it sets the size of the position tables.
        patch_size: side of the patches.
        embed_dim: channels.
        depth: blocks.
        num_heads: heads.
        agent_sizes: agents per axis, an int or a pair, for blocks 0-1, 2-3, 4-9 and all later ones.
        agent_depth: number of leading blocks with agents, the others are dense; None for all.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: bias in the query, key and value projections.
        drop_rate: dropout after the position embedding, in the MLPs and after the attention's projection.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth, growing linearly to this rate.
        num_classes: 0 leaves the classifier out.
        in_chans: image channels.

    Raises:
        ValueError: `agent_depth` outside 0 to `depth`, or another setting outside its range.

    Example:
        >>> model = AgentDeiT(32, 8, embed_dim=16, depth=2, num_heads=2, agent_sizes=(2, 2, 2, 2), num_classes=5)
        >>> model(torch.randn(1, 3, 37, 50)).shape
        torch.Size([1, 5])
    """

    tap_norm = True

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        agent_sizes: Sequence[Any] = (7, 7, 7, 7),
        agent_depth: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_levels((depth,))
        check_probability("drop_rate", drop_rate)
        check_probability("drop_path_rate", drop_path_rate)
        sizes = agent_sizes_of(agent_sizes, 4, "agent_sizes")
        (leading,) = leading_agents(None if agent_depth is None else (agent_depth,), (depth,))
        (patch_size,) = per_axis(patch_size, 1, "patch_size")
        self.grid = tuple(-(-size // patch_size) for size in per_axis(img_size, 2, "img_size"))
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, norm=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + prod(self.grid), embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)

        shared: Any = {"qkv_bias": qkv_bias, "attention_dropout": attn_drop_rate, "projection_dropout": drop_rate}
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(drop_path_rates(drop_path_rate, (depth,))[0]):
            if i < leading:
                size = sizes[PHASES[min(i, len(PHASES) - 1)]]
                layer = ClassTokenAgentAttention(embed_dim, num_heads, grid=self.grid, agent_size=size, **shared)
                self.blocks.append(ClassTokenBlock(layer, mlp_ratio, rate, drop_rate, norm_eps=1e-6))
            else:
                dense = GlobalAttention(embed_dim, num_heads, grid=(1 + prod(self.grid),), **shared)
                self.blocks.append(Block(dense, mlp_ratio, rate, drop_rate, norm_eps=1e-6))
        self.feature_info = [{"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{depth - 1}"}]
        self.num_features = embed_dim
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)
        for table in (self.pos_embed, self.cls_token):
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

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> logits (B, num_classes)."""
        # The head reads the class token alone, so it alone is normalised.
        return self.head(self.norm(self._forward_tokens(images)[0][:, 0]))

    def _forward_tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        self.check_images(images)
        x = self.patch_embed(images)
        grid = tuple(x.shape[1:-1])
        tokens = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, -2)), 1)
        tokens = self.pos_drop(tokens + self._positions(grid))
        for block in self.blocks:
            inputs = (tokens, grid) if isinstance(block, ClassTokenBlock) else (tokens,)
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            tokens = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return tokens, grid

    def _positions(self, grid: tuple[int, ...]) -> Tensor:
        """The position embedding of the class token and of the patches of `grid`, (1, 1 + N, C)."""
        if grid == self.grid:
            return self.pos_embed
        patches = resize_grid(self.pos_embed[:, 1:].unflatten(1, self.grid), grid)
        return torch.cat((self.pos_embed[:, :1], patches.flatten(1, -2)), 1)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict under our names; position tables of another image size are interpolated.

        A position embedding with another number of patches than the nominal grid is taken to be of a square grid.
        """
        ours = convert_attentions(self, super().from_official(state))
        table = ours.get("pos_embed")
        if table is not None and table.ndim == 3:
            patches = fit_position_table(table[:, 1:], self.grid).flatten(1, -2)
            ours["pos_embed"] = torch.cat((table[:, :1], patches), 1)
        return ours

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone besides biases and norms."""
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into a sequence of groups, for layer-wise learning rates."""
        block = r"^blocks\.(\d+)"
        return {
            "stem": r"^(?:patch_embed|pos_embed|cls_token)",
            "blocks": block if coarse else [(block, None), (r"^norm", (99999,))],
        }


class ClassTokenBlock(Block):
    """The residual block for tokens of which the first is no position of the grid."""

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(B, 1 + prod(grid), C) -> the same shape."""
        normed = self.norm1(tokens)
        x, token = self.attn(normed[:, 1:].unflatten(1, grid), normed[:, :1])
        tokens = tokens + self.drop_path(torch.cat((token, x.flatten(1, -2)), 1))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


AGENT_DEIT_VARIANTS: dict[str, dict[str, Any]] = {
    "agent_deit_t": {"embed_dim": 192, "num_heads": 3},
    "agent_deit_s": {"embed_dim": 384, "num_heads": 6, "drop_path_rate": 0.1},
    "agent_deit_s_448": {"embed_dim": 384, "num_heads": 6, "drop_path_rate": 0.1, "img_size": 448},
    "agent_deit_b": {
        "embed_dim": 768,
        "num_heads": 12,
        "agent_sizes": (9, 9, 9, 9),
        "agent_depth": 4,
        "drop_path_rate": 0.3,
    },
}

register_variants(AgentDeiT, AGENT_DEIT_VARIANTS, source=SOURCE, crop_mode="squash")

"""Multi-axis attention: attention inside blocks, then attention on a lattice spread over the whole grid."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.common import GridAttention
from gridattn.layers.drop_path import DropPath
from gridattn.layers.mlp import Mlp
from gridattn.layers.registry import register_attention
from gridattn.layers.window import WindowAttention


class PartitionAttentionBlock(nn.Module):
    """x = x + drop_path(attention(LN1(x))), then x = x + drop_path(mlp(LN2(x))), with attention inside a partition.

    Args:
        attention: a layer (B, *grid, C) -> (B, *grid, C).
        mlp_ratio: hidden channels of the feed-forward over C; 0 leaves it out.
        norm_eps: of both normalisations.
        tanh_gelu: the tanh approximation of GELU in the feed-forward, as in the published weights.
        drop_path: probability of dropping a branch for a sample.
        layer_scale: initial value of one learned factor per channel and branch; None for none.
    """

    def __init__(
        self,
        attention: GridAttention,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-5,
        tanh_gelu: bool = True,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        dim = attention.dim
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps) if mlp_ratio else None
        self.mlp = Mlp(dim, int(dim * mlp_ratio), tanh_gelu=tanh_gelu) if mlp_ratio else None
        self.drop_path = DropPath(drop_path)
        self.gamma1 = None if layer_scale is None else nn.Parameter(layer_scale * torch.ones(dim))
        self.gamma2 = None if layer_scale is None or not mlp_ratio else nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        attended = self.attn(self.norm1(x))
        x = x + self.drop_path(attended if self.gamma1 is None else self.gamma1 * attended)
        if self.mlp is None or self.norm2 is None:
            return x
        mixed = self.mlp(self.norm2(x))
        return x + self.drop_path(mixed if self.gamma2 is None else self.gamma2 * mixed)

    def macs(self, grid: Sequence[int]) -> int:
        """Multiply-accumulates for one sample on `grid`."""
        hidden = 0 if self.mlp is None else self.mlp.fc1.out_features
        return self.attn.macs(grid) + 2 * prod(grid) * self.attn.dim * hidden


@register_attention(
    "multi_axis",
    summary="attention inside blocks of neighbours, then on a dilated grid over the whole map",
    source="arXiv 2204.01697",
    linear_cost=True,
)
class MultiAxisAttention(GridAttention):
    """Multi-axis attention: a block of attention inside windows of P neighbours an axis, then one on lattices of G.

    The lattice of a position holds G positions an axis, evenly spread over the whole grid. After both, every output
    depends on every input as long as the step of the lattice is at most P. Each attention has a learned bias per
    relative position. A grid that the windows do not fill is padded, and the padding is masked.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid; only its length, the rank, is used.
        window_size: P, one int or one per axis.
        grid_size: G, one int or one per axis; P when None.
        bias: learned relative position bias.
        mlp_ratio: hidden channels of both feed-forwards over C; 0 leaves them out.
        qkv_bias: bias in the query/key/value projections.
        norm_eps: of the normalisations.
        tanh_gelu: the tanh approximation of GELU in the feed-forwards, as in the published weights.
        drop_path: probability of dropping a branch for a sample.

    Source: Tu et al., MaxViT: Multi-Axis Vision Transformer, arXiv 2204.01697.

    Example:
        >>> import torch
        >>> MultiAxisAttention(32, num_heads=4)(torch.randn(2, 10, 9, 32)).shape
        torch.Size([2, 10, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        window_size: int | Sequence[int] = 7,
        grid_size: int | Sequence[int] | None = None,
        bias: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-5,
        tanh_gelu: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        shared = {"grid": grid, "bias": bias, "qkv_bias": qkv_bias}
        blocks = WindowAttention(dim, num_heads, window_size=window_size, partition="block", **shared)
        lattices = WindowAttention(dim, num_heads, window_size=grid_size or window_size, partition="grid", **shared)
        self.block_attention, self.grid_attention = (
            PartitionAttentionBlock(attention, mlp_ratio, norm_eps, tanh_gelu, drop_path)
            for attention in (blocks, lattices)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        return self.grid_attention(self.block_attention(x))

    def macs(self, grid: Sequence[int]) -> int:
        return self.block_attention.macs(grid) + self.grid_attention.macs(grid)


def partition_state_from_official(
    state: Mapping[str, Tensor], num_heads: int, window_size: Sequence[int]
) -> dict[str, Tensor]:
    """Renames the weights of one published partition attention to those of `PartitionAttentionBlock`.

    There are two published layouts. A table of biases (heads, 2P - 1, 2P - 1) goes by key minus query and comes with a
    projection into query, key and value of all heads. A table ((2P - 1)^2, heads) goes by query minus key and comes
    with a projection into query, key and value of each head in turn.

    Args:
        state: norm1, attn.qkv, attn.rel_pos.relative_position_bias_table, attn.proj, norm2 and mlp of one sub-layer.
        num_heads: heads.
        window_size: positions of a window along each axis.
    """
    renamed = {key: tensor for key, tensor in state.items() if not key.startswith("attn.rel_pos.")}
    table = state["attn.rel_pos.relative_position_bias_table"]
    if table.ndim == 2:
        table = table.T.unflatten(1, [2 * w - 1 for w in window_size]).flip(list(range(1, 1 + len(window_size))))
        for key in ("attn.qkv.weight", "attn.qkv.bias"):
            if key in renamed:
                renamed[key] = rearrange(renamed[key], "(h three d) ... -> (three h d) ...", h=num_heads, three=3)
    return renamed | {"attn.relative_position_bias": table.contiguous()}

"""Dual attention: a block of window attention followed by a block of channel attention."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from gridattn.layers.channel import ChannelAttention
from gridattn.layers.common import GridAttention
from gridattn.layers.drop_path import DropPath
from gridattn.layers.large_kernel import DepthwiseConv
from gridattn.layers.mlp import Mlp
from gridattn.layers.registry import register_attention
from gridattn.layers.window import WindowAttention
from gridattn.ops.common import per_axis
from gridattn.ops.large_kernel import depthwise_conv
from gridattn.ops.padding import pad_grid, to_multiple


class ConvPositionEncoding(nn.Module):
    """Adds a depth-wise convolution, 3 wide on each axis: the only thing in the block that knows about positions.

    Args:
        dim: channels C.
        rank: number of grid axes.
    """

    identity: Tensor

    def __init__(self, dim: int, rank: int = 2) -> None:
        super().__init__()
        self.proj = DepthwiseConv(dim, (3,) * rank)
        identity = torch.zeros(1, 1, *[3] * rank)
        identity[(0, 0, *[1] * rank)] = 1.0
        self.register_buffer("identity", identity, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        # A one at the centre of the kernel adds the input within the convolution.
        return depthwise_conv(x, self.proj.weight + self.identity, self.proj.bias)


class DualAttentionBlock(nn.Module):
    """Half of a dual attention pair: position encoding, attention, position encoding, feed-forward.

    x = cpe1(x); x = x + drop_path(attention(LN1(x))); x = cpe2(x); x = x + drop_path(mlp(LN2(x))).

    Args:
        attention: a layer (B, *grid, C) -> (B, *grid, C).
        mlp_ratio: hidden channels of the feed-forward over C; 0 leaves it out.
        drop_path: probability of dropping a branch for a sample.
    """

    def __init__(self, attention: GridAttention, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        dim, rank = attention.dim, attention.rank
        self.cpe1 = ConvPositionEncoding(dim, rank)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.cpe2 = ConvPositionEncoding(dim, rank)
        self.norm2 = nn.LayerNorm(dim) if mlp_ratio else None
        self.mlp = Mlp(dim, int(dim * mlp_ratio)) if mlp_ratio else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        x = self.cpe1(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe2(x)
        if self.mlp is None or self.norm2 is None:
            return x
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def macs(self, grid: Sequence[int]) -> int:
        """Multiply-accumulates for one sample on `grid`."""
        hidden = 0 if self.mlp is None else self.mlp.fc1.out_features
        encode = self.cpe1.proj.macs(grid) + self.cpe2.proj.macs(grid)
        return encode + self.attn.macs(grid) + 2 * prod(grid) * self.attn.dim * hidden


class PaddedWindowAttention(WindowAttention):
    """Window attention in which a window that the grid does not fill sees its zero padding.

    The grid is padded at its end before the projection, so that a padded position has the projection's bias as key and
    value. The published DaViT weights were trained so. Arguments as in `WindowAttention`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        grid = self.check_input(x)
        return super().forward(self._padded(x))[(slice(None), *(slice(size) for size in grid))]

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """As in `GridAttention`; weights of the padding are cut off, so that those of a border sum to less than one."""
        self.check_query(x, query)
        whole = super().attention_map(self._padded(x), query)
        return whole[(..., *(slice(size) for size in x.shape[1:-1]))]

    def _padded(self, x: Tensor) -> Tensor:
        return pad_grid(x, [(0, to_multiple(size, w)) for size, w in zip(x.shape[1:-1], self.window_size)])

    def macs(self, grid: Sequence[int]) -> int:
        return super().macs([-(-size // w) * w for size, w in zip(grid, self.window_size)])


@register_attention(
    "dual",
    summary="a block of window attention among positions, then a block of attention among channels",
    source="arXiv 2204.03645",
    linear_cost=True,
)
class DualAttention(GridAttention):
    """A spatial block (attention inside windows) and a channel block (attention among channels), in this order.

    Args:
        dim: channels C.
        num_heads: heads of the window attention and groups of the channel attention; must divide `dim`.
        grid: the nominal grid; only its length, the rank, is used.
        window_size: positions per window, one int or one per axis.
        mlp_ratio: hidden channels of both feed-forwards over C; 0 leaves them out.
        qkv_bias: bias in the query/key/value projections.
        dynamic_scale: see `ChannelAttention`.
        mask_padding: keep the padding of windows that the grid does not fill out of the softmax; the published weights
            have False.
        drop_path: probability of dropping a branch for a sample.

    Source: Ding et al., DaViT: Dual Attention Vision Transformers, arXiv 2204.03645.

    Example:
        >>> import torch
        >>> DualAttention(32, num_heads=4)(torch.randn(2, 10, 9, 32)).shape
        torch.Size([2, 10, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        window_size: int | Sequence[int] = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        dynamic_scale: bool = False,
        mask_padding: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        per_axis(window_size, self.rank, "window_size")
        window_attention = WindowAttention if mask_padding else PaddedWindowAttention
        within_windows = window_attention(
            dim, num_heads, grid=grid, window_size=window_size, bias=False, qkv_bias=qkv_bias
        )
        among_channels = ChannelAttention(dim, num_heads, grid=grid, qkv_bias=qkv_bias, dynamic_scale=dynamic_scale)
        self.spatial_block = DualAttentionBlock(within_windows, mlp_ratio, drop_path)
        self.channel_block = DualAttentionBlock(among_channels, mlp_ratio, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        return self.channel_block(self.spatial_block(x))

    def macs(self, grid: Sequence[int]) -> int:
        return self.spatial_block.macs(grid) + self.channel_block.macs(grid)

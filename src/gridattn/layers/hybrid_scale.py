"""SG-Former's attentions: hybrid-scale, guided by significance, and plain, all with the same position branch."""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, cast

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, split_heads
from gridattn.layers.dropout import Dropout
from gridattn.layers.large_kernel import DepthwiseConv
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels, check_choice, check_probability, per_axis
from gridattn.ops.hybrid_scale import (
    GROUP_SIZES,
    hybrid_scale_attention,
    reallocate_tokens,
    significance_map,
    token_count,
)
from gridattn.ops.padding import pad_grid, to_multiple

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ValuePosition(nn.Module):
    """Locally enhanced position encoding: a linear map and a depth-wise convolution, 3 wide, added to the heads.

    Args:
        dim: channels C.
        rank: number of grid axes.
    """

    def __init__(self, dim: int, rank: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.conv = DepthwiseConv(dim, (3,) * rank)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        return self.conv(self.linear(x))

    def macs(self, grid: Sequence[int]) -> int:
        """Multiply-accumulates for one sample on `grid`."""
        return prod(grid) * self.linear.weight.numel() + self.conv.macs(grid)


class TokenAttention(nn.Module):
    """Every position of a grid attends to some tokens: y = proj(softmax(scale Q K^T) V + DWConv(Linear(x))).

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        rank: number of grid axes.
        qkv_bias: bias in the query/key/value projections.
        scale: factor of the logits; head_dim ** -0.5 when None.
        attention_dropout: dropout probability of the attention weights.
        projection_dropout: dropout probability of the output.

    Example:
        >>> import torch
        >>> TokenAttention(32)(torch.randn(2, 7, 9, 32), torch.randn(2, 5, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        rank: int = 2,
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_channels(dim, num_heads)
        check_probability("attention_dropout", attention_dropout)
        check_probability("projection_dropout", projection_dropout)
        self.dim = dim
        self.num_heads = num_heads
        self.scale = scale
        self.attention_dropout = attention_dropout
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.lepe = ValuePosition(dim, rank)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout(projection_dropout)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, *grid, C), tokens (B, T, C) -> (B, *grid, C)."""
        query = rearrange(self.q(x).flatten(1, -2), "b n (h d) -> b h n d", h=self.num_heads)
        key, value = rearrange(self.kv(tokens), "b t (two h d) -> two b h t d", two=2, h=self.num_heads).unbind(0)
        heads = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.attention_dropout if self.training else 0.0, scale=self.scale
        )
        heads = rearrange(heads, "b h n d -> b n (h d)").reshape(x.shape)
        return self.proj_drop(self.proj(heads + self.lepe(x)))

    def macs(self, grid: Sequence[int], tokens: int) -> int:
        """Multiply-accumulates for one sample on `grid` with so many tokens."""
        n = prod(grid)
        return 2 * self.dim**2 * (n + tokens) + 2 * n * tokens * self.dim + self.lepe.macs(grid)


class LepeAttention(GridAttention):
    """Dense attention with a position branch: y = proj(softmax(scale Q K^T) V + DWConv(Linear(x))).

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid; only its length, the rank, is used.
        **options: `qkv_bias`, `scale`, `attention_dropout`, `projection_dropout` of `TokenAttention`.

    Source: the last stage of SG-Former, arXiv 2308.12216.

    Example:
        >>> import torch
        >>> LepeAttention(32, num_heads=4)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    def __init__(self, dim: int, num_heads: int = 4, *, grid: Sequence[int] = (14, 14), **options: Any) -> None:
        super().__init__(dim, rank=len(grid))
        self.attention = TokenAttention(dim, num_heads, rank=self.rank, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        return self.attention(x, x.flatten(1, -2))

    def macs(self, grid: Sequence[int]) -> int:
        return self.attention.macs(grid, prod(grid))


@register_attention(
    "hybrid_scale",
    summary="half of the heads see the whole grid through coarse keys, half see their window",
    source="arXiv 2308.12216",
)
class HybridScaleAttention(GridAttention):
    """Attention at two scales: y = proj(concat(coarse heads, window heads) + DWConv(Linear(x))).

    The first half of the heads attend to GELU(LN(patches)), one key for every patch of `reduction` positions per axis;
    the second half to the positions of their own window. The weights also give the significance of every position,
    see `gridattn.ops.hybrid_scale.significance_map`.

    Args:
        dim: channels C.
        num_heads: heads; even, must divide `dim`.
        grid: the nominal grid; only its length, the rank, is used.
        reduction: positions per patch and axis, one int or one per axis.
        window_size: positions per window, one int or one per axis.
        border: what becomes of the last positions that do not fill a patch: "pad" fills it with zeros, "crop" leaves
            them out of the coarse keys (official). An axis shorter than a patch is always padded.
        qkv_bias: bias in the query/key/value projections.
        scale: factor of the logits; head_dim ** -0.5 when None.
        attention_dropout: dropout probability of the attention weights.
        projection_dropout: dropout probability of the output.

    Raises:
        ValueError: an odd number of heads, a size below 1, an unknown border.

    Source: SG-Former, arXiv 2308.12216.

    Example:
        >>> import torch
        >>> layer = HybridScaleAttention(32, num_heads=4, reduction=4)
        >>> y, significance = layer(torch.randn(2, 14, 10, 32), return_significance=True)
        >>> y.shape, significance.shape
        (torch.Size([2, 14, 10, 32]), torch.Size([2, 14, 10]))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        reduction: int | Sequence[int] = 2,
        window_size: int | Sequence[int] = 7,
        border: Literal["pad", "crop"] = "pad",
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_channels(dim, num_heads)
        if num_heads % 2:
            raise ValueError(f"num_heads={num_heads} is not allowed; half of the heads are coarse, so it must be even")
        check_choice("border", border, ("pad", "crop"))
        check_probability("attention_dropout", attention_dropout)
        check_probability("projection_dropout", projection_dropout)
        self.num_heads = num_heads
        self.reduction = per_axis(reduction, self.rank, "reduction")
        self.window_size = per_axis(window_size, self.rank, "window_size")
        self.border = border
        self.scale = scale
        self.attention_dropout = attention_dropout
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.patch = _CONVOLUTIONS[self.rank](dim, dim, self.reduction, self.reduction)
        self.patch_norm = nn.LayerNorm(dim)
        self.kv_coarse = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv_local = nn.Linear(dim, dim, bias=qkv_bias)
        self.lepe = ValuePosition(dim, self.rank)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout(projection_dropout)

    def forward(self, x: Tensor, return_significance: bool = False) -> Any:
        """(B, *grid, C) -> (B, *grid, C), and with `return_significance` also the map (B, *grid), without gradient."""
        self.check_input(x)
        query = rearrange(self.q(x), "... (h d) -> ... h d", h=self.num_heads)
        coarse_key, coarse_value = self._key_value(self.kv_coarse, self._patches(x))
        key, value = self._key_value(self.kv_local, x)
        heads = hybrid_scale_attention(
            query,
            coarse_key,
            coarse_value,
            key,
            value,
            self.window_size,
            scale=self.scale,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        y = self.proj_drop(self.proj(heads.flatten(-2) + self.lepe(x)))
        if not return_significance:
            return y
        patch = self.reduction if self.border == "pad" else None
        return y, significance_map(query, coarse_key, key, self.window_size, patch=patch, scale=self.scale)

    def _key_value(self, projection: nn.Linear, x: Tensor) -> tuple[Tensor, ...]:
        return split_heads(projection(x), 2, self.num_heads // 2)

    def _patches(self, x: Tensor) -> Tensor:
        x = pad_grid(x, [(0, self._padding(n, r)) for n, r in zip(x.shape[1:-1], self.reduction)])
        return F.gelu(self.patch_norm(self.patch(x.movedim(-1, 1)).movedim(1, -1)))

    def _padding(self, size: int, patch: int) -> int:
        short = isinstance(size, int) and size < patch
        return to_multiple(size, patch) if self.border == "pad" or short else 0

    def macs(self, grid: Sequence[int], with_significance: bool = False) -> int:
        """Multiply-accumulates for one sample; the significance map costs the logits of both scales once more."""
        coarse = prod((n + self._padding(n, r)) // r for n, r in zip(grid, self.reduction))
        window = [min(w, n) for w, n in zip(self.window_size, grid)]
        padded = prod(-(-n // w) * w for w, n in zip(window, grid))
        logits = self.dim * (prod(grid) * coarse + padded * prod(window)) // 2
        linears = self.dim**2 * (3 * prod(grid) + coarse * (1 + prod(self.reduction)))
        return linears + self.lepe.macs(grid) + logits * (3 if with_significance else 2)

    def memory(self, grid: Sequence[int], bytes_per_element: int = 4) -> int:
        """Input, output, query, key, value, and the logits of the windows."""
        window = prod(min(w, n) for w, n in zip(self.window_size, grid))
        return bytes_per_element * prod(grid) * (5 * self.dim + window * self.num_heads // 2)


class GuidedAttention(nn.Module):
    """Attention to tokens that are reallocated by significance: many for the most significant positions, few elsewhere.

    Keys and values come from `gridattn.ops.hybrid_scale.reallocate_tokens`: learned sums over groups of neighbours in
    rank, whose sizes depend on `reduction` (`GROUP_SIZES`). The official code makes the tokens twice, once with the
    map read row by row and once column by column; both give the same ranking unless values tie, so one is made.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        rank: number of grid axes.
        reduction: 2, 4 or 8: the larger, the fewer tokens.
        **options: `qkv_bias`, `scale`, `attention_dropout`, `projection_dropout` of `TokenAttention`.

    Raises:
        ValueError: another reduction.

    Source: SG-Former, arXiv 2308.12216.

    Example:
        >>> import torch
        >>> GuidedAttention(32, num_heads=4)(torch.randn(2, 14, 9, 32), significance=torch.rand(2, 14, 9)).shape
        torch.Size([2, 14, 9, 32])
    """

    def __init__(self, dim: int, num_heads: int = 4, *, rank: int = 2, reduction: int = 2, **options: Any) -> None:
        super().__init__()
        check_choice("reduction", reduction, tuple(sorted(GROUP_SIZES)))
        self.group_sizes = GROUP_SIZES[reduction]
        self.aggregate = nn.ModuleList(nn.Linear(size, 1) for size in self.group_sizes)
        self.attention = TokenAttention(dim, num_heads, rank=rank, **options)

    def forward(self, x: Tensor, significance: Tensor) -> Tensor:
        """(B, *grid, C) and (B, *grid) -> (B, *grid, C)."""
        sums = [cast(nn.Linear, layer) for layer in self.aggregate]
        weights, biases = [layer.weight.squeeze(0) for layer in sums], [layer.bias for layer in sums]
        tokens = reallocate_tokens(x.flatten(1, -2), significance.flatten(1), weights, biases)
        return self.attention(x, tokens)

    def macs(self, grid: Sequence[int]) -> int:
        """Multiply-accumulates for one sample on `grid`."""
        count = prod(grid)
        return self.attention.macs(grid, token_count(count, self.group_sizes)) + count * self.attention.dim

"""Dense attention to a coarser grid of keys and values (spatial reduction), as in pyramid vision transformers."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.common import GridAttention
from gridattn.layers.dropout import Dropout
from gridattn.ops.common import check_channels, check_probability, per_axis
from gridattn.ops.padding import pad_grid

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class SpatialReductionAttention(GridAttention):
    """Every position attends to patches: y = proj(softmax(s Q K^T) V), Q from x, K and V from LN(Conv(x)).

    The convolution has the reduction for kernel and stride. Positions that do not fill a last patch are left out; an
    axis shorter than a patch is padded with zeros.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid; only its length, the rank, is used.
        reduction: positions per key and axis, one int or one per axis.
        qkv_bias: bias in the query/key/value projection.
        scale: factor of the logits; head_dim ** -0.5 when None.
        attention_dropout: dropout probability of the attention weights.
        projection_dropout: dropout probability of the output.

    Raises:
        ValueError: `dim` not divisible by `num_heads`, a reduction below 1, a probability outside [0, 1).

    Source: Pyramid Vision Transformer, arXiv 2102.12122.

    Example:
        >>> import torch
        >>> SpatialReductionAttention(32, num_heads=4, reduction=4)(torch.randn(2, 9, 3, 32)).shape
        torch.Size([2, 9, 3, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        reduction: Any = 2,
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_channels(dim, num_heads)
        check_probability("attention_dropout", attention_dropout)
        check_probability("projection_dropout", projection_dropout)
        self.num_heads = num_heads
        self.reduction = per_axis(reduction, self.rank, "reduction")
        self.scale = scale
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.patch = _CONVOLUTIONS[self.rank](dim, dim, self.reduction, self.reduction)
        self.patch_norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout(projection_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        sizes = (self.dim, 2 * self.dim)
        weights = self.qkv.weight.split(sizes)
        biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split(sizes)
        query = rearrange(F.linear(x.flatten(1, -2), weights[0], biases[0]), "b n (h d) -> b h n d", h=self.num_heads)
        packed = F.linear(self._patches(x), weights[1], biases[1])
        key, value = rearrange(packed, "b m (two h d) -> two b h m d", two=2, h=self.num_heads).unbind(0)
        dropout = self.attention_dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(heads.transpose(1, 2).reshape(x.shape)))

    def _patches(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, patches, C)."""
        missing = [max(r - n, 0) if isinstance(n, int) else 0 for n, r in zip(x.shape[1:-1], self.reduction)]
        x = pad_grid(x, [(0, amount) for amount in missing]).movedim(-1, 1)
        return self.patch_norm(self.patch(x).flatten(2).mT)

    def macs(self, grid: Sequence[int]) -> int:
        n, m = prod(grid), prod(max(size // r, 1) for size, r in zip(grid, self.reduction))
        return self.dim**2 * (2 * n + 2 * m + m * prod(self.reduction)) + 2 * n * m * self.dim

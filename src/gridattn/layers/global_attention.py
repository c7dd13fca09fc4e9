"""Dense multi-head self-attention: every position sees every position. The yardstick for all others."""

from collections.abc import Sequence
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, split_heads, value_gradient_map
from gridattn.layers.dropout import Dropout
from gridattn.layers.linear import apply_linear
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels, check_probability


@register_attention(
    "global",
    summary="dense multi-head self-attention over the whole grid",
    source="arXiv 1706.03762",
    causal=True,
)
class GlobalAttention(GridAttention):
    """Dense multi-head self-attention, softmax(Q K^T / sqrt(d)) V, over all positions of a grid of rank 1 to 3.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid; only its length, the rank, is used.
        is_causal: a position sees itself and those before it in row-major order.
        qkv_bias: bias in the query/key/value projection.
        scale: factor of the logits; head_dim ** -0.5 when None.
        attention_dropout: dropout probability of the attention weights.
        projection_dropout: dropout probability of the output.

    Source: Vaswani et al., Attention Is All You Need, arXiv 1706.03762.

    Example:
        >>> import torch
        >>> GlobalAttention(32, num_heads=4)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    exact_map = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        is_causal: bool = False,
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
        self.is_causal = is_causal
        self.scale = scale
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout(projection_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        query, key, value = self._project(x)
        return self.proj_drop(apply_linear(self.proj, self._attend(query, key, value).flatten(-2)))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return split_heads(apply_linear(self.qkv, x), 3, self.num_heads)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens = [t.flatten(1, -3).transpose(1, 2) for t in (query, key, value)]  # (B, heads, N, head_dim)
        out = F.scaled_dot_product_attention(
            *tokens,
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=self.is_causal,
            scale=self.scale,
        )
        return out.transpose(1, 2).reshape(value.shape)

    def macs(self, grid: Sequence[int]) -> int:
        n = prod(grid)
        return n * 4 * self.dim**2 + 2 * n**2 * self.dim

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        position = self.check_query(x, query)
        q, k, v = self._project(x)
        return value_gradient_map(lambda value: self._attend(q, k, value), v, position)

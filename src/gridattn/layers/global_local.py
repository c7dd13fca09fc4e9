"""Global-local cross-attention: a few responsive positions attend to all, and the block that also pairs samples."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, value_gradient_map
from gridattn.layers.drop_path import DropPath
from gridattn.layers.global_attention import GlobalAttention
from gridattn.layers.mlp import Mlp
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels
from gridattn.ops.pairwise import pairwise_attention
from gridattn.ops.rollout import count_of, rollout_row, share_of, top_responses


@register_attention(
    "global_local",
    summary="the positions of largest response attend to all; the rest share the answer of their mean",
    source="arXiv 2205.02151",
)
class GlobalLocalAttention(GridAttention):
    """Global-local cross-attention (GLCA) on a grid, with a selection of its own.

    The mean of the queries stands for the class token. Its attention, averaged over heads, is the response of each
    position; the floor(ratio N) positions of largest response attend globally, as the class token does:

        out_i = W_o softmax(q_i K^T / sqrt(d)) V    where position i is selected
        out_i = W_o softmax(q_m K^T / sqrt(d)) V    q_m the mean query, elsewhere

    In DCAL the responses come from the rollout over the layers below and the unselected tokens leave the branch; that
    form is `DualCrossBlock` with `gridattn.ops.rollout`.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid; only its length, the rank, is used.
        ratio: part of the positions to select, in (0, 1]; the authors use 0.1 and 0.3. At least one is selected.
        qkv_bias: bias in the query/key/value projection.
        scale: factor of the logits; head_dim ** -0.5 when None.

    Source: Zhu et al., Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object
    Re-Identification, CVPR 2022, arXiv 2205.02151.

    Example:
        >>> GlobalLocalAttention(32, num_heads=4, ratio=0.3)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    exact_map = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        ratio: float = 0.1,
        qkv_bias: bool = True,
        scale: float | None = None,
    ) -> None:
        head_dim = check_channels(dim, num_heads)
        super().__init__(dim, rank=len(grid))
        self.num_heads, self.part = num_heads, share_of(ratio)
        self.scale = head_dim**-0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        grid = self.check_input(x)
        query, key, value = self._project(x)
        rows, selected = self._select(query, key)
        return self._spread(self.proj(self._attend(rows, key, value)), selected, grid)

    def selection(self, x: Tensor) -> Tensor:
        """Row-major indices (B, R) of the selected positions, falling by response."""
        self.check_input(x)
        query, key, _ = self._project(x)
        return self._select(query, key)[1]

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, *grid, C) -> three times (B, heads, N, head_dim)."""
        return rearrange(
            self.qkv(x.flatten(1, -2)), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        ).unbind(0)

    def _select(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """The queries that attend, (B, heads, 1 + R, head_dim), the mean first, and the R indices (B, R)."""
        mean = query.mean(2, keepdim=True)
        response = (mean @ key.transpose(-1, -2) * self.scale).detach().float().softmax(-1)
        selected = top_responses(response.mean(1).squeeze(1), self.part)
        index = selected[:, None, :, None].expand(-1, self.num_heads, -1, query.shape[-1])
        return torch.cat([mean, query.gather(2, index)], dim=2), selected

    def _attend(self, rows: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(rows, key, value, scale=self.scale)
        return rearrange(out, "b h r d -> b r (h d)")

    def _spread(self, rows: Tensor, selected: Tensor, grid: Sequence[int]) -> Tensor:
        """(B, 1 + R, C) -> (B, *grid, C): row 0 everywhere but at the selected positions."""
        index = selected.unsqueeze(-1).expand(-1, -1, rows.shape[-1])
        return rows[:, :1].expand(-1, prod(grid), -1).scatter(1, index, rows[:, 1:]).unflatten(1, tuple(grid))

    def macs(self, grid: Sequence[int]) -> int:
        n = prod(grid)
        rows = 1 + count_of(n, self.part)
        return n * 3 * self.dim**2 + n * self.dim * (1 + 2 * rows) + rows * self.dim**2

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        position = self.check_query(x, query)
        grid = x.shape[1:-1]
        q, k, v = self._project(x)
        rows, selected = self._select(q, k)

        def attend(value: Tensor) -> Tensor:
            flat = rearrange(value.flatten(1, -3), "b n h d -> b h n d")
            return self._spread(self._attend(rows, k, flat), selected, grid).unflatten(-1, (self.num_heads, -1))

        return value_gradient_map(attend, rearrange(v, "b h n d -> b n h d").unflatten(1, tuple(grid)), position)


class DualCrossBlock(nn.Module):
    """A pre-norm transformer block that serves all three branches of DCAL.

        block(x)                      self-attention:                x attends to x
        block(local, context=x)       global-local cross-attention:  the selected tokens attend to all tokens
        block(x, partner=x')          pair-wise cross-attention:     x attends to x and to its partner x'

    each followed by residual, norm, feed-forward and residual. Whatever is attended to passes the first norm too.
    Parameters are named as in timm's vision transformers.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        mlp_ratio: channels inside the feed-forward, as a multiple of `dim`.
        drop_path: probability of passing over a residual branch in training, drawn anew in every call.

    Source: Zhu et al., Dual Cross-Attention Learning, CVPR 2022, arXiv 2205.02151.

    Example:
        >>> block, x = DualCrossBlock(24, num_heads=3), torch.randn(2, 10, 24)
        >>> block(x[:, :4], context=x).shape, block(x, partner=x.flip(0)).shape
        (torch.Size([2, 4, 24]), torch.Size([2, 10, 24]))
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = GlobalAttention(dim, num_heads, grid=(1,))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, context: Tensor | None = None, partner: Tensor | None = None) -> Tensor:
        """One block.

        Args:
            x: (B, n, C), the tokens that attend and are returned.
            context: (B, m, C), attended to in place of `x`.
            partner: (B, m', C), attended to in addition, with one softmax over both.

        Returns:
            (B, n, C).
        """
        query, key, value = self._project(x) if context is None else (self._queries(x), *self._keys_values(context))
        if partner is None:
            query, key, value = (t.transpose(1, 2) for t in (query, key, value))
            out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        else:
            out = pairwise_attention(query, key, value, *self._keys_values(partner))
        x = x + self.drop_path(self.attn.proj(out.flatten(-2)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attention(self, x: Tensor) -> Tensor:
        """Self-attention weights (B, heads, n, n), what a rollout is made of."""
        query, key, _ = self._project(x)
        logits = torch.einsum("b i h d, b j h d -> b h i j", query, key) * query.shape[-1] ** -0.5
        return logits.softmax(-1)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self._heads(self.attn.qkv(self.norm1(x)), 3)

    def _queries(self, x: Tensor) -> Tensor:
        dim, qkv = x.shape[-1], self.attn.qkv
        return self._heads(F.linear(self.norm1(x), qkv.weight[:dim], qkv.bias[:dim]), 1)[0]

    def _keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        dim, qkv = x.shape[-1], self.attn.qkv
        return self._heads(F.linear(self.norm1(x), qkv.weight[dim:], qkv.bias[dim:]), 2)

    def _heads(self, tokens: Tensor, parts: int) -> tuple[Tensor, ...]:
        return rearrange(tokens, "b n (parts h d) -> parts b n h d", parts=parts, h=self.attn.num_heads).unbind(0)


def select_tokens(tokens: Tensor, attentions: Sequence[Tensor], ratio: float) -> tuple[Tensor, Tensor]:
    """The class token and the tokens to which the rollout of the layers below gives most of it.

    Args:
        tokens: (B, 1 + N, C), the class token first.
        attentions: (B, heads, 1 + N, 1 + N) of each layer below, first to last.
        ratio: part of the N tokens to select, in (0, 1].

    Returns:
        The tokens, (B, 1 + R, C), and their indices, (B, 1 + R); the class token first, the rest falling by response.

    Source: DCAL, arXiv 2205.02151.

    Example:
        >>> block, x = DualCrossBlock(24, num_heads=3), torch.randn(2, 11, 24)
        >>> local, index = select_tokens(block(x), [block.attention(x)], ratio=0.3)
        >>> local.shape, index[:, 0].tolist()
        (torch.Size([2, 4, 24]), [0, 0])
    """
    with torch.no_grad():
        patches = 1 + top_responses(rollout_row(attentions)[:, 1:], share_of(ratio))
    index = F.pad(patches, (1, 0))
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])), index

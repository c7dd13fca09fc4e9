"""Gated positional self-attention: attention that starts as a convolution and may become global."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, split_heads, value_gradient_map
from gridattn.layers.dropout import Dropout
from gridattn.layers.global_attention import GlobalAttention
from gridattn.layers.linear import apply_linear
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels, check_probability
from gridattn.ops.gated_positional import (
    attention_distance,
    attention_weights,
    gated_positional_attention,
    gated_positional_weights,
)


class Locality(NamedTuple):
    """Where the positional attention of each head looks.

    Attributes:
        gate: (heads,), the share of positional attention.
        centre: (heads, rank), offset from the query to the peak, last axis first: (x, y).
        span: (heads,), squared width of the peak.
        distance: (heads,), length of `centre`.
    """

    gate: Tensor
    centre: Tensor
    span: Tensor
    distance: Tensor


@register_attention(
    "gated_positional",
    summary="content attention and a learned positional attention, mixed by a gate per head",
    source="arXiv 2103.10697",
)
class GatedPositionalAttention(GridAttention):
    """Gated positional self-attention (GPSA), A = (1 - g) softmax(Q K^T / sqrt(d)) + g P, g = sigmoid(gating_param).

    P depends on positions only, P ~ exp(-strength * |k - q - centre|^2) at first, with the centres of the heads on a
    square: the heads begin as the taps of a convolution, and the value projection as the identity. Training can move
    and widen the peaks, and open the gate to content.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`. The largest square number (cube on three axes) of them is placed on taps.
        grid: the nominal grid; only its length, the rank, is used.
        qkv_bias: bias in the query, key and value projections.
        scale: factor of the content logits; head_dim ** -0.5 when None.
        local_init: place the heads; else all weights are random.
        locality_strength: how sharply a head looks at its tap at first.
        attention_dropout: dropout probability of the attention weights.
        projection_dropout: dropout probability of the output.

    Source: d'Ascoli et al., ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases,
    arXiv 2103.10697.

    Example:
        >>> import torch
        >>> GatedPositionalAttention(36, num_heads=9)(torch.randn(2, 7, 9, 36)).shape
        torch.Size([2, 7, 9, 36])
    """

    exact_map = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        qkv_bias: bool = False,
        scale: float | None = None,
        local_init: bool = True,
        locality_strength: float = 1.0,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_channels(dim, num_heads)
        check_probability("attention_dropout", attention_dropout)
        check_probability("projection_dropout", projection_dropout)
        self.num_heads = num_heads
        self.scale = scale
        self.local_init = local_init
        self.locality_strength = locality_strength
        self.attention_dropout = attention_dropout
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.pos_proj = nn.Linear(self.rank + 1, num_heads)
        self.gating_param = nn.Parameter(torch.ones(num_heads))
        self.proj_drop = Dropout(projection_dropout)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights with a standard deviation of 0.02, then places the heads where `local_init` asks for it."""
        for linear in (self.qk, self.v, self.proj, self.pos_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.ones_(self.gating_param)
        if self.local_init:
            nn.init.eye_(self.v.weight)
            taps = convolution_taps(self.num_heads, self.rank)
            self.pos_proj.weight[: len(taps), :-1] = 2 * taps
            self.pos_proj.weight[: len(taps), -1] = -1
            self.pos_proj.weight.mul_(self.locality_strength)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        query, key, value = self._project(x)
        dropout = self.attention_dropout if self.training else 0.0
        return self.proj_drop(apply_linear(self.proj, self._attend(query, key, value, dropout).flatten(-2)))

    def weights(self, x: Tensor) -> Tensor:
        """The attention of all queries to all keys, (B, heads, N, N), N positions in row-major order."""
        self.check_input(x)
        query, key, _ = self._project(x)
        return gated_positional_weights(query, key, self.pos_proj.weight, self.gating_param.sigmoid(), scale=self.scale)

    def locality(self) -> Locality:
        """Gates, and centres and spans of the positional attention, as they are now."""
        weight = self.pos_proj.weight.detach()
        span = -1 / weight[:, -1]
        centre = weight[:, :-1] * span.unsqueeze(-1) / 2
        return Locality(self.gating_param.detach().sigmoid(), centre, span, centre.norm(dim=-1))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key = split_heads(apply_linear(self.qk, x), 2, self.num_heads)
        return query, key, apply_linear(self.v, x).unflatten(-1, (self.num_heads, -1))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
        return gated_positional_attention(
            query,
            key,
            value,
            self.pos_proj.weight,
            self.gating_param.sigmoid(),
            position_bias=self.pos_proj.bias,
            scale=self.scale,
            dropout=dropout,
        )

    def macs(self, grid: Sequence[int]) -> int:
        n = prod(grid)
        return n * self.dim * (4 * self.dim + 2 * n + sum(grid))

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        position = self.check_query(x, query)
        q, k, v = self._project(x)
        return value_gradient_map(lambda value: self._attend(q, k, value), v, position)


def convolution_taps(num_heads: int, rank: int = 2) -> Tensor:
    """Offsets of the taps of a kernel, centred, last axis first; as many as the largest k ** rank <= num_heads.

    Even kernels have their taps between positions, at multiples of 1/2.

    Returns:
        (k ** rank, rank), the last coordinate varying fastest.

    Example:
        >>> convolution_taps(4).tolist()
        [[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]
    """
    width = 1
    while (width + 1) ** rank <= num_heads:
        width += 1
    along = torch.arange(width) - (width - 1) / 2
    return torch.cartesian_prod(*[along] * rank).view(-1, rank)


def attention_distances(layer: GatedPositionalAttention | GlobalAttention, x: Tensor) -> Tensor:
    """Non-locality of each head: mean distance in positions from a query to what it attends to, over the batch.

    Args:
        layer: a gated positional or a dense attention layer.
        x: (B, *grid, C), the layer's input.

    Returns:
        (heads,).

    Source: ConViT, arXiv 2103.10697, section 4.

    Example:
        >>> import torch
        >>> attention_distances(GatedPositionalAttention(8, num_heads=4), torch.randn(2, 5, 5, 8)).shape
        torch.Size([4])
    """
    return attention_distance(mean_attention(layer, x), layer.check_input(x))


def mean_attention(layer: GatedPositionalAttention | GlobalAttention, x: Tensor) -> Tensor:
    """Attention of all queries to all keys, averaged over the batch: (heads, N, N)."""
    if isinstance(layer, GatedPositionalAttention):
        return layer.weights(x).mean(0)
    query, key, _ = layer._project(x)
    return attention_weights(query, key, scale=layer.scale).mean(0)

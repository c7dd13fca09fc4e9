"""Attention among the channels of a grid, in groups."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, split_heads
from gridattn.layers.linear import apply_linear
from gridattn.layers.registry import register_attention
from gridattn.ops.channel_attention import channel_attention, channel_self_attention, channel_weights
from gridattn.ops.common import autocast_enabled, check_channels


@register_attention(
    "channel",
    summary="attention among channels: each channel is a token whose features are all positions",
    source="arXiv 2204.03645",
    linear_cost=True,
)
class ChannelAttention(GridAttention):
    """Channel-group attention, V softmax(scale * Q^T K)^T in every group of channels, then an output projection.

    Nothing in it knows where a position is: permuting the positions of the input permutes those of the output.

    Args:
        dim: channels C.
        num_heads: number of channel groups; must divide `dim`.
        grid: the nominal grid; only its length, the rank, is used.
        qkv_bias: bias in the query/key/value projection.
        dynamic_scale: scale the logits by N ** -0.5, N being the number of positions, instead of by
            (C / num_heads) ** -0.5, with which they grow as N does. The thirds of the projection are query, key, value
            with it and value, query, key without: the layouts of the published weights.

    Source: Ding et al., DaViT: Dual Attention Vision Transformers, arXiv 2204.03645.

    Example:
        >>> import torch
        >>> ChannelAttention(32, num_heads=4)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        qkv_bias: bool = True,
        dynamic_scale: bool = False,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        self.group_dim = check_channels(dim, num_heads)
        self.num_heads = num_heads
        self.dynamic_scale = dynamic_scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        scale = self._scale(self.check_input(x))
        if self._by_gram_matrix(x):
            return self._attend_by_gram_matrix(x, scale)
        query, key, value = self._project(x)
        return apply_linear(self.proj, channel_attention(query, key, value, scale=scale).flatten(-2))

    def weights(self, x: Tensor) -> Tensor:
        """The attention among channels, (B, groups, C / groups, C / groups); every row sums to one."""
        scale = self._scale(self.check_input(x))
        query, key, _ = self._project(x)
        return channel_weights(query, key, scale=scale)

    def _scale(self, grid: Sequence[int]) -> float:
        return prod(grid) ** -0.5 if self.dynamic_scale else self.group_dim**-0.5

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        thirds = split_heads(apply_linear(self.qkv, x), 3, self.num_heads)
        query, key, value = (0, 1, 2) if self.dynamic_scale else (1, 2, 0)
        return thirds[query], thirds[key], thirds[value]

    def _by_gram_matrix(self, x: Tensor) -> bool:
        """Whether to use the form that needs no projection at every position.

        A Gram matrix in half precision would lose digits, and a symbolic size cannot decide.
        """
        positions = prod(x.shape[1:-1])
        exact = x.dtype in (torch.float32, torch.float64) and not autocast_enabled(x.device.type)
        return exact and isinstance(positions, int) and self._gram_matrix_pays(positions)

    def _gram_matrix_pays(self, positions: int) -> bool:
        # Its products of C x C matrices, one set a sample, must be small beside those with all positions.
        return positions >= 3 * self.dim and positions * self.dim >= 2**16

    def _attend_by_gram_matrix(self, x: Tensor, scale: float) -> Tensor:
        weight, bias = self.qkv.weight, self.qkv.bias
        if not self.dynamic_scale:
            weight = weight.roll(-self.dim, 0)
            bias = None if bias is None else bias.roll(-self.dim, 0)
        return channel_self_attention(
            x, weight, bias, self.proj.weight, self.proj.bias, num_groups=self.num_heads, scale=scale
        )

    def macs(self, grid: Sequence[int]) -> int:
        positions, dim = prod(grid), self.dim
        if self._gram_matrix_pays(positions):
            folded = dim * (dim + 1) * (2 * dim + 1 + self.group_dim) + dim**2 * self.group_dim
            return 2 * positions * dim**2 + folded
        return positions * (4 * dim**2 + 2 * dim * self.group_dim)

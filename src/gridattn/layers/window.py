"""Attention inside windows: blocks of neighbours, shifted blocks, or positions spread evenly over the grid."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, split_heads, value_gradient_map
from gridattn.layers.dropout import Dropout
from gridattn.layers.linear import apply_linear
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels, check_choice, check_probability, per_axis
from gridattn.ops.neighborhood import neighborhood_attention
from gridattn.ops.partition import Layout, merge_windows, partition_windows, regroup_axes, window_mask
from gridattn.ops.relative_bias import crop_relative_bias, expand_relative_bias

KERNEL_TOKENS, KERNEL_TOKENS_TRAINED = 784, 6000
"""Tokens of a batch from which the CPU kernel of neighborhood attention is faster, without and with gradients."""


@register_attention(
    "window",
    summary="attention inside non-overlapping blocks of neighbours",
    source="arXiv 2103.14030",
    linear_cost=True,
    partition="block",
    shifted=False,
)
@register_attention(
    "shifted_window",
    summary="attention inside blocks that are shifted by half a block",
    source="arXiv 2103.14030",
    linear_cost=True,
    partition="block",
    shifted=True,
)
@register_attention(
    "dilated_grid",
    summary="attention among positions spread evenly over the grid, one lattice for every residue",
    source="arXiv 2204.01697",
    linear_cost=True,
    partition="grid",
    shifted=False,
)
class WindowAttention(GridAttention):
    """Multi-head attention inside windows of a fixed number of positions, softmax(Q K^T / sqrt(d) + B) V.

    B[q, k] is a learned entry per head and per offset k - q inside the window. A grid that the windows do not fill is
    padded at its end; padding is masked, so it never reaches a result. A window longer than an axis is cut to the axis.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid; only its length, the rank, is used.
        window_size: positions per window, one int or one per axis.
        partition: `"block"`, windows of neighbours, or `"grid"`, windows of positions spread evenly over the axis.
        shifted: blocks start half a block later; the cut-off pieces at both ends of an axis are windows of their own.
        bias: learned relative position bias.
        qkv_bias: bias in the query/key/value projection.
        scale: factor of the logits; head_dim ** -0.5 when None.
        attention_dropout: dropout probability of the attention weights.
        projection_dropout: dropout probability of the output.

    Raises:
        ValueError: `dim` not divisible by `num_heads`, an unknown partition, `shifted` with `"grid"`, a size below 1.

    Sources: Liu et al., Swin Transformer, arXiv 2103.14030 (blocks); Tu et al., MaxViT, arXiv 2204.01697 (grid).

    Example:
        >>> WindowAttention(32, num_heads=4, window_size=7, partition="grid")(torch.randn(2, 10, 9, 32)).shape
        torch.Size([2, 10, 9, 32])
    """

    exact_map = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        window_size: int | Sequence[int] = 7,
        partition: Layout = "block",
        shifted: bool = False,
        bias: bool = True,
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_channels(dim, num_heads)
        check_choice("partition", partition, ("block", "grid"))
        check_probability("attention_dropout", attention_dropout)
        check_probability("projection_dropout", projection_dropout)
        if shifted and partition == "grid":
            raise ValueError("shifted=True is not allowed with partition='grid'; only blocks can be shifted")
        self.num_heads = num_heads
        self.window_size = per_axis(window_size, self.rank, "window_size")
        self.partition: Layout = partition
        self.shifted = shifted
        self.scale = scale
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.relative_position_bias = (
            nn.Parameter(
                nn.init.trunc_normal_(torch.empty(num_heads, *(2 * w - 1 for w in self.window_size)), std=0.02)
            )
            if bias
            else None
        )
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout(projection_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        grid = self.check_input(x)
        window, shift = self._clip(grid)
        if self._fits_kernel(x, window, shift):
            return self.proj_drop(self._forward_by_kernel(x, window))
        # Windows are cut before the projection: one cut instead of three.
        windows = partition_windows(x, window, self.partition, shift)
        heads = (self.num_heads, self.dim // self.num_heads)
        stacked = apply_linear(self.qkv, windows).view(x.shape[0] * windows.shape[1], prod(window), 3, *heads)
        query, key, value = stacked.permute(2, 0, 3, 1, 4).unbind(0)
        out = self._attend_windows(query, key, value, grid, window, shift)
        out = out.transpose(1, 2).view(*windows.shape[:-1], *heads)
        return self.proj_drop(
            apply_linear(self.proj, merge_windows(out, window, grid, self.partition, shift).reshape(x.shape))
        )

    def _fits_kernel(self, x: Tensor, window: Sequence[int], shift: Sequence[int]) -> bool:
        """Whether the CPU kernel of neighborhood attention can take the windows, and is the faster way."""
        return (
            x.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and x.shape[:-1].numel() >= (KERNEL_TOKENS_TRAINED if torch.is_grad_enabled() else KERNEL_TOKENS)
            and not any(shift)
            and all(w > 1 and size % w == 0 for size, w in zip(x.shape[1:-1], window))
            and not (self.training and self.attention_dropout)
        )

    def _forward_by_kernel(self, x: Tensor, window: Sequence[int]) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C): blocks are neighborhoods that as many queries share as they have keys."""
        if self.partition == "grid":
            x = regroup_axes(x, window)
        query, key, value = split_heads(apply_linear(self.qkv, x), 3, self.num_heads)
        table = self.bias_table()
        bias = None if table is None else crop_relative_bias(table, window)
        out = neighborhood_attention(query, key, value, window, stride=window, scale=self.scale, bias=bias)
        out = apply_linear(self.proj, out.reshape(x.shape))
        return out if self.partition == "block" else regroup_axes(out, [n // w for n, w in zip(x.shape[1:], window)])

    def _attend_windows(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: Sequence[int],
        window: Sequence[int],
        shift: Sequence[int],
    ) -> Tensor:
        """Query, key and value, (B * windows, heads, positions, head_dim) each -> the same."""
        bias = self._logit_bias(grid, window, shift, query)
        dropout = self.attention_dropout if self.training else 0.0
        if bias is None or not bias.requires_grad or query.device.type != "cpu" or torch.compiler.is_compiling():
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=bias, dropout_p=dropout, scale=self.scale
            )
        # No fused kernel of the CPU gives a gradient of the bias. PyTorch would take these steps and, between them,
        # look for rows that see nothing; there are none.
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        weights = (scale * query @ key.mT).add_(bias).softmax(-1)
        return (F.dropout(weights, dropout) if dropout else weights) @ value

    def _clip(self, grid: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        # A symbolic size, met while a graph with dynamic sizes is exported, keeps the whole window: padding is masked.
        window = tuple(min(w, size) if isinstance(size, int) else w for w, size in zip(self.window_size, grid))
        shift = tuple(w // 2 if self.shifted and w < size else 0 for w, size in zip(window, grid))
        return window, shift

    def _logit_bias(self, grid: Sequence[int], window: Sequence[int], shift: Sequence[int], q: Tensor) -> Tensor | None:
        """What is added to the logits of q (B * windows, heads, q, d); the visible keys where nothing is added."""
        visible = window_mask(grid, window, self.partition, shift, q.device)
        bias = None
        table = self.bias_table()
        if table is not None:
            bias = expand_relative_bias(crop_relative_bias(table, window), window).unsqueeze(0).to(q.dtype)
        if visible is None:
            return bias
        visible = rearrange(visible, "n q k -> n 1 q k")
        masked = visible if bias is None else bias.masked_fill(~visible, -torch.inf)
        samples = q.shape[0] // visible.shape[0]
        if samples == 1 and not torch.compiler.is_compiling():
            return masked  # repeating once would copy
        return masked.repeat(samples, 1, 1, 1)

    def bias_table(self) -> Tensor | None:
        """Relative position biases (heads, 2 * window_size - 1 per axis); None where there are none."""
        return self.relative_position_bias

    def macs(self, grid: Sequence[int]) -> int:
        window, _ = self._clip(grid)
        padded = prod(-(-size // w) * w for size, w in zip(grid, window))
        return (prod(grid) + 3 * padded) * self.dim**2 + 2 * padded * prod(window) * self.dim

    def memory(self, grid: Sequence[int], bytes_per_element: int = 4) -> int:
        """Input, output, query, key, value, and the logits of all windows with their bias."""
        window, _ = self._clip(grid)
        padded = prod(-(-size // w) * w for size, w in zip(grid, window))
        return bytes_per_element * padded * (5 * self.dim + 2 * prod(window) * self.num_heads)

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        position = self.check_query(x, query)
        grid = self.check_input(x)
        window, shift = self._clip(grid)
        projected = split_heads(apply_linear(self.qkv, x), 3, self.num_heads)

        def cut(t: Tensor) -> Tensor:
            return partition_windows(t, window, self.partition, shift).flatten(0, 1).transpose(1, 2)

        q, k = map(cut, projected[:2])

        def attend(value: Tensor) -> Tensor:
            out = self._attend_windows(q, k, cut(value), grid, window, shift).transpose(1, 2)
            return merge_windows(out.unflatten(0, (x.shape[0], -1)), window, grid, self.partition, shift)

        return value_gradient_map(attend, projected[2], position)

"""Multi-head self-attention convolution (MSA-Conv) with cyclic shifts, and the released layer around it."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, split_heads, value_gradient_map
from gridattn.layers.dropout import Dropout
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels, check_choice, check_probability, per_axis
from gridattn.ops.msa_conv import BACKENDS, BORDERS, msa_conv, msa_conv_macs, window_reach

PROJECTIONS = ("pointwise", "conv")
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@register_attention(
    "msa_conv",
    summary="softmax attention over a sliding window with zeros beyond the border (MSA-Conv)",
    source="arXiv 2310.04134",
    linear_cost=True,
)
class MSAConv(GridAttention):
    """Multi-head self-attention convolution: every position attends to the window around it.

    One head is the standard form, `num_heads=dim` the depth-wise one, a dilation above 1 the dilated one. Weights
    depend on content alone; with a pointwise projection the layer is blind to direction apart from the border. A cyclic
    shift rolls the grid before and back after, which makes positions on opposite borders neighbours.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid; only its length, the rank, is used.
        kernel_size: window size, one int or one per axis.
        dilation: one int or one per axis; dilation * (kernel_size - 1) must be even.
        shift: positions to roll, one int per axis, positive towards larger indices; None for no shift. See
            `gridattn.ops.msa_conv.multi_directional_shift`.
        border: "zero" keeps positions outside the grid in the softmax with logit and value 0 (official), "mask" does
            not.
        projection: "pointwise", or "conv" for a dense convolution of the window's size.
        qkv_bias: bias in the query/key/value projection.
        scale: factor of the logits; head_dim ** -0.5 when None.
        attention_dropout: dropout probability of the attention weights.
        projection_dropout: dropout probability of the output.
        backend: see `gridattn.ops.msa_conv.msa_conv`.

    Raises:
        ValueError: a window without a centre, a shift for another rank, an unknown border, projection or backend.

    Source: TiC: Exploring Vision Transformer in Convolution, arXiv 2310.04134.

    Example:
        >>> import torch
        >>> MSAConv(32, num_heads=4, kernel_size=5, shift=(2, -2))(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    exact_map = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        kernel_size: Any = 3,
        dilation: Any = 1,
        shift: Sequence[int] | None = None,
        border: str = "zero",
        projection: str = "pointwise",
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_channels(dim, num_heads)
        check_choice("border", border, BORDERS)
        check_choice("projection", projection, PROJECTIONS)
        check_choice("backend", backend, BACKENDS)
        check_probability("attention_dropout", attention_dropout)
        check_probability("projection_dropout", projection_dropout)
        window_reach(kernel_size, dilation, self.rank)
        if shift is not None and (len(shift) != self.rank or any(not isinstance(s, int) for s in shift)):
            raise ValueError(f"shift={shift!r} is not allowed; {self.rank} ints are, one per axis")
        self.num_heads = num_heads
        self.kernel_size = per_axis(kernel_size, self.rank, "kernel_size")
        self.dilation = per_axis(dilation, self.rank, "dilation")
        self.shift = (0,) * self.rank if shift is None else tuple(shift)
        self.border = border
        self.scale = scale
        self.attention_dropout = attention_dropout
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        if projection == "conv":
            self.proj = _GridConv(dim, dim, self.kernel_size)
        else:
            self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout(projection_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        query, key, value = self._project(self._roll(x))
        out = self.proj(self._attend(query, key, value).flatten(-2))
        return self._roll_back(self.proj_drop(out))

    def _roll(self, x: Tensor) -> Tensor:
        return x.roll(self.shift, tuple(range(1, self.rank + 1))) if any(self.shift) else x

    def _roll_back(self, x: Tensor) -> Tensor:
        return x.roll([-s for s in self.shift], tuple(range(1, self.rank + 1))) if any(self.shift) else x

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return split_heads(self.qkv(x), 3, self.num_heads)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return msa_conv(
            query,
            key,
            value,
            self.kernel_size,
            self.dilation,
            scale=self.scale,
            border=self.border,
            dropout=self.attention_dropout if self.training else 0.0,
            backend=self.backend,
        )

    def macs(self, grid: Sequence[int]) -> int:
        taps = prod(self.kernel_size) if isinstance(self.proj, _GridConv) else 1
        projections = prod(grid) * self.dim**2 * (3 + taps)
        return projections + msa_conv_macs(
            self.dim, grid, self.kernel_size, self.dilation, border=self.border, backend=self.backend
        )

    def memory(self, grid: Sequence[int], bytes_per_element: int = 4) -> int:
        weights = 2 * self.num_heads * prod(self.kernel_size)
        return prod(grid) * (5 * self.dim + weights) * bytes_per_element

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        position = self.check_query(x, query)
        rolled = tuple((p + s) % size for p, s, size in zip(position, self.shift, x.shape[1:-1]))
        q, k, v = self._project(self._roll(x))
        weights = value_gradient_map(lambda value: self._attend(q, k, value), v, rolled)
        return self._roll_back(weights.flatten(0, 1)).view_as(weights)


class MSAConvLayer(nn.Module):
    """The released layer: y = ReLU(conv(attention(x) + x)), with a dense convolution that may change width and stride.

    Args:
        dim: input channels C.
        out_dim: output channels.
        grid: the nominal grid; only its length, the rank, is used.
        kernel_size: of the attention window and of the convolution, one int or one per axis.
        stride: of the convolution, one int or one per axis; the attention is always dense.
        dilation: of the attention, one int or one per axis.
        padding: of the convolution, one int or one per axis; kernel_size // 2 when None (the released default is 1).
        bias: bias in the convolution.
        attention_dropout: dropout probability of the attention weights.

    Source: TiC: Exploring Vision Transformer in Convolution, arXiv 2310.04134.

    Example:
        >>> import torch
        >>> MSAConvLayer(32, 48, stride=2)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 4, 5, 48])
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        grid: Sequence[int] = (14, 14),
        kernel_size: Any = 3,
        stride: Any = 1,
        dilation: Any = 1,
        padding: Any = None,
        bias: bool = False,
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_channels(dim, 1)
        check_probability("attention_dropout", attention_dropout)
        rank = len(grid)
        window_reach(kernel_size, dilation, rank)
        self.kernel_size = per_axis(kernel_size, rank, "kernel_size")
        self.dilation = per_axis(dilation, rank, "dilation")
        self.attention_dropout = attention_dropout
        if padding is None:
            padding = tuple(size // 2 for size in self.kernel_size)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.conv = _CONVOLUTIONS[rank](
            dim,
            out_dim,
            self.kernel_size,
            per_axis(stride, rank, "stride"),
            per_axis(padding, rank, "padding", minimum=0),
            bias=bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid after the stride, out_dim)."""
        query, key, value = rearrange(self.qkv(x), "... (three c) -> three ... 1 c", three=3)
        dropout = self.attention_dropout if self.training else 0.0
        attended = msa_conv(query, key, value, self.kernel_size, self.dilation, dropout=dropout).squeeze(-2)
        return self.conv((attended + x).movedim(-1, 1)).movedim(1, -1).relu()


class _GridConv(nn.Module):
    """Dense convolution of a channels-last grid that keeps its size."""

    def __init__(self, dim: int, out_dim: int, kernel_size: Sequence[int]) -> None:
        super().__init__()
        self.conv = _CONVOLUTIONS[len(kernel_size)](dim, out_dim, tuple(kernel_size), padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.movedim(-1, 1)).movedim(1, -1)


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns the weights of an official `MSA_Conv_2d` into those of `MSAConvLayer`."""
    names = {"qkv_conv.weight": "qkv.weight", "qkv_conv.bias": "qkv.bias"}
    return {
        names.get(key, key.replace("mlp.", "conv.")): value.flatten(1) if key == "qkv_conv.weight" else value
        for key, value in state.items()
    }

"""Agent attention inside windows, and attention of either kind inside two sets of crossing stripes."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.agent import AgentMixer, convert_official_mixer
from gridattn.layers.common import GridAttention, split_heads, value_gradient_map
from gridattn.layers.dropout import Dropout
from gridattn.layers.large_kernel import DepthwiseConv
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels, check_probability, per_axis
from gridattn.ops.partition import merge_windows, partition_windows


class SoftmaxMixer(nn.Module):
    """Dense attention plus a depth-wise convolution of the values (locally enhanced position encoding).

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        kernel_size: of the convolution, per axis.
        scale: factor of the logits; head_dim ** -0.5 when None.
        attention_dropout: dropout probability of the attention weights.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Sequence[int],
        scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_channels(dim, num_heads)
        check_probability("attention_dropout", attention_dropout)
        self.scale = scale
        self.attention_dropout = attention_dropout
        self.dwc = DepthwiseConv(dim, kernel_size)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None) -> Tensor:
        """Three times (B, *grid, heads, d) -> (B, *grid, C); `real` (B, *grid) tells positions from padding."""
        return self.attend(query, key, value, real).flatten(-2) + self.dwc(value.flatten(-2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None) -> Tensor:
        """The attention alone, (B, *grid, heads, d)."""
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if real is None else real.flatten(1)[:, None, None],
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scale,
        )
        return out.transpose(1, 2).reshape(query.shape)

    def macs(self, grid: Sequence[int]) -> int:
        """Multiply-accumulates for one sample on `grid`."""
        return 2 * prod(grid) ** 2 * self.dwc.weight.shape[0] + self.dwc.macs(grid)


def mix_in_windows(
    mix: Any, query: Tensor, key: Tensor, value: Tensor, window: Sequence[int], shift: Sequence[int] | None = None
) -> Tensor:
    """Applies a mixer to every window of a grid as if it were a sample of its own.

    Args:
        mix: (query, key, value, real) -> (windows, *window, *features).
        query: (B, *grid, heads, d), as are `key` and `value`.
        window: positions per window and axis. A grid that they do not fill is padded with zeros, and `real` says so.
        shift: rolls the grid by so many positions towards its start before the cut, and back after.

    Returns:
        (B, *grid, *features).
    """
    batch, grid = query.shape[0], query.shape[1:-2]
    windows = [partition_windows(t, window, shift=shift) for t in (query, key, value)]
    count = windows[0].shape[1]
    real = None
    if not all(isinstance(n, int) and n % w == 0 for n, w in zip(grid, window)):
        real = partition_windows(query.new_ones((1, *grid), dtype=torch.bool), window, shift=shift)[0]
        real = real.repeat(batch, 1).unflatten(1, tuple(window))
    out = mix(*(t.flatten(0, 1).unflatten(1, tuple(window)) for t in windows), real)
    out = out.flatten(1, len(window))
    return merge_windows(out.reshape(batch, count, *out.shape[1:]), window, grid, shift=shift)


@register_attention(
    "agent_window",
    summary="agent attention inside non-overlapping blocks of neighbours",
    source="arXiv 2312.08874",
    linear_cost=True,
    shifted=False,
)
@register_attention(
    "agent_shifted_window",
    summary="agent attention inside blocks that are rolled by half a block, around the border of the grid",
    source="arXiv 2312.08874",
    linear_cost=True,
    shifted=True,
)
class AgentWindowAttention(GridAttention):
    """Agent attention inside windows: agents, biases and the depth-wise convolution all belong to one window.

    The roll of shifted windows is cyclic and, as in the official layer, not masked: positions of opposite borders meet
    in the last windows. Padding is masked: it is no key, and no agent is pooled from it. A window longer than an axis
    is cut to it and not shifted along it.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid; windows longer than it are stored cut.
        window_size: positions per window, one int or one per axis.
        shifted: rolls the grid by half a window.
        agent_size: agents per window and axis, one int or one per axis.
        kernel_size: of the depth-wise convolution, one int or one per axis.
        qkv_bias: bias in the query/key/value projection.
        scale: factor of both products; head_dim ** -0.5 when None.
        attention_dropout: dropout probability of the aggregating weights.
        projection_dropout: dropout probability of the output.

    Source: the Swin form of Agent Attention, arXiv 2312.08874.

    Example:
        >>> AgentWindowAttention(32, num_heads=4, window_size=7, agent_size=3)(torch.randn(2, 10, 9, 32)).shape
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
        shifted: bool = False,
        agent_size: int | Sequence[int] = 3,
        kernel_size: int | Sequence[int] = 3,
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_channels(dim, num_heads)
        check_probability("projection_dropout", projection_dropout)
        self.num_heads = num_heads
        self.window_size = per_axis(window_size, self.rank, "window_size")
        self.shifted = shifted
        self.mixer = AgentMixer(
            dim,
            num_heads,
            self._clip(grid)[0],
            agent_size,
            kernel_size=kernel_size,
            scale=scale,
            attention_dropout=attention_dropout,
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout(projection_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        window, shift = self._clip(self.check_input(x))
        query, key, value = self._project(x)
        return self.proj_drop(self.proj(mix_in_windows(self.mixer, query, key, value, window, shift)))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return split_heads(self.qkv(x), 3, self.num_heads)

    def _clip(self, grid: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        # A symbolic size, met while a graph with dynamic sizes is exported, keeps the whole window: the graph refuses
        # smaller grids, whose windows are cut and so have other agents.
        for w, size in zip(self.window_size, grid):
            if not isinstance(size, int):
                torch._check(size >= w)
        window = tuple(min(w, size) if isinstance(size, int) else w for w, size in zip(self.window_size, grid))
        shift = tuple(w // 2 if self.shifted and w < size else 0 for w, size in zip(window, grid))
        return window, shift

    def macs(self, grid: Sequence[int]) -> int:
        window, _ = self._clip(grid)
        count = prod(-(-size // w) for size, w in zip(grid, window))
        return prod(grid) * 4 * self.dim**2 + count * self.mixer.macs(window)

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """Row `query` of the product of both feature maps of its window; the convolution is not in it."""
        position = self.check_query(x, query)
        window, shift = self._clip(x.shape[1:-1])
        q, k, v = self._project(x)
        return value_gradient_map(
            lambda value: mix_in_windows(self.mixer.attend, q, k, value, window, shift), v, position
        )


@register_attention(
    "cross_window",
    summary="half of the heads attend inside vertical stripes, half inside horizontal ones",
    source="arXiv 2107.00652",
    ranks=(2,),
    agent_size=None,
)
@register_attention(
    "agent_cross_window",
    summary="half of the heads use agents inside vertical stripes, half inside horizontal ones",
    source="arXiv 2312.08874",
    ranks=(2,),
    linear_cost=True,
    agent_size=3,
)
class CrossWindowAttention(GridAttention):
    """Attention inside a cross of two stripes: y = proj(concat(vertical stripes, horizontal stripes)).

    The first half of the heads (and channels) sees stripes of full height and `window_size` columns, the second half
    stripes of `window_size` rows and full width. Inside a stripe either agents mix, with biases, or softmax attention
    does; both add a depth-wise convolution of the values. Where stripes are as long as both axes of the nominal grid,
    all heads see the whole grid in one branch.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`, and be even unless the stripes fill the grid.
        grid: the nominal grid, for which the biases of agents are stored.
        window_size: columns or rows of a stripe; None for the whole grid.
        agent_size: agents per stripe and axis, one int or one per axis; None for softmax attention without a bias.
        kernel_size: of the depth-wise convolution, one int or one per axis.
        qkv_bias: bias in the query/key/value projection.
        scale: factor of the products; head_dim ** -0.5 when None.
        attention_dropout: dropout probability of the weights.
        projection_dropout: dropout probability of the output.

    Raises:
        ValueError: an odd number of heads for two branches, a size below 1.

    Sources: CSWin Transformer, arXiv 2107.00652; its form in Agent Attention, arXiv 2312.08874.

    Example:
        >>> CrossWindowAttention(32, num_heads=4, window_size=4, agent_size=3)(torch.randn(2, 14, 9, 32)).shape
        torch.Size([2, 14, 9, 32])
    """

    exact_map = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        window_size: int | None = 7,
        agent_size: int | Sequence[int] | None = None,
        kernel_size: int | Sequence[int] = 3,
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_channels(dim, num_heads)
        check_probability("projection_dropout", projection_dropout)
        per_axis(max(grid) if window_size is None else window_size, self.rank, "window_size")
        self.num_heads = num_heads
        self.window_size = None if window_size is None or window_size >= max(grid) else window_size
        count = 1 if self.window_size is None else 2
        if num_heads % count:
            raise ValueError(f"num_heads={num_heads} is not allowed; two sets of stripes need an even number")
        kernel = per_axis(kernel_size, self.rank, "kernel_size")
        shared: dict[str, Any] = {"kernel_size": kernel, "scale": scale, "attention_dropout": attention_dropout}
        self.branches = nn.ModuleList(
            SoftmaxMixer(dim // count, num_heads // count, **shared)
            if agent_size is None
            else AgentMixer(dim // count, num_heads // count, self._stripe(branch, grid), agent_size, **shared)
            for branch in range(count)
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout(projection_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        mixed = [
            mix_in_windows(mixer, q, k, v, self._stripe(branch, x.shape[1:-1]))
            for branch, (mixer, q, k, v) in enumerate(zip(self.branches, *self._project(x)))
        ]
        return self.proj_drop(self.proj(torch.cat(mixed, -1)))

    def _project(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        """Queries, keys and values, each split into the heads of the branches."""
        return [t.chunk(len(self.branches), -2) for t in split_heads(self.qkv(x), 3, self.num_heads)]

    def _stripe(self, branch: int, grid: Sequence[int]) -> tuple[int, ...]:
        width = self.window_size
        return tuple(
            n if width is None or axis == branch else min(width, n) if isinstance(n, int) else width
            for axis, n in enumerate(grid)
        )

    def macs(self, grid: Sequence[int]) -> int:
        total = prod(grid) * 4 * self.dim**2
        for branch, mixer in enumerate(self.branches):
            stripe = self._stripe(branch, grid)
            count = prod(-(-size // w) for size, w in zip(grid, stripe))
            total += count * mixer.macs(stripe)  # pyright: ignore[reportCallIssue]
        return total

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """Weights of the query in its two stripes, head by head; the convolution is not in them."""
        position = self.check_query(x, query)
        queries, keys, values = self._project(x)

        def attend(value: Tensor) -> Tensor:
            parts = zip(self.branches, queries, keys, value.chunk(len(self.branches), -2))
            return torch.cat(
                [
                    mix_in_windows(mixer.attend, q, k, v, self._stripe(branch, x.shape[1:-1]))
                    for branch, (mixer, q, k, v) in enumerate(parts)
                ],
                -2,
            )

        return value_gradient_map(attend, torch.cat(values, -2), position)


def convert_official_cross_window(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official weights of the attention of one CSWin block (`qkv`, `proj`, `attns.*`) -> the names of our layer.

    Example:
        >>> list(convert_official_cross_window({"attns.1.get_v.bias": torch.ones(4)}))
        ['branches.1.dwc.bias']
    """
    ours = {name: tensor for name, tensor in state.items() if not name.startswith("attns.")}
    for branch in range(2):
        prefix = f"attns.{branch}."
        mixer = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        ours |= {f"branches.{branch}.{name}": t for name, t in convert_official_mixer(mixer).items()}
    return ours

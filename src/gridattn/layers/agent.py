"""Agent attention over a whole grid: plain, with a class token, and with reduced keys (arXiv 2312.08874)."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, gradient_map, value_gradient_map
from gridattn.layers.large_kernel import DepthwiseConv
from gridattn.layers.registry import register_attention
from gridattn.ops.agent import agent_attention, agent_bias, pool_agents, pool_real_agents
from gridattn.ops.common import check_channels, check_probability, per_axis

BLOCK_SIZE = 7
"""Length of an axis of the stored block of a bias, whatever the grid."""

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class AgentBias(nn.Module):
    """Learned bias of every agent at every position: a stretched block plus a line along each axis.

    Args:
        num_heads: heads.
        grid: positions per axis that the lines are stored for; others are interpolated.
        agent_size: agents per axis.
    """

    def __init__(self, num_heads: int, grid: Sequence[int], agent_size: Sequence[int]) -> None:
        super().__init__()
        self.agent_size = tuple(agent_size)
        count = prod(agent_size)

        def table(*size: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, count, *size), std=0.02))

        self.block = table(*[BLOCK_SIZE] * len(grid))
        self.axes = nn.ParameterList(table(size) for size in grid)

    def forward(self, grid: Sequence[int], agents: Sequence[int]) -> Tensor:
        """(heads, prod(agents), prod(grid))."""
        return agent_bias(self.block, list(self.axes), grid, self.agent_size, agents)


class AgentMixer(nn.Module):
    """What all forms share: agents pooled from the queries, both biases, and a depth-wise convolution of the values.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: nominal grid of the queries.
        agent_size: agents per axis.
        dense_agent_size: agents per axis at run time where they differ from those trained; biases are interpolated.
        key_grid: nominal grid of the keys; `grid` when None.
        kernel_size: of the convolution, one int or one per axis.
        scale: factor of both products; head_dim ** -0.5 when None.
        attention_dropout: dropout probability of the aggregating weights.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Sequence[int],
        agent_size: Any,
        *,
        dense_agent_size: Any = None,
        key_grid: Sequence[int] | None = None,
        kernel_size: Any = 3,
        scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_channels(dim, num_heads)
        check_probability("attention_dropout", attention_dropout)
        rank = len(grid)
        trained = per_axis(agent_size, rank, "agent_size")
        dense = agent_size if dense_agent_size is None else dense_agent_size
        self.agents = per_axis(dense, rank, "dense_agent_size")
        self.num_heads = num_heads
        self.scale = scale
        self.attention_dropout = attention_dropout
        self.aggregate_bias = AgentBias(num_heads, grid if key_grid is None else key_grid, trained)
        self.broadcast_bias = AgentBias(num_heads, grid, trained)
        self.dwc = DepthwiseConv(dim, per_axis(kernel_size, rank, "kernel_size"))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None) -> Tensor:
        """Attention and the convolution of the values: three times (B, *grid, heads, d) -> (B, *grid, C).

        `real` (B, *grid) tells positions from padding, whose values are zero.
        """
        return self.attend(query, key, value, real).flatten(-2) + self.dwc(value.flatten(-2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None) -> Tensor:
        """The attention alone, (B, *grid, heads, d); keys and values may lie on another grid."""
        aggregate = self.aggregate_bias(key.shape[1:-2], self.agents)
        broadcast = self.broadcast_bias(query.shape[1:-2], self.agents).mT
        if real is None:
            agents = pool_agents(query, self.agents)
        else:
            agents, alive = pool_real_agents(query, self.agents, real)
            aggregate = aggregate.masked_fill(~real.flatten(1)[:, None, None], -torch.inf)
            broadcast = broadcast.masked_fill(~alive[:, None, None], -torch.inf)
        return self.mix(query, key, value, agents, aggregate, broadcast)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, agents: Tensor, *biases: Tensor) -> Tensor:
        """Agent attention with this mixer's scale and dropout; `biases` are the aggregating and the broadcasting one."""
        return agent_attention(
            query,
            key,
            value,
            agents,
            aggregate_bias=biases[0],
            broadcast_bias=biases[1],
            scale=self.scale,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )

    def macs(self, grid: Sequence[int], key_count: int | None = None) -> int:
        """Multiply-accumulates for one sample on `grid`; as many keys as positions unless given."""
        keys = prod(grid) if key_count is None else key_count
        products = 2 * prod(self.agents) * (prod(grid) + keys) * self.dwc.weight.shape[0]
        return products + self.dwc.macs(grid)


@register_attention(
    "agent",
    summary="agents pooled from the queries gather from all positions and hand out to all positions",
    source="arXiv 2312.08874",
    linear_cost=True,
)
class AgentAttention(GridAttention):
    """Agent attention: y = proj(softmax(s Q A^T + B2) softmax(s A K^T + B1) V + DWConv(V)), A = pooled Q.

    Cost and memory grow linearly with the grid. On other grids than the nominal one the biases are interpolated, which
    is the form that the authors use for detection and segmentation.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid, for which the biases are stored.
        agent_size: agents per axis, one int or one per axis.
        dense_agent_size: agents per axis at run time where they differ from those trained; None for the same.
        kernel_size: of the depth-wise convolution, one int or one per axis.
        qkv_bias: bias in the query/key/value projection.
        scale: factor of both products; head_dim ** -0.5 when None.
        attention_dropout: dropout probability of the aggregating weights.
        projection_dropout: dropout probability of the output.

    Source: Agent Attention: On the Integration of Softmax and Linear Attention, arXiv 2312.08874.

    Example:
        >>> AgentAttention(32, num_heads=4, agent_size=(3, 4))(torch.randn(2, 10, 9, 32)).shape
        torch.Size([2, 10, 9, 32])
    """

    exact_map = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        agent_size: int | Sequence[int] = 7,
        dense_agent_size: int | Sequence[int] | None = None,
        kernel_size: int | Sequence[int] = 3,
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_probability("projection_dropout", projection_dropout)
        self.num_heads = num_heads
        self.mixer = AgentMixer(
            dim,
            num_heads,
            grid,
            agent_size,
            dense_agent_size=dense_agent_size,
            key_grid=self._key_grid(grid),
            kernel_size=kernel_size,
            scale=scale,
            attention_dropout=attention_dropout,
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(projection_dropout)

    def _key_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return tuple(grid)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        return self.proj_drop(self.proj(self.mixer(*self._project(x))))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return rearrange(self.qkv(x), "... (three h d) -> three ... h d", three=3, h=self.num_heads).unbind(0)

    def macs(self, grid: Sequence[int]) -> int:
        return prod(grid) * 4 * self.dim**2 + self.mixer.macs(grid)

    def memory(self, grid: Sequence[int], bytes_per_element: int = 4) -> int:
        """Input, output, query, key, value, and the logits of both products with their biases."""
        weights = 4 * prod(self.mixer.agents) * self.num_heads
        return bytes_per_element * prod(grid) * (5 * self.dim + weights)

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """Row `query` of the product of both feature maps; the convolution of the values is not in it."""
        position = self.check_query(x, query)
        q, k, v = self._project(x)
        return value_gradient_map(lambda value: self.mixer.attend(q, k, value), v, position)


class ClassTokenAgentAttention(AgentAttention):
    """Agent attention over a grid and one class token, as in a plain vision transformer.

    Agents are pooled from the positions of the grid alone. The class token is one more key and query, with a bias of
    its own per agent; the convolution does not see it. Without a token the layer is `AgentAttention`.

    Arguments as for `AgentAttention`.

    Source: the DeiT form of Agent Attention, arXiv 2312.08874.

    Example:
        >>> layer = ClassTokenAgentAttention(32, num_heads=4)
        >>> x, token = layer(torch.randn(2, 14, 14, 32), torch.randn(2, 1, 32))
        >>> x.shape, token.shape
        (torch.Size([2, 14, 14, 32]), torch.Size([2, 1, 32]))
    """

    def __init__(self, dim: int, num_heads: int = 4, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        count = prod(self.mixer.aggregate_bias.agent_size)
        self.token_key_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, count, 1), std=0.02))
        self.token_query_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, 1, count), std=0.02))
        if self.mixer.agents != self.mixer.aggregate_bias.agent_size:
            raise ValueError(f"dense_agent_size={self.mixer.agents} is not allowed with a class token; leave it None")

    def forward(self, x: Tensor, token: Tensor | None = None) -> Any:
        """x (B, *grid, C) and token (B, 1, C) -> both."""
        if token is None:
            return super().forward(x)
        grid = self.check_input(x)
        query, key, value = self._project(torch.cat((token, x.flatten(1, -2)), 1))
        on_grid = query[:, 1:].unflatten(1, grid)
        aggregate = torch.cat((self.token_key_bias, self.mixer.aggregate_bias(grid, self.mixer.agents)), -1)
        broadcast = torch.cat((self.token_query_bias, self.mixer.broadcast_bias(grid, self.mixer.agents).mT), -2)
        agents = pool_agents(on_grid, self.mixer.agents)
        heads = self.mixer.mix(query, key, value, agents, aggregate, broadcast).flatten(-2)
        local = self.mixer.dwc(value[:, 1:].unflatten(1, grid).flatten(-2))
        mixed = torch.cat((heads[:, :1], heads[:, 1:] + local.flatten(1, -2)), 1)
        out = self.proj_drop(self.proj(mixed))
        return out[:, 1:].unflatten(1, grid), out[:, :1]


@register_attention(
    "agent_pyramid",
    summary="agent attention whose keys and values come from a grid reduced by a strided convolution",
    source="arXiv 2312.08874",
    linear_cost=True,
)
class PyramidAgentAttention(AgentAttention):
    """Agent attention with keys and values on a reduced grid, LN(Conv(x)), as in a pyramid vision transformer.

    The convolution has `reduction` for kernel and stride; positions that do not fill a last patch are left out (an
    axis shorter than a patch is padded with zeros). Values are interpolated back to the grid for the depth-wise
    convolution. With `reduction=1` this is `AgentAttention`.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid, for which the biases are stored.
        reduction: positions per key and axis, one int or one per axis.
        agent_size, kernel_size, qkv_bias, scale, attention_dropout, projection_dropout: as for `AgentAttention`.

    Source: the PVT form of Agent Attention, arXiv 2312.08874.

    Example:
        >>> PyramidAgentAttention(32, num_heads=4, reduction=2)(torch.randn(2, 10, 9, 32)).shape
        torch.Size([2, 10, 9, 32])
    """

    exact_map = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        reduction: int | Sequence[int] = 2,
        agent_size: int | Sequence[int] = 7,
        kernel_size: int | Sequence[int] = 3,
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
    ) -> None:
        self._reduction = per_axis(reduction, len(grid), "reduction")
        super().__init__(
            dim,
            num_heads,
            grid=grid,
            agent_size=agent_size,
            kernel_size=kernel_size,
            qkv_bias=qkv_bias,
            scale=scale,
            attention_dropout=attention_dropout,
            projection_dropout=projection_dropout,
        )
        if max(self._reduction) > 1:
            self.patch = _CONVOLUTIONS[self.rank](dim, dim, self._reduction, self._reduction)
            self.patch_norm = nn.LayerNorm(dim)
        else:
            self.patch = self.patch_norm = None

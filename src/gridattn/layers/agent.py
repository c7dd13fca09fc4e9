"""Agent attention over a whole grid: plain, with a class token, and with reduced keys (arXiv 2312.08874)."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, split_heads, value_gradient_map
from gridattn.layers.dropout import Dropout
from gridattn.layers.large_kernel import DepthwiseConv
from gridattn.layers.registry import register_attention
from gridattn.ops.agent import agent_attention, agent_bias, pool_agents, pool_real_agents
from gridattn.ops.common import check_channels, check_probability, per_axis
from gridattn.ops.padding import pad_grid

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
        """Agent attention with this mixer's scale and dropout; `biases` are B1 and B2."""
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
    exact_map=True,
)
@register_attention(
    "agent_pyramid",
    summary="agent attention whose keys and values come from a grid halved by a strided convolution",
    source="arXiv 2312.08874",
    linear_cost=True,
    reduction=2,
)
class AgentAttention(GridAttention):
    """Agent attention: y = proj(softmax(s Q A^T + B2) softmax(s A K^T + B1) V + DWConv(V)), A = pooled Q.

    Cost and memory grow linearly with the grid. On other grids than the nominal one the biases are interpolated, which
    is the form that the authors use for detection and segmentation.

    With a reduction, keys and values come from LN(Conv(x)), a convolution with the reduction for kernel and stride;
    positions that do not fill a last patch are left out (an axis shorter than a patch is padded with zeros), and values
    are interpolated back to the grid for the depth-wise convolution.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid, for which the biases are stored.
        agent_size: agents per axis, one int or one per axis.
        dense_agent_size: agents per axis at run time where they differ from those trained; None for the same.
        reduction: positions per key and axis, one int or one per axis.
        kernel_size: of the depth-wise convolution, one int or one per axis.
        qkv_bias: bias in the query/key/value projection.
        scale: factor of both products; head_dim ** -0.5 when None.
        attention_dropout: dropout probability of the aggregating weights.
        projection_dropout: dropout probability of the output.

    Attributes:
        exact_map: True without a reduction; with one, `attention_map` is made of gradients.

    Source: Agent Attention: On the Integration of Softmax and Linear Attention, arXiv 2312.08874.

    Example:
        >>> AgentAttention(32, num_heads=4, agent_size=(3, 4))(torch.randn(2, 10, 9, 32)).shape
        torch.Size([2, 10, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        agent_size: int | Sequence[int] = 7,
        dense_agent_size: int | Sequence[int] | None = None,
        reduction: int | Sequence[int] = 1,
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
        self.reduction = per_axis(reduction, self.rank, "reduction")
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
        self.exact_map = max(self.reduction) == 1  # pyright: ignore[reportAttributeAccessIssue]
        self.patch = self.patch_norm = None
        if not self.exact_map:
            self.patch = _CONVOLUTIONS[self.rank](dim, dim, self.reduction, self.reduction)
            self.patch_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout(projection_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        grid = self.check_input(x)
        if self.patch is None:
            mixed = self.mixer(*self._project(x))
        else:
            query, key, value = self._project_reduced(x)
            mixed = self.mixer.attend(query, key, value).flatten(-2) + self.mixer.dwc(self._back_to(value, grid))
        return self.proj_drop(self.proj(mixed))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return split_heads(self.qkv(x), 3, self.num_heads)

    def _project_reduced(self, x: Tensor) -> tuple[Tensor, ...]:
        assert self.patch is not None
        assert self.patch_norm is not None
        missing = [max(r - n, 0) if isinstance(n, int) else 0 for n, r in zip(x.shape[1:-1], self.reduction)]
        patches = pad_grid(x, [(0, amount) for amount in missing])
        patches = self.patch_norm(self.patch(patches.movedim(-1, 1)).movedim(1, -1))
        (w_query, w_rest), bias = self.qkv.weight.split((self.dim, 2 * self.dim)), self.qkv.bias
        b_query, b_rest = (None, None) if bias is None else bias.split((self.dim, 2 * self.dim))
        query = rearrange(F.linear(x, w_query, b_query), "... (h d) -> ... h d", h=self.num_heads)
        rest = F.linear(patches, w_rest, b_rest)
        return query, *split_heads(rest, 2, self.num_heads)

    def _back_to(self, value: Tensor, grid: Sequence[int]) -> Tensor:
        """Values on the reduced grid (B, *key_grid, heads, d) -> (B, *grid, C)."""
        maps = rearrange(value, "b ... h d -> b (h d) ...")
        return F.interpolate(maps, size=tuple(grid), mode=_MODES[self.rank], align_corners=False).movedim(1, -1)

    def _key_grid(self, grid: Sequence[int]) -> list[int]:
        return [max(n // r, 1) for n, r in zip(grid, self.reduction)]

    def macs(self, grid: Sequence[int]) -> int:
        keys = prod(self._key_grid(grid))
        patches = 0 if self.patch is None else keys * self.dim**2 * prod(self.reduction)
        return 2 * self.dim**2 * (prod(grid) + keys) + patches + self.mixer.macs(grid, keys)

    def memory(self, grid: Sequence[int], bytes_per_element: int = 4) -> int:
        """Input, output, query, key, value, and the logits of both products with their biases."""
        weights = 4 * prod(self.mixer.agents) * self.num_heads
        return bytes_per_element * prod(grid) * (5 * self.dim + weights)

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """Row `query` of the product of both feature maps, without the convolution; gradients with a reduction."""
        if self.patch is not None:
            return super().attention_map(x, query)
        position = self.check_query(x, query)
        q, k, v = self._project(x)
        return value_gradient_map(lambda value: self.mixer.attend(q, k, value), v, position)


class ClassTokenAgentAttention(AgentAttention):
    """Agent attention over a grid and one class token, as in a plain vision transformer.

    Agents are pooled from the positions of the grid alone. The class token is one more key and query, with a bias of
    its own per agent; the convolution does not see it. Without a token the layer is `AgentAttention`.

    Arguments as for `AgentAttention`, without `dense_agent_size` and `reduction`.

    Raises:
        ValueError: those of `AgentAttention`, and either of these two.

    Source: the DeiT form of Agent Attention, arXiv 2312.08874.

    Example:
        >>> layer = ClassTokenAgentAttention(32, num_heads=4)
        >>> x, token = layer(torch.randn(2, 14, 14, 32), torch.randn(2, 1, 32))
        >>> x.shape, token.shape
        (torch.Size([2, 14, 14, 32]), torch.Size([2, 1, 32]))
    """

    def __init__(self, dim: int, num_heads: int = 4, **options: Any) -> None:
        for name in ("dense_agent_size", "reduction"):
            if name in options:
                raise ValueError(f"{name}={options[name]!r} is not allowed with a class token; leave it out")
        super().__init__(dim, num_heads, **options)
        count = prod(self.mixer.aggregate_bias.agent_size)
        self.token_key_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, count, 1), std=0.02))
        self.token_query_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, 1, count), std=0.02))

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


def convert_official_mixer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official biases and convolution (`an_bias` ... `wa_bias`, `dwc` or `get_v`) -> the names of `AgentMixer`.

    Example:
        >>> convert_official_mixer({"wa_bias": torch.randn(1, 2, 1, 5, 9)})["broadcast_bias.axes.1"].shape
        torch.Size([2, 9, 5])
    """
    ours = {}
    for name, tensor in state.items():
        if name in ("an_bias", "na_bias"):
            ours["aggregate_bias.block" if name == "an_bias" else "broadcast_bias.block"] = tensor
        elif name in ("ah_bias", "aw_bias"):
            ours[f"aggregate_bias.axes.{'hw'.index(name[1])}"] = tensor[0].flatten(2)
        elif name in ("ha_bias", "wa_bias"):
            ours[f"broadcast_bias.axes.{'hw'.index(name[0])}"] = tensor[0].flatten(1, 2).mT
        else:
            ours[name.replace("get_v.", "dwc.")] = tensor
    return ours


def convert_official_agent(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official weights of one agent attention of DeiT, PVT or Swin -> the names of our layers.

    Every operation on the tensors is differentiable.

    Example:
        >>> official = {"q.weight": torch.randn(8, 8), "kv.weight": torch.randn(16, 8)}
        >>> convert_official_agent(official)["qkv.weight"].shape
        torch.Size([24, 8])
    """
    renamed = {"sr": "patch", "norm": "patch_norm", "qkv": "qkv", "proj": "proj"}
    ours, mixer = {}, {}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        if layer in renamed:
            ours[f"{renamed[layer]}.{leaf}"] = tensor
        elif layer == "q" and f"kv.{leaf}" in state:
            ours[f"qkv.{leaf}"] = torch.cat((tensor, state[f"kv.{leaf}"]))
        elif name in ("ac_bias", "ca_bias"):
            ours["token_key_bias" if name == "ac_bias" else "token_query_bias"] = tensor[0]
        elif layer != "kv":
            mixer[name] = tensor
    return ours | {f"mixer.{name}": tensor for name, tensor in convert_official_mixer(mixer).items()}

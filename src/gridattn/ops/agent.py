"""Agent attention: a few agents, pooled from the queries, gather from all keys and hand out to all queries.

    V_A = softmax(s A K^T + B1) V          (aggregate: the agents attend to the positions)
    O   = softmax(s Q A^T + B2) V_A        (broadcast: the positions attend to the agents)

With feature maps phi_q(Q) = softmax(s Q A^T + B2) and phi_k(K)^T = softmax(s A K^T + B1) this is linear attention,
O = phi_q (phi_k^T V); the matrix phi_q phi_k^T, which is never formed, has rows that sum to one.

Source: Agent Attention: On the Integration of Softmax and Linear Attention, arXiv 2312.08874.
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from gridattn.ops.adaptive_pool import adaptive_average
from gridattn.ops.common import check_choice

BACKENDS = ("auto", "fused", "products")
_FEW = 16
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    *,
    aggregate_bias: Tensor | None = None,
    broadcast_bias: Tensor | None = None,
    scale: float | None = None,
    broadcast_scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """softmax(s2 Q A^T + B2) softmax(s A K^T + B1) V, at a cost of 2 n (N + M) d per head.

    Args:
        query: (B, *grid, heads, d), N positions.
        key: (B, *key_grid, heads, d), M positions.
        value: (B, *key_grid, heads, d); its width may differ.
        agents: (B, *agent_grid, heads, d), n of them in row-major order.
        aggregate_bias: B1, broadcastable to (B, heads, n, M).
        broadcast_bias: B2, broadcastable to (B, heads, N, n).
        scale: s; d ** -0.5 when None.
        broadcast_scale: s2, the factor of the second product; s when None.
        dropout_p: dropout probability of the aggregating weights.
        backend: "fused" makes two calls of `scaled_dot_product_attention`. "products" writes the weights out, agents
            before positions in both, so that rows are long: faster on a CPU while agents are few. "auto" takes
            products on a CPU for up to 16 agents.

    Returns:
        (B, *grid, heads, width of value).

    Raises:
        ValueError: tensors whose heads or head widths differ, an unknown backend.

    Example:
        >>> x = torch.randn(1, 9, 7, 4, 8)
        >>> agent_attention(x, x, x, pool_agents(x, (3, 3))).shape
        torch.Size([1, 9, 7, 4, 8])
    """
    check_choice("backend", backend, BACKENDS)
    _check_heads(query, key, value, agents)
    s1 = query.shape[-1] ** -0.5 if scale is None else scale
    s2 = s1 if broadcast_scale is None else broadcast_scale
    b1, b2 = (_like(bias, query) for bias in (aggregate_bias, broadcast_bias))
    q, k, v, a = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value, agents))
    few = query.device.type == "cpu" and a.shape[2] <= _FEW
    attend = _by_products if backend == "products" or (backend == "auto" and few) else _fused
    out = attend(q, k, v, a, b1, b2, s1, s2, dropout_p)
    return out.transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1])


def _fused(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b1: Tensor | None, b2: Tensor | None, s1: float, s2: float, p: float
) -> Tensor:
    a = a.contiguous()  # pooled channels first; fused kernels want the last axis dense
    gathered = F.scaled_dot_product_attention(a, k, v, attn_mask=b1, dropout_p=p, scale=s1)
    return F.scaled_dot_product_attention(q, a, gathered, attn_mask=b2, scale=s2)


def _by_products(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b1: Tensor | None, b2: Tensor | None, s1: float, s2: float, p: float
) -> Tensor:
    aggregate, broadcast = s1 * a @ k.mT, s2 * a @ q.mT
    aggregate = (aggregate if b1 is None else aggregate + b1).softmax(-1)
    broadcast = (broadcast if b2 is None else broadcast + b2.mT).softmax(-2)
    return broadcast.mT @ (F.dropout(aggregate, p) @ v)


def agent_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    *,
    aggregate_bias: Tensor | None = None,
    broadcast_bias: Tensor | None = None,
    scale: float | None = None,
    broadcast_scale: float | None = None,
) -> Tensor:
    """The definition of `agent_attention`, with both feature maps written out."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, a = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value, agents))
    phi_k = (factor * a @ k.mT + (0.0 if aggregate_bias is None else aggregate_bias)).softmax(-1)
    phi_q = (factor if broadcast_scale is None else broadcast_scale) * q @ a.mT
    phi_q = (phi_q + (0.0 if broadcast_bias is None else broadcast_bias)).softmax(-1)
    return (phi_q @ (phi_k @ v)).transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1])


def pool_agents(query: Tensor, size: Sequence[int]) -> Tensor:
    """Means of the queries over cells, adaptive average pooling: (B, *grid, h, d) -> (B, *size, h, d).

    Cell i of X positions in p cells covers floor(i X / p) up to, not with, ceil((i + 1) X / p).

    Example:
        >>> pool_agents(torch.arange(6.0).view(1, 6, 1, 1), (3,)).flatten().tolist()
        [0.5, 2.5, 4.5]
    """
    heads = query.shape[-2]
    pooled = adaptive_average(rearrange(query, "b ... h d -> b (h d) ..."), size)
    return rearrange(pooled, "b (h d) ... -> b ... h d", h=heads)


def pool_real_agents(query: Tensor, size: Sequence[int], real: Tensor) -> tuple[Tensor, Tensor]:
    """As `pool_agents`, but every agent is the mean over the real positions of its cell.

    Args:
        query: (B, *grid, h, d), zero where a position is not real.
        size: agents per axis.
        real: (B, *grid) bool.

    Returns:
        (B, *size, h, d), and (B, prod(size)) bool: which agents have a real position.
    """
    share = pool_agents(real[..., None, None].to(query.dtype), size)
    return pool_agents(query, size) / share.clamp_min(torch.finfo(query.dtype).tiny), share.flatten(1) > 0


def agent_bias(
    block: Tensor, axes: Sequence[Tensor], grid: Sequence[int], trained: Sequence[int], agents: Sequence[int]
) -> Tensor:
    """Position bias of agents: a small block of every agent, stretched over the grid, plus a line along every axis.

    B[h, a, (x0, x1, ...)] = stretch(block)[h, a, x0, x1, ...] + sum_i stretch(axes[i])[h, a, xi]

    Stretching is linear interpolation with half-pixel centres. Agents other than those trained are interpolated over
    the grid of agents in the same way.

    Args:
        block: (heads, n, *block), n = prod(trained).
        axes: one (heads, n, length) for every axis of the grid.
        grid: positions per axis.
        trained: agents per axis that the tables hold, in row-major order.
        agents: agents per axis that are wanted.

    Returns:
        (heads, prod(agents), prod(grid)).

    Example:
        >>> lines = [torch.zeros(2, 4, 5), torch.zeros(2, 4, 6)]
        >>> agent_bias(torch.randn(2, 4, 7, 7), lines, (5, 8), (2, 2), (3, 2)).shape
        torch.Size([2, 6, 40])
    """
    block, *axes = (_resample_agents(table, trained, agents) for table in (block, *axes))
    bias = _stretch(block, grid)
    for axis, table in enumerate(axes):
        line = _stretch(table, grid[axis : axis + 1])
        bias = bias + line.view(*line.shape[:2], *[-1 if a == axis else 1 for a in range(len(grid))])
    return bias.flatten(2)


def _resample_agents(table: Tensor, trained: Sequence[int], agents: Sequence[int]) -> Tensor:
    if tuple(trained) == tuple(agents):
        return table
    maps = table.flatten(2).mT.unflatten(2, tuple(trained))  # (heads, positions, *trained)
    return _stretch(maps, agents).flatten(2).mT.reshape(table.shape[0], prod(agents), *table.shape[2:])


def _stretch(table: Tensor, size: Sequence[int]) -> Tensor:
    # A symbolic size, met while a graph with dynamic sizes is exported, is never taken for the table's own.
    if all(isinstance(n, int) and n == own for n, own in zip(size, table.shape[2:])):
        return table
    return F.interpolate(table, size=tuple(size), mode=_MODES[len(size)], align_corners=False)


def _like(bias: Tensor | None, query: Tensor) -> Tensor | None:
    if bias is None:
        return None
    # Fused kernels take a mask of two or four axes; one without a batch is broadcast, not repeated.
    return (bias if bias.ndim == 4 else bias.unsqueeze(0)).to(query.dtype)


def _check_heads(query: Tensor, key: Tensor, value: Tensor, agents: Tensor) -> None:
    for name, tensor in (("key", key), ("value", value), ("agents", agents)):
        if tensor.shape[-2] != query.shape[-2] or (name != "value" and tensor.shape[-1] != query.shape[-1]):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; heads and width of query, {tuple(query.shape[-2:])}, needed"
            )
    if key.shape[:-2] != value.shape[:-2]:
        raise ValueError(f"value has shape {tuple(value.shape)}; the positions of key {tuple(key.shape)} are allowed")

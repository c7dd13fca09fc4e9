"""Content attention and a purely positional attention, mixed by one gate per head."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from gridattn.ops.common import check_choice, check_same_kind


def gated_positional_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_weight: Tensor,
    gate: Tensor,
    *,
    position_bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention with the weights A = (1 - g) softmax(scale * Q K^T) + g P, g being the gate of the head.

    P[q, k] = softmax over k of w . r[q, k] looks at positions only; r[q, k] are the `relative_coordinates` and w a row
    of `position_weight`. As |r|^2 is a sum over axes, P is a product of one softmax per axis, P[q, k] =
    prod_a P_a[q_a, k_a], so that P is applied axis by axis and no matrix over all pairs of positions is made.

    Args:
        query: (B, *grid, heads, head_dim), 1 to 3 axes.
        key: like `query`.
        value: (B, *grid, heads, value_dim).
        position_weight: (heads, rank + 1), one factor per relative coordinate.
        gate: (heads,), between 0 and 1.
        position_bias: (heads,), added to all positional logits of a head. It cancels in the softmax; the published
            weights have it.
        scale: factor of the content logits; head_dim ** -0.5 when None.
        dropout: probability of dropping an entry of A; above 0 the matrix A is made.
        backend: "reference" makes A, "auto" does not unless `dropout` asks for it.

    Returns:
        (B, *grid, heads, value_dim).

    Raises:
        ValueError: shapes that do not fit together.

    Source: ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases, arXiv 2103.10697.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 2, 7, 9, 4, 8).unbind(0)
        >>> gated_positional_attention(q, k, v, torch.randn(4, 3), torch.rand(4)).shape
        torch.Size([2, 7, 9, 4, 8])
    """
    check_same_kind(query=query, key=key, value=value)
    check_choice("backend", backend, ("auto", "reference"))
    heads, rank = query.shape[-2], query.ndim - 3
    if query.shape != key.shape or query.shape[:-1] != value.shape[:-1] or rank not in (1, 2, 3):
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} must be "
            "(B, *grid, heads, channels) with 1 to 3 axes, equal but for the channels of value"
        )
    if position_weight.shape != (heads, rank + 1) or gate.shape != (heads,):
        raise ValueError(
            f"position_weight {tuple(position_weight.shape)} and gate {tuple(gate.shape)} must be "
            f"{(heads, rank + 1)} and {(heads,)}"
        )
    if backend == "reference" or dropout > 0:
        weights = gated_positional_weights(query, key, position_weight, gate, position_bias=position_bias, scale=scale)
        weights = F.dropout(weights, dropout).to(value.dtype)
        return torch.einsum("bhqk,bkhd->bqhd", weights, value.flatten(1, -3)).reshape(value.shape)

    content = F.scaled_dot_product_attention(_tokens(query), _tokens(key), _tokens(value), scale=scale)
    content = content.transpose(1, 2).reshape(value.shape)
    positional = value
    for axis, weights in enumerate(axis_weights(value.shape[1:-2], position_weight, position_bias)):
        positional = _apply_along(weights.to(value.dtype), positional, axis)
    return torch.lerp(content, positional, gate.to(value.dtype).unsqueeze(-1))


def gated_positional_weights(
    query: Tensor,
    key: Tensor,
    position_weight: Tensor,
    gate: Tensor,
    *,
    position_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The matrix A of `gated_positional_attention`, (B, heads, N, N) with N positions in row-major order."""
    content = attention_weights(query, key, scale=scale)
    positional = positional_weights(query.shape[1:-2], position_weight, position_bias)
    gate = gate.view(-1, 1, 1)
    weights = (1 - gate) * content + gate * positional
    return weights / weights.sum(-1, keepdim=True)


def attention_weights(query: Tensor, key: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax(scale * Q K^T) of (B, *grid, heads, head_dim): (B, heads, N, N)."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return (factor * _tokens(query) @ _tokens(key).transpose(-1, -2)).softmax(-1)


def positional_weights(grid: Sequence[int], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The positional attention P as it is defined: softmax over keys of w . r[q, k].

    Args:
        grid: sizes of the axes.
        weight: (heads, rank + 1).
        bias: (heads,) or None.

    Returns:
        (heads, N, N).

    Example:
        >>> import torch
        >>> positional_weights((4, 4), torch.randn(2, 3)).sum(-1).allclose(torch.ones(2, 16))
        True
    """
    coordinates = relative_coordinates(grid, device=weight.device).to(weight.dtype)
    return F.linear(coordinates, weight, bias).movedim(-1, 0).softmax(-1)


def axis_weights(grid: Sequence[int], weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """The factors of the positional attention: for each axis of size S the (heads, S, S) softmax along that axis.

    P[q, k] = prod_a P_a[q_a, k_a]; `bias` enters the first factor, where it cancels.
    """
    factors = []
    for axis, size in enumerate(grid):
        position = torch.arange(size, device=weight.device)
        offset = (position - position[:, None]).to(torch.float32 if weight.dtype.itemsize < 4 else weight.dtype)
        linear, quadratic = weight[:, len(grid) - 1 - axis], weight[:, -1]
        logits = linear.view(-1, 1, 1) * offset + quadratic.view(-1, 1, 1) * offset.square()
        if bias is not None and axis == 0:
            logits = logits + bias.view(-1, 1, 1)
        factors.append(logits.softmax(-1))
    return factors


def relative_coordinates(grid: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Offsets from query to key, last axis first, and their squared length: (dx, dy, dx^2 + dy^2) on two axes.

    Returns:
        (N, N, rank + 1) int64.

    Example:
        >>> relative_coordinates((2, 3))[0, 5].tolist()
        [2, 1, 5]
    """
    axes = [torch.arange(size, device=device) for size in grid]
    position = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], -1)
    offset = (position[None, :] - position[:, None]).flip(-1)
    return torch.cat([offset, offset.square().sum(-1, keepdim=True)], -1)


def attention_distance(weights: Tensor, grid: Sequence[int]) -> Tensor:
    """Non-locality: how far, in positions, the attention of a query lies from it on average.

    D = 1/N sum over queries and keys of A[q, k] |k - q|, with |.| the Euclidean length.

    Args:
        weights: (..., N, N), rows summing to one.
        grid: sizes of the axes, N in all.

    Returns:
        (...): one distance per matrix.

    Example:
        >>> import torch
        >>> round(attention_distance(torch.full((49, 49), 1 / 49), (7, 7)).item(), 4)
        3.6095
    """
    if weights.shape[-2:] != (prod(grid), prod(grid)):
        raise ValueError(f"weights has shape {tuple(weights.shape)}; (..., N, N) with N={prod(grid)} is allowed")
    length = relative_coordinates(grid, device=weights.device)[..., -1].to(weights.dtype).sqrt()
    return (weights * length).sum((-2, -1)) / prod(grid)


def _tokens(x: Tensor) -> Tensor:
    """(B, *grid, heads, channels) -> (B, heads, N, channels)."""
    return x.flatten(1, -3).transpose(1, 2)


def _apply_along(weights: Tensor, x: Tensor, axis: int) -> Tensor:
    """(heads, S, S) times (B, *grid, heads, channels) along one axis of the grid."""
    places = "xyz"[: x.ndim - 3]
    source, target = places.replace(places[axis], "k"), places.replace(places[axis], "q")
    return torch.einsum(f"hqk,b{source}hd->b{target}hd", weights, x)

"""The interface of every attention layer: a grid in, a grid out, its cost, and the picture of what a query sees."""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn


def split_heads(projected: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """Takes a joint projection apart, (..., parts * num_heads * d) -> `parts` views (..., num_heads, d).

    Example:
        >>> query, key, value = split_heads(torch.randn(2, 7, 96), 3, num_heads=4)
        >>> query.shape
        torch.Size([2, 7, 4, 8])
    """
    return projected.unflatten(-1, (parts, num_heads, -1)).unbind(-3)


class GridAttention(nn.Module):
    """An attention layer on a grid: `(B, *grid, C)` in, `(B, *grid, C)` out.

    A subclass sets `dim` and `rank` through `super().__init__` and defines `forward` and `macs`; where the mechanism
    has attention weights, it also overrides `attention_map` and sets `exact_map`.

    Attributes:
        dim: number of channels C.
        rank: number of grid axes.
        exact_map: True where `attention_map` returns the mechanism's own weights rather than gradients.
    """

    exact_map: bool = False

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.dim = dim
        self.rank = rank

    def check_input(self, x: Tensor) -> tuple[int, ...]:
        """Returns the grid of `x`.

        Raises:
            ValueError: another number of axes than batch, `rank` and channels, another channel count, or an empty axis.
        """
        if x.ndim != self.rank + 2:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; {type(self).__name__} takes (batch, {self.rank} grid axes, channels)"
            )
        if x.shape[-1] != self.dim:
            raise ValueError(f"x has {x.shape[-1]} channels; {type(self).__name__} was built for dim={self.dim}")
        grid = tuple(x.shape[1:-1])
        if any(size < 1 for size in grid):
            raise ValueError(f"x has the grid {grid}; every axis must hold at least one position")
        return grid

    def macs(self, grid: Sequence[int]) -> int:
        """Multiply-accumulates of one forward pass for one sample on `grid`: projections, products and convolutions."""
        raise NotImplementedError

    def memory(self, grid: Sequence[int], bytes_per_element: int = 4) -> int:
        """Bytes that one forward pass of one sample holds at its peak, input and output included, without gradients.

        The default counts input, query, key, value and output; a mechanism that stores more overrides it.
        """
        return 5 * prod(grid) * self.dim * bytes_per_element

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """How much the output at one position owes to every position.

        Where `exact_map` is True these are the attention weights of the query, one map a head. Elsewhere it is the
        norm over
        channels of the gradient of the output's squared norm at the query, scaled to sum to one, as a single head.

        Args:
            x: (B, *grid, C), the layer's input.
            query: grid index of the query, one int per axis.

        Returns:
            (B, heads, *grid), float32, not negative.

        Raises:
            ValueError: a query outside the grid.
        """
        return gradient_map(self, x, self.check_query(x, query))

    def check_query(self, x: Tensor, query: Sequence[int]) -> tuple[int, ...]:
        """Returns `query` as a tuple after checking that it names a position of the grid of `x`."""
        grid = self.check_input(x)
        query = tuple(int(q) for q in query)
        if len(query) != len(grid) or any(not 0 <= q < size for q, size in zip(query, grid)):
            raise ValueError(f"query={query} is not a position of the grid {grid}")
        return query


def gradient_map(layer: Callable[[Tensor], Tensor], x: Tensor, query: tuple[int, ...]) -> Tensor:
    """Influence of every position on the output at `query`, by one backward pass.

    Args:
        layer: maps (B, *grid, C) to (B, *grid, C).
        x: (B, *grid, C).
        query: grid index.

    Returns:
        (B, 1, *grid): norm over channels of the input gradient, summing to one over the grid (zero if nothing flows).
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        at_query = layer(leaf)[(slice(None), *query)]
        (grad,) = torch.autograd.grad(at_query.float().square().sum(), leaf)
    influence = grad.float().norm(dim=-1)
    total = influence.flatten(1).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    return (influence / total.view(-1, *[1] * len(query))).unsqueeze(1)


def value_gradient_map(attend: Callable[[Tensor], Tensor], value: Tensor, query: tuple[int, ...]) -> Tensor:
    """Attention weights of one query of any mechanism that is linear in its values: out = A v, so d out[query] / d v
    = A[query].

    Args:
        attend: maps values (B, *grid, heads, head_dim) to outputs of the same layout, everything else held fixed.
        value: the values.
        query: grid index.

    Returns:
        (B, heads, *grid): the weights, float32.
    """
    with torch.enable_grad():
        leaf = torch.zeros_like(value).requires_grad_()
        at_query = attend(leaf)[(slice(None), *query)]  # (B, heads, head_dim)
        (grad,) = torch.autograd.grad(at_query[..., 0].sum(), leaf)
    return grad[..., 0].float().movedim(-1, 1)

"""Attention with linear biases on grids (2D-ALiBi, X-ALiBi): logits lowered in proportion to the distance of query
and key.

bias[h, i, j] = -m_h * || p_i - p_j ||, with one fixed slope m_h a head and positions p in units of one grid cell.
There is no learned
part and no table, so any grid, any subset of positions and two different grids (X-ALiBi) work alike.

Source: CROMA, arXiv 2311.00566 (2-D and cross-attention); ALiBi, arXiv 2108.12409 (the slopes).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The slopes m_1 ... m_n: 2^(-8k/n) for n a power of two; otherwise those of the power of two p below, followed
    by the
    first n - p of every second slope of 2p.

    Raises:
        ValueError: fewer than one head.

    Example:
        >>> alibi_slopes(4)
        (0.25, 0.0625, 0.015625, 0.00390625)
        >>> [1 / slope for slope in alibi_slopes(6)]
        [4.0, 16.0, 64.0, 256.0, 2.0, 8.0]
    """
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads={num_heads!r} is not allowed; it must be a positive int")
    power = 1 << (num_heads.bit_length() - 1)
    slopes = tuple(2 ** (-8 * k / power) for k in range(1, power + 1))
    if power == num_heads:
        return slopes
    return slopes + alibi_slopes(2 * power)[0::2][: num_heads - power]


def grid_positions(
    grid: Sequence[int], extent: Sequence[int] | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Positions of a grid's cells in row-major order.

    Args:
        grid: sizes of the axes.
        extent: measure in cells of this grid laid over the same area, cell centres being (i + 1/2) extent / grid -
            1/2; the grid's
            own cells when None. This is what puts two grids of different resolution into one frame.

    Returns:
        (prod(grid), len(grid)) float32.

    Example:
        >>> grid_positions((1, 2)).tolist(), grid_positions((2,), extent=(4,)).tolist()
        ([[0.0, 0.0], [0.0, 1.0]], [[0.5], [2.5]])
    """
    axes = [torch.arange(size, dtype=torch.float32, device=device) for size in grid]
    if extent is not None:
        if len(extent) != len(grid):
            raise ValueError(f"extent={tuple(extent)} has {len(extent)} axes but grid={tuple(grid)} has {len(grid)}")
        axes = [(axis + 0.5) * (whole / size) - 0.5 for axis, whole, size in zip(axes, extent, grid)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def alibi_bias(query_positions: Tensor, key_positions: Tensor, slopes: Sequence[float]) -> Tensor:
    """The additive bias of attention logits, -m_h || p_i - p_j ||.

    Args:
        query_positions: (..., Nq, axes), in cells. A subset of a grid's positions gives the bias of masked tokens.
        key_positions: (..., Nk, axes), leading dimensions that broadcast with the queries'.
        slopes: one a head.

    Returns:
        (..., heads, Nq, Nk) in the dtype of the positions.

    Example:
        >>> p = grid_positions((3, 3))
        >>> alibi_bias(p, p, alibi_slopes(4)).shape
        torch.Size([4, 9, 9])
    """
    if query_positions.shape[-1] != key_positions.shape[-1]:
        raise ValueError(
            f"query_positions have {query_positions.shape[-1]} axes but key_positions have {key_positions.shape[-1]}"
        )
    offset = query_positions[..., :, None, :] - key_positions[..., None, :, :]
    distance = offset.square().sum(-1).sqrt()
    slope = torch.tensor(tuple(slopes), dtype=distance.dtype, device=distance.device)
    return -slope[:, None, None] * distance[..., None, :, :]


def alibi_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(Q K^T / sqrt(d) + bias) V; the bias is not scaled.

    Args:
        query: (B, Nq, heads, head_dim).
        key: (B, Nk, heads, head_dim).
        value: (B, Nk, heads, value_dim).
        bias: (heads, Nq, Nk) or (B, heads, Nq, Nk).
        dropout: probability with which attention weights are dropped.

    Returns:
        (B, Nq, heads, value_dim).

    Example:
        >>> p, x = grid_positions((2, 3)), torch.randn(1, 6, 4, 8)
        >>> alibi_attention(x, x, x, alibi_bias(p, p, alibi_slopes(4))).shape
        torch.Size([1, 6, 4, 8])
    """
    bias = bias.to(query.dtype)
    if bias.ndim == 3:
        bias = bias.unsqueeze(0)
    tokens = [t.transpose(1, 2) for t in (query, key, value)]
    return F.scaled_dot_product_attention(*tokens, attn_mask=bias, dropout_p=dropout).transpose(1, 2)

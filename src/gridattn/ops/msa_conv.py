"""Attention in the manner of a convolution: every position attends to a window of fixed shape, zeros beyond it."""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gridattn.ops.common import check_choice, check_same_kind, per_axis
from gridattn.ops.neighborhood import neighborhood_attention
from gridattn.ops.padding import pad_grid

BORDERS = ("zero", "mask")
BACKENDS = ("auto", "offsets", "neighborhood")


def window_reach(kernel_size: Any, dilation: Any, rank: int) -> tuple[int, ...]:
    """How far a window reaches to either side, d (k - 1) / 2 per axis.

    Raises:
        ValueError: d (k - 1) odd on some axis: the window would have no centre.

    Example:
        >>> window_reach((3, 5), 2, rank=2)
        (2, 4)
    """
    kernel, steps = per_axis(kernel_size, rank, "kernel_size"), per_axis(dilation, rank, "dilation")
    spans = [d * (k - 1) for k, d in zip(kernel, steps)]
    if any(span % 2 for span in spans):
        raise ValueError(
            f"kernel_size={kernel} with dilation={steps} has no centre; dilation * (kernel_size - 1) must be even"
        )
    return tuple(span // 2 for span in spans)


def window_logits(query: Tensor, key: Tensor, kernel_size: Any = 3, dilation: Any = 1) -> Tensor:
    """Products of queries with the keys of their windows: logits[p, t] = q[p] . k[p + d t - reach], 0 outside the grid.

    Args:
        query: (B, *grid, heads, head_dim), grid of rank 1 to 3.
        key: (B, *grid, heads, head_dim).
        kernel_size: one int or one per axis.
        dilation: one int or one per axis.

    Returns:
        (B, *grid, heads, taps), taps in row-major order of the window, not scaled.

    Raises:
        ValueError: a window without a centre, shapes that differ, or other dtypes or devices.

    Example:
        >>> import torch
        >>> window_logits(torch.randn(2, 7, 9, 4, 8), torch.randn(2, 7, 9, 4, 8)).shape
        torch.Size([2, 7, 9, 4, 9])
    """
    _check_shapes(query=query, key=key)
    return torch.stack([(query * shifted).sum(-1) for shifted in _windows(key, kernel_size, dilation)], -1)


def window_sum(weights: Tensor, value: Tensor, kernel_size: Any = 3, dilation: Any = 1) -> Tensor:
    """Weighted sum of each window's values: out[p] = sum_t weights[p, t] v[p + d t - reach], v = 0 outside the grid.

    Args:
        weights: (B, *grid, heads, taps).
        value: (B, *grid, heads, head_dim).
        kernel_size: one int or one per axis; need not be the one that the weights were made with, only as many taps.
        dilation: one int or one per axis.

    Returns:
        (B, *grid, heads, head_dim).

    Raises:
        ValueError: a window without a centre, or another number of taps than weights.

    Example:
        >>> import torch
        >>> window_sum(torch.randn(2, 7, 9, 4, 9), torch.randn(2, 7, 9, 4, 8)).shape
        torch.Size([2, 7, 9, 4, 8])
    """
    kernel = per_axis(kernel_size, value.ndim - 3, "kernel_size")
    if weights.shape != (*value.shape[:-1], prod(kernel)):
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}; {(*value.shape[:-1], prod(kernel))} is allowed for "
            f"kernel_size={kernel} and value with shape {tuple(value.shape)}"
        )
    out = torch.zeros_like(value)
    for weight, shifted in zip(weights.unsqueeze(-2).unbind(-1), _windows(value, kernel, dilation)):
        out = torch.addcmul(out, weight, shifted)
    return out


def msa_conv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Any = 3,
    dilation: Any = 1,
    *,
    scale: float | None = None,
    border: str = "zero",
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Multi-head self-attention convolution: softmax attention of every position over the window around it.

    out[p] = sum_t P[p, t] v[p + d t - reach], P[p] = softmax over the taps t of scale q[p] . k[p + d t - reach]. With
    one head it is the standard form, with as many heads as channels the depth-wise one, with a dilation above 1 the
    dilated one.

    Args:
        query: (B, *grid, heads, head_dim), grid of rank 1 to 3.
        key: (B, *grid, heads, head_dim).
        value: (B, *grid, heads, head_dim).
        kernel_size: one int or one per axis.
        dilation: one int or one per axis; dilation * (kernel_size - 1) must be even.
        scale: factor of the products; head_dim ** -0.5 when None.
        border: "zero": positions outside the grid take part in the softmax with logit and value 0 (official). "mask":
            they are left out.
        dropout: dropout probability of the weights.
        backend: "offsets" adds up one shifted copy of the grid per tap: any window, and memory for one logit per tap.
            "neighborhood" fills the grid up with zeros, so that no window of neighborhood attention is pushed inside,
            and uses its kernels: border "zero", odd windows of at least 3 on every axis, no dropout. "auto" takes it,
            where it can, for windows of 25 taps and more, but not inside `torch.compile` and `torch.export`.

    Returns:
        (B, *grid, heads, head_dim).

    Raises:
        ValueError: a window without a centre, shapes that differ, an unknown border or backend, or a backend that
        cannot run
            the problem.

    Source: TiC: Exploring Vision Transformer in Convolution, arXiv 2310.04134.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 2, 7, 9, 4, 8)
        >>> msa_conv(q, k, v, kernel_size=(3, 5), dilation=2).shape
        torch.Size([2, 7, 9, 4, 8])
    """
    _check_shapes(query=query, key=key, value=value)
    check_choice("border", border, BORDERS)
    check_choice("backend", backend, BACKENDS)
    rank, grid = query.ndim - 3, tuple(query.shape[1:-2])
    kernel, steps = per_axis(kernel_size, rank, "kernel_size"), per_axis(dilation, rank, "dilation")
    reach = window_reach(kernel, steps, rank)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    obstacle = _neighborhood_obstacle(kernel, border, dropout)
    if backend == "neighborhood" and obstacle:
        raise ValueError(f"backend='neighborhood' cannot run this problem: {obstacle}")
    if _uses_neighborhood(kernel, border, dropout, backend):
        return _by_neighborhood(query, key, value, kernel, steps, reach, factor)
    logits = factor * window_logits(query, key, kernel, steps)
    if border == "mask":
        logits = logits.masked_fill(_outside(logits, grid, kernel, steps), torch.finfo(logits.dtype).min)
    weights = F.dropout(logits.softmax(-1), dropout)
    return window_sum(weights.to(value.dtype), value, kernel, steps)


def msa_conv_macs(
    dim: int,
    grid: Sequence[int],
    kernel_size: Any = 3,
    dilation: Any = 1,
    *,
    border: str = "zero",
    backend: str = "auto",
) -> int:
    """Multiply-accumulates of `msa_conv` without dropout for one sample of `dim` channels.

    The products of shifted copies are element-wise work and not counted; those of neighborhood attention are.
    """
    kernel = per_axis(kernel_size, len(grid), "kernel_size")
    if not _uses_neighborhood(kernel, border, 0.0, backend):
        return 0
    steps = per_axis(dilation, len(grid), "dilation")
    filled = [max(size, d) + d * (k - 1) for size, k, d in zip(grid, kernel, steps)]
    return 2 * dim * prod(kernel) * prod(filled)


def multi_directional_shift(block: int, reach: Sequence[int]) -> tuple[int, ...]:
    """Shift of one block of a network in which successive blocks shift in different directions, by the window's reach.

    Axis i goes towards smaller indices in blocks whose bit i is set: on an image (+, +), (-, +), (+, -), (-, -), and
    again.

    Args:
        block: index of the block, counted over the whole network.
        reach: of the window, see `window_reach`.

    Source: TiC: Exploring Vision Transformer in Convolution, arXiv 2310.04134.

    Example:
        >>> [multi_directional_shift(block, (1, 2)) for block in range(4)]
        [(1, 2), (-1, 2), (1, -2), (-1, -2)]
    """
    return tuple(-r if block >> axis & 1 else r for axis, r in enumerate(reach))


def inter_pool(x: Tensor) -> Tensor:
    """Halves a grid by averaging 2-wide cells; a cell cut by the border averages the positions that it has.

    Args:
        x: (B, *grid, C), grid of rank 1 to 3.

    Returns:
        (B, *ceil(grid / 2), C).

    Source: TiC: Exploring Vision Transformer in Convolution, arXiv 2310.04134.

    Example:
        >>> import torch
        >>> inter_pool(torch.tensor([1.0, 3.0, 5.0]).view(1, 3, 1)).flatten()
        tensor([2., 5.])
    """
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[x.ndim - 2]
    return pool(x.movedim(-1, 1), 2, stride=2, ceil_mode=True, count_include_pad=False).movedim(1, -1)


def _windows(x: Tensor, kernel_size: Any, dilation: Any) -> Iterator[Tensor]:
    """The grid as seen from every position through each tap: views of the zero-padded grid, taps in row-major order."""
    rank, grid = x.ndim - 3, x.shape[1:-2]
    kernel, steps = per_axis(kernel_size, rank, "kernel_size"), per_axis(dilation, rank, "dilation")
    padded = _pad(x, window_reach(kernel, steps, rank), [0] * rank)
    for tap in product(*[range(0, k * d, d) for k, d in zip(kernel, steps)]):
        yield padded[(slice(None), *[slice(start, start + size) for start, size in zip(tap, grid)])]


def _pad(x: Tensor, reach: Sequence[int], more: Sequence[int]) -> Tensor:
    """Zeros around the grid: `reach` on either side of an axis and `more` at its end."""
    return pad_grid(x, [(r, r + m) for r, m in zip(reach, more)])


def _outside(logits: Tensor, grid: Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """(*grid, 1, taps) bool: taps that fall outside the grid."""
    inside = torch.ones(1, *grid, 1, 1, dtype=torch.bool, device=logits.device)
    return ~torch.stack([window[0, ..., 0] for window in _windows(inside, kernel, dilation)], -1)


def _neighborhood_obstacle(kernel: Sequence[int], border: str, dropout: float) -> str | None:
    if border != "zero":
        return f"border={border!r} is not 'zero'"
    if any(k < 3 or k % 2 == 0 for k in kernel):
        return f"kernel_size={tuple(kernel)} has an even entry or a 1"
    return f"dropout={dropout} is not 0" if dropout else None


def _uses_neighborhood(kernel: Sequence[int], border: str, dropout: float, backend: str) -> bool:
    """Shifted copies are faster for few taps; they also fuse in `torch.compile` and export for every grid."""
    if backend == "auto":
        possible = _neighborhood_obstacle(kernel, border, dropout) is None
        return possible and prod(kernel) >= 25 and not torch.compiler.is_compiling()
    return backend == "neighborhood"


def _by_neighborhood(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Sequence[int],
    dilation: Sequence[int],
    reach: Sequence[int],
    scale: float,
) -> Tensor:
    grid = query.shape[1:-2]
    # Neighborhood attention asks for a grid of at least kernel * dilation.
    short = [max(d - size, 0) for d, size in zip(dilation, grid)]
    q, k, v = (_pad(t, reach, short) for t in (query, key, value))
    out = neighborhood_attention(q, k, v, kernel, dilation=dilation, scale=scale)
    assert isinstance(out, Tensor)
    return out[(slice(None), *[slice(r, r + size) for r, size in zip(reach, grid)])]


def _check_shapes(**tensors: Tensor) -> None:
    check_same_kind(**tensors)
    query = tensors["query"]
    if query.ndim not in (4, 5, 6):
        raise ValueError(f"query has shape {tuple(query.shape)}; (batch, 1 to 3 grid axes, heads, head_dim) is allowed")
    for name, tensor in tensors.items():
        if tensor.shape != query.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} but query has {tuple(query.shape)}")

"""Polyline path masks: the weight of a pair of positions decays along a path of straight pieces between them.

A position holds one decay per axis. The path from a key to a query follows the first axis on the key's line, then the
next axis, and ends on the query's line along the last axis. On a picture that is the vertical piece in the column of
the key, then the horizontal piece in the row of the query; the mask of the path in the other order is the transposed
matrix. Everything here works with logarithms of decays, so that nothing underflows.

Source: Polyline Path Masked Attention for Vision Transformer, arXiv 2506.15940.
"""

from collections.abc import Iterable, Sequence
from itertools import product

import torch
from einops import rearrange
from torch import Tensor

from gridattn.ops.common import check_choice
from gridattn.ops.linear_scan import linear_scan


def path_mask_reference(decay: Tensor) -> Tensor:
    """The mask as it is defined, by a walk along every path.

    On two axes, with `decay[..., 0]` = beta (vertical) and `decay[..., 1]` = alpha (horizontal),

        L[(i, j), (k, l)] = prod_{m = min(i, k) + 1 .. max(i, k)} beta[m, l] * prod_{m = min(j, l) + 1 .. max(j, l)}
        alpha[i, m].

    Args:
        decay: (*grid, rank), in (0, 1].

    Returns:
        (N, N), query, then key, in row-major order.

    Example:
        >>> path_mask_reference(torch.tensor([[1.0], [0.5], [0.1]])).tolist()[0]
        [1.0, 0.5, 0.05000000074505806]
    """
    grid = decay.shape[:-1]
    positions = list(product(*(range(size) for size in grid)))
    mask = decay.new_ones(len(positions), len(positions))
    for q, query in enumerate(positions):
        for k, key in enumerate(positions):
            for axis in range(len(grid)):
                low, high = sorted((query[axis], key[axis]))
                for step in range(low + 1, high + 1):
                    mask[q, k] *= decay[(*query[:axis], step, *key[axis + 1 :], axis)]
    return mask


def axis_log_masks(log_decay: Tensor) -> tuple[Tensor, ...]:
    """Logarithm of the mask inside every line of the grid, S[q, k] = -|c_q - c_k|, c the running sum of log decays.

    Args:
        log_decay: (B, *grid, heads, rank), not positive; entry a decays along axis a.

    Returns:
        One tensor per axis a, of S positions: (B, *grid without axis a, heads, S, S), float32 or wider.

    Raises:
        ValueError: another number of decays than axes.

    Example:
        >>> rows, columns = axis_log_masks(-torch.rand(1, 3, 5, 2, 2))
        >>> rows.shape, columns.shape
        (torch.Size([1, 5, 2, 3, 3]), torch.Size([1, 3, 2, 5, 5]))
    """
    rank = log_decay.ndim - 3
    if rank < 1 or log_decay.shape[-1] != rank:
        raise ValueError(f"log_decay has shape {tuple(log_decay.shape)}; (B, *grid, heads, rank) is allowed")
    wide = torch.promote_types(log_decay.dtype, torch.float32)
    masks = []
    for axis, along in enumerate(log_decay.unbind(-1)):
        sums = along.to(wide).cumsum(axis + 1).movedim(axis + 1, -1)  # (B, *others, heads, S)
        masks.append(-(sums.unsqueeze(-1) - sums.unsqueeze(-2)).abs())
    return tuple(masks)


def path_log_mask(log_decay: Tensor) -> Tensor:
    """Logarithm of the polyline path mask, the sum over axes of `axis_log_masks`: O(N^2), no walk along the paths.

    Args:
        log_decay: (B, *grid, heads, rank), not positive.

    Returns:
        (B, heads, N, N), query, then key, in row-major order. Transposed, it is the mask of the opposite order of axes.

    Example:
        >>> path_log_mask(-torch.rand(1, 3, 5, 2, 2)).shape
        torch.Size([1, 2, 15, 15])
    """
    masks = axis_log_masks(log_decay)
    axes = range(len(masks))
    total = None
    for axis, mask in enumerate(masks):
        # A line along this axis passes the query's places on the axes before it and the key's on those after it.
        others = " ".join(f"q{a}" if a < axis else f"k{a}" for a in axes if a != axis)
        queries = " ".join(f"q{a}" if a <= axis else "1" for a in axes)
        keys = " ".join(f"k{a}" if a >= axis else "1" for a in axes)
        mask = rearrange(mask, f"b {others} h q{axis} k{axis} -> b h {queries} {keys}")
        total = mask if total is None else total + mask
    assert total is not None
    return total.flatten(2 + len(masks)).flatten(2, 1 + len(masks))


def path_mask_product(log_decay: Tensor, x: Tensor, *, transposed: bool = False, backend: str = "auto") -> Tensor:
    """y = L x, or L^T x, of the polyline path mask L, without the matrix over all pairs of positions.

    L is a product of one factor per axis that mixes positions of one line only, so y needs one pass per axis: the first
    axis first for L, the last axis first for L^T. Inside a line, both directions are linear recurrences,
    y_i = f_i + b_i - x_i with f_i = a_i f_{i-1} + x_i and b_i = a_{i+1} b_{i+1} + x_i.

    Args:
        log_decay: (B, *grid, heads, rank), not positive.
        x: (B, *grid, heads, channels).
        transposed: L^T in place of L.
        backend: "scan" costs O(N), "lines" makes one matrix per line, "reference" makes L; "auto" takes the scan.

    Returns:
        Like `x`.

    Raises:
        ValueError: shapes that do not fit, an unknown backend.

    Example:
        >>> path_mask_product(-torch.rand(1, 3, 5, 2, 2), torch.randn(1, 3, 5, 2, 7)).shape
        torch.Size([1, 3, 5, 2, 7])
    """
    check_choice("backend", backend, ("auto", "scan", "lines", "reference"))
    if log_decay.shape[:-1] != x.shape[:-1] or log_decay.shape[-1] != x.ndim - 3:
        raise ValueError(
            f"log_decay {tuple(log_decay.shape)} and x {tuple(x.shape)} must be (B, *grid, heads, rank) and "
            "(B, *grid, heads, channels)"
        )
    if backend == "reference":
        mask = path_log_mask(log_decay).exp().to(x.dtype)
        mask = mask.transpose(-1, -2) if transposed else mask
        return torch.einsum("bhqk,bkhc->bqhc", mask, x.flatten(1, -3)).reshape(x.shape)
    order = range(x.ndim - 3)
    if backend == "lines":
        weights = [mask.exp().to(x.dtype) for mask in axis_log_masks(log_decay)]
        return mix_lines(weights, x, reversed(order) if transposed else order)
    for axis in reversed(order) if transposed else order:
        x = _scan_both_ways(log_decay[..., axis], x, axis + 1)
    return x


def mix_lines(weights: Sequence[Tensor], x: Tensor, axes: Iterable[int]) -> Tensor:
    """Mixes the positions of every line along one axis after the other.

    Args:
        weights: one tensor per axis, (B, *grid without the axis, heads, S, S).
        x: (B, *grid, heads, channels).
        axes: the axes in the order in which they are mixed.

    Returns:
        Like `x`.
    """
    for axis in axes:
        x = (weights[axis] @ x.movedim(axis + 1, -2)).movedim(-2, axis + 1)
    return x


def _scan_both_ways(log_decay: Tensor, x: Tensor, dim: int) -> Tensor:
    decay, sequence = log_decay.movedim(dim, 0).unsqueeze(-1).expand_as(x.movedim(dim, 0)), x.movedim(dim, 0)
    forward = linear_scan(decay, sequence)
    # The step from i to i + 1 decays by the entry of i + 1 in both directions.
    after = torch.cat([decay[1:], torch.zeros_like(decay[:1])])
    backward = linear_scan(after.flip(0), sequence.flip(0)).flip(0)
    return (forward + backward - sequence).movedim(0, dim)

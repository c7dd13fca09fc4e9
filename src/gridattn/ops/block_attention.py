"""Local attention of sequences and grids: a block of queries sees its own block and the whole blocks around it."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from gridattn.ops.common import check_same_kind, per_axis
from gridattn.ops.padding import pad_grid
from gridattn.ops.relative_attention import relative_attention


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | Sequence[int],
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
    relative: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of blocks of w positions per axis to their own block and the next one on either side of every axis.

    Args:
        query: (B, *grid, heads, head_dim), 1 to 3 axes; a grid that blocks do not fill is padded, the padding not seen.
        key: like `query`.
        value: (B, *grid, heads, value_dim).
        window_size: w, one int or one per axis.
        is_causal: a query sees keys up to its own position in row-major order.
        mask: (B, *grid) bool, True for real positions; a masked position neither sees nor is seen. Its own output
            means nothing.
        relative: two tables (2 M + 1, channels) of vectors by distance for keys and values, see `relative_attention`,
            which gets the query times `scale`; for causal attention along one axis.
        scale: factor of the logits; head_dim ** -0.5 when None.

    Returns:
        (B, *grid, heads, value_dim).

    Raises:
        ValueError: shapes that do not fit, a window below 1, relative positions on a grid or without causality.

    Source: Efficient Content-Based Sparse Attention with Routing Transformers, arXiv 2003.05997 (local heads).

    Example:
        >>> q, k, v = torch.randn(3, 1, 10, 7, 2, 8).unbind(0)
        >>> block_attention(q, k, v, 4, is_causal=True).shape
        torch.Size([1, 10, 7, 2, 8])
    """
    check_same_kind(query=query, key=key, value=value)
    if query.ndim not in (4, 5, 6) or query.shape != key.shape or query.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} must be "
            "(B, *grid, heads, channels) with 1 to 3 axes, equal but for the channels of value"
        )
    grid = query.shape[1:-2]
    if relative is not None and not (is_causal and len(grid) == 1):
        raise ValueError(f"relative is for causal attention along one axis; is_causal={is_causal}, grid={tuple(grid)}")
    blocks = Blocks(grid, per_axis(window_size, len(grid), "window_size"), is_causal)
    q, k, v = blocks.queries(query), blocks.keys(key), blocks.keys(value)
    q, k, v = (rearrange(t, "b n p h d -> b n h p d") for t in (q, k, v))

    place = torch.arange(prod(grid), device=query.device).view(1, *grid, 1, 1)
    query_at, key_at = (cut(place + 1).squeeze(3).squeeze(3) for cut in (blocks.queries, blocks.keys))
    query_at, key_at = query_at.unsqueeze(-1), key_at.unsqueeze(-2)  # (1, blocks, queries, keys), 0 outside the grid
    visible = (key_at > 0) & (key_at <= query_at) if is_causal else (key_at > 0).expand(-1, -1, q.shape[-2], -1)
    real_queries = query_at > 0
    if mask is not None:
        real = mask.unsqueeze(-1).unsqueeze(-1)
        shown_queries, shown_keys = (cut(real).squeeze(3).squeeze(3) for cut in (blocks.queries, blocks.keys))
        real_queries = real_queries & shown_queries.unsqueeze(-1)
        visible = visible & shown_keys.unsqueeze(-2)
    # No row may be empty: a query that is masked or outside the grid weighs all keys of its window alike.
    visible = visible | ~real_queries
    q = q * real_queries.unsqueeze(2)
    visible = visible.unsqueeze(2).expand(len(q), -1, -1, -1, -1).flatten(0, 1)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    if relative is None:
        out = F.scaled_dot_product_attention(*flat, attn_mask=visible, scale=scale)
    else:
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        out = relative_attention(factor * flat[0], flat[1], flat[2], relative, visible=visible)
    return blocks.merge(rearrange(out.unflatten(0, q.shape[:2]), "b n h p d -> b n p h d"))


def block_attention_pairs(grid: Sequence[int], window_size: Sequence[int], is_causal: bool = False) -> int:
    """Products of a query and a key that `block_attention` computes per head, padding included.

    Example:
        >>> block_attention_pairs((8,), (4,)), block_attention_pairs((8,), (4,), is_causal=True)
        (96, 64)
    """
    blocks = Blocks(grid, window_size, is_causal)
    return prod(blocks.counts) * prod(window_size) * prod(blocks.window)


class Blocks:
    """Cuts a grid into blocks of queries and the windows of keys around them.

    Causal windows have no block after their own along the first axis.
    """

    def __init__(self, grid: Sequence[int], size: Sequence[int], is_causal: bool = False) -> None:
        self.grid, self.size = tuple(grid), tuple(size)
        self.counts = tuple((g + w - 1) // w for g, w in zip(grid, size))  # ONNX cuts off where -(-g // w) rounds down
        self.after = tuple(0 if is_causal and axis == 0 else w for axis, w in enumerate(size))
        self.window = tuple(2 * w + after for w, after in zip(size, self.after))

    def queries(self, x: Tensor) -> Tensor:
        """(B, *grid, heads, d) -> (B, blocks, positions, heads, d)."""
        return self._unfold(pad_grid(x, [(0, n * w - g) for g, n, w in self._sizes()]), self.size)

    def keys(self, x: Tensor) -> Tensor:
        """(B, *grid, heads, d) -> (B, blocks, positions of the window, heads, d), zeros outside the grid."""
        padding = [(w, n * w - g + after) for (g, n, w), after in zip(self._sizes(), self.after)]
        return self._unfold(pad_grid(x, padding), self.window)

    def merge(self, x: Tensor) -> Tensor:
        """Undoes `queries`."""
        axes = range(len(self.grid))
        spread = " ".join(f"(n{a} w{a})" for a in axes)
        flat = f"b ({' '.join(f'n{a}' for a in axes)}) ({' '.join(f'w{a}' for a in axes)}) h d"
        sizes = {f"n{a}": self.counts[a] for a in axes} | {f"w{a}": self.size[a] for a in axes}
        x = rearrange(x, f"{flat} -> b {spread} h d", **sizes)
        return x[(slice(None), *(slice(g) for g in self.grid))]

    def _sizes(self) -> zip:
        return zip(self.grid, self.counts, self.size)

    def _unfold(self, x: Tensor, window: Sequence[int]) -> Tensor:
        for axis, (size, step) in enumerate(zip(window, self.size), start=1):
            x = x.unfold(axis, size, step)  # the window becomes the last axis
        rank = len(window)
        return x.flatten(-rank).flatten(1, rank).movedim(-1, 2)

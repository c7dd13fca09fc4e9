"""`natten.modules`: multi-head neighborhood attention with its projections, on grids of rank 1, 2 and 3."""

from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor, nn

from gridattn.compat.natten.functional import neighborhood_attention_generic
from gridattn.ops.common import check_channels, check_probability, per_axis, per_axis_flag


class _NeighborhoodAttention(nn.Module):
    rank: ClassVar[int]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
        is_causal: Any = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = check_channels(embed_dim, num_heads)
        self.scale = qk_scale or self.head_dim**-0.5
        self.kernel_size = per_axis(kernel_size, self.rank, "kernel_size", minimum=2)
        self.stride = per_axis(1 if stride is None else stride, self.rank, "stride")
        self.dilation = per_axis(1 if dilation is None else dilation, self.rank, "dilation")
        self.is_causal = per_axis_flag(False if is_causal is None else is_causal, self.rank, "is_causal")
        if any(s > k for s, k in zip(self.stride, self.kernel_size)):
            raise ValueError(f"stride={self.stride} exceeds kernel_size={self.kernel_size}; at most that is allowed")
        check_probability("proj_drop", proj_drop)
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, embed_dim) -> (B, *grid, embed_dim).

        Raises:
            ValueError: another rank or channel count, or a grid smaller than kernel_size * dilation.
        """
        if x.ndim != self.rank + 2:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; {type(self).__name__} takes (batch, {self.rank} grid axes, channels)"
            )
        if x.shape[-1] != self.embed_dim:
            raise ValueError(f"x has {x.shape[-1]} channels; {type(self).__name__} has embed_dim={self.embed_dim}")
        q, k, v = rearrange(self.qkv(x), "... (three h d) -> three ... h d", three=3, h=self.num_heads).unbind(0)
        out = neighborhood_attention_generic(
            q, k, v, self.kernel_size, self.stride, self.dilation, self.is_causal, scale=self.scale
        )
        return self.proj_drop(self.proj(rearrange(out, "... h d -> ... (h d)")))

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, dilation={self.dilation}, is_causal={self.is_causal}"
        )


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Neighborhood attention on sequences: proj(NA(qkv(x))), (B, X, C) -> (B, X, C).

    Args:
        embed_dim: channels C.
        num_heads: heads; must divide `embed_dim`.
        kernel_size: window size, one int or one per axis, at least 2.
        stride: queries that share a window; 1 when None.
        dilation: step between the keys of a window; 1 when None.
        is_causal: axes along which a query sees no later key; none when None.
        qkv_bias: bias in the query/key/value projection.
        qk_scale: factor of the logits; head_dim ** -0.5 when None or 0.
        proj_drop: dropout probability of the output.

    Raises:
        ValueError: sizes or flags that are not allowed.

    Source: arXiv 2204.07143 (NAT), arXiv 2504.16922 (GNA).

    Example:
        >>> import torch
        >>> NeighborhoodAttention1D(32, num_heads=4, kernel_size=7, is_causal=True)(torch.randn(2, 20, 32)).shape
        torch.Size([2, 20, 32])
    """

    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Neighborhood attention on images, (B, H, W, C) -> (B, H, W, C); arguments as in `NeighborhoodAttention1D`.

    Example:
        >>> import torch
        >>> NeighborhoodAttention2D(32, num_heads=4, kernel_size=(3, 5), dilation=2)(torch.randn(1, 9, 11, 32)).shape
        torch.Size([1, 9, 11, 32])
    """

    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Neighborhood attention on volumes, (B, D, H, W, C) -> (B, D, H, W, C); arguments as in `NeighborhoodAttention1D`.

    Example:
        >>> import torch
        >>> layer = NeighborhoodAttention3D(32, num_heads=4, kernel_size=3, is_causal=(True, False, False))
        >>> layer(torch.randn(1, 4, 5, 6, 32)).shape
        torch.Size([1, 4, 5, 6, 32])
    """

    rank = 3

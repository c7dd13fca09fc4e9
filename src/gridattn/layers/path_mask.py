"""Polyline path masked attention: neighbours along short paths weigh more, and the content decides how much more."""

import math
from collections.abc import Mapping, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, value_gradient_map
from gridattn.layers.large_kernel import DepthwiseConv
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels, check_choice
from gridattn.ops.path_attention import MASKINGS, criss_cross_path_attention, path_attention
from gridattn.ops.rotary import rotary_frequencies, rotate

MASKS = ("polyline", "one_way", "shared", "manhattan", "none")


class PathDecay(nn.Module):
    """Predicts the decays of every position, one per axis and head: log a = -exp(A_log) softplus(w . x + dt_bias).

    One linear map from the channels of a head to the axes serves all heads; the first of its outputs belongs to the
    last axis.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        rank: number of grid axes.
        shared: one decay for all axes.
    """

    def __init__(self, dim: int, num_heads: int, rank: int = 2, shared: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.rank = rank
        self.dt_linear = nn.Linear(check_channels(dim, num_heads), 1 if shared else rank, bias=False)
        nn.init.trunc_normal_(self.dt_linear.weight, std=0.02)
        # softplus(dt_bias) starts between 0.001 and 0.1, spread evenly on a logarithmic scale.
        rate = torch.empty(num_heads).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp_min(1e-4)
        self.dt_bias = nn.Parameter(rate + torch.log(-torch.expm1(-rate)))
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1.0, 1.1).log())

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> log decays (B, *grid, heads, rank), entry a along axis a."""
        steps = self.dt_linear(x.unflatten(-1, (self.num_heads, -1))).flip(-1)
        log_decay = -self.A_log.exp().unsqueeze(-1) * F.softplus(steps + self.dt_bias.unsqueeze(-1))
        return log_decay.expand(*log_decay.shape[:-1], self.rank)


def manhattan_log_decay(num_heads: int, *, base: float = 2.0, spread: float = 4.0) -> Tensor:
    """Fixed decays per step, log(1 - 2 ** -(base + spread * i / heads)) for head i: a mask by Manhattan distance.

    Returns:
        (heads).

    Source: RMT: Retentive Networks Meet Vision Transformers, arXiv 2309.11523.

    Example:
        >>> manhattan_log_decay(2).exp().tolist()
        [0.75, 0.9375]
    """
    return torch.log(1 - 2.0 ** -(base + spread * torch.arange(num_heads) / num_heads))


@register_attention(
    "polyline_path",
    summary="dense attention whose weights decay along straight paths through the content",
    source="arXiv 2506.15940",
    decomposed=False,
)
@register_attention(
    "polyline_path_criss_cross",
    summary="attention inside rows, then columns, and the other way, decaying along straight paths",
    source="arXiv 2506.15940",
    ranks=(2, 3),
    decomposed=True,
)
class PolylinePathAttention(GridAttention):
    """Multi-head attention under a polyline path mask, plus a depth-wise convolution of the values.

    Every position predicts how much is lost when a path steps over it along each axis (`PathDecay`); the mask of a pair
    is the product along the path that goes straight along one axis, then straight along the next. Its logarithm and
    that of the opposite path are added to the logits and the two attentions are averaged. Query and key are rotated by
    their row-major position.

        y = out_proj(attention(q, k, v, mask) + lepe(v))

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim` into heads of even size.
        grid: the nominal grid; only its length, the rank, is used.
        decomposed: attention inside lines, axis after axis in both orders, instead of over all pairs.
        mask: "polyline"; "one_way", the first path only (first axis first); "shared", one decay for all axes;
            "manhattan", fixed decays per head; "none".
        masking: "added" to the logits, or "multiplied" to the weights, which then do not sum to one.
        qkv_bias: bias in the query, key and value projections.
        scale: factor of the logits; head_dim ** -0.5 when None.
        decay_base: with "manhattan", the decay of the first head, see `manhattan_log_decay`.
        decay_spread: with "manhattan", the range over heads.

    Raises:
        ValueError: a `dim` that the heads do not divide evenly, an unknown mask or masking.

    Source: Zhao et al., Polyline Path Masked Attention for Vision Transformer, arXiv 2506.15940.

    Example:
        >>> PolylinePathAttention(32, num_heads=4)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    exact_map = True
    manhattan: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        decomposed: bool = False,
        mask: str = "polyline",
        masking: str = "added",
        qkv_bias: bool = True,
        scale: float | None = None,
        decay_base: float = 2.0,
        decay_spread: float = 4.0,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        head_dim = check_channels(dim, num_heads)
        if head_dim % 2:
            raise ValueError(f"dim={dim} over num_heads={num_heads} gives heads of {head_dim}; an even size is allowed")
        check_choice("mask", mask, MASKS)
        check_choice("masking", masking, MASKINGS)
        self.num_heads = num_heads
        self.decomposed = decomposed
        self.mask = mask
        self.masking = masking
        self.scale = scale
        self.order = self._order()
        self.q_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.lepe = DepthwiseConv(dim, (5,) * self.rank)
        self.out_proj = nn.Linear(dim, dim)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        learned = mask not in ("manhattan", "none")
        self.path_embed = PathDecay(dim, num_heads, self.rank, shared=mask == "shared") if learned else None
        fixed = manhattan_log_decay(num_heads, base=decay_base, spread=decay_spread) if mask == "manhattan" else None
        self.register_buffer("manhattan", fixed, persistent=False)

    def _order(self) -> str:
        if self.mask == "one_way":
            return "forward"
        # Manhattan distance is the same both ways, so one order is enough; lines are mixed last axis first (RMT).
        return "reverse" if self.mask == "manhattan" else "both"

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        query, key, value = self._project(x)
        out = self._attend(query, key, value, self.log_decay(x)).flatten(-2)
        return self.out_proj(out + self.lepe(value.flatten(-2)))

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Log decays of every position, (B or 1, *grid, heads, rank); None without a mask."""
        if self.path_embed is not None:
            return self.path_embed(x)
        if self.mask == "none":
            return None
        return self.manhattan.unsqueeze(-1).expand(1, *x.shape[1:-1], self.num_heads, self.rank)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        sin, cos = (t.unsqueeze(-2) for t in raster_rotation(x.shape[1:-1], query.shape[-1], x.device))
        return rotate(query, sin, cos), rotate(key, sin, cos), value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None) -> Tensor:
        attend = criss_cross_path_attention if self.decomposed else path_attention
        return attend(query, key, value, log_decay, order=self.order, masking=self.masking, scale=self.scale)

    def macs(self, grid: Sequence[int]) -> int:
        n = prod(grid)
        decays = 0 if self.path_embed is None else n * self.num_heads * self.path_embed.dt_linear.weight.numel()
        orders = 2 if self.order == "both" else 1
        fused = orders if self.masking == "added" and self.mask != "none" else 1
        attention = (1 + orders) * n * sum(grid) * self.dim if self.decomposed else fused * 2 * n**2 * self.dim
        return 4 * n * self.dim**2 + self.lepe.macs(grid) + decays + attention

    def memory(self, grid: Sequence[int], bytes_per_element: int = 4) -> int:
        """Input, output, query, key, value, and of every pair that meets: logits, mask and weights."""
        n = prod(grid)
        pairs = n * sum(grid) if self.decomposed else n**2
        return bytes_per_element * (5 * n * self.dim + 4 * pairs * self.num_heads)

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """Weights of one query, summing to one unless the mask is multiplied; without the convolution of values."""
        position = self.check_query(x, query)
        q, k, v = self._project(x)
        log_decay = self.log_decay(x)
        return value_gradient_map(lambda value: self._attend(q, k, value, log_decay), v, position)


def raster_rotation(grid: Sequence[int], head_dim: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Sine and cosine of the rotation of every position by its row-major index: two of (*grid, head_dim / 2).

    Example:
        >>> sin, cos = raster_rotation((5, 7), 8)
        >>> sin.shape
        torch.Size([5, 7, 4])
    """
    index = torch.arange(prod(grid), device=device, dtype=torch.float32).view(*grid, 1)
    angles = index * rotary_frequencies(head_dim, closed=True, device=device)
    return angles.sin(), angles.cos()


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of the authors' attention module (either form) -> state of `PolylinePathAttention`."""
    return {name.replace("lepe.conv.", "lepe."): tensor for name, tensor in state.items()}

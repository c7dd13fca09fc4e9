"""Multi-scale deformable attention: as cross-attention to a pyramid, and as self-attention on one grid."""

from collections.abc import Sequence
from math import pi, prod

import torch
from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, value_gradient_map
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels
from gridattn.ops.deformable import Shapes, deformable_attention


class MultiScaleDeformableAttention(nn.Module):
    """Cross-attention in which a query reads a few points around its reference on every level of a pyramid.

        out_q = W_o concat_heads( sum_l sum_p A_qlp V_l(r_ql + D_qlp / (w_l, h_l)) )    V = W_v memory

    The offsets D = W_D q, in positions of level l, and the weights A, a softmax of W_A q over all levels and points,
    come from the query alone: there are no keys. At first head i looks along the direction 2 pi i / heads, its point p
    at p + 1 positions, all with the same weight. Parameters are named as in the official code.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        num_levels: levels of the pyramid.
        num_points: points a query reads on each level with each head.

    Source: Zhu et al., Deformable DETR, arXiv 2010.04159; used by Group Pose, arXiv 2308.07313, and MS-Occ,
    arXiv 2504.15888.

    Example:
        >>> attention = MultiScaleDeformableAttention(32, num_levels=2)
        >>> query, memory = torch.randn(1, 5, 32), torch.randn(1, 8 * 8 + 4 * 4, 32)
        >>> attention(query, torch.rand(1, 5, 2, 2), memory, [(8, 8), (4, 4)]).shape
        torch.Size([1, 5, 32])
    """

    def __init__(self, dim: int, num_heads: int = 8, num_levels: int = 4, num_points: int = 4) -> None:
        super().__init__()
        check_channels(dim, num_heads)
        for name, value in (("num_levels", num_levels), ("num_points", num_points)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not allowed; it must be a positive int")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        points = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, 2 * points)
        self.attention_weights = nn.Linear(dim, points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the star of first offsets, equal weights, and Xavier projections."""
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
        for linear in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(linear.bias)
        angle = torch.arange(self.num_heads) * (2 * pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        reach = torch.arange(1, self.num_points + 1).view(-1, 1)
        star = (direction[:, None, None] * reach).expand(-1, self.num_levels, -1, -1)
        self.sampling_offsets.bias.copy_(star.flatten())

    def forward(
        self, query: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes, padding: Tensor | None = None
    ) -> Tensor:
        """Reads the memory at the points that the queries choose.

        Args:
            query: (B, Q, C).
            reference: (B, Q, levels, 2), x then y, 0 and 1 at the outer borders of a level; any float is allowed.
            memory: (B, S, C), the positions of all levels in row-major order, one level after the other.
            shapes: (height, width) of each level.
            padding: (B, S) bool, True at positions of the memory that count as zero.

        Returns:
            (B, Q, C).
        """
        locations, weights = self.points(query, reference, shapes)
        out = deformable_attention(self.project(memory, padding), shapes, locations, weights)
        return self.output_proj(out.flatten(-2))

    def points(self, query: Tensor, reference: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
        """Where each query reads, (B, Q, heads, levels, points, 2), and with what weight, the same without the 2."""
        if len(shapes) != self.num_levels:
            raise ValueError(f"shapes={list(shapes)} has {len(shapes)} levels; {self.num_levels} are allowed")
        heads, levels = self.num_heads, self.num_levels
        logits = self.attention_weights(query).unflatten(-1, (heads, -1))
        weights = logits.softmax(-1).unflatten(-1, (levels, -1))
        offsets = rearrange(self.sampling_offsets(query), "b q (h l p xy) -> b q h l p xy", h=heads, l=levels, xy=2)
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        scaled = [
            torch.stack([offsets[:, :, :, level, :, 0] / width, offsets[:, :, :, level, :, 1] / height], dim=-1)
            for level, (height, width) in enumerate(shapes)
        ]
        return reference[:, :, None, :, None] + torch.stack(scaled, dim=3), weights

    def project(self, memory: Tensor, padding: Tensor | None = None) -> Tensor:
        """(B, S, C) -> values (B, S, heads, head_dim), zero where the memory is padded."""
        value = self.value_proj(memory)
        if padding is not None:
            value = value.masked_fill(padding.unsqueeze(-1), 0.0)
        return value.unflatten(-1, (self.num_heads, -1))


@register_attention(
    "deformable",
    summary="every position reads a few points around itself, at offsets that it chooses",
    source="arXiv 2010.04159",
    ranks=(2,),
    linear_cost=True,
)
class DeformableAttention(GridAttention):
    """Deformable self-attention on one grid: `MultiScaleDeformableAttention` with each position its own reference.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid; only its length, 2, is used.
        num_points: points that a position reads with each head.

    Source: Zhu et al., Deformable DETR, arXiv 2010.04159; the encoder of Group Pose, arXiv 2308.07313.

    Example:
        >>> DeformableAttention(32, num_heads=4)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    exact_map = True

    def __init__(self, dim: int, num_heads: int = 4, *, grid: Sequence[int] = (14, 14), num_points: int = 4) -> None:
        if len(grid) != 2:
            raise ValueError(f"grid={tuple(grid)} has {len(grid)} axes; 2 are allowed")
        super().__init__(dim, rank=2)
        self.attention = MultiScaleDeformableAttention(dim, num_heads, num_levels=1, num_points=num_points)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        grid = self.check_input(x)
        tokens = x.flatten(1, 2)
        return self.attention(tokens, self._reference(x, grid), tokens, [grid]).view(x.shape)

    def _reference(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        centres = grid_centres(grid, x.dtype, x.device)
        return centres.view(1, -1, 1, 2).expand(len(x), -1, -1, -1)

    def macs(self, grid: Sequence[int]) -> int:
        chosen = 3 * self.attention.num_heads * self.attention.num_points
        return prod(grid) * self.dim * (2 * self.dim + chosen)

    def memory(self, grid: Sequence[int], bytes_per_element: int = 4) -> int:
        heads, points = self.attention.num_heads, self.attention.num_points
        return prod(grid) * bytes_per_element * ((5 + points) * self.dim + 3 * heads * points)

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        position = self.check_query(x, query)
        grid, tokens = tuple(x.shape[1:3]), x.flatten(1, 2)
        locations, weights = self.attention.points(tokens, self._reference(x, grid), [grid])
        value = self.attention.project(tokens).unflatten(1, grid)
        return value_gradient_map(
            lambda v: deformable_attention(v.flatten(1, 2), [grid], locations, weights).view_as(v), value, position
        )


def grid_centres(grid: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Centres (x, y) of the positions of a grid of (height, width), 0 and 1 at its outer borders.

    Returns:
        (height * width, 2), row-major.

    Example:
        >>> grid_centres((1, 2), torch.float32, torch.device("cpu")).tolist()
        [[0.25, 0.5], [0.75, 0.5]]
    """
    rows, columns = ((torch.arange(n, dtype=dtype, device=device) + 0.5) / n for n in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)

"""Attention in the epipolar planes of a light field, its transformer, and the filter that alternates the directions."""

from collections.abc import Sequence
from math import prod

from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, split_heads, value_gradient_map
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels
from gridattn.ops.epipolar import band_mask, epipolar_attention


@register_attention(
    "epipolar",
    summary="attention inside epipolar planes: all of the first axis, a band along the second",
    source="arXiv 2302.08058",
    ranks=(2, 4),
    linear_cost=False,
)
class EpipolarAttention(GridAttention):
    """Attention inside the epipolar planes of a light field.

    On a grid (views, pixels) a query sees every view and the pixels within a band around its own. On a light field
    (u, v, h, w) it does so in two planes, (u, h) at its v and w and (v, w) at its u and h; their mean is the output.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid; only its length, 2 or 4, is used.
        band: pixels seen along the spatial axis, the query's own in the middle; at least 2. The authors use 11.
        qkv_bias: bias in the projections; the authors have none.
        scale: factor of the logits; head_dim ** -0.5 when None.

    Source: Liang et al., Learning Non-Local Spatial-Angular Correlation for Light Field Image Super-Resolution,
    ICCV 2023, arXiv 2302.08058.

    Example:
        >>> import torch
        >>> EpipolarAttention(32, grid=(5, 5, 16, 16))(torch.randn(1, 5, 5, 12, 18, 32)).shape
        torch.Size([1, 5, 5, 12, 18, 32])
    """

    exact_map = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        band: int = 11,
        qkv_bias: bool = False,
        scale: float | None = None,
    ) -> None:
        check_channels(dim, num_heads)
        if len(grid) not in (2, 4):
            raise ValueError(f"grid={tuple(grid)} has {len(grid)} axes; 2 (a plane) or 4 (a light field) are allowed")
        if isinstance(band, bool) or not isinstance(band, int) or band < 2:
            raise ValueError(f"band={band!r} is not allowed; it must be an int of at least 2")
        super().__init__(dim, rank=len(grid))
        self.num_heads, self.band, self.scale = num_heads, band, scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        return self.proj(self._attend(*self._project(x)).flatten(-2))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return split_heads(self.qkv(x), 3, self.num_heads)

    def _attend(self, *qkv: Tensor) -> Tensor:
        if self.rank == 2:
            return self._attend_plane(*qkv)
        _, u, v, y, x = qkv[0].shape[:5]
        vertical = self._attend_plane(*(rearrange(t, "b u v y x h d -> (b v x) u y h d") for t in qkv))
        horizontal = self._attend_plane(*(rearrange(t, "b u v y x h d -> (b u y) v x h d") for t in qkv))
        vertical = rearrange(vertical, "(b v x) u y h d -> b u v y x h d", v=v, x=x)
        horizontal = rearrange(horizontal, "(b u y) v x h d -> b u v y x h d", u=u, y=y)
        return (vertical + horizontal) / 2

    def _attend_plane(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        views = query.shape[1]
        return epipolar_attention(query, key, value, (max(2 * views, 2), self.band), scale=self.scale)

    def macs(self, grid: Sequence[int]) -> int:
        planes = [(grid[0], grid[1])] if self.rank == 2 else [(grid[0], grid[2]), (grid[1], grid[3])]
        pairs = sum(prod(grid) * views * self._counted_band(pixels) for views, pixels in planes)
        return 4 * prod(grid) * self.dim**2 + int(2 * pairs * self.dim)

    def _counted_band(self, pixels: int) -> float:
        """Keys per query along the spatial axis that the operator works on, those beyond the borders included."""
        before, after = self.band // 2, self.band - self.band // 2 - 1
        if min(before, after) >= pixels - 1:
            return pixels
        return self.band * (pixels + self.band - 1) / pixels

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        position = self.check_query(x, query)
        q, k, v = self._project(x)
        return value_gradient_map(lambda value: self._attend(q, k, value), v, position)


class EpipolarTransformer(nn.Module):
    """The transformer of one epipolar plane: attention and feed-forward, each with a residual, between two projections.

    Queries and keys come from the normalised tokens, values from the tokens as they are. There is no position code, no
    bias but in the norms, and no residual around the whole.

    Args:
        channels: channels C in and out.
        dim: width of the tokens.
        num_heads: heads; must divide `dim`.
        field: (views, pixels) seen around a query, cut at the borders.

    Source: arXiv 2302.08058.

    Example:
        >>> import torch
        >>> EpipolarTransformer(8, dim=16, num_heads=8, field=(10, 11))(torch.randn(3, 5, 13, 8)).shape
        torch.Size([3, 5, 13, 8])
    """

    def __init__(self, channels: int, dim: int, num_heads: int, field: Sequence[int]) -> None:
        super().__init__()
        check_channels(dim, num_heads)
        self.num_heads, self.field = num_heads, tuple(field)
        self.linear_in = nn.Linear(channels, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim, bias=False), nn.ReLU(), nn.Linear(2 * dim, dim, bias=False)
        )
        self.linear_out = nn.Linear(dim, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, views, pixels, C) -> (B, views, pixels, C); the batch counts planes."""
        tokens = self.linear_in(x)
        to_query, to_key, to_value = self.qkv.weight.chunk(3)
        normalised = self.norm(tokens)
        query, key, value = (
            rearrange(nn.functional.linear(source, weight), "... (h d) -> ... h d", h=self.num_heads)
            for source, weight in ((normalised, to_query), (normalised, to_key), (tokens, to_value))
        )
        tokens = tokens + self.proj(epipolar_attention(query, key, value, self.field).flatten(-2))
        return self.linear_out(tokens + self.mlp(tokens))

    def visible(self, views: int, pixels: int) -> Tensor:
        """(N, N) bool over the plane's positions: which a query (row) may attend to."""
        return band_mask((views, pixels), self.field)


class AlternatingFilter(nn.Module):
    """One transformer and one stack of per-view convolutions, on the vertical planes, then on the horizontal ones.

    a = conv(T(planes (u, h) of z)) + z, then conv(T(planes (v, w) of a)) + z; both residuals start at the input and
    the passes share their weights.

    Args:
        channels: channels C of the light field.
        field: (views, pixels) that the transformer sees.
        num_heads: heads of the transformer, whose width is 2C.

    Source: arXiv 2302.08058.

    Example:
        >>> import torch
        >>> AlternatingFilter(8, field=(6, 11))(torch.randn(1, 3, 3, 9, 12, 8)).shape
        torch.Size([1, 3, 3, 9, 12, 8])
    """

    def __init__(self, channels: int, field: Sequence[int], num_heads: int = 8) -> None:
        super().__init__()
        self.transformer = EpipolarTransformer(channels, 2 * channels, num_heads, field)
        convs = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.LeakyReLU(0.2), convs[1], nn.LeakyReLU(0.2), convs[2])

    def forward(self, z: Tensor) -> Tensor:
        """(B, u, v, h, w, C) -> (B, u, v, h, w, C)."""
        batch, u, v = z.shape[:3]
        planes = self.transformer(rearrange(z, "b u v h w c -> (b v w) u h c"))
        a = self._filter(rearrange(planes, "(b v w) u h c -> b u v h w c", b=batch, v=v)) + z
        planes = self.transformer(rearrange(a, "b u v h w c -> (b u h) v w c"))
        return self._filter(rearrange(planes, "(b u h) v w c -> b u v h w c", b=batch, u=u)) + z

    def _filter(self, field: Tensor) -> Tensor:
        views = self.conv(rearrange(field, "b u v h w c -> (b u v) c h w"))
        return rearrange(views, "(b u v) c h w -> b u v h w c", b=field.shape[0], u=field.shape[1])


_OFFICIAL = {
    "attention.in_proj_weight": "qkv.weight",
    "attention.out_proj.weight": "proj.weight",
    "feed_forward.0.weight": "mlp.0.weight",
    "feed_forward.0.bias": "mlp.0.bias",
    "feed_forward.1.weight": "mlp.1.weight",
    "feed_forward.4.weight": "mlp.3.weight",
}


def load_official_epipolar(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames official keys to those of `EpipolarTransformer` (BasicTrans) or `AlternatingFilter` (AltFilter).

    The 3-D convolutions of AltFilter have kernels (1, 3, 3); ours are 2-D.
    """
    renamed = {}
    for key, tensor in state.items():
        inside = key.removeprefix("epi_trans.")
        prefix = "transformer." if inside != key else ""
        is_conv = key.startswith("conv.")
        renamed[prefix + _OFFICIAL.get(inside, inside)] = tensor.squeeze(2) if is_conv else tensor
    return renamed

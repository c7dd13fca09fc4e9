"""Deformable attention along one axis: keys and values are read at learned, fractional positions of the sequence."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.common import GridAttention
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels
from gridattn.ops.deformable import deformable_attention, deformable_weights


@register_attention(
    "deformable_1d",
    summary="all positions attend to a few, read between positions, that drift with the content",
    source="arXiv 2212.01893",
    ranks=(1,),
)
class DeformableAttention1d(GridAttention):
    """Attention on a line whose keys and values are x at m learned positions, one set for each head.

        v_j = j + s tanh(offset_j)                 j = 0 .. m - 1, m = (n + 2 pad - kernel) // stride + 1
        p_j = 2 v_j / (m - 1) - 1                  in [-1, 1], the outer borders of the sequence
        out = W_o softmax(Q K^T / sqrt(d) + bias(t_i - p_j)) V,    K, V = W_k x(p), W_v x(p)

    x(p) is linearly interpolated, with zero beyond the ends. The offsets come from the queries through a depthwise
    convolution, GELU and a projection to one channel, with weights that the heads share. Each head has its own
    share of the channels of x, for queries, keys and values. The bias is a small network of the signed logarithm of
    the distance. A sequence too short for one window is read as if zeros followed the queries.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid; only its length, 1, is used.
        head_dim: channels of a head in queries, keys and values.
        stride: positions for each key, about.
        kernel_size: window of the convolution; at least `stride`, and of the same parity.
        offset_scale: largest drift s, in steps of keys.
        legacy_grid: as version 0.0.18 of the authors' dependency, which read all keys at the middle of the sequence
            and scaled them by max(0, 1 - |p_j| / 2); for the published weights only.

    Source: Nguyen et al., Joint Self-Supervised Image-Volume Representation Learning, AAAI 2023, arXiv 2212.01893;
    after Xia et al., arXiv 2201.00520.

    Example:
        >>> DeformableAttention1d(32, num_heads=4)(torch.randn(2, 37, 32)).shape
        torch.Size([2, 37, 32])
    """

    exact_map = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (64,),
        head_dim: int = 64,
        stride: int = 4,
        kernel_size: int = 6,
        offset_scale: float = 2.0,
        legacy_grid: bool = False,
    ) -> None:
        if len(grid) != 1:
            raise ValueError(f"grid={tuple(grid)} has {len(grid)} axes; 1 is allowed")
        check_channels(dim, num_heads)
        if head_dim < 1 or stride < 1:
            raise ValueError(f"head_dim={head_dim} and stride={stride} are not allowed; both must be positive ints")
        if kernel_size < stride or (kernel_size - stride) % 2:
            raise ValueError(
                f"kernel_size={kernel_size} is not allowed; it must be stride={stride} plus an even number"
            )
        super().__init__(dim, rank=1)
        self.num_heads, self.head_dim = num_heads, head_dim
        self.stride, self.kernel_size, self.padding = stride, kernel_size, (kernel_size - stride) // 2
        self.offset_scale, self.legacy_grid = offset_scale, legacy_grid
        inner = num_heads * head_dim
        self.to_offsets = nn.Sequential(
            nn.Conv1d(head_dim, head_dim, kernel_size, stride, self.padding, groups=head_dim),
            nn.GELU(),
            nn.Conv1d(head_dim, 1, 1, bias=False),
        )
        self.bias_width = hidden = max(dim // 4, 1)
        self.distance_bias = nn.Sequential(
            nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )
        self.to_q = nn.Conv1d(dim, inner, 1, groups=num_heads, bias=False)
        self.to_k = nn.Conv1d(dim, inner, 1, groups=num_heads, bias=False)
        self.to_v = nn.Conv1d(dim, inner, 1, groups=num_heads, bias=False)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, C) -> (B, n, C)."""
        (length,) = self.check_input(x)
        query = self._project(self.to_q, x)
        place = self._normalise(self._positions(query))
        sampled = self._sample(x, place)
        key, value = self._project(self.to_k, sampled), self._project(self.to_v, sampled)
        bias = self._bias(place, length).to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))

    def sample_positions(self, x: Tensor) -> Tensor:
        """Where each head reads its keys, (B, heads, m), in steps of keys: key j rests at j."""
        self.check_input(x)
        return self._positions(self._project(self.to_q, x))

    def num_keys(self, length: int) -> int:
        """Number m of keys on a sequence of `length`."""
        return max((length + 2 * self.padding - self.kernel_size) // self.stride, 0) + 1

    def _project(self, to: nn.Conv1d, x: Tensor) -> Tensor:
        """(B, n, C) -> (B, heads, n, head_dim)."""
        return rearrange(to(x.transpose(1, 2)), "b (h d) n -> b h n d", h=self.num_heads)

    def _positions(self, query: Tensor) -> Tensor:
        batch, missing = len(query), self.kernel_size - 2 * self.padding - query.shape[2]
        windows = rearrange(query, "b h n d -> (b h) d n")
        if missing > 0:
            windows = F.pad(windows, (0, missing))
        offset = self.to_offsets(windows).squeeze(1).unflatten(0, (batch, self.num_heads))
        offset = offset.to(torch.promote_types(offset.dtype, torch.float32)).tanh() * self.offset_scale
        return torch.arange(offset.shape[-1], dtype=offset.dtype, device=offset.device) + offset

    def _normalise(self, positions: Tensor) -> Tensor:
        return 2 * positions / max(positions.shape[-1] - 1, 1) - 1

    def _points(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Locations (B, m, heads, 1, 1, 1) in [0, 1] and weights without the last axis, for `deformable_attention`."""
        place = rearrange(place, "b h m -> b m h 1 1 1")
        if self.legacy_grid:
            return torch.full_like(place, 0.5), (1 - place.abs() / 2).clamp_min(0).squeeze(-1)
        return (place + 1) / 2, torch.ones_like(place).squeeze(-1)

    def _sample(self, x: Tensor, place: Tensor) -> Tensor:
        """(B, n, C) -> (B, m, C): each head's channels at its own positions."""
        locations, weights = self._points(place)
        channels = x.unflatten(-1, (self.num_heads, -1))
        return deformable_attention(channels, [(x.shape[1],)], locations, weights).flatten(-2)

    def _bias(self, place: Tensor, length: int) -> Tensor:
        """(B, heads, n, m)."""
        own = torch.arange(length, dtype=place.dtype, device=place.device) * (2 / max(length - 1, 1)) - 1
        distance = own.unsqueeze(-1) - place.unsqueeze(-2)
        logarithm = distance.sign() * distance.abs().log1p()
        return self.distance_bias(logarithm.unsqueeze(-1)).squeeze(-1)

    def macs(self, grid: Sequence[int]) -> int:
        (n,) = grid
        m, heads, inner = self.num_keys(n), self.num_heads, self.num_heads * self.head_dim
        hidden = self.bias_width
        projections = (n + 2 * m) * self.dim * self.head_dim + n * inner * self.dim
        offsets = m * inner * (self.kernel_size + 1)
        return projections + offsets + n * m * (2 * inner + heads * hidden * (hidden + 2))

    def memory(self, grid: Sequence[int], bytes_per_element: int = 4) -> int:
        (n,) = grid
        m, hidden = self.num_keys(n), self.bias_width
        tokens = 2 * n * self.dim + (2 * n + 2 * m) * self.num_heads * self.head_dim
        return bytes_per_element * (tokens + 2 * n * m * self.num_heads * hidden)

    @torch.no_grad()
    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        (position,) = self.check_query(x, query)
        length = x.shape[1]
        queries = self._project(self.to_q, x)
        place = self._normalise(self._positions(queries))
        key = self._project(self.to_k, self._sample(x, place))
        logits = torch.einsum("b h d, b h m d -> b h m", queries[:, :, position], key) * self.head_dim**-0.5
        weights = (logits + self._bias(place, length)[:, :, position]).float().softmax(-1)
        corners = deformable_weights([(length,)], *self._points(place)).float()  # (B, m, heads, n)
        return torch.einsum("b h m, b m h n -> b h n", weights, corners)


def deformable_1d_state_from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the official keys to those of `DeformableAttention1d`; the output's 1x1 convolution becomes a Linear."""
    renamed = {
        "rel_pos_bias.mlp.0.0.": "distance_bias.0.",
        "rel_pos_bias.mlp.1.0.": "distance_bias.2.",
        "rel_pos_bias.mlp.2.": "distance_bias.4.",
    }
    result = {}
    for key, tensor in state.items():
        prefix = next((p for p in renamed if key.startswith(p)), "")
        ours = renamed.get(prefix, "") + key.removeprefix(prefix)
        result[ours] = tensor.squeeze(-1) if key == "to_out.weight" else tensor
    return result

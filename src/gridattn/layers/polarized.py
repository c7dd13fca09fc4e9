"""Polarized self-attention: a gate over the channels, a gate over the positions, and both, side by side or in turn."""

from collections.abc import Mapping, Sequence
from math import prod

from torch import Tensor, nn

from gridattn.layers.common import GridAttention
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels, check_choice
from gridattn.ops.polarized import channel_context, spatial_score

LAYOUTS = ("parallel", "sequential", "channel", "spatial")
VARIANTS = ("paper", "official")


class ChannelGate(nn.Module):
    """Gate over the channels: sigmoid(up(c)), c the channel context of half as many channels.

    `up` is a projection and LayerNorm in the paper, a bare projection in the released parallel layer and a bottleneck
    with LayerNorm and ReLU in the released sequential one.
    """

    def __init__(self, dim: int, variant: str, bottleneck: bool) -> None:
        super().__init__()
        inner, has_bias = dim // 2, variant == "paper"
        self.query = nn.Linear(dim, 1, bias=has_bias)
        self.value = nn.Linear(dim, inner, bias=has_bias)
        if variant == "paper":
            self.up = nn.Sequential(nn.Linear(inner, dim), nn.LayerNorm(dim))
        elif bottleneck:
            narrow = inner // 4
            self.up = nn.Sequential(nn.Linear(inner, narrow), nn.LayerNorm(narrow), nn.ReLU(), nn.Linear(narrow, dim))
        else:
            self.up = nn.Sequential(nn.Linear(inner, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, 1, ..., 1, C), values in (0, 1)."""
        context = channel_context(x, self.query.weight, self.query.bias, self.value.weight, self.value.bias)
        gate = self.up(context).sigmoid()
        return gate.reshape(x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])

    def macs(self, positions: int) -> int:
        """Multiply-accumulates for one sample."""
        projections = [module for module in (self.value, *self.up) if isinstance(module, nn.Linear)]
        return 2 * positions * self.query.in_features + sum(p.weight.numel() for p in projections)


class SpatialGate(nn.Module):
    """Gate over the positions: sigmoid of the spatial score; `softmax` as in `gridattn.ops.polarized.spatial_score`."""

    def __init__(self, dim: int, variant: str, softmax: str) -> None:
        super().__init__()
        self.softmax = softmax
        self.query = nn.Linear(dim, dim // 2, bias=variant == "paper")
        self.value = nn.Linear(dim, dim // 2, bias=variant == "paper")

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, 1), values in (0, 1)."""
        score = spatial_score(
            x, self.query.weight, self.query.bias, self.value.weight, self.value.bias, softmax=self.softmax
        )
        return score.sigmoid().unsqueeze(-1)

    def macs(self, positions: int) -> int:
        """Multiply-accumulates for one sample."""
        dim, inner = self.query.in_features, self.query.out_features
        if self.softmax == "value":
            return dim * inner + positions * inner * (dim + 1)
        return 2 * dim * inner + positions * dim


@register_attention(
    "psa_parallel",
    summary="polarized self-attention: sum of a channel gate and a spatial gate",
    source="arXiv 2107.00782",
    linear_cost=True,
    layout="parallel",
)
@register_attention(
    "psa_sequential",
    summary="polarized self-attention: a channel gate, then a spatial gate",
    source="arXiv 2107.00782",
    linear_cost=True,
    layout="sequential",
)
@register_attention(
    "psa_channel",
    summary="channel branch of polarized self-attention alone",
    source="arXiv 2107.00782",
    linear_cost=True,
    layout="channel",
)
@register_attention(
    "psa_spatial",
    summary="spatial branch of polarized self-attention alone",
    source="arXiv 2107.00782",
    linear_cost=True,
    layout="spatial",
)
class PolarizedSelfAttention(GridAttention):
    """Polarized self-attention: gates that keep full resolution in space and half the channels in between.

    With A_ch (one value per channel, from a softmax-weighted mean of the grid) and A_sp (one value per position, its
    match with a pooled query): parallel x * (A_ch(x) + A_sp(x)); sequential y * A_sp(y) with y = x * A_ch(x). Neither
    knows where a position lies: permuting the positions permutes the output.

    Args:
        dim: channels C, at least 2; at least 8 for the official sequential layer.
        num_heads: not used.
        grid: the nominal grid; only its length, the rank, is used.
        layout: "parallel", "sequential", or one branch alone: "channel", "spatial".
        variant: "paper" has biases, LayerNorm before the channel sigmoid and a softmax on the pooled query. "official"
            is the released code: no biases; parallel has no LayerNorm and a softmax over the scores, which keeps its
            spatial gate between 0.5 and 0.7311; sequential has a bottleneck with LayerNorm and a softmax over each
            value channel. Branches alone are then those of the parallel layer.

    Raises:
        ValueError: an unknown layout or variant, or too few channels.

    Source: Polarized Self-Attention: Towards High-quality Pixel-wise Regression, arXiv 2107.00782.

    Example:
        >>> import torch
        >>> PolarizedSelfAttention(32, layout="sequential")(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        layout: str = "parallel",
        variant: str = "paper",
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_channels(dim, 1)
        check_choice("layout", layout, LAYOUTS)
        check_choice("variant", variant, VARIANTS)
        bottleneck = variant == "official" and layout == "sequential"
        least = 8 if bottleneck else 2
        if dim < least:
            raise ValueError(
                f"dim={dim} is too small for variant={variant!r}, layout={layout!r}; at least {least} is needed"
            )
        self.layout = layout
        softmax = "query" if variant == "paper" else "value" if bottleneck else "score"
        self.channel = None if layout == "spatial" else ChannelGate(dim, variant, bottleneck)
        self.spatial = None if layout == "channel" else SpatialGate(dim, variant, softmax)
        if variant == "official":
            for name, weight in self.named_parameters():
                if name.endswith(("query.weight", "value.weight")):
                    nn.init.kaiming_normal_(weight)

    @property
    def gates(self) -> list[ChannelGate | SpatialGate]:
        """The gates of the layout, channels before positions."""
        return [gate for gate in (self.channel, self.spatial) if gate is not None]

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        if self.layout == "parallel":
            channel, spatial = self.gates
            return x * (channel(x) + spatial(x))
        for gate in self.gates:
            x = x * gate(x)
        return x

    def macs(self, grid: Sequence[int]) -> int:
        return sum(gate.macs(prod(grid)) for gate in self.gates)


_OFFICIAL_NAMES = {
    "conv_q_right": "channel.query",
    "conv_v_right": "channel.value",
    "conv_up": "channel.up.0",
    "conv_up.0": "channel.up.0",
    "conv_up.1": "channel.up.1",
    "conv_up.3": "channel.up.3",
    "conv_q_left": "spatial.query",
    "conv_v_left": "spatial.value",
    "ch_wq": "channel.query",
    "ch_wv": "channel.value",
    "ch_wz": "channel.up.0",
    "ln": "channel.up.1",
    "sp_wq": "spatial.query",
    "sp_wv": "spatial.value",
}


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns the weights of one official layer, or of the well-known re-implementation, into those of our layer.

    Args:
        state: keys `conv_q_right.weight`, ... (variant "official") or `ch_wq.weight`, ... (variant "paper").

    Returns:
        State for `PolarizedSelfAttention` of the same variant and layout; 1 x 1 convolutions become linear maps.
    """
    converted = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        converted[f"{_OFFICIAL_NAMES[module]}.{kind}"] = value.flatten(1) if value.ndim == 4 else value.flatten()
    return converted

"""The network of L-SFAN: convolutions over (sensor, time), pooling along time, attention among the sensors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.oriented_pooling import OrientedPoolingAttention
from gridattn.ops.common import check_choice, check_probability
from gridattn.systems.settings import check_least

POOLS = ("time", "sensor", "both")
ATTENDED = ("sensors", "channels")
MIN_FRAMES = 4  # two halvings of the time axis leave one step


class Steps(NamedTuple):
    """What a forward pass goes through.

    Attributes:
        maps: output of the second block, (N, C, V, T // 4).
        pooled: mean over the pooled axes, (N, C, P) with P positions.
        attention: softmax weights (N, heads, tokens, tokens), a row for a query; None without attention.
        attended: the attended tokens, (N, tokens, width); the tokens themselves without attention.
        logits: (N, classes).
    """

    maps: Tensor
    pooled: Tensor
    attention: Tensor | None
    attended: Tensor
    logits: Tensor


class ConvBlock(nn.Sequential):
    """3x3 convolution over (sensor, time), batch normalisation, ReLU, dropout, halving of the time axis by the maximum.

    Args:
        inputs: channels in.
        outputs: channels out.
        batch_norm: whether the convolution is followed by batch normalisation.
        dropout: probability of dropping a value.
    """

    def __init__(self, inputs: int, outputs: int, batch_norm: bool, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs) if batch_norm else nn.Identity()
        self.act = nn.ReLU()
        self.drop = nn.Dropout(dropout)
        self.pool = nn.MaxPool2d((1, 2))


class LSFAN(nn.Module):
    """Lightweight spatially-focused attention network for windows of sensor signals.

    Two `ConvBlock`s give maps (C, V, T // 4), the mean over time gives H (C, V), every sensor is a token of width C:
    Z = MHSA(H^T), logits = fc(flatten(Z^T)), flattened channel by channel. There is no position code. With
    `attend="channels"` the C channels are the tokens, of width V.

    Args:
        sensors: V, rows of the input; their order matters to the convolutions.
        frames: T, nominal length of a window. Other lengths of at least 4 work too, unless `pool="sensor"`.
        num_classes: classes.
        channels: channels of the two blocks; the second is C.
        num_heads: heads of the attention, dividing the width of a token; 0 for no attention.
        attend: "sensors" or "channels", what the tokens are.
        pool: the axis averaged away: "time", "sensor" (the tokens are time steps) or "both".
        hidden: width of a hidden layer of the classifier; None for a linear classifier.
        batch_norm: batch normalisation in the blocks.
        residual: adds the tokens to the attended ones.
        dropout: after each block and before the classifier.

    Raises:
        ValueError: a value out of range, or heads that do not divide the width.

    Source: Ortigoso-Narro et al., L-SFAN, arXiv 2406.16913. Published are the filters over (sensor, time), the pooling
    along time and the attention; sizes and the classifier follow a public adaptation.

    Example:
        >>> network = LSFAN(batch_norm=False)
        >>> sum(parameter.numel() for parameter in network.parameters())
        2682
        >>> network(torch.randn(2, 30, 180)).shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        sensors: int = 30,
        frames: int = 180,
        num_classes: int = 2,
        *,
        channels: Sequence[int] = (4, 16),
        num_heads: int = 4,
        attend: str = "sensors",
        pool: str = "time",
        hidden: int | None = None,
        batch_norm: bool = True,
        residual: bool = False,
        dropout: float = 0.25,
    ) -> None:
        check_least("sensors", sensors, 1)
        check_least("frames", frames, MIN_FRAMES)
        check_least("num_classes", num_classes, 2)
        check_least("num_heads", num_heads, 0)
        check_choice("attend", attend, ATTENDED)
        check_choice("pool", pool, POOLS)
        check_probability("dropout", dropout)
        if len(channels) != 2 or min(channels) < 1:
            raise ValueError(f"channels={list(channels)} is not allowed; two counts of at least 1 are needed")
        if hidden is not None:
            check_least("hidden", hidden, 1)
        super().__init__()
        self.sensors, self.frames, self.attend, self.pool, self.residual = sensors, frames, attend, pool, residual
        self.block1 = ConvBlock(1, channels[0], batch_norm, dropout)
        self.block2 = ConvBlock(channels[0], channels[1], batch_norm, dropout)
        positions = {"time": sensors, "sensor": frames // 2 // 2, "both": 1}[pool]
        tokens, width = (positions, channels[1]) if attend == "sensors" else (channels[1], positions)
        self.attention = OrientedPoolingAttention(width, num_heads, grid=(tokens, 1)) if num_heads else None
        self.drop = nn.Dropout(dropout)
        flat = channels[1] * positions
        self.head: nn.Module = nn.Linear(flat, num_classes)
        if hidden is not None:
            layers = nn.Linear(flat, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, num_classes)
            self.head = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, V, T) -> logits (N, classes)."""
        attended = self._attend(self._tokens(self._pooled(self._maps(x))))
        return self._classify(attended)

    def steps(self, x: Tensor) -> Steps:
        """The same with everything in between; `logits` are those of `forward`."""
        maps = self._maps(x)
        pooled = self._pooled(maps)
        tokens = self._tokens(pooled)
        attended = self._attend(tokens)
        return Steps(maps, pooled, self._weights(tokens), attended, self._classify(attended))

    def logits_of_maps(self, maps: Tensor) -> Tensor:
        """Logits (N, classes) for maps (N, C, V, T // 4) of the second block."""
        return self._classify(self._attend(self._tokens(self._pooled(maps))))

    def _maps(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[1] != self.sensors:
            raise ValueError(f"x has shape {tuple(x.shape)}; (N, {self.sensors}, T) is needed")
        if x.shape[2] < MIN_FRAMES or (self.pool == "sensor" and x.shape[2] // 4 != self.frames // 4):
            needed = f"about {self.frames}, as pool='sensor' fixes it," if self.pool == "sensor" else "at least 4"
            raise ValueError(f"x has {x.shape[2]} frames; {needed} are needed")
        return self.block2(self.block1(x[:, None]))

    def _pooled(self, maps: Tensor) -> Tensor:
        axes = {"time": 3, "sensor": 2, "both": (2, 3)}[self.pool]
        return maps.mean(axes).reshape(len(maps), maps.shape[1], -1)

    def _tokens(self, pooled: Tensor) -> Tensor:
        return pooled.transpose(1, 2) if self.attend == "sensors" else pooled

    def _attend(self, tokens: Tensor) -> Tensor:
        if self.attention is None:
            return tokens
        out = self.attention(tokens[:, :, None])[:, :, 0]
        return tokens + out if self.residual else out

    def _weights(self, tokens: Tensor) -> Tensor | None:
        if self.attention is None:
            return None
        query, key, _ = self.attention._project(tokens)
        logits = query.transpose(1, 2) @ key.transpose(1, 2).mT
        return F.softmax(logits * query.shape[-1] ** -0.5, -1)

    def _classify(self, attended: Tensor) -> Tensor:
        by_channel = attended.transpose(1, 2) if self.attend == "sensors" else attended
        return self.head(self.drop(by_channel.flatten(1)))


def relevance(network: LSFAN, x: Tensor, classes: Tensor | None = None) -> Tensor:
    """Grad-CAM on the second block: which sensor spoke for a class, and when.

    R = ReLU(sum_c a_c A_c), a_c = mean over sensors and time of d logit / d A_c, every step of the maps A repeated to
    the length of the input.

    Args:
        network: in eval mode.
        x: (N, V, T).
        classes: (N,), the class to explain; None takes the predicted one.

    Returns:
        (N, V, T), at least 0, not scaled.
    """
    with torch.no_grad():
        maps = network._maps(x)
    with torch.enable_grad():
        maps = maps.detach().clone().requires_grad_()
        logits = network.logits_of_maps(maps)
        chosen = logits.argmax(1) if classes is None else classes
        (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), maps)
    weighted = (gradient.mean((2, 3), keepdim=True) * maps.detach()).sum(1).relu()
    repeated = weighted.repeat_interleave(4, 2)
    return F.pad(repeated, (0, x.shape[2] - repeated.shape[2]), mode="replicate")


def sensor_weights(attention: Tensor) -> Tensor:
    """How much each token is attended to: (N, heads, tokens, tokens) -> (N, tokens), mean over heads and queries."""
    return attention.mean((1, 2))


def build_lsfan(**network: Any) -> LSFAN:
    """The network for its stored keywords."""
    return LSFAN(**network)

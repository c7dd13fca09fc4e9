"""The two kinds of transformer blocks around attention with routing heads.

A block maps (x, mask, cache) to (x, commitment loss) and has `step` for one more position. `cache` is a `BlockCache`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.cache import SequenceCache
from gridattn.layers.routing import RoutingAttention
from gridattn.ops.common import check_choice
from gridattn.systems.routing_transformer.attention import PaperAttention

NORMS = ("layer", "scale", "rezero")


class BlockCache:
    """What one block keeps of the positions it has seen: of its attention, and the last input of shifted branches."""

    def __init__(self) -> None:
        self.attention = SequenceCache()
        self.last: dict[str, Tensor] = {}


class ScaleNorm(nn.Module):
    """g x / max(|x|, 1e-5), with one learned g."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=1e-5) * self.gain


class FeedForward(nn.Module):
    """fc2(dropout(GELU(fc1 x))); gated, fc2(dropout(GELU(a) * b)) with (a, b) = fc1 x.

    Args:
        dim: channels C.
        hidden: channels in between.
        gated: see above.
        activation: "gelu", "gelu_tanh" or "relu".
        bias: whether both maps have one.
        dropout: probability.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        gated: bool = False,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        activations = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU()}
        check_choice("activation", activation, tuple(activations))
        self.gated = gated
        self.fc1 = nn.Linear(dim, hidden * (2 if gated else 1), bias=bias)
        self.act = activations[activation]
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if not self.gated:
            return self.fc2(self.dropout(self.act(self.fc1(x))))
        a, b = self.fc1(x).chunk(2, -1)
        return self.fc2(self.dropout(self.act(a) * b))


def shift_channels(x: Tensor, is_causal: bool, previous: Tensor | None = None) -> Tensor:
    """Gives part of the channels of every position to its neighbours in the sequence.

    Causal: of two equal segments of channels the second comes from the position before. Otherwise: of three segments
    the first comes from the position after, the third from the one before. A channel left over stays.

    Args:
        x: (B, T, C).
        is_causal: see above.
        previous: (B, 1, C), the position before the first; zeros when None.

    Example:
        >>> shift_channels(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), True).tolist()
        [[[1.0, 0.0], [3.0, 2.0]]]
    """
    shifts = (0, 1) if is_causal else (-1, 0, 1)
    width = x.shape[-1] // len(shifts)
    before = torch.zeros_like(x[:, :1]) if previous is None else previous
    padded = torch.cat([before, x, torch.zeros_like(x[:, :1])], 1)
    moved = [
        padded[:, 1 - shift : 1 - shift + x.shape[1], i * width : (i + 1) * width] for i, shift in enumerate(shifts)
    ]
    return torch.cat([*moved, x[..., len(shifts) * width :]], -1)


class PackageBlock(nn.Module):
    """Pre-norm block of the PyTorch package: x + attention(norm(x)), then x + feed(norm(x)).

    With `reversible` there are two streams, stacked in the channels: a + attention(norm(b)), then b + feed(norm(a)).

    Args:
        dim: channels C.
        attention: keywords of `RoutingAttention`, `num_heads` among them.
        feed: keywords of `FeedForward`.
        norm: "layer", "scale" (`ScaleNorm`), or "rezero": no norm, and every branch times a number that starts at 0.
        shift: applies `shift_channels` after each norm.
        reversible: see above.
        dropout: of the output of each branch.
    """

    def __init__(
        self,
        dim: int,
        attention: dict[str, Any],
        feed: dict[str, Any],
        *,
        norm: str = "layer",
        shift: bool = False,
        reversible: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, NORMS)
        kinds = {"layer": lambda: nn.LayerNorm(dim), "scale": ScaleNorm, "rezero": nn.Identity}
        self.attention_norm, self.feed_norm = kinds[norm](), kinds[norm]()
        self.attention = RoutingAttention(dim, rotary=True, defer_update=True, **attention)
        self.feed = FeedForward(dim, **feed)
        rezero = norm == "rezero"
        self.attention_gain = nn.Parameter(torch.zeros(())) if rezero else None
        self.feed_gain = nn.Parameter(torch.zeros(())) if rezero else None
        self.shift, self.reversible = shift, reversible
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: BlockCache | None = None) -> tuple[Tensor, Tensor]:
        def attend(t: Tensor) -> tuple[Tensor, Tensor]:
            into = None if cache is None else cache.attention
            y, auxiliary = self.attention(t, mask, return_auxiliary=True, cache=into)
            return y, auxiliary

        return self._run(x, attend, cache, stepping=False)

    def step(self, x: Tensor, cache: BlockCache) -> Tensor:
        """(B, 1, C) -> (B, 1, C)."""

        def attend(t: Tensor) -> tuple[Tensor, Tensor]:
            return self.attention.step(t, cache.attention), t.new_zeros(())

        return self._run(x, attend, cache, stepping=True)[0]

    def update_centroids(self) -> None:
        self.attention.update_centroids()

    def _run(self, x: Tensor, attend: Any, cache: BlockCache | None, stepping: bool) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, -1) if self.reversible else (x, x)
        inner = self._shifted(self.attention_norm(b), "attention", cache, stepping)
        y, auxiliary = attend(inner)
        a = a + self._gained(y, self.attention_gain)
        feed_input = self._shifted(self.feed_norm(a), "feed", cache, stepping)
        y = self._gained(self.feed(feed_input), self.feed_gain)
        return (torch.cat([a, b + y], -1) if self.reversible else a + y), auxiliary

    def _gained(self, y: Tensor, gain: Tensor | None) -> Tensor:
        return self.dropout(y if gain is None else y * gain)

    def _shifted(self, x: Tensor, name: str, cache: BlockCache | None, stepping: bool) -> Tensor:
        if not self.shift:
            return x
        previous = cache.last.get(name) if stepping and cache is not None else None
        if cache is not None:
            cache.last[name] = x[:, -1:]
        return shift_channels(x, self.attention.is_causal, previous)


class PaperBlock(nn.Module):
    """Post-norm block of the paper's program: x = norm(x + attention(x)), then x = norm(x + feed(x)).

    Args:
        dim: channels C.
        attention: keywords of `PaperAttention`, `num_heads` among them.
        feed: keywords of `FeedForward`.
        dropout: of the output of attention and feed-forward.
    """

    def __init__(self, dim: int, attention: dict[str, Any], feed: dict[str, Any], *, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = PaperAttention(dim, dropout=dropout, **attention)
        self.attention_norm, self.feed_norm = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.feed = FeedForward(dim, **feed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: BlockCache | None = None) -> tuple[Tensor, Tensor]:
        y, auxiliary = self.attention(x, mask, None if cache is None else cache.attention)
        return self._feed(x, y), auxiliary

    def step(self, x: Tensor, cache: BlockCache) -> Tensor:
        """(B, 1, C) -> (B, 1, C)."""
        return self._feed(x, self.attention.step(x, cache.attention))

    def update_centroids(self) -> None:
        self.attention.update_centroids()

    def _feed(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.attention_norm(x + attended)
        return self.feed_norm(x + self.dropout(self.feed(x)))

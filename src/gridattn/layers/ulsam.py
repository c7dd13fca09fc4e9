"""Ultra-lightweight subspace attention module (ULSAM)."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from gridattn.layers.batch_norm import GridBatchNorm
from gridattn.layers.common import GridAttention
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels
from gridattn.ops.subspace import subspace_attention, subspace_gate, subspace_maps, subspace_scores


@register_attention(
    "ulsam",
    summary="channels in blocks, each with its own softmax map over the grid, two weights a channel (ULSAM)",
    source="arXiv 2006.15102",
    linear_cost=True,
)
class UltraLightweightSubspaceAttention(GridAttention):
    """Ultra-lightweight subspace attention: every block X_n of channels becomes X_n + A_n X_n.

    A_n = softmax over positions of relu(BN(w_n . maxpool_3(relu(BN(s_n X_n + t_n))) + b_n)). Subspaces never meet. All
    of them are computed at once, each parameter being one vector over all channels.

    Args:
        dim: channels C.
        num_heads: not used.
        grid: the nominal grid; only its length, the rank, is used.
        num_subspaces: blocks of channels g; must divide `dim`.
        momentum: of the running statistics: running = (1 - momentum) running + momentum batch. The official 0.9 follows
            almost only the last batch; 0.1 is the common choice elsewhere.

    Raises:
        ValueError: `dim` not divisible by `num_subspaces`.

    Source: ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks, arXiv
    2006.15102.

    Example:
        >>> import torch
        >>> UltraLightweightSubspaceAttention(32, num_subspaces=8)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        num_subspaces: int = 4,
        momentum: float = 0.9,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_channels(dim, 1)
        if isinstance(num_subspaces, bool) or not isinstance(num_subspaces, int) or num_subspaces < 1:
            raise ValueError(f"num_subspaces={num_subspaces!r} is not allowed; it must be a positive int")
        if dim % num_subspaces:
            raise ValueError(f"dim={dim} is not divisible by num_subspaces={num_subspaces}")
        self.num_subspaces = num_subspaces
        bound = (dim // num_subspaces) ** -0.5
        self.scale = nn.Parameter(torch.empty(dim).uniform_(-1, 1))
        self.shift = nn.Parameter(torch.empty(dim).uniform_(-1, 1))
        self.channel_norm = GridBatchNorm(dim, momentum=momentum)
        self.weight = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_subspaces).uniform_(-bound, bound))
        self.score_norm = GridBatchNorm(num_subspaces, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        if not self.training:
            return subspace_attention(x, *self._folded())
        return subspace_gate(x, self._scores(x))

    def attention(self, x: Tensor) -> Tensor:
        """The maps A: (B, *grid, C) -> (B, *grid, num_subspaces), each summing to one over the grid."""
        self.check_input(x)
        return subspace_maps(self._scores(x))

    def _scores(self, x: Tensor) -> Tensor:
        features = self.channel_norm(torch.addcmul(self.shift, x, self.scale))
        return self.score_norm(subspace_scores(features, self.weight, self.bias))

    def _folded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale, shift, weight and bias with the running statistics inside."""
        gain, offset = self.channel_norm.gain_and_offset()
        score_gain, score_offset = self.score_norm.gain_and_offset()
        weight = self.weight * score_gain.repeat_interleave(self.dim // self.num_subspaces)
        return self.scale * gain, self.shift * gain + offset, weight, self.bias * score_gain + score_offset

    def macs(self, grid: Sequence[int]) -> int:
        return prod(grid) * self.dim


_OFFICIAL_NAMES = {
    "conv_dws.weight": "scale",
    "conv_dws.bias": "shift",
    "conv_point.weight": "weight",
    "conv_point.bias": "bias",
    "bn_dws": "channel_norm",
    "bn_point": "score_norm",
}


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joins official weights, `subspaces.<n>.conv_dws.weight` and so on, into those of our layer."""
    parts: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        _, number, name = key.split(".", 2)
        for theirs, ours in _OFFICIAL_NAMES.items():
            name = name.replace(theirs, ours)
        parts.setdefault(name, {})[int(number)] = value
    return {
        name: values[0] if values[0].ndim == 0 else torch.cat([values[n].flatten() for n in sorted(values)])
        for name, values in parts.items()
    }

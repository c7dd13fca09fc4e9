"""Class semantics-based attention: channel and time gates computed from one kind of features, applied to another."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.common import GridAttention
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_choice

FUSIONS = ("sum", "mean", "channel", "time", "concat")


class ChannelGate(nn.Module):
    """One gate a channel, from how the semantics are distributed over time: sigmoid(MLP(squeeze(ReLU(conv1(R))))).

    The squeeze is one learned weighting of the time steps, shared by all channels. For another length than the nominal
    one it is resampled linearly and rescaled, so that a constant signal keeps its value.
    """

    def __init__(self, semantic_dim: int, dim: int, length: int, reduction: int) -> None:
        super().__init__()
        self.proj = nn.Conv1d(semantic_dim, dim, 1)
        self.squeeze = nn.Linear(length, 1)
        self.fc1 = nn.Linear(dim, max(dim // reduction, 1))
        self.fc2 = nn.Linear(max(dim // reduction, 1), dim)
        nn.init.constant_(self.squeeze.weight, 1 / length)
        nn.init.zeros_(self.squeeze.bias)

    def forward(self, semantics: Tensor) -> Tensor:
        """(B, Cr, T) -> (B, C)."""
        squeezed = F.linear(self.proj(semantics).relu(), self._weights(semantics.shape[-1]), self.squeeze.bias)
        hidden = self.fc1(squeezed.squeeze(-1))
        hidden = torch.where(hidden >= 0, hidden, 0)  # a ReLU whose slope at 0 is 1, as in the reference values
        return self.fc2(hidden).sigmoid()

    def _weights(self, length: int) -> Tensor:
        nominal = self.squeeze.in_features
        if length == nominal:
            return self.squeeze.weight
        return F.interpolate(self.squeeze.weight[None], size=length, mode="linear")[0] * (nominal / length)


class TimeGate(nn.Module):
    """One gate a time step: sigmoid(conv3(ReLU(conv3(R))))."""

    def __init__(self, semantic_dim: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(semantic_dim, hidden, 3, padding=1)
        self.conv2 = nn.Conv1d(hidden, 1, 3, padding=1)

    def forward(self, semantics: Tensor) -> Tensor:
        """(B, Cr, T) -> (B, 1, T)."""
        return self.conv2(self.conv1(semantics).relu()).sigmoid()


@register_attention(
    "class_semantics",
    summary="channel and time gates read from semantic features (by default the input itself)",
    source="arXiv 2109.02613",
    ranks=(1,),
    linear_cost=True,
)
class ClassSemanticsAttention(GridAttention):
    """Gates features F by semantic features R: F' = fuse(F * a, F * t), a one gate a channel, t one gate a time step.

    Both gates depend on R alone, the channel gate through the distribution of R over time, the time gate through two
    steps on either side. With all gates at 1/2 and fuse="sum", F' = F.

    Args:
        dim: channels C of F.
        num_heads: not used; the mechanism has no heads.
        grid: (T,), the nominal number of time steps; other lengths resample the learned squeeze.
        semantic_dim: channels Cr of R; `dim` when None.
        reduction: `dim` over the hidden width of the channel gate.
        hidden: hidden width of the time gate; max(Cr // 4, 8) when None.
        fuse: "sum", "mean", "channel" or "time" (one gate alone), or "concat" (both, then a 1x1 convolution).

    Source: Sridhar et al., Class Semantics-based Attention for Action Detection, ICCV 2021, arXiv 2109.02613. The
    inside of the two gates is our reading of the paper.

    Example:
        >>> import torch
        >>> layer = ClassSemanticsAttention(32, grid=(50,), semantic_dim=20)
        >>> layer(torch.randn(2, 50, 32), torch.randn(2, 50, 20)).shape
        torch.Size([2, 50, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (100,),
        semantic_dim: int | None = None,
        reduction: int = 4,
        hidden: int | None = None,
        fuse: str = "sum",
    ) -> None:
        semantic_dim = dim if semantic_dim is None else semantic_dim
        hidden = max(semantic_dim // 4, 8) if hidden is None else hidden
        sizes = {"dim": dim, "semantic_dim": semantic_dim, "reduction": reduction, "hidden": hidden}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not allowed; it must be a positive int")
        check_choice("fuse", fuse, FUSIONS)
        if len(grid) != 1:
            raise ValueError(f"grid={tuple(grid)} has {len(grid)} axes; one, time, is allowed")
        super().__init__(dim, rank=1)
        self.semantic_dim, self.fuse = semantic_dim, fuse
        self.channel = ChannelGate(semantic_dim, dim, grid[0], reduction) if fuse != "time" else None
        self.temporal = TimeGate(semantic_dim, hidden) if fuse != "channel" else None
        self.mix = nn.Conv1d(2 * dim, dim, 1) if fuse == "concat" else None

    def forward(self, x: Tensor, semantics: Tensor | None = None) -> Tensor:
        """x (B, T, C), semantics (B, T', Cr), interpolated to T steps if need be; x itself when None -> (B, T, C).

        Raises:
            ValueError: semantics of another batch size or channel count.
        """
        self.check_input(x)
        semantics = x if semantics is None else semantics
        if semantics.ndim != 3 or (semantics.shape[0], semantics.shape[2]) != (x.shape[0], self.semantic_dim):
            raise ValueError(
                f"semantics has shape {tuple(semantics.shape)}; "
                f"(batch={x.shape[0]}, time, {self.semantic_dim}) is allowed"
            )
        features, semantics = x.mT, semantics.mT
        if semantics.shape[-1] != features.shape[-1]:
            semantics = F.interpolate(semantics, size=features.shape[-1], mode="linear")
        gated = [features * gate for gate in self.gates(semantics) if gate is not None]
        if self.mix is not None:
            return self.mix(torch.cat(gated, dim=1)).mT
        out = sum(gated[1:], start=gated[0])
        return (out / 2 if self.fuse == "mean" else out).mT

    def gates(self, semantics: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(B, Cr, T) -> channel gate (B, C, 1) and time gate (B, 1, T), None where the fusion has none."""
        channel = None if self.channel is None else self.channel(semantics).unsqueeze(-1)
        return channel, None if self.temporal is None else self.temporal(semantics)

    def macs(self, grid: Sequence[int]) -> int:
        steps, total = grid[0], 0
        if self.channel is not None:
            hidden = self.channel.fc1.out_features
            total += steps * self.dim * self.semantic_dim + self.dim * steps + 2 * self.dim * hidden
        if self.temporal is not None:
            hidden = self.temporal.conv1.out_channels
            total += 3 * steps * hidden * (self.semantic_dim + 1)
        return total + (2 * self.dim**2 * steps if self.mix is not None else 0)

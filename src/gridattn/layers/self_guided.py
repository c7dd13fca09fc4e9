"""Self-guided attention: a hybrid-scale layer finds out what matters, a guided one spends its tokens there."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.common import GridAttention
from gridattn.layers.drop_path import DropPath
from gridattn.layers.dropout import Dropout
from gridattn.layers.hybrid_scale import GuidedAttention, HybridScaleAttention
from gridattn.layers.large_kernel import DepthwiseConv
from gridattn.layers.registry import register_attention


@register_attention(
    "self_guided",
    summary="a hybrid-scale layer ranks the positions, a second one attends to tokens aggregated by that ranking",
    source="arXiv 2308.12216",
)
class SelfGuidedAttention(GridAttention):
    """Hybrid-scale attention followed by attention to tokens reallocated by its significance map.

    h, S = hybrid(x);  y = h + guided(LN(x + h), S): the two attentions of an SG-Former block pair, without the
    feed-forward between them, so that the layer stands alone in any host.

    Args:
        dim: channels C.
        num_heads: heads; even, must divide `dim`.
        grid: the nominal grid; only its length, the rank, is used.
        reduction: 2, 4 or 8: positions per coarse key and axis, and the larger, the fewer reallocated tokens.
        window_size: positions per window of the local heads, one int or one per axis.
        border: of the coarse keys, "pad" or "crop", see `HybridScaleAttention`.
        qkv_bias: bias in the query/key/value projections.
        scale: factor of the logits; head_dim ** -0.5 when None.
        attention_dropout: dropout probability of the attention weights.
        projection_dropout: dropout probability of the outputs.

    Raises:
        ValueError: an odd number of heads, another reduction, a window below 1, an unknown border.

    Source: SG-Former: Self-guided Transformer with Evolving Token Reallocation, arXiv 2308.12216.

    Example:
        >>> SelfGuidedAttention(32, num_heads=4)(torch.randn(2, 10, 9, 32)).shape
        torch.Size([2, 10, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        reduction: int = 2,
        window_size: int | Sequence[int] = 7,
        border: Literal["pad", "crop"] = "pad",
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        options: dict[str, Any] = {
            "reduction": reduction,
            "qkv_bias": qkv_bias,
            "scale": scale,
            "attention_dropout": attention_dropout,
            "projection_dropout": projection_dropout,
        }
        self.hybrid = HybridScaleAttention(dim, num_heads, grid=grid, window_size=window_size, border=border, **options)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.guided = GuidedAttention(dim, num_heads, rank=self.rank, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        attended, significance = self.hybrid(x, return_significance=True)
        return attended + self.guided(self.norm(x + attended), significance)

    def macs(self, grid: Sequence[int]) -> int:
        return self.hybrid.macs(grid, with_significance=True) + self.guided.macs(grid)

    def memory(self, grid: Sequence[int], bytes_per_element: int = 4) -> int:
        return self.hybrid.memory(grid, bytes_per_element)


class DepthwiseMlp(nn.Module):
    """Feed-forward that mixes neighbours: y = fc1(x); fc2(GELU(y + DWConv(y))), the convolution 3 wide on each axis.

    Args:
        dim: channels C.
        hidden: channels in between.
        rank: number of grid axes.
        dropout: dropout probability after the activation and at the end.
    """

    def __init__(self, dim: int, hidden: int, rank: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden, (3,) * rank)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        x = self.fc1(x)
        x = self.drop(F.gelu(x + self.dwconv(x)))
        return self.drop(self.fc2(x))

    def macs(self, grid: Sequence[int]) -> int:
        """Multiply-accumulates for one sample on `grid`."""
        return 2 * prod(grid) * self.fc1.weight.numel() + self.dwconv.macs(grid)


class SelfGuidedBlock(nn.Module):
    """One block of SG-Former: x = x + drop_path(attention(LN1(x))), then x = x + drop_path(mlp(LN2(x))).

    Args:
        attention: `HybridScaleAttention`, `GuidedAttention` or `LepeAttention`.
        dim: channels C.
        rank: number of grid axes.
        mlp_ratio: hidden channels of the feed-forward over C.
        drop_path: probability of dropping a branch for a sample.
        dropout: dropout probability in the feed-forward.
    """

    def __init__(
        self,
        attention: nn.Module,
        dim: int,
        *,
        rank: int = 2,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = DepthwiseMlp(dim, int(dim * mlp_ratio), rank, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **options: Any) -> Any:
        """(B, *grid, C) -> (B, *grid, C); options go to the attention, and what it returns beside its output comes
        along."""
        attended = self.attn(self.norm1(x), **options)
        attended, *beside = attended if isinstance(attended, tuple) else (attended,)
        x = x + self.drop_path(attended)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return (x, *beside) if beside else x


class SelfGuidedPair(nn.Module):
    """Two blocks of SG-Former: a hybrid-scale one, and one guided by the significance map of the first.

    Args:
        dim: channels C.
        num_heads: heads; even, must divide `dim`.
        rank: number of grid axes.
        reduction: 2, 4 or 8.
        mlp_ratio: hidden channels of the feed-forward over C.
        drop_path: probabilities of dropping a branch in the two blocks.
        dropout: dropout probability in the feed-forwards.
        border: of the coarse keys, see `HybridScaleAttention`.
        **options: further keywords of both attentions: `qkv_bias`, `scale`, and their dropout.

    Source: SG-Former, arXiv 2308.12216.

    Example:
        >>> pair = SelfGuidedPair(32, num_heads=4, reduction=4)
        >>> y, significance = pair(torch.randn(2, 14, 14, 32), return_significance=True)
        >>> y.shape, significance.shape
        (torch.Size([2, 14, 14, 32]), torch.Size([2, 14, 14]))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        rank: int = 2,
        reduction: int = 2,
        mlp_ratio: float = 4.0,
        drop_path: tuple[float, float] = (0.0, 0.0),
        dropout: float = 0.0,
        border: Literal["pad", "crop"] = "pad",
        **options: Any,
    ) -> None:
        super().__init__()
        options = {"reduction": reduction} | options
        hybrid = HybridScaleAttention(dim, num_heads, grid=(1,) * rank, border=border, **options)
        guided = GuidedAttention(dim, num_heads, rank=rank, **options)
        shared: dict[str, Any] = {"rank": rank, "mlp_ratio": mlp_ratio, "dropout": dropout}
        self.hybrid = SelfGuidedBlock(hybrid, dim, drop_path=drop_path[0], **shared)
        self.guided = SelfGuidedBlock(guided, dim, drop_path=drop_path[1], **shared)

    def forward(self, x: Tensor, return_significance: bool = False) -> Any:
        """(B, *grid, C) -> (B, *grid, C), and with `return_significance` also the map (B, *grid)."""
        x, significance = self.hybrid(x, return_significance=True)
        x = self.guided(x, significance=significance)
        return (x, significance) if return_significance else x


def convert_official_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official weights of one SG-Former attention (hybrid, guided or plain) -> the names of our layers.

    The official layers hold separate projections for the halves of the heads; ours hold one, keys before values.
    Every operation on the tensors is differentiable.

    Example:
        >>> official = {f"q{i}.weight": torch.randn(4, 8) for i in (1, 2)}
        >>> convert_official_attention(official | {"sr.weight": torch.randn(8, 8, 2, 2)})["q.weight"].shape
        torch.Size([8, 8])
    """
    kind = "hybrid" if "sr.weight" in state else "guided" if "f1.weight" in state else "plain"
    inside = "" if kind == "hybrid" else "attention."
    renamed = {"lepe_linear": f"{inside}lepe.linear", "lepe_conv": f"{inside}lepe.conv"}
    if kind == "hybrid":
        renamed |= {"sr": "patch", "norm": "patch_norm", "kv1": "kv_coarse", "kv2": "kv_local"}
    renamed |= {f"f{i + 1}": f"aggregate.{i}" for i in range(3)}
    joined = {"hybrid": ("q1", "q2"), "guided": ("kv1", "kv2"), "plain": ()}[kind]
    ours = {}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        if layer not in joined:
            ours[f"{renamed.get(layer, f'{inside}{layer}')}.{leaf}"] = tensor
    for leaf in {name.rpartition(".")[2] for name in state if name.rpartition(".")[0] in joined}:
        halves = [state[f"{layer}.{leaf}"] for layer in joined]
        if kind == "hybrid":
            ours[f"q.{leaf}"] = torch.cat(halves)
        else:
            (key1, value1), (key2, value2) = (half.chunk(2) for half in halves)
            ours[f"attention.kv.{leaf}"] = torch.cat((key1, key2, value1, value2))
    return ours


def convert_official_block(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official weights of one SG-Former block -> the names of `SelfGuidedBlock`."""
    attention = {name.removeprefix("attn."): t for name, t in state.items() if name.startswith("attn.")}
    rest = {name.replace("dwconv.dwconv", "dwconv"): t for name, t in state.items() if not name.startswith("attn.")}
    return rest | {f"attn.{name}": t for name, t in convert_official_attention(attention).items()}

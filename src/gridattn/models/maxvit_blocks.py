"""Parts of MaxViT: its block, stem and head, and two further forms of its attention."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers import GridAttention
from gridattn.layers.maxvit import PartitionAttentionBlock
from gridattn.layers.mbconv import MbConv, mbconv_options
from gridattn.layers.window import WindowAttention
from gridattn.ops.common import per_axis

Kind = Literal["tf", "rw"]
"""Details of convolutions and normalisations: of the paper's models, and of a later form."""


class MaxViTBlock(nn.Module):
    """MBConv, then block attention and grid attention, each with a feed-forward; or, in parallel, both with one.

    Args:
        dim: channels of the input.
        dim_out: channels of the output.
        stride: of the first MBConv.
        attentions: attention inside windows and attention on lattices, both for `dim_out` channels.
        variant: see `MaxViT`.
        parallel: see `MaxViT`.
        drop_path: probability of dropping a branch.
        layer_scale: see `MaxViT`.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        stride: int,
        attentions: Sequence[WindowAttention],
        variant: Kind,
        parallel: bool = False,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        inputs = [(dim, stride), (dim_out, 1)][: 2 if parallel else 1]
        self.conv = nn.Sequential(
            *(MbConv(c, dim_out, stride=s, drop_path=drop_path, **mbconv_options(variant, c)) for c, s in inputs)
        )
        block, grid = attentions
        layers: dict[str, GridAttention] = (
            {"both": ParallelAttention(block, grid)} if parallel else {"block": block, "grid": grid}
        )
        self.attention = nn.Sequential(
            OrderedDict(
                (
                    name,
                    PartitionAttentionBlock(
                        layer,
                        norm_eps=norm_eps(variant),
                        tanh_gelu=variant == "tf",
                        drop_path=drop_path,
                        layer_scale=layer_scale,
                    ),
                )
                for name, layer in layers.items()
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), dim_out)."""
        return self.attention(self.conv(x))


class MlpBiasWindowAttention(WindowAttention):
    """Window attention whose bias is an MLP of the offset d from key to query: B = MLP(sign(d) log(1 + |d|)).

    The bias of a pair does not depend on the size of the window. Arguments as in `WindowAttention`.
    """

    def __init__(self, dim: int, num_heads: int = 4, hidden: int = 512, dropout: float = 0.125, **options: Any) -> None:
        super().__init__(dim, num_heads, bias=False, **options)
        self.position_mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(self.rank, hidden),
                act=nn.ReLU(),
                drop=nn.Dropout(dropout),
                fc2=nn.Linear(hidden, num_heads),
            )
        )

    def bias_table(self) -> Tensor:
        """Relative position biases (heads, 2 * window_size - 1 per axis), by key minus query."""
        weight = self.qkv.weight
        steps = [torch.arange(w - 1, -w, -1, device=weight.device, dtype=weight.dtype) for w in self.window_size]
        offset = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1)
        return self.position_mlp(offset.sign() * offset.abs().log1p()).movedim(-1, 0)


class ParallelAttention(GridAttention):
    """Attention inside windows and on lattices from one input; each gives half of the output's channels."""

    def __init__(self, block: WindowAttention, grid: WindowAttention) -> None:
        super().__init__(block.dim, block.rank)
        for layer in (block, grid):
            layer.proj = nn.Linear(self.dim, self.dim // 2)
        self.block = block
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return torch.cat([self.block(x), self.grid(x)], -1)

    def macs(self, grid: Sequence[int]) -> int:
        return self.block.macs(grid) + self.grid.macs(grid) - grid[0] * grid[1] * self.dim**2


class ConvStem(nn.Module):
    """3 x 3 convolution of stride 2, BN, activation, 3 x 3 convolution."""

    def __init__(self, in_chans: int, width: int | Sequence[int], variant: Kind) -> None:
        super().__init__()
        hidden, self.dim = per_axis(width, 2, "stem_width")
        is_tf = variant == "tf"
        self.pad_both_sides = not is_tf
        self.conv1 = nn.Conv2d(in_chans, hidden, 3, stride=2, bias=is_tf)
        self.norm1 = nn.BatchNorm2d(hidden, 1e-3 if is_tf else 1e-5, 0.01 if is_tf else 0.1)
        self.act = nn.GELU("tanh") if is_tf else nn.SiLU()
        self.conv2 = nn.Conv2d(hidden, self.dim, 3, padding=1, bias=is_tf)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, ceil(H / 2), ceil(W / 2), C)."""
        before = [1 if self.pad_both_sides else size % 2 for size in images.shape[2:]]
        x = F.pad(images, [amount for first in reversed(before) for amount in (first, 1)])
        return self.conv2(self.act(self.norm1(self.conv1(x)))).movedim(1, -1)


class Head(nn.Module):
    """Linear classifier of pooled features, with LN, a linear layer and tanh before it where `hidden` is given."""

    def __init__(self, dim: int, hidden: int | None, num_classes: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps) if hidden else nn.Identity()
        self.hidden = nn.Sequential(OrderedDict(fc=nn.Linear(dim, hidden), act=nn.Tanh())) if hidden else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(hidden or dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim) -> (B, num_classes)."""
        return self.fc(self.drop(self.hidden(self.norm(x))))


def norm_eps(variant: Kind) -> float:
    """Epsilon of the layer normalisations."""
    return 1e-5 if variant == "tf" else 1e-6


def init_weights(module: nn.Module) -> None:
    """For `Module.apply`: kernels and position tables normal with deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, WindowAttention) and module.relative_position_bias is not None:
        nn.init.normal_(module.relative_position_bias, std=0.02)

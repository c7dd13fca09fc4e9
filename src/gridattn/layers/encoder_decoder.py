"""Encoder-decoder attention: one U-Net draws a map of where to look, and heads at any depth turn it into gains."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.common import GridAttention
from gridattn.layers.registry import register_attention
from gridattn.ops.legacy_resize import legacy_bilinear_resize
from gridattn.ops.padding import to_multiple

ENCODER_WIDTHS = (32, 64, 64, 128)
DECODER_WIDTHS = (64, 128, 256, 256)
BOTTOM_WIDTH = 256
HEAD_KERNEL = 7


class EncoderDecoderMap(nn.Module):
    """A U-Net of four levels that maps an image or feature map to one map of gains in (0, 1).

    Every convolution is 3x3 with bias and ReLU, without norm; the last one ends in a sigmoid. Sizes that 16 does not
    divide are padded with zeros at the end, and the map is cropped.

    Args:
        in_channels: channels of the input.
        width_divisor: divides all widths; 1 is the published network, with 5,468,897 parameters for one channel.

    Source: Aboutalebi et al., MEDUSA, arXiv 2110.06063.

    Example:
        >>> EncoderDecoderMap(1, width_divisor=16)(torch.randn(2, 1, 40, 24)).shape
        torch.Size([2, 1, 40, 24])
    """

    def __init__(self, in_channels: int, width_divisor: int = 1) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("width_divisor", width_divisor)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not allowed; it must be a positive int")
        encoder, decoder = ([max(w // width_divisor, 1) for w in widths] for widths in (ENCODER_WIDTHS, DECODER_WIDTHS))
        bottom = max(BOTTOM_WIDTH // width_divisor, 1)
        self.encoder = nn.ModuleList(
            nn.Sequential(_conv(before, width), _conv(width, width))
            for before, width in zip([in_channels, *encoder], encoder)
        )
        self.bottom = _conv(encoder[-1], bottom)
        below = [*decoder[1:], bottom]
        self.decoder = nn.ModuleList(
            nn.Sequential(_conv(deep, width), _conv(width, width)) for deep, width in zip(below, decoder)
        )
        self.merge = nn.ModuleList(_conv(skip + width, width) for skip, width in zip(encoder, decoder))
        self.output = nn.Conv2d(decoder[0], 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, 1, H, W)."""
        height, width = x.shape[-2:]
        multiple = 2 ** len(self.encoder)
        x = F.pad(x, (0, to_multiple(width, multiple), 0, to_multiple(height, multiple)))
        skips = []
        for level in self.encoder:
            skips.append(level(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottom(x)
        for skip, level, merge in zip(reversed(skips), reversed(self.decoder), reversed(self.merge)):
            x = level(F.interpolate(x, scale_factor=2, mode="nearest"))
            x = merge(torch.cat([skip, x], dim=1))
        return self.output(x).sigmoid()[..., :height, :width]

    def macs(self, grid: Sequence[int]) -> int:
        """Multiply-accumulates for one sample of height and width `grid`."""
        multiple = 2 ** len(self.encoder)
        pixels = prod(-(-size // multiple) * multiple for size in grid)
        levels = [*zip(self.encoder, self.decoder, self.merge)]
        total = pixels * self.output.weight.numel() + pixels // 4 ** len(levels) * _weights(self.bottom)
        for depth, parts in enumerate(levels):
            total += pixels // 4**depth * sum(map(_weights, parts))
        return total


class MapGain(nn.Module):
    """One head: x + x * conv7x7(resize(map)), a gain a channel and position that may be negative.

    Args:
        dim: channels of the features.
        zero_init: start as the identity; the authors start from he_normal.

    Source: arXiv 2110.06063.

    Example:
        >>> MapGain(8)(torch.randn(2, 8, 13, 17), torch.rand(2, 1, 32, 24)).shape
        torch.Size([2, 8, 13, 17])
    """

    def __init__(self, dim: int, *, zero_init: bool = False) -> None:
        super().__init__()
        self.gain = nn.Conv2d(1, dim, HEAD_KERNEL, padding=HEAD_KERNEL // 2)
        if zero_init:
            nn.init.zeros_(self.gain.weight)
        else:
            nn.init.kaiming_normal_(self.gain.weight)
        if self.gain.bias is not None:
            nn.init.zeros_(self.gain.bias)

    def forward(self, x: Tensor, attention: Tensor) -> Tensor:
        """x (B, C, h, w), attention (B, 1, H, W) -> (B, C, h, w)."""
        return x + x * self.gain(legacy_bilinear_resize(attention, x.shape[-2:]))


@register_attention(
    "encoder_decoder",
    summary="a small U-Net reads the whole grid and draws the gain of every position and channel",
    source="arXiv 2110.06063",
    ranks=(2,),
    linear_cost=True,
)
class EncoderDecoderAttention(GridAttention):
    """The body and one head of MEDUSA on a feature map: x + x * conv7x7(U-Net(x)).

    In the published network one body, fed with the image, serves heads at four depths (`EncoderDecoderMap`, `MapGain`);
    here the body reads the layer's own input.

    Args:
        dim: channels C.
        num_heads: not used; the mechanism has no heads.
        grid: the nominal grid; only its length, which must be 2, is used.
        width_divisor: divides the widths of the U-Net.
        zero_init: start as the identity.

    Source: Aboutalebi et al., MEDUSA: Multi-scale Encoder-Decoder Self-Attention, arXiv 2110.06063.

    Example:
        >>> EncoderDecoderAttention(32)(torch.randn(1, 14, 9, 32)).shape
        torch.Size([1, 14, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        width_divisor: int = 8,
        zero_init: bool = False,
    ) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim={dim!r} is not allowed; it must be a positive int")
        if len(grid) != 2:
            raise ValueError(f"grid={tuple(grid)} has {len(grid)} axes; 2 are allowed")
        super().__init__(dim, rank=2)
        self.body = EncoderDecoderMap(dim, width_divisor)
        self.head = MapGain(dim, zero_init=zero_init)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        self.check_input(x)
        features = x.movedim(-1, 1)
        return self.head(features, self.body(features)).movedim(1, -1)

    def macs(self, grid: Sequence[int]) -> int:
        return self.body.macs(grid) + prod(grid) * self.head.gain.weight.numel()


def _conv(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU())


def _weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))


_BODY = {
    **{f"sem/{n}": f"encoder.{i // 2}.{i % 2}.0" for i, n in enumerate((1, 2, 4, 5, 7, 8, 10, 11))},
    "sem/13": "bottom.0",
    **{f"sem/{n + j}": f"decoder.{3 - i}.{j}.0" for i, n in enumerate((15, 20, 25, 30)) for j in (0, 1)},
    **{f"sem/{n}": f"merge.{3 - i}.0" for i, n in enumerate((18, 23, 28, 33))},
    "sem/34": "output",
}


def load_official_map(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the TensorFlow variables of the U-Net (`sem/<n>/kernel`, `/bias`) to those of `EncoderDecoderMap`.

    Kernels (h, w, in, out) become (out, in, h, w).

    Raises:
        ValueError: a variable that the U-Net does not have.
    """
    renamed = {}
    for key, tensor in state.items():
        scope, _, leaf = key.rpartition("/")
        if scope not in _BODY or leaf not in ("kernel", "bias"):
            raise ValueError(f"variable {key!r} is not one of the encoder-decoder")
        renamed[f"{_BODY[scope]}.{'weight' if leaf == 'kernel' else 'bias'}"] = convolution_from_tensorflow(tensor)
    return renamed


def convolution_from_tensorflow(tensor: Tensor) -> Tensor:
    """A kernel (h, w, in, out) as (out, in, h, w); a bias as it is."""
    return tensor.permute(3, 2, 0, 1).contiguous() if tensor.ndim == 4 else tensor

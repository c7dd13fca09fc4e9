"""EPIT: spatial super-resolution of light fields by transformers on epipolar planes."""

import torch
from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.epipolar import AlternatingFilter
from gridattn.ops.common import check_channels, check_choice
from gridattn.systems.epit.fields import bicubic_up, rgb_to_ycbcr, ycbcr_to_rgb
from gridattn.systems.settings import check_least

SCALES = (2, 3, 4)
BAND = 11
_ALL_VIEWS = 2**15  # a field of view wider than any row of views


class EPIT(nn.Module):
    """Bicubic upsampling of a light field plus a learned residual of its luma.

    Y of every view passes four convolutions, `blocks` alternating filters (`AlternatingFilter`) with a residual around
    them, and a pixel shuffle whose last convolution runs on the mosaic of all views. Cb and Cr are upsampled
    bicubically. The weights serve any number of views and any size.

    Args:
        scale: s, how many times as high and wide the views become.
        channels: C.
        blocks: alternating filters.
        num_heads: heads of their transformers, which are 2C wide.
        epipolar: with False the transformers are left out and the views exchange nothing but their borders.

    Source: Liang et al., Learning Non-Local Spatial-Angular Correlation for Light Field Image Super-Resolution,
    ICCV 2023, arXiv 2302.08058.

    Example:
        >>> EPIT(2, channels=8, blocks=1)(torch.rand(1, 3, 3, 3, 12, 9)).shape
        torch.Size([1, 3, 3, 3, 24, 18])
    """

    def __init__(
        self, scale: int, channels: int = 64, blocks: int = 5, num_heads: int = 8, epipolar: bool = True
    ) -> None:
        super().__init__()
        check_choice("scale", scale, SCALES)
        check_least("channels", channels, 1)
        check_least("blocks", blocks, 1)
        check_channels(2 * channels, num_heads)
        self.scale = scale
        self.conv_first = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        convs = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(3)]
        self.conv_init = nn.Sequential(*(layer for conv in convs for layer in (conv, nn.LeakyReLU(0.2))))
        filters = [AlternatingFilter(channels, (_ALL_VIEWS, BAND), num_heads) for _ in range(blocks)]
        self.filters = nn.Sequential(*filters)
        self.expand = nn.Conv2d(channels, channels * scale**2, 1, bias=False)
        self.shuffle = nn.Sequential(nn.PixelShuffle(scale), nn.LeakyReLU(0.2))
        self.conv_last = nn.Conv2d(channels, 1, 3, padding=1, bias=False)
        if not epipolar:
            for block in filters:
                block.transformer = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, field: Tensor) -> Tensor:
        """(B, 3, U, V, h, w), RGB in 0..1 -> (B, 3, U, V, s h, s w), RGB, not clipped.

        Raises:
            ValueError: another number of axes or colours.
        """
        if field.ndim != 6 or field.shape[1] != 3 or 0 in field.shape:
            raise ValueError(
                f"field has shape {tuple(field.shape)}; (batch, 3, views, views, height, width) without empty axes is "
                "needed"
            )
        wide = rgb_to_ycbcr(field.to(torch.promote_types(field.dtype, torch.float32)))
        up = bicubic_up(wide, self.scale)
        luma = up[:, :1] + self._residual(wide[:, 0].to(field.dtype))
        return ycbcr_to_rgb(torch.cat([luma, up[:, 1:]], 1)).to(field.dtype)

    def _residual(self, luma: Tensor) -> Tensor:
        """(B, U, V, h, w) -> (B, 1, U, V, s h, s w)."""
        batch, u, v = luma.shape[:3]
        first = self.conv_first(rearrange(luma, "b u v h w -> (b u v) 1 h w"))
        features = first + self.conv_init(first)
        features = rearrange(features, "(b u v) c h w -> b u v h w c", b=batch, u=u)
        features = features + self.filters(features)
        mosaic = self.expand(rearrange(features, "b u v h w c -> b c (u h) (v w)"))
        mosaic = self.conv_last(self.shuffle(mosaic))
        return rearrange(mosaic, "b c (u h) (v w) -> b c u v h w", u=u, v=v)


def build_epit(scale: int, channels: int = 64, blocks: int = 5, num_heads: int = 8, epipolar: bool = True) -> EPIT:
    """An `EPIT` from plain keywords.

    Raises:
        ValueError: a value that is not allowed.

    Example:
        >>> sum(p.numel() for p in build_epit(2).parameters()), sum(p.numel() for p in build_epit(4).parameters())
        (1420928, 1470080)
    """
    return EPIT(scale, channels, blocks, num_heads, epipolar)

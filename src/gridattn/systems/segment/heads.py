"""Heads of semantic segmentation: feature maps of a backbone in, class scores of every position of the finest out.

All act on channels-first maps (B, C_i, h_i, w_i), finest first, of any number and any sizes.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import log2

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from gridattn.ops.common import check_choice, check_probability
from gridattn.systems.settings import check_least

NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}
"""Normalisations: over the batch and all positions (what the papers use), or over the channels of every position."""


def conv_norm_relu(in_dim: int, out_dim: int, kernel_size: int, norm: str) -> nn.Sequential:
    """Convolution of odd width without bias, normalisation, ReLU: (B, in_dim, H, W) -> (B, out_dim, H, W)."""
    conv = nn.Conv2d(in_dim, out_dim, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, NORMS[norm](out_dim), nn.ReLU())


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corners not aligned: (B, C, h, w) -> (B, C, *size)."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class PixelClassifier(nn.Sequential):
    """Dropout of whole channels, then a 1x1 convolution to class scores."""

    def __init__(self, dim: int, num_classes: int, dropout: float) -> None:
        conv = nn.Conv2d(dim, num_classes, 1)
        nn.init.normal_(conv.weight, std=0.01)
        nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]
        super().__init__(nn.Dropout2d(dropout), conv)


class UPerHead(nn.Module):
    """Unified perceptual parsing head: pyramid pooling on the coarsest map, then a top-down pyramid, all joined.

    top = conv3([x_n, resize(conv1(pool_s(x_n))) for s in pool_scales]);  l_i = conv1(x_i) + resize(l_{i+1}), l_n = top;
    y = conv3([conv3(l_1), ..., conv3(l_{n-1}), l_n], all resized to x_1);  scores = classifier(y)

    Args:
        in_channels: channels C_i of the maps.
        num_classes: classes K.
        channels: inside the head.
        pool_scales: sides of the grids that the coarsest map is averaged to.
        dropout: probability of dropping a channel before the classifier.
        norm: a name of `NORMS`.

    Raises:
        ValueError: a number that is not allowed or an unknown norm.

    Source: arXiv 1807.10221, with the settings of VAN (arXiv 2202.09741) and DaViT (arXiv 2204.03645).

    Example:
        >>> head = UPerHead([8, 16], num_classes=5, channels=12).eval()
        >>> head([torch.randn(1, 8, 17, 26), torch.randn(1, 16, 9, 13)]).shape
        torch.Size([1, 5, 17, 26])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        check_head(channels=channels, num_classes=num_classes, dropout=dropout, norm=norm)
        for scale in pool_scales:
            check_least("pool_scales", scale, 1)
        *finer, top = in_channels
        self.pool_scales = tuple(pool_scales)
        self.pooled = nn.ModuleList(conv_norm_relu(top, channels, 1, norm) for _ in self.pool_scales)
        self.top = conv_norm_relu(top + len(self.pool_scales) * channels, channels, 3, norm)
        self.laterals = nn.ModuleList(conv_norm_relu(dim, channels, 1, norm) for dim in finer)
        self.smooths = nn.ModuleList(conv_norm_relu(channels, channels, 3, norm) for _ in finer)
        self.join = conv_norm_relu(len(in_channels) * channels, channels, 3, norm)
        self.classifier = PixelClassifier(channels, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, h_i, w_i), finest first -> scores (B, K, h_1, w_1)."""
        *finer, top = maps
        pyramid = [lateral(x) for lateral, x in zip(self.laterals, finer)] + [self.pool(top)]
        for i in range(len(finer) - 1, -1, -1):
            pyramid[i] = pyramid[i] + resize(pyramid[i + 1], pyramid[i].shape[2:])
        smooth = [smooth(x) for smooth, x in zip(self.smooths, pyramid)] + [pyramid[-1]]
        size = maps[0].shape[2:]
        return self.classifier(self.join(torch.cat([resize(x, size) for x in smooth], 1)))

    def pool(self, x: Tensor) -> Tensor:
        """Adds averages over the whole map and over parts of it: (B, C, h, w) -> (B, channels, h, w)."""
        size = x.shape[2:]
        pooled = [
            resize(conv(F.adaptive_avg_pool2d(x, scale)), size) for scale, conv in zip(self.pool_scales, self.pooled)
        ]
        return self.top(torch.cat([x, *pooled], 1))


class SemanticFPNHead(nn.Module):
    """Feature pyramid whose maps are brought to the finest one's size by convolutions and doublings, and added.

    A map of stride s_i goes through max(1, log2(s_i / s_1)) units of conv3, followed by bilinear doubling where i > 1.

    Args:
        in_channels: channels C_i of the maps.
        num_classes: classes K.
        reductions: image positions per map position s_i, along one axis; None for 1, 2, 4, ...
        fpn_channels: of the pyramid.
        channels: of the units.
        dropout: probability of dropping a channel before the classifier.
        norm: a name of `NORMS`.

    Raises:
        ValueError: a number that is not allowed or an unknown norm.

    Source: arXiv 1901.02446 on the pyramid of arXiv 1612.03144, with the settings of VAN (arXiv 2202.09741).

    Example:
        >>> head = SemanticFPNHead([8, 16], num_classes=5, fpn_channels=12, channels=6).eval()
        >>> head([torch.randn(1, 8, 17, 26), torch.randn(1, 16, 9, 13)]).shape
        torch.Size([1, 5, 17, 26])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        reductions: Sequence[int] | None = None,
        fpn_channels: int = 256,
        channels: int = 128,
        dropout: float = 0.1,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        check_head(channels=channels, num_classes=num_classes, dropout=dropout, norm=norm)
        check_least("fpn_channels", fpn_channels, 1)
        reductions = [2**i for i in range(len(in_channels))] if reductions is None else reductions
        self.neck = FeaturePyramidNetwork(list(in_channels), fpn_channels)
        self.branches = nn.ModuleList()
        for reduction in reductions:
            count = max(1, round(log2(reduction / reductions[0])))
            dims = [fpn_channels, *[channels] * count]
            self.branches.append(nn.Sequential(*(conv_norm_relu(a, channels, 3, norm) for a in dims[:-1])))
        self.classifier = PixelClassifier(channels, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, h_i, w_i), finest first -> scores (B, K, h_1, w_1)."""
        pyramid = self.neck(OrderedDict((str(i), x) for i, x in enumerate(maps)))
        size = maps[0].shape[2:]
        total: Tensor | None = None
        for i, (branch, x) in enumerate(zip(self.branches, pyramid.values())):
            for unit in branch:  # pyright: ignore[reportGeneralTypeIssues]
                x = unit(x)
                if i:
                    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = resize(x, size)
            total = x if total is None else total + x
        assert total is not None
        return self.classifier(total)


class FCNHead(nn.Module):
    """One convolution of width 3 and a classifier on a single map; the auxiliary head of a training.

    Args:
        in_dim: channels of the map.
        num_classes: classes K.
        channels: of the convolution.
        dropout: probability of dropping a channel before the classifier.
        norm: a name of `NORMS`.

    Source: arXiv 1411.4038, with the settings of VAN (arXiv 2202.09741).

    Example:
        >>> FCNHead(16, num_classes=5, channels=10).eval()(torch.randn(2, 16, 5, 7)).shape
        torch.Size([2, 5, 5, 7])
    """

    def __init__(
        self, in_dim: int, num_classes: int, *, channels: int = 256, dropout: float = 0.1, norm: str = "batch"
    ) -> None:
        super().__init__()
        check_head(channels=channels, num_classes=num_classes, dropout=dropout, norm=norm)
        self.conv = conv_norm_relu(in_dim, channels, 3, norm)
        self.classifier = PixelClassifier(channels, num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim, h, w) -> scores (B, K, h, w)."""
        return self.classifier(self.conv(x))


def check_head(*, channels: int, num_classes: int, dropout: float, norm: str) -> None:
    """Raises ValueError for what no head takes."""
    check_least("channels", channels, 1)
    check_least("num_classes", num_classes, 1)
    check_probability("dropout", dropout)
    check_choice("norm", norm, tuple(NORMS))


HEADS: dict[str, Callable[..., nn.Module]] = {"upernet": UPerHead, "semantic_fpn": SemanticFPNHead}
"""Heads by the name that the settings use."""

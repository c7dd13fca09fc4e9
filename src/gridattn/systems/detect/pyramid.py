"""A feature pyramid on any backbone of the library, and anchors for its strides."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork

from gridattn.models import create_model

RATIOS = (0.5, 1.0, 2.0)


class Pyramid(nn.Module):
    """Backbone, feature pyramid network, and coarser levels: images in, one map a level out, finest first.

    The backbone's maps of a stride of at least `finest` enter torchvision's `FeaturePyramidNetwork`; a backbone that
    has none gives its coarsest map. Levels that are then missing have twice the stride of the one before: they are
    convolutions of stride 2, of which the first takes the backbone's last map (RetinaNet, arXiv 1708.02002), or every
    second position of the level before.

    Args:
        backbone: name that `create_model` takes.
        channels: of every level.
        levels: number of levels; not fewer than the maps that enter.
        finest: smallest stride used, pixels.
        learned: whether the coarser levels come from convolutions.
        options: further keywords of `create_model`.

    Raises:
        ValueError: what `create_model` refuses, or fewer levels than maps.

    Example:
        >>> pyramid = Pyramid("grid_vit_4stage_micro", channels=8, levels=4, finest=4, learned=False)
        >>> [(name, tuple(x.shape)) for name, x in pyramid(torch.randn(1, 3, 64, 32)).items()][::3]
        [('0', (1, 8, 16, 8)), ('3', (1, 8, 2, 1))]
        >>> pyramid.strides
        [4, 8, 16, 32]
    """

    def __init__(
        self,
        backbone: str,
        *,
        channels: int = 256,
        levels: int = 5,
        finest: int = 4,
        learned: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        options = dict(options or {})
        with torch.device("meta"):
            probe = create_model(
                backbone, features_only=True, **{k: v for k, v in options.items() if k != "checkpoint"}
            )
        chosen = choose_maps(probe.feature_info.reduction(), finest)
        if len(chosen) > levels:
            raise ValueError(f"levels={levels} is not allowed; {backbone!r} gives {len(chosen)} maps, the least number")
        self.body = create_model(backbone, features_only=True, out_indices=chosen, **options)
        self.out_channels = channels
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), channels)
        strides = self.body.feature_info.reduction()
        self.maps = len(strides)
        self.strides = [*strides, *(strides[-1] * 2 ** (i + 1) for i in range(levels - self.maps))]
        widths = [self.body.feature_info.channels()[-1], *[channels] * (levels - self.maps)] if learned else []
        coarser = [nn.Conv2d(width, channels, 3, stride=2, padding=1) for width in widths[: levels - self.maps]]
        for conv in coarser:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        self.coarser = nn.ModuleList(coarser)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) -> "0", "1" ...: (B, channels, ceil(H / stride), ceil(W / stride)) for every stride."""
        maps = self.body(images)
        found = self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))
        x = maps[-1] if self.coarser else found[str(self.maps - 1)]
        for i in range(self.maps, len(self.strides)):
            # As in RetinaNet, only the levels after the first of these see a rectified map.
            x = self.coarser[i - self.maps](F.relu(x) if i > self.maps else x) if self.coarser else x[..., ::2, ::2]
            found[str(i)] = x
        return found


def choose_maps(strides: Sequence[int], finest: int) -> list[int]:
    """Indices of the maps that a pyramid takes: strides of at least `finest`, rising; else the coarsest map alone.

    Example:
        >>> choose_maps([2, 4, 8, 16, 32], finest=4), choose_maps([4, 8, 4], finest=4), choose_maps([2, 4], finest=8)
        ([1, 2, 3, 4], [0, 1], [1])
    """
    chosen: list[int] = []
    for i, stride in enumerate(strides):
        if stride >= finest and all(stride > strides[j] for j in chosen):
            chosen.append(i)
    return chosen or [max(range(len(strides)), key=lambda i: strides[i])]


class StridedAnchors(AnchorGenerator):
    """Anchors around the grid points of every level.

    At the position (i, j) of a level of stride s stand boxes centred on (s j, s i), of sides
    `scale * s * 2^(o/octaves)` for o = 0 .. octaves - 1 (geometric mean of both sides) and of three ratios of height to
    width: 1/2, 1, 2.

    torchvision's generator divides the sizes of image and map instead, which misplaces the anchors of levels that do
    not divide the image, and makes them in the maps' precision, where bfloat16 cannot tell pixel 257 from 258.

    Args:
        strides: of the levels, pixels.
        scale: side of the smallest anchor over the stride.
        octaves: sizes per level.

    Example:
        >>> anchors = StridedAnchors([8, 16], scale=4, octaves=1)
        >>> images = ImageList(torch.zeros(1, 3, 16, 16), [(16, 16)])
        >>> found = anchors(images, [torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1)])[0]
        >>> found.shape, found[4].tolist()
        (torch.Size([15, 4]), [-8.0, -16.0, 24.0, 16.0])
    """

    def __init__(self, strides: Sequence[int], scale: float, octaves: int) -> None:
        sizes = tuple(tuple(scale * stride * 2 ** (o / octaves) for o in range(octaves)) for stride in strides)
        super().__init__(sizes, (RATIOS,) * len(strides))  # pyright: ignore[reportArgumentType]
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        steps = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors([list(x.shape[-2:]) for x in feature_maps], steps))
        return [anchors] * len(image_list.image_sizes)

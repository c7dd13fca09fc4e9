"""A backbone and a segmentation head as one network, built from plain keywords."""

import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gridattn.models import FeatureMaps, create_model
from gridattn.ops.common import check_choice
from gridattn.systems.segment.heads import HEADS, FCNHead, SemanticFPNHead, resize
from gridattn.systems.settings import check_least, check_names


class Segmenter(nn.Module):
    """Scores of every pixel: backbone, head, bilinear resize to the image.

    Args:
        backbone: images -> maps, finest first.
        head: maps -> scores at the finest map.
        aux_head: scores from the map before the coarsest one, for the training alone; None for none.

    Example:
        >>> model = build_segmenter("grid_vit_4stage_micro", num_classes=4, head_options={"channels": 16}).eval()
        >>> model(torch.randn(1, 3, 45, 70)).shape
        torch.Size([1, 4, 45, 70])
    """

    def __init__(self, backbone: FeatureMaps, head: nn.Module, aux_head: FCNHead | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.aux_head = aux_head

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> scores (B, K, H, W)."""
        return resize(self.head(self.backbone(images)), images.shape[2:])

    def forward_with_aux(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scores, and those of the auxiliary head, both (B, K, H, W)."""
        maps = self.backbone(images)
        size = images.shape[2:]
        aux = None if self.aux_head is None else resize(self.aux_head(maps[aux_index(len(maps))]), size)
        return resize(self.head(maps), size), aux


def aux_index(count: int) -> int:
    """Which of `count` maps the auxiliary head takes: the one before the coarsest, or the only one."""
    return max(0, count - 2)


def pyramid_indices(reductions: Sequence[int], most: int = 4) -> list[int]:
    """The maps that a head takes of a backbone unless it is told: the last `most` of those that grow coarser.

    Args:
        reductions: image positions per map position, in the backbone's order.
        most: how many at most.

    Example:
        >>> pyramid_indices([2, 4, 8, 16, 32]), pyramid_indices([4, 8, 16, 32, 4]), pyramid_indices([16])
        ([1, 2, 3, 4], [0, 1, 2, 3], [0])
    """
    growing = [i for i, r in enumerate(reductions) if all(r > other for other in reductions[:i])]
    return growing[-most:]


def build_segmenter(
    model: str,
    num_classes: int,
    *,
    in_chans: int = 3,
    model_options: Mapping[str, Any] | None = None,
    out_indices: Sequence[int] | None = None,
    head: str = "upernet",
    head_options: Mapping[str, Any] | None = None,
    aux_channels: int = 0,
) -> Segmenter:
    """Builds a network from plain keywords.

    Args:
        model: backbone, a name of `list_models()`.
        num_classes: classes K.
        in_chans: image channels.
        model_options: further keywords of `create_model`, such as attention, drop_path_rate or img_size.
        out_indices: which maps of the backbone the head takes; None takes what `pyramid_indices` chooses.
        head: a name of `HEADS`.
        head_options: keywords of the head, such as channels, dropout or norm.
        aux_channels: channels of the auxiliary head; 0 for no such head.

    Raises:
        ValueError: a name or an option that is not known, or a value that the backbone or the head refuses.
    """
    check_choice("head", head, tuple(HEADS))
    check_least("aux_channels", aux_channels, 0)
    options = dict(head_options or {})
    allowed = set(inspect.signature(HEADS[head]).parameters) - {"in_channels", "num_classes", "reductions"}
    check_names(f"head option of {head!r}", options, allowed)
    common = {"in_chans": in_chans, "features_only": True, **(model_options or {})}
    backbone = create_model(model, out_indices=out_indices, **common)
    if backbone.body.rank != 2:
        raise ValueError(f"model={model!r} takes images of {backbone.body.rank} axes; segmentation needs 2")
    if out_indices is None:
        indices = pyramid_indices(backbone.feature_info.reduction())
        if len(indices) < len(backbone.feature_info.info):  # maps without use would hold weights without gradients
            backbone = create_model(model, out_indices=indices, **common)
    reductions, channels = backbone.feature_info.reduction(), backbone.feature_info.channels()
    if any(b < a for a, b in pairwise(reductions)):
        raise ValueError(f"out_indices={out_indices} gives maps of strides {reductions}; finest first is allowed")
    if HEADS[head] is SemanticFPNHead:
        options["reductions"] = reductions
    aux = None
    if aux_channels:
        shared = {name: options[name] for name in ("dropout", "norm") if name in options}
        aux = FCNHead(channels[aux_index(len(channels))], num_classes, channels=aux_channels, **shared)
    return Segmenter(backbone, HEADS[head](channels, num_classes, **options), aux)


def check_trainable(network: nn.Module, in_chans: int, size: Sequence[int]) -> None:
    """Runs a training crop of zeros through a network, so that a size which it refuses is found before the training.

    Raises:
        ValueError: the size, and what the network says of it.
    """
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, in_chans, *size))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the network cannot take crop_size={tuple(size)}: {reason}") from None
    finally:
        network.train()

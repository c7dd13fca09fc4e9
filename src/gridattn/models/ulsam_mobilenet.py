"""MobileNet-V1 and -V2 in which subspace attention (ULSAM) takes the place of chosen blocks, or follows them.

stem -> numbered blocks, in levels of one resolution each -> mean -> linear

Sources: ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks, arXiv
2006.15102; MobileNets, arXiv 1704.04861; MobileNetV2, arXiv 1801.04381.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from gridattn.layers.drop_path import DropPath
from gridattn.layers.ulsam import UltraLightweightSubspaceAttention, convert_official
from gridattn.models.common import Backbone, Level, conv_channels_last, linear
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_probability


class Step(NamedTuple):
    """What a numbered block does: channels in and out, stride, widening of a bottleneck (MobileNet-V2 alone)."""

    dim: int
    out_dim: int
    stride: int
    expansion: int = 1


class SubspaceMobileNet(Backbone):
    """What both networks share: numbered blocks, of which some are replaced or followed by subspace attention.

    Blocks are numbered from 1, as published. A level begins with each block of stride 2.
    """

    head_dropout = 0.0
    official_prefix: str

    def __init__(
        self,
        stem_dim: int,
        steps: Sequence[Step],
        replace: Sequence[int],
        insert_after: Sequence[int],
        num_subspaces: int,
        bn_momentum: float,
        drop_rate: float,
        drop_path_rate: float,
        num_classes: int,
        in_chans: int,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_probability("drop_rate", drop_rate)
        check_probability("drop_path_rate", drop_path_rate)
        _check_numbers("replace", replace, steps, unchanged=True)
        _check_numbers("insert_after", insert_after, steps, unchanged=False)

        self.patch_embed = self.make_stem(stem_dim)
        levels: list[list[nn.Module]] = [[]]
        for number, step in enumerate(steps, start=1):
            if step.stride > 1:
                levels.append([])
            attention = UltraLightweightSubspaceAttention
            options = {"num_subspaces": num_subspaces, "momentum": bn_momentum}
            rate = drop_path_rate * (number - 1) / max(1, len(steps) - 1)
            levels[-1].append(attention(step.dim, **options) if number in replace else self.make_block(step, rate))
            if number in insert_after:
                levels[-1].append(attention(step.out_dim, **options))
        return levels

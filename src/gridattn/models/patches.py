"""Non-overlapping patches on grids of any rank, and checks of per-level settings."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Convolution with kernel = stride = `patch_size`, then LayerNorm; the input is padded with zeros at its ends.

    Args:
        in_chans: channels of the input.
        dim: channels of the output.
        patch_size: side of a patch.
        rank: number of axes.
        norm: whether a LayerNorm follows.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, rank: int = 2, *, norm: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = conv_of_rank(rank)(in_chans, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, *size) -> (B, *ceil(size / patch_size), dim)."""
        return self.norm(self.proj(pad_to_multiple(x, self.patch_size)).movedim(1, -1))


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Appends zeros to every axis after the first two until `multiple` divides it."""
    missing = [(size + multiple - 1) // multiple * multiple - size for size in x.shape[2:]]
    if all(isinstance(amount, int) and amount == 0 for amount in missing):
        return x
    return F.pad(x, [amount for pad in reversed(missing) for amount in (0, pad)])


def conv_of_rank(rank: int) -> type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]:
    """The convolution class for grids of `rank` axes.

    Raises:
        ValueError: a rank other than 1, 2 or 3.
    """
    if rank not in (1, 2, 3):
        raise ValueError(f"img_size has {rank} axes; 1, 2 or 3 are allowed")
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]


def check_level_lists(**lists: Sequence[Any]) -> None:
    """Raises ValueError unless all settings have as many entries as the first, one per level."""
    (first_name, first), *rest = lists.items()
    for name, values in rest:
        if len(values) != len(first):
            raise ValueError(
                f"{name} has {len(values)} entries but {first_name} has {len(first)}; one per level is allowed"
            )

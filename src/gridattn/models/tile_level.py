"""A level of a backbone whose blocks work on tokens in tile order."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gridattn.models.common import Level
from gridattn.ops.common import per_axis
from gridattn.ops.neighborhood import TileLayout


class TileLevel(Level):
    """`Level` with its tokens in tiles from the first block to the last.

    The order changes twice a level, whatever its depth. Blocks of attention and MLP treat all tokens alike; the
    downsampler is a convolution and gets the grid.

    Args:
        blocks: of one resolution; their attention must take a `layout`.
        downsample: as in `Level`.
        tile: tokens of a tile along each axis, one int or one per axis of the grid.
        rank: number of grid axes.

    Raises:
        ValueError: a tile that is not made of positive ints.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], downsample: nn.Module | None, tile: int | Sequence[int], rank: int = 2
    ) -> None:
        super().__init__(blocks, downsample)
        self.tile = per_axis(tile, rank, "tile")

    def forward(self, x: Tensor, recompute: bool = False) -> tuple[Tensor, Tensor]:
        """(B, *grid, C) -> the level's map, and the same downsampled for the next level."""
        layout = TileLayout(x.shape[1:-1], self.tile)
        x = layout.to_tiles(x)
        for block in self.blocks:
            if recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, layout=layout)  # type: ignore[assignment]
            else:
                x = block(x, layout=layout)
        x = layout.to_grid(x)
        return x, x if self.downsample is None else self.downsample(x)

"""Tokens of a grid kept tile by tile through a whole network, so that attention never has to reorder them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from einops import rearrange
from torch import Tensor

from gridattn.ops.common import per_axis
from gridattn.ops.neighborhood.slots import AxisSlots
from gridattn.ops.padding import pad_grid


@dataclass(frozen=True, init=False)
class TileLayout:
    """An order of the tokens of a grid in which those of a tile follow each other.

    Each axis is padded to whole tiles; tiles lie row by row, tokens row by row inside a tile:

        (B, X1 .. Xn, ...) -> (B, tiles1 .. tilesn * tile1 .. tilen, ...)

    Whatever treats every token alike (linear layers, norms, activations, MLPs, residuals) commutes with the order, so
    tokens can be brought into it once at the entry of such a network and back once at its exit. Convolutions and means
    over the grid need `to_grid` first. Padded tokens start as zeros; what a network computes from them is seen by no
    other token and dropped by `to_grid`.

    Args:
        grid: sizes of the grid's axes, 1 to 3 of them.
        tile: tokens of a tile along each axis, one int or one per axis; any size, also one that does not divide the
            grid.
        dilation: order each axis by residues of this number, every residue in tiles of its own: the order in which
            tiles of a dilated attention hold nothing but what it sees.

    Raises:
        ValueError: not 1 to 3 axes, sizes that are not positive ints, or a dilation that exceeds the grid.

    Source: token permutation of Generalized Neighborhood Attention, arXiv 2504.16922, done once a network.

    Example:
        >>> import torch
        >>> layout = TileLayout((5, 4), (2, 2))
        >>> x = torch.randn(3, 5, 4, 16)
        >>> layout.to_tiles(x).shape
        torch.Size([3, 24, 16])
        >>> torch.equal(layout.to_grid(layout.to_tiles(x).relu()), x.relu())
        True
    """

    grid: tuple[int, ...]
    tile: tuple[int, ...]
    dilation: tuple[int, ...]

    def __init__(self, grid: Sequence[int], tile: int | Sequence[int], dilation: int | Sequence[int] = 1) -> None:
        if isinstance(grid, str) or not isinstance(grid, Sequence) or len(grid) not in (1, 2, 3):
            raise ValueError(f"grid={grid!r} is not allowed; 1 to 3 positive ints are, one per axis")
        rank = len(grid)
        object.__setattr__(self, "grid", per_axis(tuple(grid), rank, "grid"))
        object.__setattr__(self, "tile", per_axis(tile, rank, "tile"))
        object.__setattr__(self, "dilation", per_axis(dilation, rank, "dilation"))
        if any(step > size for step, size in zip(self.dilation, self.grid)):
            raise ValueError(f"dilation={self.dilation} exceeds the grid {self.grid}; at most the grid is allowed")

    @property
    def slots(self) -> tuple[AxisSlots, ...]:
        """The slots of each axis."""
        return tuple(AxisSlots(*axis) for axis in zip(self.grid, self.tile, self.dilation))

    @property
    def tiles(self) -> tuple[int, ...]:
        """Number of tiles along each axis."""
        return tuple(axis.tiles for axis in self.slots)

    @property
    def tokens(self) -> int:
        """Length of a sequence in this order, padded tokens included."""
        return prod(self.tiles) * prod(self.tile)

    @property
    def is_padded(self) -> bool:
        """Whether some tokens of a sequence are padding."""
        return self.tokens > prod(self.grid)

    def to_tiles(self, x: Tensor) -> Tensor:
        """Brings tokens into tile order; padded ones are zeros.

        Args:
            x: (B, *grid, ...).

        Returns:
            (B, tokens, ...).

        Raises:
            ValueError: another grid.
        """
        if tuple(x.shape[1 : 1 + len(self.grid)]) != self.grid:
            raise ValueError(f"x has shape {tuple(x.shape)}; (batch, *grid, ...) with the grid {self.grid} is allowed")
        x = pad_grid(x, [(0, full - size) for full, size in zip(self._padded, self.grid)])
        on_grid, in_tiles, sizes = self._patterns
        return rearrange(x, f"{on_grid} -> {in_tiles}", **sizes)

    def to_grid(self, x: Tensor) -> Tensor:
        """Inverse of `to_tiles`; padded tokens are dropped.

        Args:
            x: (B, tokens, ...).

        Returns:
            (B, *grid, ...).

        Raises:
            ValueError: another number of tokens.
        """
        self.check(x, "x")
        on_grid, in_tiles, sizes = self._patterns
        restored = rearrange(x, f"{in_tiles} -> {on_grid}", **sizes)
        return restored[(slice(None), *(slice(size) for size in self.grid))] if self.is_padded else restored

    def check(self, x: Tensor, name: str) -> None:
        """Raises ValueError unless `x` is (B, tokens, ...)."""
        if x.ndim < 2 or x.shape[1] != self.tokens:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; the grid {self.grid} in tiles of {self.tile} takes "
                f"(batch, {self.tokens} tokens, ...)"
            )

    @property
    def _padded(self) -> tuple[int, ...]:
        return tuple(axis.tiles * axis.tile for axis in self.slots)

    @property
    def _patterns(self) -> tuple[str, str, dict[str, int]]:
        """Both orders as einops patterns (r: tiles of a residue, t: tile, d: dilation, by axis), and the sizes."""
        axes = range(len(self.grid))
        on_grid = "b " + " ".join(f"(r{i} t{i} d{i})" for i in axes) + " ..."
        tiles, places = " ".join(f"d{i} r{i}" for i in axes), " ".join(f"t{i}" for i in axes)
        sizes = {f"t{i}": self.tile[i] for i in axes} | {f"d{i}": self.dilation[i] for i in axes}
        sizes |= {f"r{i}": axis.tiles // axis.groups for i, axis in enumerate(self.slots)}
        return on_grid, f"b ({tiles} {places}) ...", sizes

"""Neighborhood attention over grids that are larger than memory: tile by tile, each tile with the keys around it."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gridattn.ops.common import check_choice, per_axis
from gridattn.ops.neighborhood.api import BACKENDS, attend_planned
from gridattn.ops.neighborhood.checks import (
    check_additional,
    check_bias,
    check_key_mask,
    check_tensors,
    count_visible_keys,
)
from gridattn.ops.neighborhood.crop import Crop, crop_plan
from gridattn.ops.neighborhood.plan import Plan, make_plan
from gridattn.ops.neighborhood.stream_sinks import open_sink
from gridattn.ops.neighborhood.stream_sources import Source, open_source

MEMORY = 1 << 29
"""Bytes that a tile and the work on it may take by default."""


class Tile(NamedTuple):
    """A part of the work: some samples and a box of queries."""

    batch: slice
    crop: Crop

    @property
    def queries(self) -> tuple[slice, ...]:
        """Region of the queries."""
        return self.batch, *self.crop.queries

    @property
    def keys(self) -> tuple[slice, ...]:
        """Region of the keys that the queries see."""
        return self.batch, *self.crop.need

    @property
    def inside(self) -> tuple[slice, ...]:
        """The queries among the positions of the crop."""
        return slice(None), *self.crop.inside


@torch.no_grad()
def neighborhood_attention_streamed(
    query: Any,
    key: Any,
    value: Any,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    out: Any,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Any = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    tile: int | Sequence[int] | None = None,
    memory: int = MEMORY,
    progress: Callable[[int, int], Any] | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Any:
    """`neighborhood_attention` of a grid that need not fit into memory; same numbers, no gradients.

    The queries are cut into tiles. Of each tile, the queries and the keys and values that they see are read, and the
    output is written. Memory is bounded by `memory`, not by the grid.

    `query`, `key`, `value` and `key_mask` may each be

    * a numpy array, also memory-mapped (`np.memmap`, `np.load(..., mmap_mode="r")`). numpy has no bfloat16; an array of
      `uint16` is taken as the bits of bfloat16;
    * a tensor, also memory-mapped (`torch.from_file(name, shared=True, size=..., dtype=torch.bfloat16).view(shape)`);
    * any object with `shape`, `dtype` and slicing, such as a data set of h5py or zarr;
    * a `GridReader`: a function that gives the numbers of a region, with the shape and dtype of the whole.

    Args:
        query: (B, *grid, Hq, D) on a grid of 1, 2 or 3 axes.
        key: (B, *grid, Hkv, D).
        value: (B, *grid, Hkv, Dv).
        kernel_size, stride, dilation, is_causal, scale, bias, additional_keys, additional_values, backend: as in
            `neighborhood_attention`; of these, tensors stay in memory.
        out: where the output (B, *grid, Hq, Dv) goes, in the dtype of the query: the path of a .npy file, which is
            written under another name and takes its own when it is complete (bfloat16 as `uint16` bits); or an array,
            tensor or other object with `shape`, `dtype` and assignment to slices; or a function that is called with
            each region, a tuple of slices along batch and grid, and its tile, a tensor.
        key_mask: (B, *grid) bool; only keys with True may be seen. It is read once before the work begins.
        tile: queries of a tile per axis; the largest that `memory` allows when None.
        memory: bytes that one tile and the work on it may take, by estimate, beside what the process holds anyway.
        progress: called with the number of tiles done and of all tiles, after each tile.
        resume: where `out` is a path, an interrupted call leaves what it has, hidden beside `out`, and the same call
            goes on from there. It must be given the same inputs; only shapes and settings are compared.
        device: where tiles are computed.

    Returns:
        For a path the complete output, memory-mapped and read-only; else None.

    Raises:
        ValueError: what `neighborhood_attention` refuses; a source, `out` or `tile` of the wrong kind; not enough disk
            space; `memory` too small for a window; a `GridReader` that gives another shape or dtype.

    Example:
        >>> q, k, v = (torch.randn(1, 60, 50, 2, 8).numpy() for _ in range(3))
        >>> result = torch.empty(1, 60, 50, 2, 8)
        >>> neighborhood_attention_streamed(q, k, v, kernel_size=7, out=result, tile=16)
        >>> result.isfinite().all()
        tensor(True)
    """
    check_choice("backend", backend, ("auto", *BACKENDS))
    sources = [open_source(name, s) for name, s in (("query", query), ("key", key), ("value", value))]
    like = [source.like() for source in sources]
    check_tensors(*like)
    tensors = [None if t is None else t.detach().cpu() for t in (bias, additional_keys, additional_values)]
    check_additional(*like[1:], *tensors[1:])
    plan = make_plan(like[0].shape[1:-2], kernel_size, stride, dilation, is_causal)
    check_bias(tensors[0], like[0], plan)
    mask = None if key_mask is None else open_source("key_mask", key_mask)
    check_key_mask(None if mask is None else mask.like(), like[0], plan, spare=True)
    tiles = cut_tiles(plan, *like, tile=tile, memory=memory)
    if mask is not None and (additional_keys is None or additional_keys.shape[1] == 0):
        _check_visible(mask, tiles)

    settings = [tuple(t.shape) for t in like], like[0].dtype, plan, scale, mask is None, tiles.boxes, tiles.samples
    sink = open_sink(out, (*like[0].shape[:-1], like[2].shape[-1]), like[0].dtype, resume, _digest(settings, tensors))
    bias, *extra = (None if t is None else t.to(device) for t in tensors)
    try:
        for number, part in enumerate(tiles, start=1):
            if number > sink.done:
                q, k, v, kept = _read(part, sources, mask, device)
                extra_keys, extra_values = (None if t is None else t[part.batch] for t in extra)
                problem = (q, k, v, part.crop.plan, scale, bias, kept, (extra_keys, extra_values))
                result, _ = attend_planned(*problem, need_lse=False, backend=backend)
                sink.put(part.queries, result[part.inside].cpu())
                sink.mark(number)
            if progress is not None:
                progress(number, len(tiles))
        return sink.finish()
    except BaseException:
        sink.abandon()
        raise


@dataclass(frozen=True)
class Tiles:
    """All tiles of a grid, made when they are asked for.

    Attributes:
        plan: the whole problem.
        batch: samples of the whole.
        samples: samples of a tile.
        boxes: queries of a tile, per axis.
    """

    plan: Plan
    batch: int
    samples: int
    boxes: tuple[int, ...]

    def __len__(self) -> int:
        return prod(-(-size // step) for size, step in self._axes())

    def __iter__(self) -> Iterator[Tile]:
        for starts in product(*(range(0, size, step) for size, step in self._axes())):
            batch, *box = ((start, min(start + step, size)) for start, (size, step) in zip(starts, self._axes()))
            yield Tile(slice(*batch), crop_plan(self.plan, box))

    def _axes(self) -> list[tuple[int, int]]:
        return [(self.batch, self.samples), *zip(self.plan.grid, self.boxes)]


def cut_tiles(
    plan: Plan, query: Tensor, key: Tensor, value: Tensor, tile: int | Sequence[int] | None, memory: int
) -> Tiles:
    """The tiles of a problem: those asked for, or the largest whose estimated memory stays within `memory` bytes.

    The largest are found by cutting, again and again, the axis whose cut leaves the least to be read in all.

    Raises:
        ValueError: a `tile` that is not allowed, or a `memory` that does not hold the smallest tile.
    """
    batch, grid = query.shape[0], plan.grid
    position = _bytes_per_position(query, key, value)
    if tile is not None:
        box = tuple(map(min, per_axis(tile, plan.rank, "tile"), grid))
        samples = memory // (position * prod(_longest_crop(plan, box)))
        return Tiles(plan, batch, max(1, min(samples, batch)), box)
    box, samples = grid, max(1, batch)
    while (needed := samples * position * prod(_longest_crop(plan, box))) > memory:
        if samples > 1:
            samples = -(-samples // 2)
            continue
        current = prod(_longest_crop(plan, box))
        smaller = [cut for axis in range(plan.rank) if (cut := _cut(plan, box, axis)) is not None]
        smaller = [cut for cut in smaller if prod(_longest_crop(plan, cut)) < current]
        if not smaller:
            raise ValueError(f"memory={memory} is not allowed; the smallest tile needs about {needed} bytes")
        box = min(smaller, key=lambda cut: prod(_longest_crop(plan, cut)) * len(Tiles(plan, 1, 1, cut)))
    return Tiles(plan, batch, samples, box)


def _cut(plan: Plan, box: tuple[int, ...], axis: int) -> tuple[int, ...] | None:
    """The box with one axis halved, in whole runs of all residues while it is long enough for them."""
    step = plan.axes[axis].stride * plan.axes[axis].dilation
    half = -(-box[axis] // 2)
    half = -(-half // step) * step if box[axis] > step else half
    return (*box[:axis], half, *box[axis + 1 :]) if half < box[axis] else None


def _longest_crop(plan: Plan, box: tuple[int, ...]) -> tuple[int, ...]:
    """Upper bounds of the sizes of the crops that tiles of these sizes need."""
    sizes = []
    for axis, size in zip(plan.axes, box):
        reach, step = (axis.kernel - 1) * axis.dilation, axis.stride * axis.dilation
        slack = 2 * (step - 1) if step > 1 else 0
        sizes.append(min(axis.length, max(size + reach, axis.kernel * axis.dilation) + slack))
    return tuple(sizes)


def _bytes_per_position(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Estimate of the memory that a position of a crop takes: tokens as read, padded and as a backend copies them,
    its output as computed and as written, the lse."""
    heads, depth = query.shape[-2:]
    tokens, out = heads * depth + key.shape[-2] * (depth + value.shape[-1]), heads * value.shape[-1]
    size = query.element_size()
    inside = max(size, 4) if query.dtype == torch.float16 else size
    return (2 * size + inside) * tokens + (2 * size + inside) * out + max(size, 4) * heads


def _read(
    tile: Tile, sources: Sequence[Source], mask: Source | None, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and mask of a tile, on the positions of its crop."""
    query, key, value = sources
    q = tile.crop.pad_queries(query.read(tile.queries).to(device))
    k, v = (tile.crop.pad_keys(source.read(tile.keys).to(device)) for source in (key, value))
    return q, k, v, None if mask is None else tile.crop.pad_keys(mask.read(tile.keys).to(device))


def _check_visible(mask: Source, tiles: Tiles) -> None:
    """Raises ValueError if the mask leaves a query without a key."""
    for tile in tiles:
        kept = tile.crop.pad_keys(mask.read(tile.keys))
        empty = (count_visible_keys(kept, tile.crop.plan)[tile.inside] == 0).nonzero()
        if len(empty):
            first = [part.start + at for part, at in zip(tile.queries, empty[0].tolist())]
            raise ValueError(
                f"key_mask leaves queries without a key, one at position {tuple(first[1:])} of sample {first[0]}; "
                "every window must keep at least one key unless additional_keys are given"
            )


def _digest(settings: object, tensors: Sequence[Tensor | None]) -> str:
    """Names a call by its settings and the tensors that stay in memory."""
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in tensors:
        digest.update(b"-" if tensor is None else tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""What the operator refuses, with messages that name the argument, its value and what is allowed."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gridattn.ops.common import check_same_kind
from gridattn.ops.neighborhood.plan import Plan


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Checks ranks, shapes, dtypes and devices of query, key and value against each other."""
    layout = (4, 5, 6), "(batch, 1 to 3 grid axes, heads, head_dim)"
    check_layouts(query=(query, *layout), key=(key, *layout), value=(value, *layout))
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[:-2] != query.shape[:-2]:
            raise ValueError(
                f"{name} has batch and grid {tuple(tensor.shape[:-2])} but query has {tuple(query.shape[:-2])}; "
                "they must be equal"
            )
    check_heads(query, key, value)


def check_layouts(**tensors: tuple[Tensor, tuple[int, ...], str]) -> None:
    """Checks that tensors are dense, of floating point, and of one dtype and device.

    Args:
        **tensors: a tensor by its name, how many axes it may have, and what they are called in the message.
    """
    for name, (tensor, ranks, layout) in tensors.items():
        if tensor.is_nested or tensor.layout != torch.strided:
            raise NotImplementedError(f"{name} is a nested or sparse tensor; dense tensors are allowed")
        if tensor.ndim not in ranks:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {layout} is allowed")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; a floating point dtype is allowed")
    check_same_kind(**{name: tensor for name, (tensor, *_) in tensors.items()})


def check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Checks heads and channels of (..., heads, channels) against each other."""
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key has head_dim {key.shape[-1]} but query has {query.shape[-1]}; they must be equal")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value has {value.shape[-2]} heads but key has {key.shape[-2]}; they must be equal")
    if 0 in (query.shape[-2], key.shape[-2], query.shape[-1]):
        raise ValueError(
            f"query has shape {tuple(query.shape)}, key {tuple(key.shape)}; at least one head and channel each"
        )
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"query has {query.shape[-2]} heads; a multiple of the {key.shape[-2]} heads of key is allowed"
        )


def check_additional(
    key: Tensor, value: Tensor, additional_keys: Tensor | None, additional_values: Tensor | None
) -> None:
    """Checks the additional tokens against key and value."""
    if additional_keys is None and additional_values is None:
        return
    if additional_keys is None or additional_values is None:
        missing = "additional_keys" if additional_keys is None else "additional_values"
        raise ValueError(f"{missing} is None; additional_keys and additional_values are given together or not at all")
    check_same_kind(key=key, additional_keys=additional_keys, additional_values=additional_values)
    length = additional_keys.shape[1] if additional_keys.ndim == 4 else "N"
    for name, tensor, like in (
        ("additional_keys", additional_keys, key),
        ("additional_values", additional_values, value),
    ):
        allowed = (like.shape[0], length, like.shape[-2], like.shape[-1])
        if tensor.ndim != 4 or tuple(tensor.shape) != allowed:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; (batch, N, heads, head_dim) = {allowed} is allowed"
            )


def check_bias(bias: Tensor | None, query: Tensor, plan: Plan) -> None:
    """Checks shape, dtype and device of the relative position bias."""
    if bias is None:
        return
    allowed = (query.shape[-2], *(2 * axis.kernel - 1 for axis in plan.axes))
    if tuple(bias.shape) != allowed:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; (heads, 2 * kernel_size - 1 per axis) = {allowed} is allowed"
        )
    if not bias.is_floating_point():
        raise ValueError(f"bias is {bias.dtype}; a floating point dtype is allowed")
    if bias.device != query.device:
        raise ValueError(f"bias is on {bias.device} but query is on {query.device}; one device is allowed")


def check_key_mask(key_mask: Tensor | None, query: Tensor, plan: Plan, *, spare: bool) -> None:
    """Checks the mask and, unless there are `spare` keys elsewhere or a trace runs, that it leaves no query alone."""
    if key_mask is None:
        return
    check_mask(key_mask, tuple(query.shape[:-2]), query.device)
    if not spare:
        check_visible(key_mask, plan)


def check_mask(key_mask: Tensor, allowed: tuple[int, ...], device: torch.device, layout: str = "batch, *grid") -> None:
    """Checks dtype, shape and device of a key mask."""
    if key_mask.dtype != torch.bool:
        raise ValueError(f"key_mask is {key_mask.dtype}; torch.bool is allowed, True where a key may be seen")
    if tuple(key_mask.shape) != allowed:
        raise ValueError(f"key_mask has shape {tuple(key_mask.shape)}; ({layout}) = {allowed} is allowed")
    if key_mask.device != device:
        raise ValueError(f"key_mask is on {key_mask.device} but query is on {device}; one device is allowed")


def check_visible(
    key_mask: Tensor, plan: Plan, asked: Tensor | None = None, samples: Sequence[int] | None = None
) -> None:
    """Checks, unless a trace runs, that a key mask leaves every query at least one key.

    Args:
        key_mask: (B, *grid) bool.
        plan: the windows.
        asked: (1 or B, *grid) bool, where there are queries; everywhere when None.
        samples: numbers of the samples for the message; 0 to B - 1 when None.
    """
    if torch.compiler.is_compiling():
        return
    alone = count_visible_keys(key_mask, plan) == 0
    empty = (alone if asked is None else alone & asked).nonzero()
    if len(empty):
        batch, *position = empty[0].tolist()
        raise ValueError(
            f"key_mask leaves {len(empty)} queries without a key, the first at position {tuple(position)} of sample "
            f"{batch if samples is None else samples[batch]}; every window must keep at least one key unless "
            "additional_keys are given"
        )


def check_positions(
    positions: Any, batch: int, grid: tuple[int, ...], device: torch.device, count: int | None = None
) -> Tensor:
    """Checks positions on a grid, their range only outside traces; gives them as (1 or batch, M, rank) int64.

    Args:
        positions: (M, rank) or (batch, M, rank) integers.
        batch: number of samples.
        grid: sizes of the grid.
        device: where they must be.
        count: M, where it is known.
    """
    _check_integers("positions", positions, device)
    count = positions.shape[-2] if count is None and positions.ndim > 1 else count
    allowed = ((count, len(grid)), (batch, count, len(grid)))
    if tuple(positions.shape) not in allowed:
        raise ValueError(
            f"positions has shape {tuple(positions.shape)}; (M, rank) = {allowed[0]} or (batch, M, rank) = "
            f"{allowed[1]} is allowed"
        )
    positions = positions.long()
    positions = positions[None] if positions.ndim == 2 else positions
    if torch.compiler.is_compiling() or positions.numel() == 0:
        return positions
    for axis, ((first, last), size) in enumerate(zip(bounds(positions), grid)):
        if first < 0 or last > size:
            raise ValueError(
                f"positions go from {first} to {last - 1} on axis {axis}; 0 to {size - 1} is allowed on the grid {grid}"
            )
    return positions


def bounds(positions: Tensor) -> list[tuple[int, int]]:
    """First and last index, exclusive, of (..., rank) positions along each axis."""
    low, high = torch.stack(positions.reshape(-1, positions.shape[-1]).aminmax(dim=0)).tolist()
    return [(first, last + 1) for first, last in zip(low, high)]


def check_window_choice(
    choice: Any, batch: int, grid: tuple[int, ...], heads: int, sizes: int, device: torch.device
) -> Tensor:
    """Checks a choice among window sizes, its range only outside traces; gives (1 or batch, *grid, 1 or heads) int64.

    Args:
        choice: (*grid), (batch, *grid) or (1 or batch, *grid, 1 or heads) integers.
        batch: number of samples.
        grid: sizes of the grid.
        heads: number of query heads.
        sizes: how many sizes there are to choose from.
        device: where it must be.
    """
    _check_integers("choice", choice, device)
    spread = choice[None] if choice.ndim == len(grid) else choice
    spread = spread[..., None] if spread.ndim == len(grid) + 1 else spread
    shared = choice.ndim != len(grid) + 1 and spread.shape[:1] == (1,)
    fits = spread.ndim == len(grid) + 2 and tuple(spread.shape[1:-1]) == grid and spread.shape[-1] in (1, heads)
    if not fits or not (shared or len(spread) == batch):
        raise ValueError(
            f"choice has shape {tuple(choice.shape)}; (*grid) = {grid}, (batch, *grid) = {(batch, *grid)} or "
            f"(1 or batch, *grid, 1 or heads) = {(batch, *grid, heads)} is allowed"
        )
    if not torch.compiler.is_compiling() and spread.numel():
        low, high = torch.stack(spread.aminmax()).tolist()
        if low < 0 or high >= sizes:
            raise ValueError(
                f"choice goes from {low} to {high}; 0 to {sizes - 1} is allowed, the numbers of the window sizes"
            )
    return spread.long()


def _check_integers(name: str, tensor: Any, device: torch.device) -> None:
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} is {kind}; a tensor of integers is allowed")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but query is on {device}; one device is allowed")


def count_visible_keys(key_mask: Tensor, plan: Plan) -> Tensor:
    """Number of keys in the window of each query that the mask leaves, by running sums along one axis after the other.

    Args:
        key_mask: (B, *grid) bool.
        plan: the windows.

    Returns:
        (B, *grid) int32.
    """
    count = key_mask.to(torch.int32)
    for dim, axis in enumerate(plan.axes, start=1):
        padded = F.pad(count.movedim(dim, -1), (axis.dilation, -axis.length % axis.dilation))
        sums = padded.unflatten(-1, (-1, axis.dilation)).cumsum(-2, dtype=torch.int32).flatten(-2)
        before = torch.from_numpy(axis.start).to(key_mask.device)  # `dilation` leading zeros: sums lag one position
        window = torch.from_numpy(axis.dilation * axis.count).to(key_mask.device)
        count = (sums[..., before + window] - sums[..., before]).movedim(-1, dim)
    return count

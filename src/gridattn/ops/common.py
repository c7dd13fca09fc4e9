"""Argument handling that every operator shares: broadcasting of per-axis sizes and the checks with their messages."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def per_axis(value: Any, rank: int, name: str, *, minimum: int = 1) -> tuple[int, ...]:
    """Broadcasts an integer setting to one entry per grid axis.

    Args:
        value: an int, taken for every axis, or a sequence of exactly `rank` ints.
        rank: number of grid axes.
        name: the argument's name, for the message.
        minimum: smallest value allowed.

    Raises:
        ValueError: a value that is not an int, is below `minimum`, or a sequence of another length.

    Example:
        >>> per_axis(7, 2, "kernel_size")
        (7, 7)
        >>> per_axis([3, 5], 2, "kernel_size")
        (3, 5)
    """
    values = _broadcast(value, rank)
    if len(values) != rank:
        raise ValueError(f"{name}={value!r} has {len(values)} entries; an int or {rank} ints are allowed, one per axis")
    if any(isinstance(v, bool) or not isinstance(v, int) or v < minimum for v in values):
        raise ValueError(f"{name}={value!r} is not allowed; every entry must be an int of at least {minimum}")
    return values


def per_axis_flag(value: Any, rank: int, name: str) -> tuple[bool, ...]:
    """Broadcasts a boolean setting to one entry per grid axis; 0 and 1 are refused.

    Example:
        >>> per_axis_flag(True, 2, "is_causal")
        (True, True)
    """
    values = _broadcast(value, rank)
    if len(values) != rank:
        raise ValueError(
            f"{name}={value!r} has {len(values)} entries; a bool or {rank} bools are allowed, one per axis"
        )
    if any(not isinstance(v, bool) for v in values):
        raise ValueError(f"{name}={value!r} is not allowed; every entry must be a bool")
    return values


def _broadcast(value: Any, rank: int) -> tuple[Any, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value)
    return (value,) * rank


def check_channels(dim: int, num_heads: int) -> int:
    """Returns the head dimension `dim // num_heads`.

    Raises:
        ValueError: a non-positive size, or `dim` not divisible by `num_heads`.
    """
    for name, value in (("dim", dim), ("num_heads", num_heads)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not allowed; it must be a positive int")
    if dim % num_heads:
        raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}")
    return dim // num_heads


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(map(repr, allowed))}")


def check_probability(name: str, value: float) -> None:
    """Raises ValueError unless `value` lies in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name}={value!r} is not allowed; it must be a number in [0, 1)")


def check_same_kind(**tensors: Tensor) -> None:
    """Raises ValueError unless all tensors share one dtype and one device."""
    (first_name, first), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.dtype != first.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but {first_name} is {first.dtype}; one dtype is allowed")
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device} but {first_name} is on {first.device}; one device is allowed"
            )


def autocast_enabled(device_type: str) -> bool:
    """Whether an autocast region is active for a type of device; some types, such as "meta", have none."""
    available = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def is_plain(tensors: list[Tensor]) -> bool:
    """Whether nothing follows this call: no gradient, compiler, tracer, transform or mode.

    A kernel can then be called directly: PyTorch's dispatcher takes longer than a small problem.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
        return False
    records, is_wrapped = torch.is_grad_enabled(), torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]
    for tensor in tensors:
        if type(tensor) not in (Tensor, Parameter) or is_wrapped(tensor) or (records and tensor.requires_grad):
            return False
    return not torch.overrides.has_torch_function(tensors)

"""Tables that depend on sizes alone: made once, and taken as constants by a trace (torch.compile, torch.export)."""

from collections.abc import Callable
from functools import lru_cache, wraps
from operator import index
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Built = TypeVar("Built", bound=Callable)


def constant_in_traces(function: Built) -> Built:
    """A function whose results `torch.compile` takes as constants; sizes among its arguments become constants as well.

    `torch.compiler.assume_constant_result` sets the same mark, but takes no sizes that a trace leaves open, and loads
    the whole compiler, which doubles the time of importing torch.
    """

    def constant(*args: Any) -> Any:
        results = function(*args)
        for tensor in results if isinstance(results, tuple) else (results,):
            if isinstance(tensor, Tensor):  # as torch._dynamo.mark_static, which does nothing during a trace
                tensor._dynamo_static_indices = set(range(tensor.ndim))  # pyright: ignore[reportAttributeAccessIssue]
        return results

    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @wraps(function)
    def call(*args: Any) -> Any:
        return constant(*(_fixed(arg) for arg in args)) if torch.compiler.is_dynamo_compiling() else function(*args)

    return cast(Built, call)


def _fixed(value: Any) -> Any:
    """The value with every size in it fixed, so that a trace holds for these sizes alone."""
    if isinstance(value, tuple):
        return tuple(_fixed(part) for part in value)
    return index(value) if isinstance(value, int) and not isinstance(value, bool) else value


@lru_cache(maxsize=128)
def to_tensors(build: Callable[..., tuple[np.ndarray, ...]], device: torch.device, *args) -> tuple[Tensor, ...]:
    """The arrays `build(*args)` as tensors on `device`.

    They outlive the call, so they must be ordinary tensors even when it runs in inference mode or under fake tensors.
    """
    with torch.inference_mode(False), _disable_current_modes():
        return tuple(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in build(*args))

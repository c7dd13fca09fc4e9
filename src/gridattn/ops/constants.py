"""Tables that depend on sizes alone: made once, and taken as constants by a trace (torch.compile, torch.export)."""

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Built = TypeVar("Built", bound=Callable)


def constant_in_traces(function: Built) -> Built:
    """Marks a function whose results a trace takes as constants.

    `torch.compiler.assume_constant_result` sets the same mark, but loads the whole compiler, which doubles the time of
    importing torch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@lru_cache(maxsize=128)
def to_tensors(build: Callable[..., tuple[np.ndarray, ...]], device: torch.device, *args) -> tuple[Tensor, ...]:
    """The arrays `build(*args)` as tensors on `device`.

    They outlive the call, so they must be ordinary tensors even when it runs in inference mode or under fake tensors.
    """
    with torch.inference_mode(False), _disable_current_modes():
        return tuple(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in build(*args))

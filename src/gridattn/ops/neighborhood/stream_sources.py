"""Grids that are read region by region: memory-mapped arrays and tensors, and functions that give a region."""

import ctypes
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

Region = tuple[slice, ...]
"""A box of a grid: slices along the batch and each grid axis, with both ends given."""

_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "uint16": torch.bfloat16,
    "bool": torch.bool,
}


@dataclass(frozen=True)
class GridReader:
    """A grid that a function gives region by region, so that it need not exist as a whole.

    Args:
        read: takes a region, a tuple of slices along the batch and each grid axis, and returns the numbers there as a
            tensor or an array, with all heads and channels.
        shape: shape of the whole, (B, *grid, heads, channels).
        dtype: type of the numbers.

    Example:
        >>> ramp = GridReader(lambda region: torch.ones(1, 4, 2, 8), shape=(1, 1000, 2, 8), dtype=torch.float32)
        >>> ramp.read((slice(0, 1), slice(10, 14))).shape
        torch.Size([1, 4, 2, 8])
    """

    read: Callable[[Region], Any]
    shape: Sequence[int]
    dtype: torch.dtype


@dataclass(frozen=True)
class Source:
    """One input of a streamed operator.

    Attributes:
        name: the argument's name, for messages.
        shape: shape of the whole.
        dtype: type of its numbers as a tensor.
        fetch: gives a region, as a tensor or an array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[Region], Any]

    def read(self, region: Region) -> Tensor:
        """The numbers of a region, (sizes of the region, *rest), in memory of their own.

        Raises:
            ValueError: the function behind the source gives another shape or dtype.
        """
        tensor = to_tensor(self.fetch(region))
        sizes = tuple(part.stop - part.start for part in region)
        allowed = sizes + self.shape[len(sizes) :]
        if tuple(tensor.shape) != allowed or tensor.dtype != self.dtype:
            raise ValueError(
                f"{self.name} gave {tuple(tensor.shape)} of {tensor.dtype} for the region {region}; {allowed} of "
                f"{self.dtype} is allowed"
            )
        return tensor

    def like(self) -> Tensor:
        """A tensor of the whole's shape and dtype that takes no memory."""
        return torch.zeros((), dtype=self.dtype).expand(self.shape)


def open_source(name: str, source: Any) -> Source:
    """Makes a source of a tensor, an array, anything that is indexed like one, or a `GridReader`.

    Raises:
        ValueError: anything else, or an array of a dtype without a counterpart.
    """
    if isinstance(source, GridReader):
        return Source(name, tuple(int(size) for size in source.shape), source.dtype, source.read)
    if isinstance(source, Tensor):
        return Source(name, tuple(source.shape), source.dtype, partial(_read_tensor, source.detach()))
    if not all(hasattr(source, part) for part in ("shape", "dtype", "__getitem__")):
        raise ValueError(
            f"{name} is a {type(source).__name__}; a tensor, an array (also memory-mapped), an object with shape, "
            "dtype and slicing, or a GridReader is allowed"
        )
    return Source(name, tuple(source.shape), dtype_of(name, source), partial(_read_array, source))


def dtype_of(name: str, array: Any) -> torch.dtype:
    """The dtype that the numbers of an array have as a tensor; 16-bit unsigned integers hold the bits of bfloat16.

    Raises:
        ValueError: a dtype without a counterpart.
    """
    kind = np.dtype(array.dtype).name
    if kind not in _DTYPES:
        raise ValueError(f"{name} is an array of {kind}; {', '.join(_DTYPES)} (uint16: bits of bfloat16) are allowed")
    return _DTYPES[kind]


def to_tensor(array: Any) -> Tensor:
    """A tensor of an array's numbers."""
    if isinstance(array, Tensor):
        return array
    array = np.asarray(array)
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if _DTYPES.get(array.dtype.name) == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: Tensor) -> np.ndarray:
    """An array of a tensor's numbers; the bits of bfloat16 as 16-bit unsigned integers."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def release(array: Any) -> None:
    """Gives the memory of a file-backed shared mapping back; its pages are read anew where they are next needed.

    Without this, what was read counts as resident memory for as long as nobody else asks for it. Private mappings and
    plain memory, whose numbers would be lost, are left alone.
    """
    if isinstance(array, Tensor):
        storage = array.untyped_storage()
        if storage.device.type == "cpu" and storage.filename is not None and hasattr(mmap, "MADV_DONTNEED"):
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), mmap.MADV_DONTNEED)
        return
    shared = False
    while array is not None and not isinstance(array, mmap.mmap):
        shared = shared or (isinstance(array, np.memmap) and getattr(array, "mode", "c") != "c")
        array = getattr(array, "base", None)
    if shared and array is not None and hasattr(array, "madvise"):
        array.madvise(mmap.MADV_DONTNEED)


def _read_tensor(tensor: Tensor, region: Region) -> Tensor:
    part = tensor[region].clone(memory_format=torch.contiguous_format)
    release(tensor)
    return part


def _read_array(array: Any, region: Region) -> Tensor:
    part = to_tensor(np.array(array[region]))
    release(array)
    return part

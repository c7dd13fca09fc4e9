"""Where a streamed operator puts its output tile by tile: a file that is there whole or not at all, an array, a
function."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gridattn.ops.neighborhood.stream_sources import Region, dtype_of, release, to_array


class Sink:
    """Takes the tiles of an output; `put(region, tile)` does so.

    Attributes:
        done: tiles that an earlier, interrupted call has put already.
    """

    done = 0

    def __init__(self, put: Callable[[Region, Tensor], Any]) -> None:
        self.put = put

    def mark(self, done: int) -> None:
        """Notes that so many tiles are put."""

    def finish(self) -> Any:
        """Ends a complete output and gives what the operator returns."""
        return None

    def abandon(self) -> None:
        """Ends an output that stays incomplete."""


class FileSink(Sink):
    """A .npy file, which takes its name when it is complete.

    Args:
        path: the file.
        shape, dtype: of the whole.
        resume: keep an incomplete file, and go on with one that a call of the same `fingerprint` left.
        fingerprint: names the call.

    Raises:
        ValueError: a name that does not end in .npy, or not enough space.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, resume: bool, fingerprint: str) -> None:
        super().__init__(self._put)
        if path.suffix != ".npy":
            raise ValueError(f"out={str(path)!r} is not allowed; the name of the file must end in .npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.resume = resume
        self.fingerprint = fingerprint
        self.partial = path.with_name(f".{path.name}.partial" if resume else f".{os.getpid()}-{path.name}")
        self.journal = self.partial.with_name(f"{self.partial.name}.json")
        array_dtype = np.dtype(np.uint16) if dtype == torch.bfloat16 else to_array(torch.empty(0, dtype=dtype)).dtype
        self.done = self._tiles_done() if resume else 0
        if self.done:
            self.array = np.lib.format.open_memmap(self.partial, mode="r+")
            return
        needed = int(np.prod(shape, dtype=np.int64)) * array_dtype.itemsize
        free = shutil.disk_usage(path.parent).free
        if needed > free:
            raise ValueError(
                f"out={str(path)!r} needs {needed / 2**30:.3g} GiB, but {free / 2**30:.3g} GiB are free there"
            )
        try:
            self.array = np.lib.format.open_memmap(self.partial, mode="w+", dtype=array_dtype, shape=shape)
            _reserve(self.partial)
        except BaseException:
            self.partial.unlink(missing_ok=True)
            raise

    def _put(self, region: Region, tile: Tensor) -> None:
        self.array[region] = to_array(tile)
        release(self.array)

    def mark(self, done: int) -> None:
        if self.resume:
            fresh = self.journal.with_name(f"{self.journal.name}.new")
            fresh.write_text(json.dumps({"fingerprint": self.fingerprint, "done": done}), encoding="utf-8")
            os.replace(fresh, self.journal)

    def finish(self) -> np.memmap:
        self.array.flush()
        del self.array
        os.replace(self.partial, self.path)
        self.journal.unlink(missing_ok=True)
        return np.load(self.path, mmap_mode="r")

    def abandon(self) -> None:
        del self.array
        if not self.resume:
            self.partial.unlink(missing_ok=True)

    def _tiles_done(self) -> int:
        try:
            left = json.loads(self.journal.read_text(encoding="utf-8"))
            same = left["fingerprint"] == self.fingerprint and self.partial.is_file()
            return int(left["done"]) if same else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def open_sink(out: Any, shape: tuple[int, ...], dtype: torch.dtype, resume: bool, fingerprint: str) -> Sink:
    """The sink for a path, a function, or something that is indexed like an array.

    Raises:
        ValueError: anything else, an array of another shape or dtype, or `resume` without a path.
    """
    if isinstance(out, str | os.PathLike):
        return FileSink(Path(out), shape, dtype, resume, fingerprint)
    if resume:
        raise ValueError("resume=True is not allowed here; only an `out` that is the path of a file can be resumed")
    if all(hasattr(out, part) for part in ("shape", "dtype", "__setitem__")):
        kind = out.dtype if isinstance(out, Tensor) else dtype_of("out", out)
        if tuple(out.shape) != shape or kind != dtype:
            raise ValueError(f"out is {tuple(out.shape)} of {kind}; {shape} of {dtype} is allowed")
        return Sink(partial(_put_in, out))
    if callable(out):
        return Sink(out)
    raise ValueError(
        f"out is a {type(out).__name__}; the path of a .npy file, an array, or a function of region and tile is allowed"
    )


def _put_in(out: Any, region: Region, tile: Tensor) -> None:
    if isinstance(out, Tensor):
        out.detach()[region] = tile.to(out.device)
    else:
        array = to_array(tile)
        out[region] = array if array.dtype != np.uint16 else array.view(np.dtype(out.dtype))
    release(out)


def _reserve(path: Path) -> None:
    """Claims a file's blocks, so that a full disk is an error now and not a crash in the middle of the work."""
    size = path.stat().st_size
    if hasattr(os, "posix_fallocate") and size:
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:  # some file systems cannot
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise

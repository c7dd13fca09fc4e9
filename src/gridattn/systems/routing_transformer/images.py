"""Readers of small images: ImageNet at 64 x 64 as arrays or as PNG files, and scikit-learn's handwritten digits."""

import zipfile
from collections.abc import Sequence
from math import isqrt
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from gridattn.data.images import read_image


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1437 and 360 images (N, 8, 8, 1) of 17 grey levels; every fifth one is held out."""
    images = load_digits()["images"].astype(np.uint8)[..., None]  # pyright: ignore[reportArgumentType, reportCallIssue]
    held_out = np.arange(len(images)) % 5 == 0
    return images[~held_out], images[held_out]


class ArrayImages:
    """Images of the files of down-sampled ImageNet: rows of all red, then all green, then all blue values.

    Args:
        files: npz files with `data`, (N, 3 side^2) uint8. Entries that are stored without compression stay on disk.

    Raises:
        ValueError: a file without such an array, or sides that differ.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.parts = [_array(file) for file in files]
        row = self.parts[0].shape[1]
        for file, part in zip(files, self.parts):
            if part.shape[1] != row:
                raise ValueError(f"{str(file)!r} has rows of {part.shape[1]} values, {str(files[0])!r} of {row}")
        self.side = isqrt(row // 3)
        self.ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        part = int(np.searchsorted(self.ends, index, side="right"))
        row = self.parts[part][index - (self.ends[part - 1] if part else 0)]
        return np.asarray(row).reshape(3, self.side, self.side).transpose(1, 2, 0)


class FileImages:
    """PNG files of one size.

    Args:
        files: at least one.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.shape = np.asarray(read_image(self.files[0])).shape

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        image = np.asarray(read_image(self.files[index]))
        if image.shape != self.shape:
            found, needed = (f"{s[1]}x{s[0]}" for s in (image.shape, self.shape))
            raise ValueError(f"image {str(self.files[index])!r} is {found}; the first one is {needed}")
        return image


Images = np.ndarray | ArrayImages | FileImages


def imagenet64(path: Path) -> tuple[Images, Images]:
    """Training and validation images of a folder in one of the two published layouts.

    Either `train_data_batch_1.npz` and so on with `val_data.npz`, or folders `train_64x64` and `valid_64x64` of PNG
    files.

    Raises:
        ValueError: a folder in neither layout, one where a numbered file is missing, or a damaged file.
    """
    parts = sorted(path.glob("train_data_batch_*.npz"), key=lambda file: (len(file.name), file.name))
    if parts:
        for number, part in enumerate(parts, 1):
            needed = path / f"train_data_batch_{number}.npz"
            if part != needed:
                raise ValueError(f"data file {str(needed)!r} does not exist, but {part.name} does")
        if not (path / "val_data.npz").is_file():
            raise ValueError(f"data file {str(path / 'val_data.npz')!r} does not exist")
        train, val = ArrayImages(parts), ArrayImages([path / "val_data.npz"])
        if train.side != val.side:
            raise ValueError(f"images of {str(path)!r} are {train.side} wide for training, {val.side} for validation")
        return train, val
    folders = [path / "train_64x64", path / "valid_64x64"]
    files = [sorted(folder.glob("*.png")) for folder in folders]
    for folder, found in zip(folders, files):
        if not found:
            raise ValueError(
                f"folder {str(path)!r} has neither train_data_batch_1.npz nor PNG files in {str(folder.name)!r}"
            )
    return FileImages(files[0]), FileImages(files[1])


def _array(file: Path) -> np.ndarray:
    """The entry `data` of an npz file, mapped from disk where it is stored as it is."""
    try:
        with zipfile.ZipFile(file) as archive:
            entry = archive.getinfo("data.npy")
            if entry.compress_type != zipfile.ZIP_STORED:
                with np.load(file, allow_pickle=False) as arrays:
                    data = arrays["data"]
            else:
                data = _mapped(file, archive, entry)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(file)!r} cannot be read: {' '.join(str(error).split())}") from None
    side = isqrt(data.shape[-1] // 3)
    if data.ndim != 2 or data.dtype != np.uint8 or 3 * side * side != data.shape[1] or not len(data):
        raise ValueError(f"{str(file)!r} has data {data.shape} of {data.dtype}; (N, 3 side^2) of uint8 is needed")
    return data


def _mapped(file: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        header = stream.tell()
    with file.open("rb") as raw:
        raw.seek(entry.header_offset + 26)
        name, extra = np.frombuffer(raw.read(4), "<u2")
    offset = entry.header_offset + 30 + int(name) + int(extra) + header
    if offset + int(np.prod(shape)) * dtype.itemsize > file.stat().st_size:
        raise ValueError("it ends before its array does")
    return np.memmap(file, dtype, "r", offset, shape, "F" if fortran else "C")

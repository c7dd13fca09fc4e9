"""Light fields in files: the layouts of the five datasets and of their prepared patches, and folders of views."""

import math
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gridattn.data.images import find_images, read_image

Array = NDArray[np.float32]
SUFFIXES = (".mat", ".h5", ".hdf5")
_TOOLBOX = re.compile(r"^SR_(\d+)x\1_(\d+)x$")


def read_light_field(path: str | Path) -> Array:
    """Reads a light field.

    * `.mat`, older than 7.3: variable `LF` [U, V, H, W, 3 or more]; 7.3 (HDF5): the same with its axes reversed.
    * `.h5`: dataset `LF` [3, U, V, H, W]; or the toolbox's mosaics `Hr_SAI_y`, stored transposed, [(v w), (u h)], whose
      Y becomes a grey light field; there the name of a folder above, `SR_5x5_2x`, tells the number of views.
    * a folder: images of one size, whose names end in two numbers, row and column (`view_00_03.png`), or a square
      number of them in the order of their names.

    Whole numbers are divided by the largest of their type.

    Args:
        path: file or folder.

    Returns:
        (3, U, V, H, W), float32, RGB in 0..1.

    Raises:
        ValueError: a path that does not exist, a damaged file, or content of another layout.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_views(path)
    if not path.is_file():
        raise ValueError(f"light field {str(path)!r} does not exist")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"light field {str(path)!r} is not a folder of views or one of {', '.join(SUFFIXES)}")
    return _read_hdf(path) if _is_hdf(path) else _read_old_mat(path)


def read_shape(path: Path) -> tuple[int, int, int, int]:
    """U, V, H, W of a light field without reading its pixels.

    Raises:
        ValueError: as `read_light_field`.
    """
    if _is_hdf(path):
        return _with_hdf(path, lambda file: _hdf_shape(file, path))
    return _mat_shape(path)


def find_scenes(folder: Path) -> list[Path]:
    """Light-field files below a folder, in alphabetical order; hidden ones are passed over."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def toolbox_layout(path: Path) -> tuple[int, int] | None:
    """Views along an axis and scale from a folder's name such as `SR_5x5_2x` in `path`; None without one."""
    for part in reversed(path.parts):
        found = _TOOLBOX.match(part)
        if found:
            return int(found[1]), int(found[2])
    return None


def _is_hdf(path: Path) -> bool:
    # MATLAB 7.3 puts 512 bytes of its own before the signature.
    with path.open("rb") as file:
        head = file.read(520)
    signature = b"\x89HDF\r\n\x1a\n"
    if head[:8] == signature or head[512:520] == signature:
        return True
    if not _is_mat(path):
        raise ValueError(f"light field {str(path)!r} is damaged or no HDF5 file")
    return False


def _is_mat(path: Path) -> bool:
    return path.suffix.lower() == ".mat"


def _with_hdf(path: Path, read: Callable[[Any], Any]) -> Any:
    try:
        import h5py
    except ImportError:
        raise ValueError(f'{str(path)!r} needs h5py: pip install "gridattn[lightfield]"') from None
    try:
        with h5py.File(path, "r") as file:
            return read(file)
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"light field {str(path)!r} is damaged or incomplete: {_line(error)}") from None


def _read_hdf(path: Path) -> Array:
    def read(file: Any) -> Array:
        if "LF" not in file and "Hr_SAI_y" in file:
            return _from_mosaic(file["Hr_SAI_y"][()], path)
        _hdf_shape(file, path)
        values = file["LF"][:3]
        return _unit(values.transpose(0, 4, 3, 2, 1) if _is_mat(path) else values, path)

    return _with_hdf(path, read)


def _hdf_shape(file: Any, path: Path) -> tuple[int, int, int, int]:
    if "LF" not in file and "Hr_SAI_y" in file:
        views, _ = _needed_layout(path)
        wide, high = file["Hr_SAI_y"].shape
        return views, views, high // views, wide // views
    if "LF" not in file:
        raise ValueError(f"light field {str(path)!r} has no variable 'LF'; it has {', '.join(file) or 'none'}")
    shape = file["LF"].shape
    if len(shape) != 5 or shape[0] < 3 or 0 in shape:
        raise ValueError(f"'LF' of {str(path)!r} has shape {shape}; [3, U, V, H, W] or its MATLAB order is needed")
    if _is_mat(path):
        return shape[4], shape[3], shape[2], shape[1]
    return shape[1], shape[2], shape[3], shape[4]


def _read_old_mat(path: Path) -> Array:
    _mat_shape(path)
    return _unit(np.moveaxis(_loadmat(path)["LF"][..., :3], -1, 0), path)


def _mat_shape(path: Path) -> tuple[int, int, int, int]:
    from scipy.io import whosmat

    try:
        shapes = {name: shape for name, shape, _ in whosmat(str(path))}
    except Exception as error:  # scipy reports a damaged file by errors of many kinds
        raise ValueError(f"light field {str(path)!r} is damaged or no MATLAB file: {_line(error)}") from None
    if "LF" not in shapes:
        raise ValueError(f"light field {str(path)!r} has no variable 'LF'; it has {', '.join(shapes) or 'none'}")
    shape = shapes["LF"]
    if len(shape) != 5 or shape[4] < 3 or 0 in shape:
        raise ValueError(f"'LF' of {str(path)!r} has shape {shape}; [U, V, H, W, 3] is needed")
    return shape[0], shape[1], shape[2], shape[3]


def _loadmat(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat

    try:
        return loadmat(str(path), variable_names=["LF"])
    except Exception as error:  # as above
        raise ValueError(f"light field {str(path)!r} is damaged: {_line(error)}") from None


def _needed_layout(path: Path) -> tuple[int, int]:
    layout = toolbox_layout(path)
    if layout is None:
        raise ValueError(f"mosaics of {str(path)!r} need a folder named like SR_5x5_2x above them")
    return layout


def _from_mosaic(mosaic: NDArray[Any], path: Path) -> Array:
    """(v w, u h) luma, over 255 -> the grey light field of that luma, (3, U, V, H, W)."""
    views, _ = _needed_layout(path)
    if mosaic.ndim != 2 or any(n % views or not n for n in mosaic.shape):
        raise ValueError(f"a mosaic of {str(path)!r} has shape {mosaic.shape}; multiples of {views} are needed")
    wide, high = mosaic.shape
    luma = _unit(mosaic, path).T.reshape(views, high // views, views, wide // views).swapaxes(1, 2)
    # With Cb = Cr = 128 / 255, red, green and blue are equal and their luma is the given one.
    return np.repeat(((255 * luma - 16) / 219)[None], 3, axis=0).astype(np.float32)


def _unit(values: NDArray[Any], path: Path) -> Array:
    if np.issubdtype(values.dtype, np.integer):
        return (values / np.iinfo(values.dtype).max).astype(np.float32)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"light field {str(path)!r} has values of type {values.dtype}; numbers are needed")
    values = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"light field {str(path)!r} has values that are not finite")
    return values


def _read_views(folder: Path) -> Array:
    files = [path for path in find_images(folder) if path.parent == folder]
    if not files:
        raise ValueError(f"folder {str(folder)!r} holds no images")
    numbers = [[int(n) for n in re.findall(r"\d+", file.stem)[-2:]] for file in files]
    rows, columns = (sorted({pair[i] for pair in numbers if len(pair) == 2}) for i in (0, 1))
    if all(len(pair) == 2 for pair in numbers) and len(files) == len(rows) * len(columns) == len(
        {tuple(pair) for pair in numbers}
    ):
        order = sorted(range(len(files)), key=lambda i: numbers[i])
        grid = len(rows), len(columns)
    else:
        side = math.isqrt(len(files))
        if side**2 != len(files):
            raise ValueError(
                f"folder {str(folder)!r} holds {len(files)} views; names that end in row and column, or a square "
                "number of views, are needed"
            )
        order, grid = list(range(len(files))), (side, side)
    views = [np.asarray(read_image(files[i]), np.float32) / 255 for i in order]
    for i, view in zip(order, views):
        if view.shape != views[0].shape:
            raise ValueError(
                f"view {str(files[i])!r} has {view.shape[0]} x {view.shape[1]} pixels; "
                f"{views[0].shape[0]} x {views[0].shape[1]} as in {str(files[order[0]])!r} are needed"
            )
    return np.moveaxis(np.stack(views).reshape(*grid, *views[0].shape), -1, 0).astype(np.float32)


@lru_cache(maxsize=4)
def _cached(path: Path, modified: float) -> Array:
    return read_light_field(path)


def read_patch(path: Path, top: int, left: int, size: int) -> Array:
    """Pixels [top, top + size) x [left, left + size) of every view; the last few scenes are kept in memory."""
    field = _cached(path, path.stat().st_mtime)
    return field[..., top : top + size, left : left + size]


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]

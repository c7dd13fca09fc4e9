"""Readers of recordings: EmoPain's MATLAB windows, .npz recordings, CSV signals, seglearn's watch recordings."""

import importlib.util
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gridattn.systems.l_sfan.windows import Recording

EMOPAIN_CLASSES = ("not protective", "protective")
EMOPAIN_CHANNELS = (
    *(f"angle {i}" for i in range(1, 14)),
    *(f"energy {i}" for i in range(1, 14)),
    *(f"sEMG {i}" for i in range(1, 5)),
)
_SUBJECT_FILE = re.compile(r"([CP]\d+)", re.IGNORECASE)


def read_emopain(folder: str | Path) -> list[Recording]:
    """Windows of EmoPain, one MATLAB file a subject: `C<k>*.mat` (healthy) and `P<k>*.mat` (patients).

    A file holds `subdata` (windows, frames, features) and `sublabel`, a class for every window. `train<k>.mat`, which
    mix the subjects of a fold, are passed over.

    Raises:
        ValueError: a folder without such files, or a file that is damaged or inconsistent.
    """
    folder = _existing(folder)
    files = [file for file in sorted(folder.glob("*.mat")) if _SUBJECT_FILE.match(file.stem)]
    if not files:
        raise ValueError(f"{str(folder)!r} holds no subject file (C<k>*.mat or P<k>*.mat)")
    found: list[Recording] = []
    for file in files:
        data, labels = _read_mat(file)
        match = _SUBJECT_FILE.match(file.stem)
        assert match is not None
        for number, (x, label) in enumerate(zip(data, labels)):
            y = np.full(len(x), label, np.int64)
            found.append(Recording(x, y, match[1].upper(), "", f"{file.name}[{number}]"))
    _check_sensors(found)
    return found


def _read_mat(file: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    from scipy.io import loadmat

    try:
        content = loadmat(file)
    except Exception as error:  # scipy reports damaged files by errors of many kinds
        raise ValueError(f"{str(file)!r} cannot be read as MATLAB file: {_line(error)}") from None
    for name in ("subdata", "sublabel"):
        if name not in content:
            raise ValueError(f"{str(file)!r} has no variable {name!r}")
    data, labels = np.asarray(content["subdata"]), np.asarray(content["sublabel"]).ravel()
    if data.ndim != 3:
        raise ValueError(f"{str(file)!r}: subdata has shape {data.shape}; (windows, frames, features) is needed")
    if len(labels) != len(data):
        raise ValueError(f"{str(file)!r}: sublabel has {len(labels)} entries for {len(data)} windows")
    return _signal(data, file), _classes(labels, file)


def read_npz_folder(folder: str | Path) -> list[Recording]:
    """Recordings `*.npz`, one a file: `x` (frames, V), `y` (frames,), `subject` and, if known, `activity` and `rate`.

    Raises:
        ValueError: a folder without such files, or a file that is damaged or inconsistent.
    """
    folder = _existing(folder)
    files = sorted(folder.rglob("*.npz"))
    if not files:
        raise ValueError(f"{str(folder)!r} holds no recordings (*.npz)")
    found = [read_npz(file) for file in files]
    _check_sensors(found)
    return found


def read_npz(file: Path, labelled: bool = True) -> Recording:
    """One recording; without `labelled`, `y` and `subject` may be absent, and unknown labels are -1."""
    try:
        with np.load(file, allow_pickle=False) as content:
            entries = {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(f"{str(file)!r} cannot be read as recording: {_line(error)}") from None
    for name in ("x", "y", "subject") if labelled else ("x",):
        if name not in entries:
            raise ValueError(f"{str(file)!r} has no entry {name!r}")
    x = _signal(entries["x"], file)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{str(file)!r}: x has shape {x.shape}; (frames, sensors) is needed")
    y = _classes(entries["y"].ravel(), file) if "y" in entries else np.full(len(x), -1, np.int64)
    if len(y) != len(x):
        raise ValueError(f"{str(file)!r}: y has {len(y)} entries for {len(x)} frames")
    return Recording(x, y, str(entries.get("subject", "")), str(entries.get("activity", "")), file.name)


def read_csv(file: Path, sensors: int) -> Recording:
    """A signal without labels from a CSV file of sensors x time.

    A row is a sensor; its first field may be a name, and so may the whole first row be names or times. A file of
    frames x sensors is turned, where only that fits the number of sensors.

    Args:
        file: the file.
        sensors: rows that are needed.

    Raises:
        ValueError: a file that is missing, is no table of finite numbers, or has another number of sensors.
    """
    if not file.is_file():
        raise ValueError(f"signal {str(file)!r} does not exist")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"signal {str(file)!r} cannot be read: {_line(error)}") from None
    rows = [[field.strip() for field in line.split(",")] for line in lines if line.strip()]
    if rows and all(not _is_number(field) for field in rows[0]):
        rows = rows[1:]
    if rows and all(not _is_number(row[0]) for row in rows):
        rows = [row[1:] for row in rows]
    if not rows or not rows[0] or len({len(row) for row in rows}) != 1:
        raise ValueError(f"signal {str(file)!r} is no table of sensors x time; rows of one length are needed")
    for number, row in enumerate(rows):
        bad = next((field for field in row if not _is_number(field)), None)
        if bad is not None:
            raise ValueError(f"signal {str(file)!r} holds {bad[:40]!r} in row {number}; numbers are needed")
    table = np.array(rows, np.float64)
    if table.shape[0] != sensors and table.shape[1] == sensors:
        table = table.T
    if table.shape[0] != sensors:
        raise ValueError(f"signal {str(file)!r} has {table.shape[0]} rows; the network needs {sensors} sensors")
    return Recording(_signal(table.T, file), np.full(table.shape[1], -1, np.int64), "", "", file.name)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers, nothing else; `_codecs.encode` makes the bytes of their scalars."""

    def find_class(self, module: str, name: str) -> Any:
        numpy = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "scalar")
        if numpy or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def read_watch(file: Path | None = None) -> tuple[list[Recording], tuple[str, ...], tuple[str, ...]]:
    """Shoulder exercises worn by a watch: 140 recordings of 10 subjects, 7 exercises, 6 channels at 50 Hz.

    Args:
        file: `watch_dataset.npy`; None takes the one that the package seglearn ships.

    Returns:
        The recordings, names of the classes and names of the channels.

    Raises:
        ModuleNotFoundError: seglearn is not installed.
        ValueError: a damaged file, or one that holds more than arrays.
    """
    if file is None:
        package = importlib.util.find_spec("seglearn")  # its data is read, not its code run
        if package is None or package.origin is None:
            raise ModuleNotFoundError("data='watch' needs seglearn; install gridattn[sensors]")
        file = Path(package.origin).parent / "data" / "watch_dataset.npy"
    try:
        with file.open("rb") as stream:
            np.lib.format.read_magic(stream)
            np.lib.format.read_array_header_1_0(stream)
            content = _ArraysOnly(stream).load().item()
        signals, labels, subjects = content["X"], content["y"], content["subject"]
        classes, channels = (tuple(map(str, content[name])) for name in ("y_labels", "X_labels"))
        found = [
            Recording(_signal(x, file), np.full(len(x), int(y)), str(int(s)), classes[int(y)], f"watch-{i:03d}")
            for i, (x, y, s) in enumerate(zip(signals, labels, subjects))
        ]
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, LookupError, ValueError) as error:
        raise ValueError(f"{str(file)!r} cannot be read as watch recordings: {_line(error)}") from None
    return found, classes, channels


def _existing(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise ValueError(f"{str(folder)!r} is no folder")
    return Path(folder)


def _check_sensors(recordings: list[Recording]) -> None:
    first = recordings[0]
    for other in recordings:
        if other.x.shape[1] != first.x.shape[1]:
            counts = f"{other.x.shape[1]} sensors; {first.name} has {first.x.shape[1]}"
            raise ValueError(f"{other.name} has {counts}")


def _signal(values: Any, file: Path) -> NDArray[np.float32]:
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{str(file)!r} holds signals that are no numbers") from None
    if not np.isfinite(array).all():
        raise ValueError(f"{str(file)!r} holds values that are not finite")
    return array


def _classes(values: NDArray[Any], file: Path) -> NDArray[np.int64]:
    if values.dtype.kind not in "biuf" or (values != np.floor(values)).any() or (values < 0).any():
        raise ValueError(f"{str(file)!r} holds labels that are no class indices of at least 0")
    return values.astype(np.int64)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]

"""Sensor recordings by name, split by subject."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gridattn.systems.l_sfan import tension
from gridattn.systems.l_sfan.files import (
    EMOPAIN_CHANNELS,
    EMOPAIN_CLASSES,
    read_emopain,
    read_npz_folder,
    read_watch,
)
from gridattn.systems.l_sfan.windows import Recording, Standardise, Windows

WATCH_HELD_OUT = ("1", "4", "7", "10")
EMBEDDED = ("tension", "watch")


@dataclass(frozen=True)
class SensorData:
    """Recordings of several subjects.

    Attributes:
        spec: the name they were loaded by.
        recordings: all of them.
        classes: class names; a label is an index into them.
        channels: names of the sensors, in order.
        held_out: subjects for validation where none are named; may be empty.
    """

    spec: str
    recordings: Sequence[Recording]
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    held_out: tuple[str, ...] = ()

    @property
    def subjects(self) -> list[str]:
        """All subjects, numbers in numerical order."""
        found = {recording.subject for recording in self.recordings}
        return sorted(found, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))

    def validation_subjects(self, named: Sequence[str] | None, seed: int) -> list[str]:
        """The named subjects, else those of the dataset, else a fifth of all drawn by `seed`.

        Raises:
            ValueError: a subject that does not exist, or none left for training.
        """
        subjects = self.subjects
        chosen = list(dict.fromkeys(named if named is not None else self.held_out))
        for subject in chosen:
            if subject not in subjects:
                raise ValueError(f"subject {subject!r} is not in data={self.spec!r}; allowed: {', '.join(subjects)}")
        if not chosen:
            order = np.random.default_rng(seed).permutation(len(subjects))
            chosen = [subjects[i] for i in sorted(order[: max(1, len(subjects) // 5)])]
        if len(chosen) == len(subjects):
            raise ValueError(f"val_subjects={chosen} are all subjects of data={self.spec!r}; one must be left to train")
        return chosen

    def windows(self, subjects: Sequence[str], window: int, hop: int) -> Windows:
        """The windows of some subjects.

        Raises:
            ValueError: recordings too short for any window.
        """
        kept = set(subjects)
        found = Windows([r for r in self.recordings if r.subject in kept], window, hop)
        if not len(found):
            raise ValueError(f"window={window} leaves no window of the subjects {', '.join(subjects)}")
        return found

    def split(self, held_out: Sequence[str], window: int, hop: int) -> tuple[Windows, Windows, Standardise]:
        """Training windows, windows of the held-out subjects, and the statistics of the training windows alone."""
        held = set(held_out)
        train = self.windows([s for s in self.subjects if s not in held], window, hop)
        return train, self.windows(list(held_out), window, hop), Standardise.fit(train)


def load_sensors(spec: str) -> SensorData:
    """Loads sensor recordings.

    Args:
        spec: `tension` (procedural, 30 sensors, 2 classes), `watch` (real shoulder exercises, 6 channels, 7 classes;
            needs the extra `sensors`), `emopain:PATH` (MATLAB files by subject) or `folder:PATH` (.npz recordings;
            classes.txt and channels.txt, a name a line, are optional).

    Raises:
        ValueError: an unknown name, or files that cannot be used.
        ModuleNotFoundError: `watch` without seglearn.

    Example:
        >>> data = load_sensors("tension")
        >>> len(data.recordings), len(data.channels), data.classes
        (1100, 30, ('relaxed or natural', 'guarded'))
    """
    kind, _, path = spec.partition(":")
    if spec == "tension":
        return SensorData(spec, tension.recordings(), tension.CLASSES, tension.CHANNELS, tension.HELD_OUT)
    if spec == "watch":
        recordings, classes, channels = read_watch()
        return SensorData(spec, recordings, classes, channels, WATCH_HELD_OUT)
    if kind == "emopain" and path:
        found = read_emopain(path)
        return _from_files(spec, found, EMOPAIN_CLASSES, EMOPAIN_CHANNELS)
    if kind == "folder" and path:
        found = read_npz_folder(path)
        return _from_files(spec, found, _names(Path(path) / "classes.txt"), _names(Path(path) / "channels.txt"))
    raise ValueError(f"data={spec!r} is not known; allowed: {', '.join(EMBEDDED)}, emopain:PATH, folder:PATH")


def _from_files(spec: str, recordings: list[Recording], classes: Sequence[str], channels: Sequence[str]) -> SensorData:
    """Checks names against the files; what has no names is numbered."""
    sensors, highest = recordings[0].x.shape[1], max(int(r.y.max()) for r in recordings)
    classes = tuple(classes) or tuple(f"class {i}" for i in range(max(2, highest + 1)))
    if highest >= len(classes):
        raise ValueError(f"data={spec!r} holds the label {highest}; there are {len(classes)} classes")
    if spec.startswith("emopain") and sensors != len(channels):
        channels = ()
    channels = tuple(channels) or tuple(f"sensor {i + 1}" for i in range(sensors))
    if len(channels) != sensors:
        raise ValueError(f"data={spec!r} has {sensors} sensors; channels.txt names {len(channels)}")
    data = SensorData(spec, recordings, classes, channels)
    if len(data.subjects) < 2:
        raise ValueError(f"data={spec!r} has 1 subject; at least 2 are needed")
    return data


def _names(file: Path) -> tuple[str, ...]:
    if not file.is_file():
        return ()
    return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())

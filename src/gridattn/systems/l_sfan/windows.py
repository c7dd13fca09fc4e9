"""Recordings of body-worn sensors, and the windows that are cut from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gridattn.data.sampling import SeededSamples
from gridattn.systems.l_sfan.augment import SignalAugment
from gridattn.systems.settings import check_least

STD_FLOOR = 1e-6


@dataclass(frozen=True)
class Recording:
    """One activity of one subject.

    Attributes:
        x: (frames, V) float32, in the sensors' own units.
        y: (frames,) int64, the class of every frame.
        subject: who.
        activity: what was done.
        name: where it comes from, for messages.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    subject: str
    activity: str = ""
    name: str = ""


def window_starts(frames: int, window: int, hop: int) -> list[int]:
    """First frames of the windows of a recording.

    floor((L - W) / S) + 1 windows where the recording is at least as long as a window. A shorter one gives a single
    window, padded at its end, if it fills at least half of it, else none.

    Raises:
        ValueError: a window or hop below 1.

    Example:
        >>> window_starts(360, 180, 45)
        [0, 45, 90, 135, 180]
        >>> window_starts(90, 180, 45), window_starts(89, 180, 45)
        ([0], [])
    """
    check_least("window", window, 1)
    check_least("hop", hop, 1)
    if frames < window:
        return [0] if 2 * frames >= window else []
    return list(range(0, frames - window + 1, hop))


def majority(labels: NDArray[np.int64]) -> int:
    """The most frequent class of a window; of equally frequent ones the largest, so that a half is enough for class 1.

    Frames labelled -1 are of no known class; without any other the window is of none, -1.

    Example:
        >>> majority(np.repeat([0, 1], [90, 90])), majority(np.repeat([0, 1], [91, 89]))
        (1, 0)
    """
    counts = np.bincount(labels[labels >= 0])
    if not len(counts):
        return -1
    return int(len(counts) - 1 - counts[::-1].argmax())


class Windows:
    """Windows of recordings by index; they share the recordings' memory.

    Args:
        recordings: the recordings.
        window: frames W of a window.
        hop: frames S between the starts of windows.

    Attributes:
        places: recording and first frame of every window.
        labels: (N,) int64, `majority` of the frames.
        subjects: subject of every window.
    """

    def __init__(self, recordings: Sequence[Recording], window: int, hop: int) -> None:
        self.recordings, self.window, self.hop = recordings, window, hop
        self.places = [(r, s) for r, rec in enumerate(recordings) for s in window_starts(len(rec.y), window, hop)]
        self.labels = np.array([majority(recordings[r].y[s : s + window]) for r, s in self.places], np.int64)
        self.subjects = [recordings[r].subject for r, _ in self.places]

    def __len__(self) -> int:
        return len(self.places)

    def frames(self, index: int) -> NDArray[np.float32]:
        """(at most W, V), a view."""
        recording, start = self.places[index]
        return self.recordings[recording].x[start : start + self.window]


@dataclass(frozen=True)
class Standardise:
    """z = (x - mean) / std by sensor.

    Attributes:
        mean: of every sensor.
        std: of every sensor, at least 1e-6.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def fit(cls, windows: Windows) -> "Standardise":
        """Mean and deviation over all windows and their frames, in float64.

        Raises:
            ValueError: no windows.
        """
        if not len(windows):
            raise ValueError("there are 0 training windows; at least 1 is needed")
        mean, std = _moments(windows)
        return cls(tuple(mean.tolist()), tuple(np.maximum(std, STD_FLOOR).tolist()))

    def __call__(self, x: NDArray[np.float32], window: int | None = None) -> Tensor:
        """(frames, V) -> (V, frames) float32, filled up at the end with the mean (zeros) to `window` frames."""
        z = ((x - np.asarray(self.mean)) / np.asarray(self.std)).astype(np.float32).T
        if window is not None and z.shape[1] < window:
            z = np.pad(z, ((0, 0), (0, window - z.shape[1])))
        return torch.from_numpy(np.ascontiguousarray(z))


def _moments(windows: Windows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation of every sensor; two passes, so that large offsets cost no digits."""
    count = sum(len(windows.frames(i)) for i in range(len(windows)))
    mean = sum(windows.frames(i).sum(0, dtype=np.float64) for i in range(len(windows))) / count
    squares = sum(((windows.frames(i) - mean) ** 2).sum(0) for i in range(len(windows))) / count
    return np.asarray(mean), np.sqrt(np.asarray(squares))


def class_weights(labels: NDArray[np.int64], num_classes: int) -> Tensor:
    """w_c = n / (K n_c) over the K classes that occur, 0 for a class that does not; their mean over the labels is 1.

    Example:
        >>> class_weights(np.array([0, 0, 0, 1]), 2).tolist()
        [0.6666666865348816, 2.0]
    """
    counts = np.bincount(labels, minlength=num_classes)
    occurring = np.count_nonzero(counts)
    return torch.tensor(np.where(counts, len(labels) / (occurring * np.maximum(counts, 1)), 0.0), dtype=torch.float32)


@dataclass
class WindowSamples(SeededSamples):
    """Standardised windows (V, W) float32 and their labels, by draw number; padding is a window of zeros labelled -1.

    Args:
        windows: the windows.
        standardise: fitted on the training subjects.
        augment: how training windows vary; None leaves them as they are.
        seed: of the run.
    """

    windows: Windows
    standardise: Standardise
    augment: SignalAugment | None = None
    seed: int = field(default=0)

    def __len__(self) -> int:
        return len(self.windows)

    def sample(self, index: int) -> tuple[Tensor, int]:
        x = self.standardise(self.windows.frames(index), self.windows.window)
        return (x if self.augment is None else self.augment(x)), int(self.windows.labels[index])

    def padding(self) -> tuple[Tensor, int]:
        return torch.zeros(len(self.standardise.mean), self.windows.window), -1


def frame_scores(values: Tensor, starts: Sequence[int], frames: int, window: int) -> Tensor:
    """Mean over the windows that cover a frame.

    Args:
        values: (N, ..., W) one value a frame of each window, or (N, ..., 1) one value a window.
        starts: first frames of the windows.
        frames: frames of the recording.
        window: W.

    Returns:
        (..., frames); NaN where no window covers a frame.

    Example:
        >>> frame_scores(torch.tensor([[1.0], [3.0]]), [0, 2], 7, 4).tolist()
        [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, nan]
    """
    total = values.new_zeros(*values.shape[1:-1], frames)
    count = values.new_zeros(frames)
    for value, start in zip(values, starts):
        end = min(start + window, frames)
        total[..., start:end] += value[..., : end - start] if value.shape[-1] > 1 else value
        count[start:end] += 1
    return torch.where(count > 0, total / count.clamp_min(1), torch.nan)

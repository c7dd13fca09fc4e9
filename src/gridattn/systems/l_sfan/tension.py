"""Procedural recordings in the shape of EmoPain: muscles that are tense without moving, or move without tension.

V = 30 at 60 Hz: 13 joint angles, their 13 energies, 4 muscle envelopes. A window's label is (movement is large) XOR
(muscles are active), so that neither group of sensors tells it alone. Angles 9 to 12 stay still: the convolutions
cannot see a moving joint and a muscle at once.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from gridattn.systems.l_sfan.windows import Recording

CLASSES = ("relaxed or natural", "guarded")
CHANNELS = (
    *(f"angle {i}" for i in range(1, 14)),
    *(f"energy {i}" for i in range(1, 14)),
    *(f"sEMG {i}" for i in range(1, 5)),
)
FRAMES, RATE = 180, 60.0
HELD_OUT = ("s08", "s09", "s10", "s11")
_SUBJECTS, _JOINTS, _MOVING, _MUSCLES = 12, 13, 9, 4
_TRAIN, _TEST = 100, 75


@cache
def recordings() -> tuple[Recording, ...]:
    """Windows of 12 subjects, each a recording of 180 frames: 100 for each of the first 8, 75 for each other."""
    return tuple(
        recording
        for subject in range(_SUBJECTS)
        for recording in _subject(subject, _TEST if f"s{subject:02d}" in HELD_OUT else _TRAIN)
    )


def _subject(subject: int, count: int) -> list[Recording]:
    rng = np.random.default_rng((6913, subject))
    gains = rng.uniform(0.85, 1.15, 2)
    posture = np.random.default_rng(6913)  # of the exercise, the same for all
    base, phase = posture.uniform(-1, 1, _JOINTS), posture.uniform(0, 2 * np.pi, _JOINTS)
    made = []
    for number in range(count):
        move, tense = rng.integers(0, 2, 2).tolist()
        x = _window(rng, move, tense, gains, base, phase)
        label = np.full(FRAMES, move ^ tense, np.int64)
        activity = f"{'moving' if move else 'still'}, {'tense' if tense else 'loose'}"
        made.append(Recording(x, label, f"s{subject:02d}", activity, f"s{subject:02d}-{number:03d}"))
    return made


def _window(
    rng: np.random.Generator,
    move: int,
    tense: int,
    gains: NDArray[np.float64],
    base: NDArray[np.float64],
    phase: NDArray[np.float64],
) -> NDArray[np.float32]:
    swing, level = (
        gain * (rng.uniform(0.85, 1.15) if on else rng.uniform(0.25, 0.4)) for gain, on in zip(gains, (move, tense))
    )
    profile = np.where(np.arange(_JOINTS) < _MOVING, np.abs(np.sin(1.7 * np.arange(_JOINTS) + 0.5)) + 0.3, 0.0)
    time = np.arange(FRAMES)[:, None] / RATE
    angle = base + swing * profile * np.sin(2 * np.pi * rng.uniform(0.3, 0.9) * time + phase)
    angle = angle + rng.normal(0, 0.05, angle.shape)
    energy = _smooth(400 * np.diff(angle, axis=0, prepend=angle[:1]) ** 2, 9)
    muscle = _smooth(level * np.abs(rng.normal(size=(FRAMES, _MUSCLES))), 15)
    return np.concatenate([angle, energy, muscle], 1).astype(np.float32)


def _smooth(x: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Moving average along the frames, the ends repeated."""
    padded = np.pad(x, ((width // 2, width // 2), (0, 0)), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, width, axis=0).mean(-1)

"""Procedural sorts and identities: ellipses told apart by small coloured marks, among marks that mean nothing."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from gridattn.systems.dcal.files import Sighting, Sightings

SIZE = 32
COLOURS = ((1.0, 0.0, 0.0), (0.0, 0.8, 0.0), (0.1, 0.2, 1.0), (1.0, 0.9, 0.0))
NAMES = ("red", "green", "blue", "yellow")
CLASSES = tuple(f"{first}-{second}" for first in NAMES for second in NAMES)
TRAIN_COUNT, VAL_COUNT = 320, 480
HALF_AXES = (10.0, 6.0)
MARK = 3.6

CAMERAS = 4
IDENTITIES, SEEN = 64, 48
TRAIN_SHOTS, TEST_SHOTS = 6, 2
"""Pictures of an identity by each camera."""

Array = NDArray[np.float64]


def body(centre: Sequence[float], angle: float) -> NDArray[np.bool_]:
    """The pixels (32, 32) of an ellipse with half axes of 10 and 6 pixels, the long one turned by `angle` (radians)."""
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    y, x = rows - centre[1], columns - centre[0]
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    return (along / HALF_AXES[0]) ** 2 + (across / HALF_AXES[1]) ** 2 <= 1


def square(x: float, y: float, side: float) -> NDArray[np.bool_]:
    """The pixels (32, 32) whose centres lie in a square around (x, y)."""
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    return (abs(rows - y) <= side / 2) & (abs(columns - x) <= side / 2)


def places(centre: Sequence[float], angle: float, count: int) -> list[tuple[float, float]]:
    """Centres (x, y) of `count` marks, 2 or 3, from -6 to +6 pixels along the long axis of a body."""
    steps = np.linspace(-6, 6, count)
    return [(centre[0] + s * np.cos(angle), centre[1] + s * np.sin(angle)) for s in steps]


def figure(rng: np.random.Generator, marks: Sequence[int]) -> Array:
    """One picture (32, 32, 3), values 0..1, of an ellipse with the given marks, indices into `COLOURS`."""
    image = 0.5 + 0.55 * gaussian_filter(rng.normal(size=(SIZE, SIZE, 3)), (3, 3, 0))
    for _ in range(5):
        x, y = rng.uniform(1.5, SIZE - 1.5, 2)
        image[square(x, y, 3)] = COLOURS[rng.integers(len(COLOURS))]
    centre, angle = rng.uniform(12, 20, 2).tolist(), rng.uniform(-0.4, 0.4)
    image[body(centre, angle)] = rng.uniform(0.35, 0.65, 3)
    for mark, (x, y) in zip(marks, places(centre, angle, len(marks))):
        image[square(x, y, MARK)] = COLOURS[mark]
    return (image + 0.04 * rng.normal(size=image.shape)).clip(0, 1)


def by_camera(image: Array, camera: int) -> Array:
    """The picture as a camera, 0 to 3, gives it: a tint and a gamma of its own."""
    rng = np.random.default_rng((7, camera))
    return (image * rng.uniform(0.7, 1.0, 3)) ** rng.uniform(0.7, 1.4)


def to_bytes(image: Array) -> NDArray[np.uint8]:
    """Values 0..1 -> 0..255."""
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def all_sightings(draw: Callable[[np.random.Generator, tuple[int, ...], int, bool], Array]) -> Sightings:
    """Training, queries and gallery of 64 identities, each an ordered triple of marks, by four cameras.

    48 identities are trained on. Of the others the cameras 0 and 1 give a query each; all further pictures are gallery.

    Args:
        draw: (rng, marks, camera, held_out) -> picture, values 0..1.
    """
    order = np.random.default_rng(0).permutation(IDENTITIES).tolist()
    train: list[Sighting] = []
    query: list[Sighting] = []
    gallery: list[Sighting] = []
    for position, identity in enumerate(order):
        marks = (identity // 16, identity // 4 % 4, identity % 4)
        held_out = position >= SEEN
        for camera in range(CAMERAS):
            for shot in range(TEST_SHOTS if held_out else TRAIN_SHOTS):
                rng = np.random.default_rng((1, identity, camera, shot))
                seen = Sighting(to_bytes(draw(rng, marks, camera, held_out)), identity, camera)
                place = train if not held_out else query if camera < 2 and shot == 0 else gallery
                place.append(seen)
    return train, query, gallery


@cache
def sorts() -> tuple[tuple[list[NDArray[np.uint8]], list[int]], ...]:
    """Training and test pictures with their labels: 16 sorts, each an ordered pair of marks."""
    parts = []
    for split, count in enumerate((TRAIN_COUNT, VAL_COUNT)):
        labels = [i % len(CLASSES) for i in range(count)]
        pictures = [
            to_bytes(figure(np.random.default_rng((split, i)), divmod(label, len(COLOURS))))
            for i, label in enumerate(labels)
        ]
        parts.append((pictures, labels))
    return tuple(parts)


@cache
def sightings() -> Sightings:
    """Training, queries and gallery of 64 identities with three marks, see `all_sightings`."""
    return all_sightings(lambda rng, marks, camera, held_out: by_camera(figure(rng, marks), camera))

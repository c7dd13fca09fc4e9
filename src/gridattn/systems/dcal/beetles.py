"""Beetles composed from real photographs: small spots tell the sorts apart, and the ground under them misleads.

A body cut from tabby fur lies on ground cut from a photograph of brick, grass, gravel or the moon, tinted. Along its
back it carries spots cut from an orange suit, a blue sky, pale tissue or dark space; a sort is the ordered pair of two
spots. Crumbs of the same four materials lie about. There are 30 training pictures of a sort, and half of them are
taken on the ground of that sort; in the test pictures the ground says nothing. The right 30 % of every photograph is
for testing alone.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from gridattn.systems.dcal.files import Sightings
from gridattn.systems.dcal.marks import SIZE, Array, all_sightings, body, by_camera, places, square, to_bytes

GROUNDS = ("brick", "grass", "gravel", "moon")
TINTS = ((0.95, 0.85, 0.65), (0.7, 0.95, 0.65), (0.65, 0.8, 1.0), (1.0, 0.7, 0.85))
HABITATS = len(GROUNDS) * len(TINTS)
FUR = ("chelsea", (0, 60, 150, 330))
SPOTS = {
    "orange": ("astronaut", (330, 480, 40, 140)),
    "blue": ("rocket", (40, 120, 220, 340)),
    "pale": ("immunohistochemistry", (300, 400, 150, 220)),
    "dark": ("hubble_deep_field", (0, 872, 0, 1000)),
}
"""Name -> photograph in `skimage.data` and the rows and columns of it that are used."""

CLASSES = tuple(f"{first}-{second}" for first in SPOTS for second in SPOTS)
TRAIN_COUNT, VAL_COUNT = 480, 480
AT_HOME = 0.5
"""Share of the training pictures that show a sort on its own ground."""
SPOT = 5.0
CRUMBS = 3
_TRAIN_PART = 0.7


@cache
def _photograph(name: str, box: tuple[int, int, int, int] | None = None) -> Array:
    """(H, W, 3), values 0..1."""
    from skimage import data

    array = np.asarray(getattr(data, name)(), dtype=np.float64) / 255
    array = array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=-1)
    return array if box is None else array[box[0] : box[1], box[2] : box[3]]


def _cut(rng: np.random.Generator, photograph: Array, size: tuple[int, int], held_out: bool) -> Array:
    """A random part of a photograph, mirrored at random."""
    height, width = photograph.shape[:2]
    edge = round(_TRAIN_PART * width)
    first, last = (edge, width) if held_out else (0, edge)
    y, x = rng.integers(0, height - size[0] + 1), rng.integers(first, last - size[1] + 1)
    piece = photograph[y : y + size[0], x : x + size[1]]
    return piece[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]


def beetle(rng: np.random.Generator, spots: Sequence[int], habitat: int, *, held_out: bool) -> Array:
    """Composes one picture.

    Args:
        rng: every random choice comes from it.
        spots: materials along the back, indices into `SPOTS`.
        habitat: the ground, 0 to 15: photograph and tint.
        held_out: cuts from the parts of the photographs that are for testing.

    Returns:
        (32, 32, 3), values 0..1.

    Example:
        >>> beetle(np.random.default_rng(0), (0, 3), 5, held_out=True).shape
        (32, 32, 3)
    """
    whole = (SIZE, SIZE)
    ground, tint = divmod(habitat, len(TINTS))
    image = _cut(rng, _photograph(GROUNDS[ground]), whole, held_out) * np.asarray(TINTS[tint]) * rng.uniform(0.8, 1.2)
    materials = [_photograph(*SPOTS[name]) for name in SPOTS]
    for _ in range(CRUMBS):
        x, y = rng.uniform(1.5, SIZE - 1.5, 2)
        _lay(rng, image, materials[rng.integers(len(materials))], x, y, 3.0, held_out)
    centre, angle = rng.uniform(12, 20, 2).tolist(), rng.uniform(-0.4, 0.4)
    shape = body(centre, angle)
    fur = _cut(rng, _photograph(*FUR), whole, held_out).mean(-1, keepdims=True)
    image[shape] = (fur * rng.uniform(0.6, 1.0, 3))[shape]
    for spot, (x, y) in zip(spots, places(centre, angle, len(spots))):
        _lay(rng, image, materials[spot], x, y, SPOT, held_out)
    return (image + 0.02 * rng.normal(size=image.shape)).clip(0, 1)


def _lay(
    rng: np.random.Generator, image: Array, material: Array, x: float, y: float, side: float, held_out: bool
) -> None:
    """Puts a square cut from a photograph around (x, y)."""
    shape = square(x, y, side)
    piece = _cut(rng, material, (8, 8), held_out)
    rows, columns = np.nonzero(shape)
    image[rows, columns] = piece[rows - rows.min(), columns - columns.min()]


@cache
def sorts() -> tuple[tuple[list[NDArray[np.uint8]], list[int]], ...]:
    """Training and test pictures with their labels: 16 sorts, each an ordered pair of spots."""
    parts = []
    for split, count in enumerate((TRAIN_COUNT, VAL_COUNT)):
        labels = [i % len(CLASSES) for i in range(count)]
        pictures = []
        for i, label in enumerate(labels):
            rng = np.random.default_rng((2, split, i))
            at_home = split == 0 and rng.random() < AT_HOME
            habitat = label if at_home else int(rng.integers(HABITATS))
            pictures.append(to_bytes(beetle(rng, divmod(label, len(SPOTS)), habitat, held_out=split == 1)))
        parts.append((pictures, labels))
    return tuple(parts)


def _shot(rng: np.random.Generator, spots: tuple[int, ...], camera: int, held_out: bool) -> Array:
    """What a camera sees: its own ground in its own tint, with its own colours."""
    return by_camera(beetle(rng, spots, camera * (len(TINTS) + 1), held_out=held_out), camera)


@cache
def sightings() -> Sightings:
    """Training, queries and gallery of 64 individuals with three spots, by four cameras that each see one ground."""
    return all_sightings(_shot)

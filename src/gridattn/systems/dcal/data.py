"""Pictures by sort, or of identities seen by several cameras, by name of the dataset."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gridattn.data.datasets import Pictures
from gridattn.data.images import read_image
from gridattn.data.sampling import SeededSamples
from gridattn.systems.dcal import beetles, marks
from gridattn.systems.dcal.files import SIGHTINGS, SORTS, Sighting, identity_labels
from gridattn.systems.dcal.metrics import GALLERY, PADDING, QUERY
from gridattn.systems.dcal.transforms import Transform


@dataclass(frozen=True)
class SortData:
    """Pictures of similar sorts.

    Attributes:
        spec: the name they were loaded by.
        classes: names of the sorts; a label is an index into them.
        train: training pictures, `(PIL image, label)`.
        val: test pictures.
    """

    spec: str
    classes: tuple[str, ...]
    train: Pictures
    val: Pictures


@dataclass(frozen=True)
class IdentityData:
    """Pictures of identities by several cameras.

    Attributes:
        spec: the name they were loaded by.
        identities: number of identities to train on.
        train: training pictures; `identity` counts from 0.
        query: pictures to look for.
        gallery: pictures among which they are looked for; of identities that training does not see.
    """

    spec: str
    identities: int
    train: Sequence[Sighting]
    query: Sequence[Sighting]
    gallery: Sequence[Sighting]


EMBEDDED: dict[str, Callable[[str], Any]] = {
    "beetles": lambda spec: _sorts(spec, beetles.CLASSES, beetles.sorts()),
    "beetles-reid": lambda spec: _identities(spec, *beetles.sightings()),
    "marks": lambda spec: _sorts(spec, marks.CLASSES, marks.sorts()),
    "marks-reid": lambda spec: _identities(spec, *marks.sightings()),
}


def load_data(spec: str) -> SortData | IdentityData:
    """Loads a dataset.

    Args:
        spec: by sort `beetles` (composed from real photographs), `marks` (procedural), `cub:PATH`, `cars:PATH` or
            `aircraft:PATH`; by identity `beetles-reid`, `marks-reid`, `market:PATH`, `duke:PATH`, `msmt17:PATH` or
            `veri:PATH`.

    Raises:
        ValueError: an unknown name, or files that cannot be used.

    Example:
        >>> data = load_data("marks")
        >>> len(data.classes), len(data.train), len(data.val)
        (16, 320, 480)
    """
    kind, _, path = spec.partition(":")
    if spec in EMBEDDED:
        return EMBEDDED[spec](spec)
    if kind in SORTS and path:
        classes, train, val = SORTS[kind](path)
        return _sorts(spec, classes, (train, val))
    if kind in SIGHTINGS and path:
        return _identities(spec, *SIGHTINGS[kind](path))
    allowed = [*EMBEDDED, *(f"{name}:PATH" for name in (*SORTS, *SIGHTINGS))]
    raise ValueError(f"data={spec!r} is not known; allowed: {', '.join(allowed)}")


def picture_of(picture: Any) -> Image.Image:
    """A file or an array (H, W, 3) of uint8 as an RGB picture."""
    return Image.fromarray(picture) if isinstance(picture, np.ndarray) else read_image(picture)


def _sorts(spec: str, classes: Sequence[str], parts: Sequence[tuple[Sequence[Any], Sequence[int]]]) -> SortData:
    train, val = (Pictures(pictures, labels, picture_of) for pictures, labels in parts)
    return SortData(spec, tuple(classes), train, val)


def _identities(
    spec: str, train: Sequence[Sighting], query: Sequence[Sighting], gallery: Sequence[Sighting]
) -> IdentityData:
    labels = identity_labels(train)
    relabelled = [seen._replace(identity=labels[seen.identity]) for seen in train]
    return IdentityData(spec, len(labels), relabelled, query, gallery)


class IdentitySamples(SeededSamples):
    """Training samples for re-identification: several pictures of one identity, by draw number.

    An epoch passes every identity once; a batch of P identities holds P times `instances` pictures.

    Args:
        data: the dataset.
        transform: picture -> (3, H, W).
        instances: pictures of an identity, different ones where it has enough.
        seed: of the run.
    """

    def __init__(self, data: IdentityData, transform: Transform, instances: int, seed: int) -> None:
        super().__init__(seed)
        self.transform, self.instances = transform, instances
        self.pictures: list[list[Any]] = [[] for _ in range(data.identities)]
        for seen in data.train:
            self.pictures[seen.identity].append(seen.picture)

    def __len__(self) -> int:
        return len(self.pictures)

    def sample(self, index: int) -> tuple[Tensor, int]:
        own = self.pictures[index]
        order = torch.cat([torch.randperm(len(own)) for _ in range(-(-self.instances // len(own)))])
        chosen = [self.transform(picture_of(own[i])) for i in order[: self.instances].tolist()]
        return torch.stack(chosen), index

    def collate(self, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:  # pyright: ignore
        """Images (P instances, 3, H, W) and labels, the pictures of an identity side by side."""
        images, labels = zip(*samples)
        return torch.cat(images), torch.tensor(labels).repeat_interleave(self.instances)


class SightingSamples(SeededSamples):
    """Queries, then the gallery, by index: image, identity, camera and kind (`QUERY`, `GALLERY`; `PADDING` counts not).

    Args:
        query: pictures to look for.
        gallery: pictures among which they are looked for.
        transform: picture -> (3, H, W).
    """

    def __init__(self, query: Sequence[Sighting], gallery: Sequence[Sighting], transform: Transform) -> None:
        super().__init__()
        self.seen = [*query, *gallery]
        self.kinds = [QUERY] * len(query) + [GALLERY] * len(gallery)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.seen)

    def sample(self, index: int) -> tuple[Tensor, int, int, int]:
        picture, identity, camera = self.seen[index]
        return self.transform(picture_of(picture)), identity, camera, self.kinds[index]

    def padding(self) -> tuple[Tensor, int, int, int]:
        image, identity, camera, _ = self.sample(0)
        return torch.zeros_like(image), identity, camera, PADDING

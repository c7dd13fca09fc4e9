"""Light fields by name, as training patches and as whole scenes, with their low-resolution versions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gridattn.data.sampling import SeededSamples
from gridattn.systems.epit import scenes
from gridattn.systems.epit.fields import bicubic_down, central_views, shear
from gridattn.systems.epit.files import find_scenes, read_light_field, read_patch, read_shape, toolbox_layout

PATCH_SIDE, PATCH_STEP = 143, 64
"""Height, width and step of the patches that training scenes are cut into, pixels."""

CENTRE = 9
"""Views along an axis that are used of larger light fields."""

_TRAINING = ("training", "data_for_training")
_TEST = ("test", "testing", "data_for_test", "data_for_testing")
_EMBEDDED = ("photographs", "sinusoids", "motorcycle")
_TRAIN_SCENES, _VAL_SCENES, _VAL_SIZE = 120, 16, 48


@dataclass(frozen=True)
class Degradation:
    """From high to low resolution.

    Attributes:
        scale: s; views are reduced by `bicubic_down`.
        flicker: least and largest gain; every low-resolution view is multiplied by its own. None changes nothing.
        noise: largest deviation of Gaussian noise, grey levels of 255; every light field draws its own below it.
    """

    scale: int
    flicker: tuple[float, float] | None = None
    noise: float = 0.0

    def __call__(self, field: Tensor) -> Tensor:
        """(3, U, V, H, W) -> (3, U, V, H / s, W / s); draws from torch's global generator."""
        low = bicubic_down(field, self.scale)
        if self.flicker is not None:
            least, largest = self.flicker
            low = low * (least + (largest - least) * torch.rand(*low.shape[1:3], 1, 1))
        if self.noise:
            low = low + torch.rand(()) * self.noise / 255 * torch.randn(low.shape)
        return low


def augment(field: Tensor) -> Tensor:
    """Mirrors and transposes views and pixels together, each with probability 1/2; disparities stay as they are.

    Args:
        field: (3, U, V, H, W) with U = V and H = W.
    """
    horizontal, vertical, transposed = (torch.rand(3) < 0.5).tolist()
    if horizontal:
        field = field.flip(2, 4)
    if vertical:
        field = field.flip(1, 3)
    return field.transpose(1, 2).transpose(3, 4) if transposed else field


@dataclass(frozen=True)
class LightFields:
    """A dataset.

    Attributes:
        spec: the name it was loaded by.
        groups: names of the sets whose scores are averaged.
        patches: number of training patches.
        patch: (index, side) -> a random crop of high resolution, (3, A, A, side, side); draws from torch's generator.
        names: of the scenes for validation.
        members: index of the set of each of them.
        scene: (index, shear) -> a scene of high resolution, (3, U, V, H, W).
    """

    spec: str
    groups: tuple[str, ...]
    patches: int
    patch: Callable[[int, int], Tensor]
    names: tuple[str, ...]
    members: tuple[int, ...]
    scene: Callable[[int, float], Tensor]


class Patches(SeededSamples):
    """Training pairs by draw number: (3, A, A, p, p) and (3, A, A, s p, s p).

    Args:
        data: the dataset.
        degrade: from high to low resolution.
        side: p, pixels of low resolution.
        augmented: whether to mirror and transpose at random.
        seed: the run's seed.
    """

    def __init__(self, data: LightFields, degrade: Degradation, side: int, augmented: bool, seed: int) -> None:
        super().__init__(seed)
        self.data, self.degrade, self.side, self.augmented = data, degrade, side, augmented

    def __len__(self) -> int:
        return self.data.patches

    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        field = self.data.patch(index, self.degrade.scale * self.side)
        if self.augmented:
            field = augment(field)
        return self.degrade(field), field.contiguous()


class WholeScenes(SeededSamples):
    """Whole scenes by index: low resolution, high resolution, index of the set; a batch is a list.

    The random part of the degradation depends on the index alone. Padding has the set -1.

    Args:
        data: the dataset.
        degrade: from high to low resolution; the scenes are cut to multiples of its scale.
        sheared: pixels per view that are added to all disparities.
    """

    def __init__(self, data: LightFields, degrade: Degradation, sheared: float = 0.0) -> None:
        super().__init__(seed=0)
        self.data, self.degrade, self.sheared = data, degrade, sheared

    def __len__(self) -> int:
        return len(self.data.names)

    def sample(self, index: int) -> tuple[Tensor, Tensor, int]:
        field = self.data.scene(index, self.sheared)
        height, width = (n // self.degrade.scale * self.degrade.scale for n in field.shape[-2:])
        if not min(height, width):
            raise ValueError(
                f"scene {self.data.names[index]!r} has {tuple(field.shape[-2:])} pixels, too few to reduce"
            )
        field = field[..., :height, :width]
        return self.degrade(field), field, self.data.members[index]

    def padding(self) -> tuple[Tensor, Tensor, int]:
        side = 8
        low, high = (torch.zeros(3, 1, 1, n, n) for n in (side, side * self.degrade.scale))
        return low, high, -1

    @staticmethod
    def collate(samples: list[Any]) -> list[Any]:
        return samples


def list_light_fields() -> list[str]:
    """Names that `load_light_fields` takes."""
    return [*_EMBEDDED, "folder:PATH"]


def is_embedded(spec: str) -> bool:
    """Whether a dataset needs no files."""
    return spec in _EMBEDDED


def load_light_fields(spec: str, *, ang_res: int = 5, scale: int = 2, side: int = 32) -> LightFields:
    """Loads a dataset of light fields.

    * `photographs`, `sinusoids`: procedural scenes, see `scenes`; new ones at every look for training, 16 fixed ones
      of 48 x 48 pixels for validation.
    * `motorcycle`: the same training as `photographs`; validation on a real stereo pair, a light field of 1 x 2 views.
    * `folder:PATH`: the public datasets as they come, `PATH/{EPFL,HCI_new,...}/{training,test}/*.mat`, or as prepared
      by the authors' programs, `PATH/data_for_{training,test}/{SSR_9x9,SR_5x5_2x}/{EPFL,...}/*.h5`.

    Args:
        spec: one of the above.
        ang_res: views along each axis, those in the middle.
        scale: of the super-resolution; mosaics prepared for another one are passed over.
        side: of the training patches, pixels of low resolution.

    Raises:
        ValueError: an unknown name, a folder without such files, or files that are damaged or too small.

    Example:
        >>> data = load_light_fields("photographs", ang_res=3)
        >>> data.scene(0, 0.0).shape, len(data.names)
        (torch.Size([3, 3, 3, 48, 48]), 16)
    """
    kind, _, path = spec.partition(":")
    if spec in _EMBEDDED:
        return _embedded(spec, ang_res)
    if kind != "folder" or not path:
        raise ValueError(f"data={spec!r} is not known; allowed: {', '.join(list_light_fields())}")
    return _files(spec, Path(path).expanduser(), ang_res, scale, side)


def _embedded(spec: str, views: int) -> LightFields:
    texture = "sinusoids" if spec == "sinusoids" else "photographs"

    def patch(index: int, side: int) -> Tensor:
        # The caller seeds torch's generator for every look at a sample.
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        return torch.from_numpy(scenes.draw_scene(rng, texture, size=side).render(views, side))

    def scene(index: int, sheared: float) -> Tensor:
        rng = np.random.default_rng((1, index))
        drawn = scenes.draw_scene(rng, texture, size=_VAL_SIZE, held_out=True)
        return torch.from_numpy(drawn.sheared(sheared).render(views, _VAL_SIZE))

    def pair(index: int, sheared: float) -> Tensor:
        return shear(torch.from_numpy(scenes.stereo_pair()), sheared)  # pyright: ignore[reportArgumentType]

    if spec == "motorcycle":
        return LightFields(spec, (spec,), _TRAIN_SCENES, patch, (spec,), (0,), pair)
    names = tuple(f"{spec}-{i}" for i in range(_VAL_SCENES))
    return LightFields(spec, (spec,), _TRAIN_SCENES, patch, names, (0,) * _VAL_SCENES, scene)


def _files(spec: str, root: Path, views: int, scale: int, side: int) -> LightFields:
    if not root.is_dir():
        raise ValueError(f"data folder {str(root)!r} does not exist or is not a folder")
    train, test = (_part(root, names, views, scale) for names in (_TRAINING, _TEST))
    for name, found in (("training", train), ("test", test)):
        if not found:
            raise ValueError(
                f"data={spec!r} holds no {name} light fields for {views} x {views} views and scale {scale}; "
                f"SET/{name}/*.mat or data_for_{name}/SSR_9x9/SET/*.h5 are needed"
            )
    groups = tuple(dict.fromkeys(group for group, _ in test))
    index = [
        (path, top, left, size) for _, path in train for top, left, size in _patch_places(path, views, scale * side)
    ]

    def patch(number: int, side: int) -> Tensor:
        path, top, left, size = index[number]
        y, x = (int(torch.randint(size - side + 1, ())) for _ in range(2))
        field = torch.from_numpy(np.array(read_patch(path, top + y, left + x, side)))
        return _middle(field, views)

    def scene(number: int, sheared: float) -> Tensor:
        field = _middle(torch.from_numpy(read_light_field(test[number][1])), views)
        return shear(field, sheared) if sheared else field  # pyright: ignore[reportArgumentType]

    names = tuple(str(path.relative_to(root)) for _, path in test)
    members = tuple(groups.index(group) for group, _ in test)
    return LightFields(spec, groups, len(index), patch, names, members, scene)


def _part(root: Path, names: Sequence[str], views: int, scale: int) -> list[tuple[str, Path]]:
    """Set and path of the files below a folder of one of these names."""
    found = []
    for path in find_scenes(root):
        folders = path.relative_to(root).parts[:-1]
        layout = toolbox_layout(path)
        if not any(name in folders for name in names) or (layout and (layout[1] != scale or layout[0] < views)):
            continue
        kept = [name for name in folders if name not in names]
        found.append((kept[-1] if kept else root.name, path))
    return found


def _patch_places(path: Path, views: int, side: int) -> list[tuple[int, int, int]]:
    """Top, left and size of the patches of a training file."""
    rows, columns, height, width = read_shape(path)
    if min(rows, columns) < views or min(height, width) < side:
        raise ValueError(
            f"light field {str(path)!r} has {rows} x {columns} views of {height} x {width} pixels; at least "
            f"{views} x {views} of {side} x {side} are needed"
        )
    size = min(max(PATCH_SIDE, side), height, width)
    tops, lefts = (range(0, n - size + 1, PATCH_STEP) for n in (height, width))
    return [(top, left, size) for top in tops for left in lefts]


def _middle(field: Tensor, views: int) -> Tensor:
    if min(field.shape[1:3]) > CENTRE:
        field = central_views(field, CENTRE)
    return central_views(field, views)

"""Readers of the published folders: birds, cars and aircraft by sort; persons and vehicles by identity and camera."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LabelledFiles = tuple[list[Path], list[int]]
Sorts = tuple[list[str], LabelledFiles, LabelledFiles]
"""Class names, training files and test files with their labels."""

_SEEN = re.compile(r"^(-?\d+)_c(\d+)")
JUNK = -1


class Sighting(NamedTuple):
    """A picture of somebody or of a vehicle.

    Attributes:
        picture: a file, or an array (H, W, 3) of uint8.
        identity: whose.
        camera: which camera took it.
    """

    picture: Any
    identity: int
    camera: int


Sightings = tuple[list[Sighting], list[Sighting], list[Sighting]]
"""Training, query and gallery."""


def read_cub(path: str | Path) -> Sorts:
    """CUB-200-2011: images.txt, image_class_labels.txt, train_test_split.txt, classes.txt and `images/`.

    Raises:
        ValueError: a missing file, a line that is no `<id> <value>`, an image without label or split, or a label
            without a class.
    """
    root = _root(path, "CUB_200_2011", "images.txt")
    names = _table(root / "images.txt")
    labels, splits = (_table(root / f"{name}.txt") for name in ("image_class_labels", "train_test_split"))
    classes = _table(root / "classes.txt")
    numbers = {number: index for index, number in enumerate(classes)}
    parts: dict[str, LabelledFiles] = {"1": ([], []), "0": ([], [])}
    for number, name in names.items():
        if number not in labels or number not in splits:
            missing = "image_class_labels.txt" if number not in labels else "train_test_split.txt"
            raise ValueError(f"{str(root / missing)!r} has no line for image {number} ({name})")
        if labels[number] not in numbers:
            raise ValueError(f"image {number} ({name}) has the label {labels[number]!r}, which classes.txt lacks")
        if splits[number] not in parts:
            raise ValueError(f"image {number} ({name}) has the split {splits[number]!r}; 1 (train) and 0 are allowed")
        files, own = parts[splits[number]]
        files.append(_existing(root / "images" / name))
        own.append(numbers[labels[number]])
    return list(classes.values()), *_both(root, parts["1"], parts["0"])


def read_aircraft(path: str | Path) -> Sorts:
    """FGVC-Aircraft by variant: `data/variants.txt`, `data/images_variant_{trainval,test}.txt` and `data/images/`.

    Raises:
        ValueError: a missing file, or a variant that variants.txt lacks.
    """
    root = _root(path, "data", "variants.txt")
    classes = [line.strip() for line in _lines(root / "variants.txt")]
    parts: list[LabelledFiles] = []
    for split in ("trainval", "test"):
        table = _table(root / f"images_variant_{split}.txt")
        for number, variant in table.items():
            if variant not in classes:
                raise ValueError(f"image {number} has the variant {variant!r}, which variants.txt lacks")
        files = [_existing(root / "images" / f"{number}.jpg") for number in table]
        parts.append((files, [classes.index(variant) for variant in table.values()]))
    return classes, *_both(root, *parts)


def read_cars(path: str | Path) -> Sorts:
    """Stanford Cars: `devkit/cars_meta.mat` and `cars_train_annos.mat`, cars_test_annos_withlabels.mat, and images.

    Raises:
        ValueError: a missing or damaged file, or a label without a class.
    """
    root = _root(path, "stanford_cars", "devkit/cars_meta.mat")
    classes = [str(name) for name in _mat(root / "devkit" / "cars_meta.mat", "class_names")]
    annotations = {
        "cars_train": root / "devkit" / "cars_train_annos.mat",
        "cars_test": root / "cars_test_annos_withlabels.mat",
    }
    parts: list[LabelledFiles] = []
    for folder, file in annotations.items():
        rows = _mat(file, "annotations")
        try:
            named = [(str(row["fname"]), int(row["class"]) - 1) for row in rows]
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{str(file)!r} has annotations without fname and class: {error}") from None
        for name, label in named:
            if not 0 <= label < len(classes):
                raise ValueError(f"{name!r} of {str(file)!r} has the class {label + 1}; there are {len(classes)}")
        parts.append(([_existing(root / folder / name) for name, _ in named], [label for _, label in named]))
    return classes, *_both(root, *parts)


def read_market(path: str | Path) -> Sightings:
    """Market-1501 and DukeMTMC-reID: `bounding_box_train`, `query` and `bounding_box_test`, names `0002_c1...jpg`.

    Junk (identity -1) is left out; distractors (identity 0) stay in the gallery.

    Raises:
        ValueError: a missing or empty folder, or a name without identity and camera.
    """
    root = _root(path, "Market-1501-v15.09.15", "bounding_box_train", "DukeMTMC-reID")
    found = []
    for name in ("bounding_box_train", "query", "bounding_box_test"):
        folder = root / name
        if not folder.is_dir():
            raise ValueError(f"folder {str(folder)!r} is missing")
        seen = [_sighting(file) for file in sorted(folder.glob("*.jpg"))]
        found.append(_some(folder, [s for s in seen if s.identity != JUNK]))
    return found[0], found[1], found[2]


def read_msmt17(path: str | Path) -> Sightings:
    """MSMT17, V1 (`train`, `test`) or V2 (`mask_train_v2`, `mask_test_v2`), with list_{train,val,query,gallery}.txt.

    Training and validation lists are trained on together. The camera is the third field of a file's name.

    Raises:
        ValueError: a missing file or folder, or a line that is no `<folder>/<file>.jpg <identity>`.
    """
    root = _root(path, "MSMT17_V1", "list_train.txt", "MSMT17_V2", "MSMT17")
    folders = [root / name for name in ("train", "test")]
    if not folders[0].is_dir():
        folders = [root / name for name in ("mask_train_v2", "mask_test_v2")]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"folder {str(folder)!r} is missing; train and test, or mask_train_v2 and mask_test_v2")
    lists = {}
    for name in ("train", "val", "query", "gallery"):
        file, folder = root / f"list_{name}.txt", folders[0] if name in ("train", "val") else folders[1]
        lists[name] = _some(file, [_msmt17_line(file, folder, line) for line in _lines(file)])
    return lists["train"] + lists["val"], lists["query"], lists["gallery"]


def read_veri(path: str | Path) -> Sightings:
    """VeRi-776: name_{train,query,test}.txt list the pictures of `image_{train,query,test}`, names `0001_c001_...jpg`.

    Raises:
        ValueError: a missing file, or a name without identity and camera.
    """
    root = _root(path, "VeRi", "name_train.txt", "VeRi-776")
    found = []
    for name in ("train", "query", "test"):
        file = root / f"name_{name}.txt"
        seen = [_sighting(_existing(root / f"image_{name}" / line.strip())) for line in _lines(file)]
        found.append(_some(file, seen))
    return found[0], found[1], found[2]


SORTS: dict[str, Callable[[str | Path], Sorts]] = {"cub": read_cub, "cars": read_cars, "aircraft": read_aircraft}
SIGHTINGS: dict[str, Callable[[str | Path], Sightings]] = {
    "market": read_market,
    "duke": read_market,
    "msmt17": read_msmt17,
    "veri": read_veri,
}


def _root(path: str | Path, usual: str, mark: str, *others: str) -> Path:
    """The folder with `mark`: `path` itself, or the folder of the usual name inside of it."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ValueError(f"data folder {str(path)!r} does not exist or is not a folder")
    for candidate in (path, *(path / name for name in (usual, *others))):
        if (candidate / mark).exists():
            return candidate
    raise ValueError(f"{str(path / mark)!r} is missing, also in {usual!r}")


def _lines(file: Path) -> Iterator[str]:
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is missing")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is no text: {error}") from None
    return (line for line in text.splitlines() if line.strip())


def _table(file: Path) -> dict[str, str]:
    """`<id> <value>` by line."""
    table: dict[str, str] = {}
    for line in _lines(file):
        key, _, value = line.strip().partition(" ")
        if not value.strip():
            raise ValueError(f"{str(file)!r} has the line {line!r}; '<id> <value>' is needed")
        table[key] = value.strip()
    if not table:
        raise ValueError(f"{str(file)!r} is empty")
    return table


def _mat(file: Path, name: str) -> Any:
    from scipy.io import loadmat

    if not file.is_file():
        raise ValueError(f"{str(file)!r} is missing")
    try:
        return loadmat(str(file), squeeze_me=True)[name].reshape(-1)
    except Exception as error:  # scipy reports a damaged file by errors of many kinds
        raise ValueError(f"{str(file)!r} cannot be read: {type(error).__name__} {error}") from None


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise ValueError(f"picture {str(file)!r} is missing")
    return file


def _sighting(file: Path) -> Sighting:
    found = _SEEN.match(file.name)
    if found is None:
        raise ValueError(f"the name of {str(file)!r} tells no identity and camera; '0002_c1...' is needed")
    return Sighting(file, int(found[1]), int(found[2]))


def _msmt17_line(file: Path, folder: Path, line: str) -> Sighting:
    name, _, identity = line.strip().rpartition(" ")
    fields = Path(name).name.split("_")
    if not identity.isdecimal() or len(fields) < 4 or not fields[2].isdecimal():
        raise ValueError(f"{str(file)!r} has the line {line!r}; '<folder>/<id>_<n>_<camera>_....jpg <id>' is needed")
    return Sighting(_existing(folder / name), int(identity), int(fields[2]))


def _some(place: Path, seen: list[Sighting]) -> list[Sighting]:
    if not seen:
        raise ValueError(f"{str(place)!r} holds no pictures")
    return seen


def _both(root: Path, train: LabelledFiles, test: LabelledFiles) -> tuple[LabelledFiles, LabelledFiles]:
    for name, (files, _) in {"training": train, "test": test}.items():
        if not files:
            raise ValueError(f"{str(root)!r} has no {name} pictures")
    return train, test


def identity_labels(seen: Sequence[Sighting]) -> dict[int, int]:
    """Identity -> class, in ascending order."""
    return {identity: label for label, identity in enumerate(sorted({s.identity for s in seen}))}

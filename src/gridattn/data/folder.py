"""The user's own pictures: one sub-folder a class."""

from collections.abc import Callable, Sequence
from pathlib import Path

from gridattn.data.images import find_images, usable_images

Labelled = list[tuple[Path, int]]
Split = Callable[[Sequence[int], float, int], tuple[list[int], list[int]]]


def read_folder(path: str | Path, *, seed: int, verify: bool, split: Split) -> tuple[list[str], Labelled, Labelled]:
    """Lists the pictures of a dataset folder.

    Args:
        path: PATH/<class>/**, or PATH/train/<class>/** with PATH/val/<class>/**.
        seed: of the split where the folder has none.
        verify: decode every file, and leave out the damaged ones.
        split: (labels, fraction, seed) -> indices of training and of validation.

    Returns:
        The class names, the training files and the validation files with their labels.

    Raises:
        ValueError: a folder that is missing, holds no class folders, has a class without a usable image, or whose
            validation part has a class that its training part lacks.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"data folder {str(root)!r} does not exist or is not a folder")
    if (root / "train").is_dir() and (root / "val").is_dir():
        classes = _classes(root / "train")
        unknown = sorted(set(_classes(root / "val")) - set(classes))
        if unknown:
            raise ValueError(f"class {unknown[0]!r} of {str(root / 'val')!r} has no folder in {str(root / 'train')!r}")
        held = [name for name in classes if (root / "val" / name).is_dir()]
        val = [(file, classes.index(name)) for name in held for file in _files(root / "val" / name, verify)]
        return classes, _labelled(root / "train", classes, verify), val
    classes = _classes(root)
    files = _labelled(root, classes, verify)
    for label, name in enumerate(classes):
        if sum(other == label for _, other in files) < 2:
            raise ValueError(
                f"class folder {str(root / name)!r} has a single usable image; "
                "a split into training and validation needs two"
            )
    first, second = split([label for _, label in files], 0.2, seed)
    return classes, [files[i] for i in first], [files[i] for i in second]


def _classes(root: Path) -> list[str]:
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"data folder {str(root)!r} holds no class folders; PATH/<class>/<image> is what is read")
    return names


def _labelled(root: Path, classes: Sequence[str], verify: bool) -> Labelled:
    return [(file, label) for label, name in enumerate(classes) for file in _files(root / name, verify)]


def _files(folder: Path, verify: bool) -> list[Path]:
    files = find_images(folder)
    if not files:
        raise ValueError(f"class folder {str(folder)!r} holds no images")
    usable = usable_images(files) if verify else files
    if not usable:
        raise ValueError(f"class folder {str(folder)!r} holds no readable image; all {len(files)} are damaged")
    return usable

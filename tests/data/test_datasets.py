"""Embedded datasets and class folders: honest splits, and errors that name what is wrong."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gridattn.data import ImageDataset, list_datasets, load_dataset
from gridattn.data.datasets import split_stratified, texture_source
from gridattn.data.sampling import seeded

EMBEDDED = ["digits", "faces", "textures"]


def _folder(root: Path, counts: dict[str, int], size: int = 12) -> Path:
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (size, size), (40 * label, 10 * i, 7)).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_data_gives_normalised_tensors_of_the_size_asked_for(name: str) -> None:
    data = load_dataset(name, image_size=24)
    for part in (data.train, data.val):
        images = torch.stack([part[i][0] for i in range(0, len(part), 5)])
        assert images.shape[1:] == (data.in_chans, 24, 24)
        assert abs(float(images.mean())) < 0.5
        assert 0.7 < float(images.std()) < 1.3
    assert {data.val[i][1] for i in range(len(data.val))} == set(range(len(data.classes)))


def test_textures_cannot_be_told_by_their_frequency() -> None:
    counts = Counter(load_dataset("textures", image_size=64).val.source.labels)
    assert max(counts.values()) / sum(counts.values()) <= 0.34


@pytest.mark.parametrize("image_size", [16, 64, 128])
def test_training_and_validation_textures_share_no_pixel(image_size: int) -> None:
    # Every pixel of this picture is its own coordinate.
    y, x = np.mgrid[:512, :512]
    picture = Image.fromarray(np.stack([x % 256, y % 256, x // 256 * 2 + y // 256], -1).astype(np.uint8))
    source = texture_source({"only": picture}, image_size, crops=1_000_000 // image_size**2)

    def pixels(images: list[Image.Image]) -> set[int]:
        values = np.concatenate([np.asarray(image).reshape(-1, 3) for image in images]).astype(np.int64)
        return set((values @ [1, 256, 65536]).tolist())

    assert source.tile is not None
    with seeded(0):
        train = pixels([source.tile(source.train[i][0]) for i in range(len(source.train))])
    val = pixels([source.val[i][0] for i in range(len(source.val))])
    assert not train & val
    assert len(train) > 0.4 * 512 * 512
    assert len(val) > (0.05 if image_size == 16 else 0.15) * 512 * 512


@pytest.mark.parametrize("name", ["digits", "faces"])
def test_embedded_splits_share_no_image_and_follow_the_seed(name: str) -> None:
    def held(seed: int) -> set[bytes]:
        return {np.asarray(picture).tobytes() for picture in load_dataset(name, 24, seed=seed).val.source.pictures}

    data = load_dataset(name, 24)
    train = {np.asarray(picture).tobytes() for picture in data.train.source.pictures}
    assert not train & held(0)
    assert held(0) == held(0) != held(1)


def test_stratified_split_holds_out_the_fraction_of_every_class() -> None:
    labels = [0] * 40 + [1] * 8 + [2] * 2
    first, second = split_stratified(labels, 0.25, seed=3)
    assert Counter(labels[i] for i in second) == {0: 10, 1: 2, 2: 1}
    assert sorted(first + second) == list(range(50))


def test_class_folders_are_split_by_seed_and_may_be_nested(tmp_path: Path) -> None:
    root = _folder(tmp_path, {"cat": 5, "dog/puppies": 10})
    data = load_dataset(f"folder:{root}", image_size=8)
    assert data.classes == ("cat", "dog")
    assert Counter(data.val.source.labels) == {0: 1, 1: 2}
    assert not set(data.train.source.pictures) & set(data.val.source.pictures)


def test_train_and_val_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    _folder(tmp_path / "train", {"a": 3, "b": 2})
    _folder(tmp_path / "val", {"b": 4})
    data = load_dataset(f"folder:{tmp_path}", image_size=8)
    assert data.classes == ("a", "b")
    assert (data.train.source.labels, data.val.source.labels) == ([0, 0, 0, 1, 1], [1] * 4)


def test_damaged_images_of_a_folder_are_left_out_before_the_split(tmp_path: Path) -> None:
    root = _folder(tmp_path, {"a": 4, "b": 4})
    (root / "a" / "0.png").write_bytes(b"broken")
    data = load_dataset(f"folder:{root}", image_size=8)
    assert len(data.train) + len(data.val) == 7
    unverified = load_dataset(f"folder:{root}", image_size=8, verify=False)
    assert len(unverified.train) + len(unverified.val) == 8


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "holds no class folders"),
        ({"a": 3, "b": 0}, "b' holds no images"),
        ({"a": 3, "b": 1}, "b' has a single usable image"),
    ],
)
def test_unusable_folders_are_refused_by_name(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    root = _folder(tmp_path, counts)
    with pytest.raises(ValueError, match=message):
        load_dataset(f"folder:{root}", image_size=8)


def test_a_class_of_damaged_images_is_refused(tmp_path: Path) -> None:
    root = _folder(tmp_path, {"a": 3, "b": 1})
    (root / "b" / "0.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"b' holds no readable image; all 1 are damaged"):
        load_dataset(f"folder:{root}", image_size=8)


def test_a_validation_class_without_training_images_is_refused(tmp_path: Path) -> None:
    _folder(tmp_path / "train", {"a": 2})
    _folder(tmp_path / "val", {"a": 1, "zebra": 1})
    with pytest.raises(ValueError, match="'zebra'"):
        load_dataset(f"folder:{tmp_path}", image_size=8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"spec": "cifar"}, "data='cifar' is not known; allowed: digits, faces, textures, folder:PATH"),
        ({"spec": "folder:"}, "is not known"),
        ({"spec": "folder:/nowhere"}, "'/nowhere' does not exist"),
        ({"spec": "digits", "image_size": 4}, "image_size=4"),
        ({"spec": "textures", "image_size": 200}, "image_size=200 exceeds the 154 pixels"),
        ({"spec": "digits", "augment": {"auto_augmnt": "x"}}, "did you mean: auto_augment"),
        ({"spec": "digits", "augment": {"auto_augment": "nonsense"}}, "augment="),
    ],
)
def test_bad_arguments_are_refused(call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(**call)


def test_every_listed_dataset_loads(tmp_path: Path) -> None:
    root = _folder(tmp_path, {"a": 2, "b": 2})
    for name in list_datasets():
        assert isinstance(load_dataset(name.replace("PATH", str(root)), image_size=16), ImageDataset)

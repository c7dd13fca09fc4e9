"""Reading images and masks, embedded samples, and augmentation."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gridattn.data.sampling import seeded
from gridattn.systems.segment import brain, photographs
from gridattn.systems.segment.augment import Augment, TrainTransform
from gridattn.systems.segment.data import load_segmentation


def _write(folder: Path, part: str, name: str, mask: np.ndarray, images: str = "images", masks: str = "masks") -> None:
    picture, labels = folder / images / part / f"{name}.jpg", folder / masks / part / f"{name}.png"
    for path in (picture, labels):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*mask.shape, 3), 90, np.uint8)).save(picture)
    Image.fromarray(mask.astype(np.uint8)).save(labels)


def _ade20k(root: Path) -> Path:
    for part, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            _write(root, part, f"ADE_{i}", np.array([[0, 1, 150]] * (2 + i)), masks="annotations")
    return root


def test_ade20k_counts_from_one_and_zero_is_no_class(tmp_path: Path) -> None:
    data = load_segmentation(f"ade20k:{_ade20k(tmp_path)}")
    assert (len(data.train), len(data.val), len(data.classes)) == (3, 2, 150)
    assert data.val[0][1].tolist() == [[255, 0, 149]] * 2
    assert data.classes[:2] == ("1", "2")
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    rows += [f"{i}\t0.1\t9\t9\t1\tthing{i}, other name" for i in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
    named = load_segmentation(f"ade20k:{tmp_path}", verify=False)
    assert (named.classes[0], named.classes[149]) == ("thing1", "thing150")
    image, target = named.validation()[1]
    assert image.shape == (3, 3, 3)
    assert target.dtype == torch.int64


@pytest.mark.parametrize("layout", ["images/train", "train/images"])
def test_a_plain_folder_has_its_own_parts(tmp_path: Path, layout: str) -> None:
    for part, count in (("train", 3), ("val", 1)):
        for i in range(count):
            mask = np.array([[0, 1], [2, 255]])
            if layout == "images/train":
                _write(tmp_path, part, f"nested/{i}", mask)
            else:
                _write(tmp_path / part, "", f"{i}", mask)
    data = load_segmentation(f"folder:{tmp_path}", in_chans=1)
    assert (len(data.train), len(data.val), data.classes) == (3, 1, ("0", "1", "2"))
    assert data.val[0][1].tolist() == [[0, 1], [2, 255]]
    assert data.validation()[0][0].shape == (1, 2, 2)


def test_a_folder_without_parts_is_split_by_the_seed(tmp_path: Path) -> None:
    for i in range(10):
        _write(tmp_path, "", f"{i}", np.full((4, 5), i % 2))
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    splits = [load_segmentation(f"folder:{tmp_path}", seed=seed) for seed in (0, 0, 1)]
    held = [{split.val.name(i) for i in range(len(split.val))} for split in splits]
    assert held[0] == held[1] != held[2]
    assert len(held[0]) == 2
    kept = {splits[0].train.name(i) for i in range(8)}
    assert not kept & held[0]
    assert splits[0].classes == ("sky", "road")


def test_damaged_and_mismatched_files_are_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("good1", "good2", "cut", "large", "colour", "alone"):
        _write(tmp_path, "", name, np.zeros((40, 50)))
    (tmp_path / "masks" / "alone.png").unlink()
    cut = tmp_path / "images" / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    Image.fromarray(np.zeros((41, 50), np.uint8)).save(tmp_path / "masks" / "large.png")
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "masks" / "colour.png")
    with caplog.at_level(logging.WARNING, "gridattn"):
        data = load_segmentation(f"folder:{tmp_path}", seed=3)
    assert len(data.train) + len(data.val) == 2
    text = caplog.text
    assert "alone.jpg" in text
    assert "cut.jpg' cannot be read" in text
    assert "large.png' is 50x41 but its image is 50x40" in text
    assert "colour.png' has the mode RGB; one channel" in text


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "classes.txt").write_text("only\n"), r"mask '.*\.png' holds the number 1; 0 to 0 are"),
        (lambda root: (root / "classes.txt").write_text("a\na\n"), r"classes\.txt' names 'a' twice"),
        (lambda root: (root / "classes.txt").write_text("\n"), r"classes\.txt' holds no names"),
        (lambda root: (root / "masks").rename(root / "labels"), r"masks' does not exist"),
        (lambda root: [p.unlink() for p in (root / "masks").iterdir()], r"holds no image whose mask"),
        (lambda root: [p.write_bytes(b"x") for p in (root / "masks").iterdir()], r"none of the \d images"),
    ],
)
def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path, break_it, message: str) -> None:
    for i in range(3):
        _write(tmp_path, "", f"{i}", np.full((8, 9), 1))
    break_it(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_segmentation(f"folder:{tmp_path}")


@pytest.mark.parametrize("spec", ["nowhere", "folder:", "ade20k", "cityscapes:x"])
def test_unknown_names_are_told_with_the_known_ones(spec: str) -> None:
    with pytest.raises(ValueError, match=r"allowed: mni152, photographs, ade20k:PATH, folder:PATH"):
        load_segmentation(spec)


def test_training_and_validation_collages_share_no_pixel() -> None:
    # A photograph that is dark in its training part and bright in the other: a piece that reached into both would have
    # two values before its own mean is taken off.
    photograph = np.zeros((512, 512), np.float32)
    photograph[:, round(0.7 * 512) :] = 200
    for held_out, size in ((False, photographs.TRAIN_SIZE), (True, photographs.VAL_SIZE)):
        for seed in range(300):
            piece = photographs._piece(np.random.default_rng(seed), photograph, size, held_out)
            assert piece.shape == size
            assert np.ptp(piece) == 0


def test_collages_tell_their_classes_by_structure_alone() -> None:
    grey: dict[int, list[float]] = {label: [] for label in range(len(photographs.MATERIALS))}
    areas = np.zeros(len(photographs.MATERIALS))
    for seed in range(150):
        image, mask = photographs.collage(np.random.default_rng(seed), (96, 96), held_out=False)
        areas += np.bincount(mask.ravel(), minlength=len(areas))
        for label in np.unique(mask):
            grey[label].append(float(image[mask == label].mean()))
    means = [np.mean(values) for values in grey.values()]
    assert np.ptp(means) < 0.6 * np.mean([np.std(values) for values in grey.values()])
    assert areas.max() < 1.6 * areas.min()


@pytest.mark.slow
def test_brain_slices_of_training_and_validation_are_apart() -> None:
    pytest.importorskip("nilearn")
    (train, masks), (val, _) = brain.part(False), brain.part(True)
    assert len(train) > 2 * len(val) > 20
    assert set(np.unique(masks)) == {0, 1, 2, 3}
    everything = [slice_.tobytes() for slice_ in brain.slices()[0]]
    places = [[everything.index(s.tobytes()) for s in part] for part in (train, val)]
    assert min(abs(a - b) for a in places[0] for b in places[1]) == 3


def _ramp() -> tuple[torch.Tensor, torch.Tensor]:
    """An image whose red channel is the label of its mask: 16 columns of equal width."""
    label = (torch.arange(64) // 4).expand(48, 64).to(torch.uint8)
    return torch.stack([label * 10, label, label]).contiguous(), label.contiguous()


def test_image_and_mask_move_together() -> None:
    image, mask = _ramp()
    transform = TrainTransform((32, 40), (0.0, 0.0, 0.0), Augment.of({"photometric": 0.0, "scale": [1.0, 1.0]}))
    mirrored = set()
    for seed in range(8):
        with seeded(seed):
            x, y = transform(image, mask)
        assert x.shape == (3, 32, 40)
        assert torch.equal(x[1], y)
        mirrored.add(bool(y[0, 0] > y[0, -1]))
    assert mirrored == {True, False}


def test_scaling_keeps_image_and_mask_aligned() -> None:
    image, mask = _ramp()
    transform = TrainTransform((32, 32), (0.0, 0.0, 0.0), Augment.of({"photometric": 0.0, "scale": 2.0, "hflip": 0.0}))
    with seeded(1):
        x, y = transform(image, mask)
    assert len(y.unique()) <= 5  # a column is 8 pixels wide now
    assert (x[1].int() - y.int()).abs().max() <= 1


def test_what_a_crop_lacks_has_no_class_and_the_colour_of_the_mean() -> None:
    image, mask = _ramp()
    transform = TrainTransform((100, 100), (3.0, 4.0, 5.0), Augment.of({"scale": 1.0, "photometric": 0.0}))
    with seeded(0):
        x, y = transform(image, mask)
    outside = y == 255
    assert int((~outside).sum()) == 48 * 64
    assert x[:, outside].unique(dim=1).flatten().tolist() == [3, 4, 5]


def test_crops_full_of_one_class_are_drawn_again() -> None:
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[:, 32:] = 1
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    shares = {}
    for most in (1.0, 0.75):
        options = {"scale": 1.0, "photometric": 0.0, "max_class_share": most}
        transform = TrainTransform((16, 16), (0.0,) * 3, Augment.of(options))
        found = []
        for seed in range(40):
            with seeded(seed):
                y = transform(image, mask)[1]
            found.append(max((y == 0).float().mean().item(), (y == 1).float().mean().item()))
        shares[most] = sum(share <= 0.75 for share in found) / len(found)
    assert shares[0.75] > shares[1.0] + 0.4


def test_the_same_draw_gives_the_same_crop_and_the_next_epoch_another() -> None:
    data = load_segmentation("photographs").training((32, 32), {}, seed=5)
    (a, m), (b, n) = data[7], data[7]
    assert torch.equal(a, b)
    assert torch.equal(m, n)
    assert not torch.equal(data[7 + len(data)][0], a)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scael": 1}, "scael.*scale"),
        ({"scale": [2.0, 1.0]}, "two ascending factors"),
        ({"hflip": 1.5}, "hflip=1.5 is not allowed; it must be at most 1"),
        ({"photometric": -1}, "photometric=-1"),
    ],
)
def test_augmentation_that_is_not_allowed_is_told(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment.of(values)

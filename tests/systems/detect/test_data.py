"""COCO's layout on disk, scenes, and what training makes of them."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gridattn.systems.detect.coco import decode, encode
from gridattn.systems.detect.cutouts import CLASSES, cutouts
from gridattn.systems.detect.data import ObjectSamples, load_detection_data, train_transform
from gridattn.systems.detect.scenes import Scenes, boxes_of

SQUARE = [[2, 2, 10, 2, 10, 8, 2, 8]]


def _content() -> dict[str, Any]:
    """Three pictures: a cat and a dog, a crowd of dogs beside a dog, and nothing; the ids have gaps."""
    column = {"size": [20, 30], "counts": [20 * 5, 20 * 3, 20 * 22]}
    images = [{"id": i, "file_name": f"{i:04d}.png", "width": 30, "height": 20} for i in (7, 9, 30)]
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 90, "bbox": [2, 2, 8, 6], "segmentation": SQUARE, "area": 48.0},
        {"id": 2, "image_id": 7, "category_id": 3, "bbox": [5, 0, 3, 20], "segmentation": column},
        {"id": 3, "image_id": 9, "category_id": 3, "bbox": [0, 0, 30, 20], "segmentation": column, "iscrowd": 1},
        {"id": 4, "image_id": 9, "category_id": 3, "bbox": [25, 15, 50, 50], "segmentation": SQUARE, "iscrowd": 0},
        {"id": 5, "image_id": 9, "category_id": 3, "bbox": [25, 15, 0, 4], "segmentation": SQUARE},
    ]
    categories = [{"id": 90, "name": "cat"}, {"id": 3, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root: Path, content: dict[str, Any] | None = None, split: str = "train", year: str = "") -> Path:
    """Writes a dataset in COCO's layout; returns its annotation file."""
    content = _content() if content is None else content
    file = root / "annotations" / f"instances_{split}{year}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    (root / f"{split}{year}").mkdir(exist_ok=True)
    for image in content["images"]:
        Image.new("RGB", (30, 20), "green").save(root / f"{split}{year}" / image["file_name"])
    return file


@pytest.mark.parametrize("year", ["", "2017"])
def test_coco_gives_boxes_labels_masks_and_crowds(tmp_path: Path, year: str, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "val"):
        write_coco(tmp_path, split=split, year=year)
    data = load_detection_data(f"coco:{tmp_path}", masks=True)
    assert data.classes == ["dog", "cat"]  # by rising id
    assert data.categories == [3, 90]
    first, second, empty = (data.val[i] for i in range(3))
    assert first.image.shape == (20, 30, 3)
    assert first.boxes.tolist() == [[2, 2, 10, 8], [5, 0, 8, 20]]
    assert first.labels.tolist() == [1, 0]
    assert first.masks is not None
    assert np.array_equal(boxes_of(first.masks), first.boxes)
    assert first.masks.sum((1, 2)).tolist() == [48, 60]
    assert first.area.tolist() == [48, 60]
    assert second.crowd.tolist() == [True, False]
    assert second.boxes[1].tolist() == [25, 15, 30, 20]  # cut to the picture
    assert "1 of 5 boxes" in caplog.text
    assert empty.boxes.shape == (0, 4)
    assert empty.image_id == 30


def test_without_val_a_part_of_train_is_held_out(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "annotations" / "instances_train.json").rename(tmp_path / "train.json")
    (tmp_path / "train").rename(tmp_path / "images")
    data = load_detection_data(f"coco:{tmp_path}", seed=1)
    ids = [[source[i].image_id for i in range(len(source))] for source in (data.train, data.val)]
    assert len(ids[1]) == 1
    assert sorted(ids[0] + ids[1]) == [7, 9, 30]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("categories",), [], "names no categories"),
        (("images",), {}, "have no list 'images'"),
        (("images", 1, "id"), 7, "two images of the id 7"),
        (("images", 1, "width"), "30", "image 9 of .* has width='30'; a value of type int"),
        (("annotations", 0, "image_id"), 8, "annotation 1 of .* belongs to the image 8, which is not listed"),
        (("annotations", 1, "category_id"), 4, "annotation 2 of .* is of the category 4, which is not listed"),
        (("annotations", 1, "bbox"), [1, 2, 3], r"annotation 2 of .* has the bbox \[1, 2, 3\]"),
        (("annotations", 1, "bbox"), [1, 2, float("nan"), 3], "annotation 2 of .* has the bbox"),
        (("annotations", 3, "segmentation"), [], "annotation 4 of .* has no segmentation"),
    ],
)
def test_what_is_wrong_in_an_annotation_file_is_named(
    tmp_path: Path, place: tuple[Any, ...], value: Any, message: str
) -> None:
    file = write_coco(tmp_path)
    content = _content()
    record: Any = content
    for key in place[:-1]:
        record = record[key]
    record[place[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        load_detection_data(f"coco:{tmp_path}", masks=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [30, 20], "counts": [600]}, r"annotation 1 of .* bad segmentation: its size is \[30, 20\]"),
        ({"size": [20, 30], "counts": [10, 20]}, "run lengths add up to 30, not to 600"),
        ([[1, 2, 3, 4]], "a polygon needs three points"),
        ({"counts": "abc"}, "bad segmentation"),
    ],
)
def test_a_bad_outline_is_named(tmp_path: Path, segmentation: Any, message: str) -> None:
    content = _content()
    content["annotations"][0]["segmentation"] = segmentation
    write_coco(tmp_path, content, split="val")
    write_coco(tmp_path)
    data = load_detection_data(f"coco:{tmp_path}", masks=True)
    with pytest.raises(ValueError, match=message):
        data.val[0]


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data='coco' is not known; allowed: scenes, coco:PATH"):
        load_detection_data("coco")
    with pytest.raises(ValueError, match="does not exist or is not a folder"):
        load_detection_data(f"coco:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match=r"holds no annotations; one of annotations/instances_train2017\.json"):
        load_detection_data(f"coco:{tmp_path}")
    file = write_coco(tmp_path)
    (tmp_path / "train" / "0009.png").unlink()
    with pytest.raises(ValueError, match=r"0009\.png' of .*instances_train\.json' does not exist"):
        load_detection_data(f"coco:{tmp_path}")
    Image.new("RGB", (31, 20)).save(tmp_path / "train" / "0009.png")
    (tmp_path / "train" / "0030.png").write_bytes((tmp_path / "train" / "0007.png").read_bytes()[:60])
    data = load_detection_data(f"coco:{tmp_path}")
    source = data.train.source
    with pytest.raises(ValueError, match=r"0009\.png' has 31x20 pixels; .* gives 30x20"):
        source[1]
    with pytest.raises(ValueError, match=r"0030\.png' cannot be read"):
        source[2]
    file.write_text(file.read_text()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        load_detection_data(f"coco:{tmp_path}")
    content = _content()
    write_coco(tmp_path, content)
    content["categories"][0]["name"] = "bird"
    write_coco(tmp_path, content, split="val")
    with pytest.raises(ValueError, match=r"categories of .* differ"):
        load_detection_data(f"coco:{tmp_path}")


def test_run_lengths_and_polygons_are_masks() -> None:
    mask = torch.rand(13, 17).numpy() > 0.5
    assert np.array_equal(decode(encode(mask), 17, 13), mask)
    assert np.array_equal(decode(json.loads(json.dumps(encode(mask))), 17, 13), mask)
    triangle = decode([[0, 0, 20, 0, 0, 20]], 20, 20)
    assert abs(int(triangle.sum()) - 200) <= 20


def test_training_moves_boxes_and_masks_with_the_image_and_leaves_crowds_out(tmp_path: Path) -> None:
    write_coco(tmp_path)
    source = load_detection_data(f"coco:{tmp_path}", masks=True).train.source
    flipped = ObjectSamples(source, train_transform([40], 1000, flip=1.0))
    image, target = flipped[0]
    assert image.shape == (3, 40, 60)
    assert target["boxes"].tolist() == [[40, 4, 56, 16], [44, 0, 50, 40]]
    assert np.array_equal(boxes_of(target["masks"].numpy() > 0), target["boxes"].numpy())
    assert len(flipped[1][1]["boxes"]) == 1
    assert ObjectSamples(source)[1][1]["iscrowd"].tolist() == [1, 0]
    assert flipped[2][1]["boxes"].shape == (0, 4)
    assert torch.equal(flipped[0][1]["seed"], target["seed"])
    assert not torch.equal(flipped[0 + 3][1]["seed"], target["seed"])
    assert type(image) is type(target["boxes"]) is torch.Tensor


def test_crops_of_a_random_region_keep_what_is_inside_and_end_at_the_training_size(tmp_path: Path) -> None:
    write_coco(tmp_path)
    source = load_detection_data(f"coco:{tmp_path}", masks=True).train.source
    samples = ObjectSamples(source, train_transform([16, 24], 30, crop=[10, 18], before=[20, 30]))
    shapes = set()
    for draw in range(0, 120, 3):
        image, target = samples[draw]
        shapes.add(tuple(image.shape))
        height, width = image.shape[1:]
        assert max(height, width) <= 30
        assert (target["boxes"] >= 0).all()
        assert (target["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert target["masks"].shape == (len(target["boxes"]), height, width)
    assert len(shapes) > 8


def test_scenes_have_exact_boxes_and_are_the_same_for_the_same_draw() -> None:
    data = load_detection_data("scenes", 48)
    samples = ObjectSamples(data.train, seed=3)
    counts = []
    for draw in range(30):
        image, target = samples[draw]
        counts.append(len(target["boxes"]))
        assert image.shape == (3, 48, 48)
        assert np.array_equal(boxes_of(target["masks"].numpy() > 0), target["boxes"].numpy())
        assert target["masks"].sum(0).max() <= 1  # what lies below is not visible
    assert min(counts) == 0
    assert max(counts) >= 4
    again = ObjectSamples(data.train, seed=3)
    assert torch.equal(again[5][0], samples[5][0])
    assert not torch.equal(again[5 + len(again)][0], samples[5][0])


def test_training_and_validation_scenes_share_no_object_and_no_texture() -> None:
    train, val = (Scenes(48, 1, training=training, seed=2) for training in (True, False))
    for label, name in enumerate(CLASSES):
        assert len(train.objects[label]) + len(val.objects[label]) == len(cutouts(name))
        assert not {id(o) for o in train.objects[label]} & {id(o) for o in val.objects[label]}
    for one, other in zip(train.regions, val.regions):
        assert one.shape[1] + other.shape[1] == 512


def test_a_scene_may_be_larger_than_the_textures() -> None:
    random.seed(0)
    assert Scenes(600, 1, training=False)[0].image.shape == (600, 600, 3)
    with pytest.raises(ValueError, match="image_size=16 is too small"):
        load_detection_data("scenes", 16)

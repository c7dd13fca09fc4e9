"""A detector is trained, measured and applied; its numbers are COCO's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import TINY
from torch import Tensor

from gridattn.systems import get_system
from gridattn.systems.base import Demo
from gridattn.systems.detect import DetectSettings, evaluate_detector, load_detector, predict_objects, train_detector
from gridattn.systems.detect.coco import decode
from gridattn.systems.detect.metrics import AveragePrecision, nothing_found
from gridattn.systems.output import RunFolder
from gridattn.systems.settings import read_recipe

TRAINER: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False}
SCENES = 20


@pytest.fixture(scope="module", autouse=True)
def _few_scenes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gridattn.systems.detect.data.VAL_SCENES", SCENES)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a short training of a Mask R-CNN."""
    output = tmp_path_factory.mktemp("trained") / "run"
    trainer = {**TRAINER, "limit_train_batches": 3}
    train_detector(DetectSettings(**{**TINY["detect"], "epochs": 1, "output": str(output), "trainer": trainer}))
    return output


def test_evaluation_repeats_the_validation_of_the_exported_epoch(trained: Path, tmp_path: Path) -> None:
    report = evaluate_detector(str(trained), output=str(tmp_path / "report.json"), batch_size=3, device="cpu")
    result = json.loads(RunFolder(trained).result.read_text())
    assert {"val_box_ap", "val_box_ap50", "val_box_ap75", "val_mask_ap", "val_mask_ap_small"} <= result.keys()
    for name, value in result.items():
        if name.startswith("val_"):
            assert report[name.removeprefix("val_")] == pytest.approx(value, abs=1e-6)
    assert report["images"] == SCENES
    assert set(report["box_ap_per_class"]) == {"digit", "face", "coin"}
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_predictions_are_coco_results_with_names_and_a_picture(trained: Path, tmp_path: Path) -> None:
    for name, size in (("000012.png", (40, 50)), ("000007.png", (33, 20))):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    result = predict_objects(
        [str(tmp_path / "in")], str(trained), str(tmp_path / "out"), score=0.0, most=3, device="cpu"
    )
    assert [image["id"] for image in result["images"]] == [7, 12]
    assert [Path(s["image"]).name for s in result["skipped"]] == ["broken.png"]
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert written == result["detections"]
    assert 0 < len(written) <= 6
    sizes = {image["id"]: (image["width"], image["height"]) for image in result["images"]}
    for entry in written:
        assert entry["category"] == ["digit", "face", "coin"][entry["category_id"] - 1]
        width, height = sizes[entry["image_id"]]
        x, y, w, h = entry["bbox"]
        assert 0 <= x <= x + w <= width + 1e-3
        assert 0 <= y <= y + h <= height + 1e-3
        assert decode(entry["segmentation"], width, height).shape == (height, width)
    with Image.open(tmp_path / "out" / "detections.png") as picture:
        assert min(picture.size) > 200


def test_without_images_held_out_scenes_are_looked_at(trained: Path, tmp_path: Path) -> None:
    result = predict_objects(checkpoint=str(trained), output=str(tmp_path / "out"), score=0.99, device="cpu")
    assert [image["id"] for image in result["images"]] == list(range(1, 13))
    assert result["detections"] == []
    assert (tmp_path / "out" / "detections.png").is_file()


def test_a_detector_is_trained_and_measured_on_cocos_layout(tmp_path: Path) -> None:
    content: dict[str, Any] = {"categories": [{"id": 5, "name": "a"}, {"id": 8, "name": "b"}]}
    content["images"] = [{"id": i, "file_name": f"{i}.png", "width": 30 + i, "height": 40} for i in range(5)]
    box = {"bbox": [3, 4, 12, 14], "category_id": 8}
    content["annotations"] = [{"id": i, "image_id": i, "iscrowd": i % 2, **box} for i in range(4)]
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
        for i in range(5):
            Image.new("RGB", (30 + i, 40), "white").save(tmp_path / split / f"{i}.png")
    changes = {"data": f"coco:{tmp_path}", "detector": "retinanet", "epochs": 1, "batch_size": 5, "model": "van_b0"}
    changes |= {"model_options": {"embed_dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}, "levels": 4, "attention": None}
    settings = DetectSettings(**{**TINY["detect"], **changes, "output": str(tmp_path / "run"), "trainer": TRAINER})
    result = train_detector(settings)
    assert 0 <= result["val_box_ap"] <= 1
    trained = load_detector(str(tmp_path / "run"))
    assert trained.about["categories"] == [5, 8]
    assert evaluate_detector(str(tmp_path / "run"), device="cpu")["objects"] == 4
    with pytest.raises(ValueError, match="has the class 'coin'; the detector knows a, b"):
        evaluate_detector(str(tmp_path / "run"), "scenes")


def _found(boxes: list[list[float]], scores: list[float], labels: list[int]) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}


def _truth(boxes: list[list[float]], labels: list[int], crowd: list[int]) -> dict[str, Tensor]:
    box = torch.tensor(boxes)
    area = (box[:, 2:] - box[:, :2]).prod(1)
    return {"boxes": box, "labels": torch.tensor(labels), "iscrowd": torch.tensor(crowd), "area": area}


def test_average_precision_by_hand() -> None:
    precision = AveragePrecision(masks=False)
    # One of two objects is found, at an overlap of 0.82: seven of the ten overlaps count it, and recall is one half.
    precision.update(
        [_found([[0.0, 0, 10, 8.2]], [0.9], [0])], [_truth([[0.0, 0, 10, 10], [50.0, 50, 60, 60]], [0, 0], [0, 0])]
    )
    half = 51 / 101  # of the 101 points of recall that COCO looks at
    assert precision.compute()["box_ap50"] == pytest.approx(half)
    assert precision.compute()["box_ap"] == pytest.approx(0.7 * half)
    assert "box_ap_large" not in precision.compute()
    # An image without objects and detections, such as padding, changes nothing; a false one there does.
    empty = {**nothing_found(torch.zeros(3, 9, 9), False), "iscrowd": torch.zeros(0).long(), "area": torch.zeros(0)}
    precision.update([nothing_found(torch.zeros(3, 9, 9), False)], [empty])
    assert precision.compute()["box_ap50"] == pytest.approx(half)
    precision.update([_found([[0.0, 0, 5, 5]], [0.95], [0])], [empty])
    assert precision.compute()["box_ap50"] == pytest.approx(half / 2)


def test_detections_in_a_crowd_are_neither_hits_nor_misses() -> None:
    precision = AveragePrecision(masks=False)
    precision.update(
        [_found([[0.0, 0, 10, 10], [40.0, 40, 50, 50]], [0.5, 0.9], [0, 0])],
        [_truth([[0.0, 0, 10, 10], [30.0, 30, 90, 90]], [0, 0], [0, 1])],
    )
    assert precision.compute()["box_ap"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("detector", "yolo", "detector='yolo' is not"),
        ("image_size", 0, "image_size=0 is not allowed"),
        ("crop", [4, 2], r"crop=\[4, 2\] is not allowed"),
        ("crop", [2, 4], "and crop_sizes"),
        ("train_sizes", [0], "train_sizes=0"),
        ("flip", -1, "flip=-1"),
    ],
)
def test_bad_settings_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectSettings(**{name: value})


def test_prediction_refuses_what_it_cannot_use(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").touch()
    (tmp_path / "empty").mkdir()
    out = str(tmp_path / "out")
    for images, message in (
        ([str(tmp_path / "none.png")], "does not exist"),
        ([str(tmp_path / "empty")], "holds no images"),
        ([str(tmp_path / "broken.png")], "none of the 1 images can be read"),
    ):
        with pytest.raises(ValueError, match=message):
            predict_objects(images, str(trained), out)
    with pytest.raises(ValueError, match="score=2 is not allowed"):
        predict_objects(checkpoint=str(trained), output=out, score=2)
    with pytest.raises(ValueError, match="holds no trained network"):
        predict_objects(checkpoint=str(tmp_path), output=out)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_demo_reaches_its_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gridattn.systems.detect.data.VAL_SCENES", 160)
    demo = get_system("detect").demo
    assert isinstance(demo, Demo)
    settings = DetectSettings(**read_recipe("detect", "demo") | {"output": str(tmp_path / "run"), "trainer": TRAINER})
    assert train_detector(settings)[demo.metric] > demo.threshold

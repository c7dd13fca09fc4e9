"""A segmentation network is trained, exported, measured and applied; metrics and views count as they should."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

from gridattn.systems import get_system
from gridattn.systems.segment import SegmentSettings, evaluate_segmenter, predict_masks, train_segmenter
from gridattn.systems.segment.inference import View, class_probabilities, fitted_size
from gridattn.systems.segment.losses import pixel_cross_entropy
from gridattn.systems.segment.metrics import overall, pixel_confusion, segmentation_report
from gridattn.systems.settings import read_recipe

TRAINER = {"accelerator": "cpu", "enable_progress_bar": False}


def _settings(output: Path, **changes: Any) -> SegmentSettings:
    trainer = {**TRAINER, **changes.pop("trainer", {})}
    return SegmentSettings(**{**TINY["segment"], "output": str(output), "trainer": trainer, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    train_segmenter(_settings(output, epochs=1, trainer={"limit_train_batches": 6}))
    return output


@pytest.fixture(scope="module")
def trained_on_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on images of different sizes, in grey, and their folder."""
    root, output = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("grey") / "run"
    rng = np.random.default_rng(0)
    for i in range(10):
        size = (33 + 2 * i, 40 + i)
        mask = (np.arange(size[1]) > size[1] // 2)[None].repeat(size[0], 0).astype(np.uint8)
        image = (mask * 120 + rng.integers(0, 60, size)).astype(np.uint8)
        mask[:2] = 255
        for folder, array in (("images", image), ("masks", mask)):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(root / folder / f"{i}.png")
    (root / "classes.txt").write_text("dark\nbright\n")
    data = {"data": f"folder:{root}", "in_chans": 1, "window": 32, "batch_size": 4, "epochs": 6}
    train_segmenter(_settings(output, **data))
    return output, root


def test_evaluation_repeats_the_validation_of_the_exported_epoch(trained: Path, tmp_path: Path) -> None:
    report = evaluate_segmenter(str(trained), device="cpu", output=str(tmp_path / "report.json"))
    result = json.loads((trained / "result.json").read_text())
    for name in ("miou", "pixel_accuracy", "mean_class_accuracy"):
        assert report[name] == pytest.approx(result[f"val_{name}"], abs=1e-6)
    assert report["loss"] == pytest.approx(result["val_loss"], rel=1e-5)
    assert sum(map(sum, report["confusion"])) == 40 * 128 * 96
    assert list(report["per_class"]) == ["brick", "grass", "gravel", "tissue", "stars"]
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_files_of_any_size_are_learnt_measured_and_segmented(
    trained_on_files: tuple[Path, Path], tmp_path: Path
) -> None:
    run, root = trained_on_files
    report = evaluate_segmenter(str(run), split="all", device="cpu")
    assert report["images"] == 10
    assert report["miou"] > 0.8
    assert report["per_class"]["dark"]["iou"] > 0.8
    result = json.loads((run / "result.json").read_text())
    assert evaluate_segmenter(str(run), device="cpu")["miou"] == pytest.approx(result["val_miou"], abs=1e-6)

    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    Image.open(root / "images" / "3.png").save(tmp_path / "3.png")
    inputs = [str(root / "images"), str(tmp_path / "3.png"), str(tmp_path / "broken.jpg")]
    found = predict_masks(inputs, checkpoint=str(run), output=str(tmp_path / "out"), device="cpu")
    assert [Path(entry["image"]).name for entry in found["skipped"]] == ["broken.jpg"]
    assert len(found["predictions"]) == 11
    assert len({entry["mask"] for entry in found["predictions"]}) == 11
    for entry in found["predictions"]:
        with Image.open(entry["mask"]) as mask, Image.open(entry["picture"]) as picture:
            values = np.asarray(mask)
            assert min(picture.size) > 100
        assert list(values.shape) == entry["size"]
        counts = {found["classes"][i]: int((values == i).sum()) for i in range(2)}
        assert counts == {name: area["pixels"] for name, area in entry["areas"].items()} | {
            name: 0 for name in counts if name not in entry["areas"]
        }
        assert 0.5 <= entry["confidence"] <= 1
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == found


def test_without_files_held_out_samples_are_segmented(trained: Path, tmp_path: Path) -> None:
    found = predict_masks(checkpoint=str(trained), output=str(tmp_path), device="cpu")
    assert len(found["predictions"]) == 3
    assert all(0 <= entry["miou"] <= 1 for entry in found["predictions"])


def test_what_cannot_be_measured_or_segmented_is_told(
    trained: Path, trained_on_files: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="has the classes dark, bright; the network knows brick"):
        evaluate_segmenter(str(trained), f"folder:{trained_on_files[1]}")
    with pytest.raises(ValueError, match="split='all' is for files"):
        evaluate_segmenter(str(trained), split="all")
    with pytest.raises(ValueError, match="images is empty"):
        predict_masks(checkpoint=str(trained_on_files[0]), output=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="does not exist"):
        predict_masks(["nothing.png"], checkpoint=str(trained), output=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="holds no trained network"):
        predict_masks(checkpoint=str(tmp_path), output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_size": 4}, "crop_size=4"),
        ({"in_chans": 2}, "in_chans=2 is not allowed"),
        ({"stride": 8}, "without a window"),
        ({"window": 16, "stride": 20}, "windows may not leave gaps"),
        ({"head": "unet"}, "head='unet'"),
        ({"batch_size": 1, "head_options": {}}, "batch_size=1 leaves batch normalisation"),
        ({"model_options": {"patch": 2}}, "patch"),
    ],
)
def test_settings_that_are_not_allowed_are_told_before_a_folder_is_made(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_segmenter(_settings(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_metrics_agree_with_torchmetrics_and_pass_over_255() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 4, (2, 20, 30), generator=generator)
    predicted = torch.where(torch.rand(target.shape, generator=generator) < 0.6, target, 3 - target)
    target[:, :3] = 255
    confusion = pixel_confusion(6)  # two classes occur nowhere
    confusion.update(predicted[:1], target[:1])
    confusion.update(predicted[1:], target[1:])
    counts = confusion.compute()
    expected = MulticlassJaccardIndex(6, average="none", ignore_index=255)(predicted, target)
    report = segmentation_report(counts, list("abcdef"))
    assert [report["per_class"][name]["iou"] for name in "abcd"] == pytest.approx(expected[:4].tolist(), abs=1e-6)
    assert report["per_class"]["e"] == {"pixels": 0, "iou": None, "recall": None, "precision": None}
    assert report["miou"] == pytest.approx(float(expected[:4].mean()), abs=1e-6)
    assert int(counts.sum()) == 2 * 17 * 30
    perfect = pixel_confusion(6)
    perfect.update(target.where(target != 255, 0), target)
    assert overall(perfect.compute())["miou"] == 1.0


def test_the_loss_divides_by_all_pixels_as_the_papers_do() -> None:
    scores, target = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    target[0] = 255
    halves = [pixel_cross_entropy(scores[i : i + 1], target[i : i + 1]) for i in range(2)]
    assert halves[0] == 0
    assert torch.allclose(sum(halves) / 2, pixel_cross_entropy(scores, target))
    expected = nn.functional.cross_entropy(scores[1:], target[1:]) / 2
    assert torch.allclose(pixel_cross_entropy(scores, target), expected)


def test_windows_of_a_pointwise_network_give_what_the_whole_image_gives() -> None:
    network, image = nn.Conv2d(3, 4, 1), torch.randn(3, 37, 50)
    with torch.no_grad():
        whole = class_probabilities(network, image, View.of())
        for window, stride in ((16, 8), ((37, 20), (37, 13)), (64, 64), ((10, 50), None)):
            cut = class_probabilities(network, image, View.of(window=window, stride=stride))
            assert torch.allclose(whole, cut, atol=1e-6)
        mirrored = class_probabilities(network, image, View.of(flip=True))
    assert torch.allclose(whole, mirrored, atol=1e-6)


def test_scales_are_averaged_at_the_size_of_the_image() -> None:
    network = nn.Conv2d(3, 4, 1)
    image = torch.ones(3, 30, 41) * torch.tensor([0.3, -1.0, 0.7])[:, None, None]
    with torch.no_grad():
        plain = class_probabilities(network, image, View.of())
        several = class_probabilities(network, image, View.of(ratios=[0.5, 1.0, 1.75], resize=[60, 20]))
    assert several.shape == plain.shape
    assert torch.allclose(plain, several, atol=1e-5)
    assert torch.allclose(several.sum(0), torch.ones(30, 41), atol=1e-5)


@pytest.mark.parametrize(
    ("size", "fitted"), [((300, 400), (512, 683)), ((512, 4096), (256, 2048)), ((600, 512), (600, 512))]
)
def test_images_fit_the_longer_and_the_shorter_side(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fitted_size(size, (2048, 512)) == fitted


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["demo", "demo-mni152"])
def test_a_demo_reaches_its_threshold(recipe: str, tmp_path: Path) -> None:
    if recipe == "demo-mni152":
        pytest.importorskip("nilearn")
    demo = get_system("segment").demo
    assert demo is not None
    settings = SegmentSettings(
        **{**read_recipe("segment", recipe), "output": str(tmp_path / "run"), "trainer": TRAINER}
    )
    assert train_segmenter(settings)[demo.metric] >= demo.threshold

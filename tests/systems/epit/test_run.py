"""A super-resolution network is trained, measured, sheared and applied; the demo beats bicubic and its ablation."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY

from gridattn.systems import get_system
from gridattn.systems.epit import EpitSettings, evaluate_epit, load_epit, predict_views, train_epit
from gridattn.systems.epit.metrics import SceneMeans
from gridattn.systems.output import RunFolder
from gridattn.systems.settings import read_recipe

TRAINER = {"accelerator": "cpu", "enable_progress_bar": False}


def _settings(output: Path, **changes: Any) -> EpitSettings:
    trainer = {**TRAINER, **changes.pop("trainer", {})}
    return EpitSettings(**{**TINY["epit"], "output": str(output), "trainer": trainer, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    train_epit(_settings(output, epochs=1, trainer={"limit_train_batches": 4}))
    return output


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets as prepared by the authors' programs; the views of a scene are equal."""
    root = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for name, scenes in (("EPFL", 2), ("HCI_new", 1)):
        for part in ("training", "test"):
            folder = root / f"data_for_{part}" / "SSR_9x9" / name
            folder.mkdir(parents=True)
            for i in range(scenes):
                view = rng.random((3, 1, 1, 37, 42), np.float32)
                with h5py.File(folder / f"{i}.h5", "w") as file:
                    file["LF"] = np.broadcast_to(view, (3, 3, 3, 37, 42))
    return root


def test_evaluation_repeats_the_validation_of_the_exported_epoch(trained: Path, tmp_path: Path) -> None:
    report = evaluate_epit(str(trained), device="cpu", output=str(tmp_path / "report.json"), shears=[0, 1.5])
    result = json.loads((trained / "result.json").read_text())
    for name in SceneMeans.names:
        assert report[name] == pytest.approx(result[f"val_{name}"], rel=1e-6)
    assert len(report["scenes"]) == 16
    assert report["psnr"] == pytest.approx(np.mean([scene["psnr"] for scene in report["scenes"]]))
    assert [row["shear"] for row in report["shears"]] == [0, 1.5]
    assert report["shears"][0]["psnr"] == report["psnr"]
    assert report["shears"][1]["psnr"] != report["psnr"]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    with Image.open(tmp_path / "report.shear.png") as picture:
        assert min(picture.size) > 200


def test_scores_are_means_over_scenes_then_over_sets(trained: Path, files: Path) -> None:
    report = evaluate_epit(str(trained), f"folder:{files}", ang_res=3, tile=16, device="cpu", shears=[1])
    first, second, third = (scene["psnr"] for scene in report["scenes"])
    assert report["sets"]["EPFL"]["psnr"] == pytest.approx((first + second) / 2)
    assert report["psnr"] == pytest.approx(((first + second) / 2 + third) / 2)
    assert report["bicubic_psnr"] == pytest.approx(
        (report["sets"]["EPFL"]["bicubic_psnr"] + report["sets"]["HCI_new"]["bicubic_psnr"]) / 2
    )
    assert report["ssim"] > report["ssim_range1"]


def test_files_are_learnt_from(files: Path, tmp_path: Path) -> None:
    settings = _settings(tmp_path / "run", data=f"folder:{files}", patch=16, batch_size=1, tile=16, stride=8, epochs=1)
    result = train_epit(settings)
    found = evaluate_epit(str(tmp_path / "run"), device="cpu")
    assert found["psnr"] == pytest.approx(result["val_psnr"], rel=1e-6)
    with pytest.raises(ValueError, match="light_fields is empty"):
        predict_views(checkpoint=str(tmp_path / "run"), output=str(tmp_path / "out"))


def test_training_starts_from_given_weights(trained: Path, tmp_path: Path) -> None:
    settings = _settings(tmp_path / "run", weights=str(trained), lr=0.0, epochs=1, trainer={"limit_train_batches": 1})
    train_epit(settings)
    before, after = (load_epit(str(path)).model.state_dict() for path in (trained, tmp_path / "run"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_held_out_scene_is_super_resolved(trained: Path, tmp_path: Path) -> None:
    found = predict_views(checkpoint=str(trained), output=str(tmp_path), device="cpu")
    (entry,) = found["predictions"]
    assert (entry["views"], entry["size_before"], entry["size"]) == ([2, 2], [24, 24], [48, 48])
    scene = next(s for s in evaluate_epit(str(trained), device="cpu")["scenes"] if s["scene"] == entry["light_field"])
    assert entry["psnr"] == pytest.approx(scene["psnr"], abs=1e-5)
    assert entry["bicubic_psnr"] == pytest.approx(scene["bicubic_psnr"], abs=1e-5)
    assert json.loads((tmp_path / "predictions.json").read_text()) == found


def test_files_and_folders_of_views_are_super_resolved(trained: Path, files: Path, tmp_path: Path) -> None:
    for u in range(2):
        for v in range(3):
            (tmp_path / "views").mkdir(exist_ok=True)
            Image.new("RGB", (14, 9), (50 * u, 50 * v, 80)).save(tmp_path / "views" / f"{u}_{v}.png")
    inputs = [str(tmp_path / "views"), str(files / "data_for_test" / "SSR_9x9" / "EPFL" / "0.h5")]
    found = predict_views(inputs, checkpoint=str(trained), output=str(tmp_path / "out"), tile=16, device="cpu")
    views, scene = found["predictions"]
    assert (views["views"], views["size"]) == ([2, 3], [18, 28])
    assert (scene["views"], scene["size"]) == ([3, 3], [74, 84])
    assert "psnr" not in scene
    names = {path.name for path in Path(views["folder"]).iterdir()}
    assert names == {f"view_{u:02d}_{v:02d}.png" for u in range(2) for v in range(3)} | {
        "before.png",
        "after.png",
        "epi.png",
        "comparison.png",
    }
    for name, size in (("view_01_02.png", (28, 18)), ("before.png", (28, 18)), ("epi.png", (28, 60))):
        with Image.open(Path(views["folder"]) / name) as picture:
            assert picture.size == size


def test_what_cannot_be_measured_or_super_resolved_is_told(trained: Path, files: Path, tmp_path: Path) -> None:
    good = str(files / "data_for_test" / "SSR_9x9" / "EPFL" / "0.h5")
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="does not exist"):
        predict_views([good, "nothing.mat"], checkpoint=str(trained), output=out)
    with pytest.raises(ValueError, match="ang_res=5"):
        predict_views([good], checkpoint=str(trained), output=out, ang_res=5)
    with pytest.raises(ValueError, match="tile=16 with stride=32"):
        predict_views([good], checkpoint=str(trained), output=out, tile=16, stride=32)
    with pytest.raises(ValueError, match="holds no trained network"):
        predict_views([good], checkpoint=str(tmp_path), output=out)
    with pytest.raises(ValueError, match="whole pixels"):
        evaluate_epit(str(trained), f"folder:{files}", shears=[0.5])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 5}, "scale=5"),
        ({"patch": 2}, "patch=2"),
        ({"ang_res": 0}, "ang_res=0"),
        ({"tile": 32, "stride": 15}, "tile=32 with stride=15"),
        ({"flicker": [1.2, 0.8]}, "flicker="),
        ({"num_heads": 3}, "num_heads"),
        ({"weights": "nothing.pth"}, "nothing.pth"),
    ],
)
def test_wrong_settings_are_told_before_a_folder_is_made(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train_epit(_settings(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("data", "shear"), [("photographs", 3), ("sinusoids", 4)])
def test_the_demo_beats_bicubic_and_its_ablation_and_bears_shear(data: str, shear: int, tmp_path: Path) -> None:
    demo = get_system("epit").demo
    assert demo is not None
    recipe = read_recipe("epit", "demo") | {"data": data, "trainer": TRAINER}
    ours = train_epit(EpitSettings(**recipe | {"output": str(tmp_path / "ours")}))["val_psnr"]
    ablated = train_epit(EpitSettings(**recipe | demo.ablation | {"output": str(tmp_path / "ablated")}))["val_psnr"]
    report = evaluate_epit(str(RunFolder(tmp_path / "ours").model), device="cpu", shears=[0, shear])
    if data == "photographs":
        assert ours >= demo.threshold
    assert ours >= report["bicubic_psnr"] + 0.7
    assert ours >= ablated + demo.margin
    assert report["shears"][1]["psnr"] >= report["shears"][0]["psnr"] - 0.5

"""Training, evaluation and prediction."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from gridattn.systems.dcal import SYSTEM, DualSettings, evaluate_dcal, load_data, predict_dcal, train_dcal
from gridattn.systems.dcal.data import IdentityData
from gridattn.systems.settings import read_recipe

CPU = {"accelerator": "cpu", "enable_progress_bar": False}
TINY = {
    "model": "micro",
    "model_options": {"embed_dim": 16, "depth": 2, "num_heads": 2},
    "image_size": [32, 32],
    "epochs": 1,
    "lr": 3e-3,
}


def settings(data: str, output: Path, **changes: object) -> DualSettings:
    trainer = CPU | {"limit_train_batches": 3}
    return DualSettings(**(TINY | {"data": data, "output": str(output), "trainer": trainer} | changes))  # pyright: ignore


@pytest.fixture(scope="module")
def by_sort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sorts")
    train_dcal(settings("marks", output, batch_size=32))
    return output


@pytest.fixture(scope="module")
def by_identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("identities")
    train_dcal(settings("marks-reid", output, batch_size=8, ratio=0.3, readout="local_mean", pair="figure"))
    return output


def test_evaluation_by_sort_repeats_the_validation(by_sort: Path) -> None:
    result, report = json.loads((by_sort / "result.json").read_text()), evaluate_dcal(str(by_sort), device="cpu")
    for name in ("accuracy", "accuracy_sa", "accuracy_glca", "loss"):
        assert report[name] == pytest.approx(result[f"val_{name}"], rel=1e-5)
    assert report["images"] == 480
    assert set(result) >= {"train_loss_sa", "train_loss_glca", "train_loss_pwca", "train_accuracy"}


def test_evaluation_by_identity_repeats_the_validation(by_identity: Path, tmp_path: Path) -> None:
    result = json.loads((by_identity / "result.json").read_text())
    report = evaluate_dcal(str(by_identity), device="cpu", batch_size=50, output=str(tmp_path / "report.json"))
    assert report["mAP"] == pytest.approx(result["val_map"], abs=1e-6)
    assert report["cmc"][0] == pytest.approx(result["val_cmc1"], abs=1e-6)
    assert (report["queries"], report["gallery"], report["valid_queries"]) == (32, 96, 32)
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_pictures_become_sorts_and_rollouts(by_sort: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "olive").save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    inputs = [str(tmp_path / name) for name in ("a.png", "bad.png")]
    result = predict_dcal(inputs, str(by_sort), str(tmp_path / "out"), top=3, device="cpu")
    (found,) = result["predictions"]
    assert [entry["image"] for entry in result["skipped"]] == inputs[1:]
    assert len(found["top"]) == 3
    assert set(found["branches"]) == {"sa", "glca"}
    assert (len(found["rollout"]), len(found["rollout"][0]), len(found["selected"])) == (8, 8, 6)
    values = {(r, c): v for r, row in enumerate(found["rollout"]) for c, v in enumerate(row)}
    assert max(values, key=values.__getitem__) == tuple(found["selected"][0])
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == result
    assert Image.open(tmp_path / "out" / "predictions.png").width > 200
    samples = predict_dcal(checkpoint=str(by_sort), output=str(tmp_path / "own"), device="cpu")
    assert len(samples["predictions"]) == 8


def test_queries_become_ranked_galleries(by_identity: Path, tmp_path: Path) -> None:
    result = predict_dcal(checkpoint=str(by_identity), output=str(tmp_path / "own"), top=7, device="cpu")
    data = load_data("marks-reid")
    assert isinstance(data, IdentityData)
    for found, query in zip(result["predictions"], data.query[:1]):
        distances = [item["distance"] for item in found["ranking"]]
        assert len(distances) == 7
        assert distances == sorted(distances)
        assert (query.identity, query.camera) not in [(i["identity"], i["camera"]) for i in found["ranking"]]
    assert Image.open(tmp_path / "own" / "predictions.png").width > 400

    for number, seen in enumerate([data.query[0], *data.gallery[:3]]):
        Image.fromarray(seen.picture).save(tmp_path / f"{number}.png")
    (tmp_path / "gallery").mkdir()
    for number in (0, 1, 2):
        shutil.copy(tmp_path / f"{number}.png", tmp_path / "gallery")
    inputs, folder = [str(tmp_path / "0.png")], str(tmp_path / "gallery")
    result = predict_dcal(inputs, str(by_identity), str(tmp_path / "out"), gallery=folder, device="cpu")
    best = result["predictions"][0]["ranking"][0]
    assert best["image"] == str(tmp_path / "gallery" / "0.png")
    assert best["distance"] == pytest.approx(0, abs=1e-3)


def test_what_does_not_fit_is_refused_and_nothing_is_written(by_sort: Path, by_identity: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="gallery='marks-reid' is for a network by identity"):
        predict_dcal([str(tmp_path / "a.png")], str(by_sort), out, gallery="marks-reid")
    with pytest.raises(ValueError, match="gallery='marks' is by sort"):
        predict_dcal([str(tmp_path / "a.png")], str(by_identity), out, gallery="marks")
    with pytest.raises(ValueError, match="name pictures to look for"):
        predict_dcal(None, str(by_identity), out, gallery=str(tmp_path))
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        predict_dcal(["nowhere.png"], str(by_sort), out)
    with pytest.raises(ValueError, match="is by sort; the network tells identities"):
        evaluate_dcal(str(by_identity), "marks")
    with pytest.raises(ValueError, match="is by identity; the network tells the sorts"):
        evaluate_dcal(str(by_sort), "marks-reid")
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": "glca"}, "branches='glca'"),
        ({"ratio": 2.0}, "ratio=2"),
        ({"glca_depth": 2}, "glca_depth=2"),
        ({"pwca_depth": 0}, "pwca_depth=0"),
        ({"instances": 1}, "instances=1"),
        ({"image_size": [32]}, "image_size"),
        ({"resize": [20, 20]}, "resize"),
        ({"erase": 1.5}, "erase"),
        ({"model": "vgg"}, "model='vgg'"),
        ({"model_options": {"width": 3}}, "width"),
        ({"weights": "nowhere.pth"}, "nowhere"),
    ],
)
def test_bad_settings_are_told_before_a_folder_is_made(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_dcal(settings("marks", tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_demo_needs_its_branches(tmp_path: Path) -> None:
    demo, recipe = SYSTEM.demo, read_recipe("dcal", "demo")
    recipe["trainer"] |= CPU
    assert demo is not None
    whole = train_dcal(DualSettings(**recipe, output=str(tmp_path / "whole")))
    ablated = train_dcal(DualSettings(**recipe | dict(demo.ablation), output=str(tmp_path / "ablated")))
    assert whole["val_accuracy"] >= demo.threshold
    assert whole["val_accuracy"] - ablated["val_accuracy"] >= demo.margin

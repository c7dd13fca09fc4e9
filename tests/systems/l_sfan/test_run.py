"""Training, leave-one-subject-out, evaluation and prediction."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gridattn.systems.l_sfan import SYSTEM, SensorSettings, evaluate_sensors, load_network, predict_behaviour
from gridattn.systems.l_sfan.train import train_sensors
from gridattn.systems.settings import read_recipe

CPU = {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of three subjects, in which class 1 is the louder one."""
    path = tmp_path_factory.mktemp("recordings")
    for number, subject in enumerate("abc"):
        rng = np.random.default_rng(number)
        y = np.repeat([0, 1, 0, 1], 30)
        x = (rng.normal(size=(120, 3)) * (1 + 3 * y[:, None])).astype(np.float32)
        np.savez(path / f"{subject}.npz", x=x, y=y, subject=subject)
    return path


def settings(folder: Path, output: Path, **changes: object) -> SensorSettings:
    values = {"data": f"folder:{folder}", "window": 16, "hop": 8, "epochs": 2, "batch_size": 8, "trainer": CPU}
    return SensorSettings(output=str(output), **(values | changes))  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    train_sensors(settings(folder, output, val_subjects=["c"]))
    return output


def test_evaluation_repeats_the_validation(run: Path) -> None:
    result, report = json.loads((run / "result.json").read_text()), evaluate_sensors(str(run), device="cpu")
    for name in ("accuracy", "macro_f1", "mcc"):
        assert report[name] == pytest.approx(result[f"val_{name}"])
    assert list(report["subjects"]) == ["c"]


def test_each_window_is_predicted_once_by_a_network_that_saw_nothing_of_its_subject(
    folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "loso"
    result = train_sensors(settings(folder, output, protocol="loso", epochs=1))
    with (output / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({(row["recording"], row["start"]) for row in rows}) == len(rows) == 3 * 14
    assert np.sum(result["confusion"]) == len(rows)
    for subject, fold in result["folds"].items():
        assert load_network(fold).held_out == (subject,)
    weights = [Path(fold, "last_model", "model.safetensors").stat().st_mtime_ns for fold in result["folds"].values()]
    again = train_sensors(settings(folder, output, protocol="loso", epochs=1, resume="auto"))
    assert again["confusion"] == result["confusion"]
    assert weights == [
        Path(fold, "last_model", "model.safetensors").stat().st_mtime_ns for fold in result["folds"].values()
    ]
    with pytest.raises(ValueError, match="holds a run"):
        train_sensors(settings(folder, output, protocol="loso", epochs=1))


def test_a_signal_becomes_a_table_and_a_picture(run: Path, tmp_path: Path) -> None:
    np.savetxt(tmp_path / "walk.csv", np.random.default_rng(0).normal(size=(3, 50)), delimiter=",")
    (tmp_path / "bad.csv").write_text("1,2,3\n")
    inputs = [str(tmp_path / name) for name in ("walk.csv", "bad.csv")]
    result = predict_behaviour(inputs, checkpoint=str(run), output=str(tmp_path / "out"), device="cpu")
    (found,) = result["predictions"]
    assert [entry["signal"] for entry in result["skipped"]] == [inputs[1]]
    assert found["frames"] == 50
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-5)
    assert found["segments"][0]["start"] == 0
    with Path(found["table"]).open() as file:
        assert len(list(csv.reader(file))) == 51
    assert Image.open(found["picture"]).size[0] > 300
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == result
    with pytest.raises(ValueError, match=r"nowhere\.csv"):
        predict_behaviour(["nowhere.csv"], checkpoint=str(run))
    with pytest.raises(ValueError, match="at least 8 are needed"):
        predict_behaviour(inputs[1:], checkpoint=str(run), output=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_subjects": ["z"]}, "subject 'z'"),
        ({"val_subjects": ["a", "b", "c"]}, "all subjects"),
        ({"window": 500}, "window=500"),
        ({"window": 3}, "window=3"),
        ({"protocol": "loso", "val_subjects": ["a"]}, "val_subjects"),
        ({"augment": {"noise": 1}}, "noise"),
    ],
)
def test_bad_settings_are_told_before_a_folder_is_made(
    folder: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_sensors(settings(folder, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_demo_needs_its_attention(tmp_path: Path) -> None:
    demo, recipe = SYSTEM.demo, read_recipe("l-sfan", "demo") | {"trainer": CPU}
    assert demo is not None
    whole = train_sensors(SensorSettings(**recipe, output=str(tmp_path / "whole")))
    ablated = train_sensors(SensorSettings(**recipe | demo.ablation, output=str(tmp_path / "ablated")))
    assert whole["val_accuracy"] >= demo.threshold
    assert ablated["val_accuracy"] <= 0.65

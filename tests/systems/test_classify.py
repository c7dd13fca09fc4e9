"""A classifier is trained, exported, measured and applied; what cannot be done is told before work starts."""

import csv
import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from PIL import Image

from gridattn.data import load_dataset
from gridattn.systems import base
from gridattn.systems.classify import (
    ClassifySettings,
    ClassifyTask,
    evaluate_classifier,
    load_classifier,
    predict_classes,
    train_classifier,
)
from gridattn.systems.classify.task import classification_report
from gridattn.systems.output import RunFolder, load_run_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_values: dict) -> Path:
    """A run folder of a finished training on the digits."""
    output = tmp_path_factory.mktemp("trained") / "run"
    trainer = {"accelerator": "cpu", "enable_progress_bar": False}
    train_classifier(
        ClassifySettings(**{**tiny_values, "data": "digits", "epochs": 3, "output": str(output), "trainer": trainer})
    )
    return output


def test_training_learns_and_leaves_a_complete_run_folder(trained: Path) -> None:
    folder = RunFolder(trained)
    result = json.loads(folder.result.read_text())
    assert result["val_accuracy"] > 0.5  # ten classes
    with folder.history.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert result["val_accuracy"] == max(float(row["val_accuracy"]) for row in rows)
    for path in (folder.settings, folder.last, folder.best, folder.model, folder.last_model, folder.tensorboard):
        assert path.exists()
    assert not list(trained.rglob(".*"))  # no temporary file is left


def test_evaluation_of_the_exported_model_repeats_the_validation_of_its_epoch(trained: Path, tmp_path: Path) -> None:
    report = evaluate_classifier(str(trained), output=str(tmp_path / "report.json"), batch_size=50, device="cpu")
    result = json.loads((trained / "result.json").read_text())
    assert report["accuracy"] == pytest.approx(result["val_accuracy"], abs=1e-6)
    assert report["loss"] == pytest.approx(result["val_loss"], rel=1e-4)
    assert sum(map(sum, report["confusion"])) == report["images"] == 450
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_the_report_counts_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 2.0, 0.0], [0.0, 2.0, 0.0]])
    report = classification_report(logits, torch.tensor([0, 0, 1, 1]), ("a", "b", "c"))
    assert report["confusion"] == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert report["accuracy"] == report["balanced_accuracy"] == 0.75
    assert report["per_class"]["b"] == {"images": 2, "recall": 1.0, "precision": 2 / 3}
    assert report["per_class"]["c"] == {"images": 0, "recall": None, "precision": None}
    right, wrong = math.log(math.exp(2) + 2) - 2, math.log(math.exp(2) + 2)
    assert report["loss"] == pytest.approx((3 * right + wrong) / 4)


def _save_digits(root: Path, count: int) -> None:
    data = load_dataset("digits", 16).val.source
    for i in range(count):
        picture, label = data[i]
        folder = root / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{i}.png")


def test_folders_are_measured_by_class_name(trained: Path, tmp_path: Path) -> None:
    _save_digits(tmp_path / "some", 60)
    report = evaluate_classifier(str(trained), f"folder:{tmp_path / 'some'}", split="all", device="cpu")
    assert report["images"] == 60
    assert report["accuracy"] > 0.4
    (tmp_path / "some" / "0").rename(tmp_path / "some" / "zero")
    with pytest.raises(ValueError, match=r"has the class 'zero'; the classifier knows 0, 1"):
        evaluate_classifier(str(trained), f"folder:{tmp_path / 'some'}", split="all")


def test_prediction_writes_json_csv_and_a_picture_and_passes_over_damaged_files(trained: Path, tmp_path: Path) -> None:
    _save_digits(tmp_path / "in", 12)
    (tmp_path / "in" / "broken.png").write_bytes(b"not a picture")
    out = tmp_path / "out"
    result = predict_classes([str(tmp_path / "in")], str(trained), str(out), top=2, batch_size=5, device="cpu")
    assert len(result["predictions"]) == 12
    assert [Path(entry["image"]).name for entry in result["skipped"]] == ["broken.png"]
    right = sum(Path(p["image"]).parent.name == p["top"][0]["class"] for p in result["predictions"])
    assert right >= 5
    for prediction in result["predictions"]:
        first, second = (entry["probability"] for entry in prediction["top"])
        assert 1 >= first >= second >= 0
    assert json.loads((out / "predictions.json").read_text()) == result
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class_1"] for row in rows] == [p["top"][0]["class"] for p in result["predictions"]]
    with Image.open(out / "predictions.png") as picture:
        assert min(picture.size) > 200


def test_a_picture_is_classified_like_the_tensor_of_the_dataset(trained: Path, tmp_path: Path) -> None:
    data = load_dataset("digits", 16)
    picture, _ = data.val.source[3]
    picture.save(tmp_path / "x.png")
    result = predict_classes([str(tmp_path / "x.png")], str(trained), str(tmp_path / "out"), top=10, device="cpu")
    classifier = load_classifier(trained)
    with torch.inference_mode():
        expected = classifier.model(data.val[3][0][None]).softmax(1)[0]
    got = {entry["class"]: entry["probability"] for entry in result["predictions"][0]["top"]}
    assert [got[name] for name in classifier.classes] == pytest.approx(expected.tolist(), abs=2e-6)


def test_prediction_refuses_what_it_cannot_read(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").touch()
    for images, message in (
        ([], "images is empty"),
        ([str(tmp_path / "none.png")], "does not exist"),
        ([str(tmp_path / "empty")], "holds no images"),
        ([str(tmp_path / "broken.png")], "none of the 1 images can be read"),
    ):
        with pytest.raises(ValueError, match=message):
            predict_classes(images, str(trained), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="holds no trained classifier"):
        predict_classes([str(tmp_path / "broken.png")], str(tmp_path / "empty"))
    assert not (tmp_path / "out").exists()


def test_mixing_averaging_smoothing_and_augmentation_train_together(tiny) -> None:
    settings = tiny(
        mixup=0.4,
        cutmix=0.4,
        label_smoothing=0.1,
        ema_decay=0.5,
        drop_path_rate=0.1,
        augment={"auto_augment": "rand-m5", "re_prob": 0.3},
        opt="sgd",
        opt_options={"momentum": 0.9},
        trainer={"precision": "bf16-mixed", "accumulate_grad_batches": 2},
    )
    result = train_classifier(settings)
    assert math.isfinite(result["train_loss"])
    last = load_run_checkpoint(RunFolder(settings.output).last)
    exported = load_classifier(RunFolder(settings.output).last_model).model.state_dict()
    averaged = last["state_dict"]["model.head.weight"]
    assert torch.equal(exported["head.weight"], averaged)
    assert not torch.equal(averaged, last["current_model_state"]["model.head.weight"])


def test_the_learning_rate_warms_up_and_falls_step_by_step(tiny) -> None:
    import lightning as L

    settings = tiny(epochs=4, warmup_epochs=1, min_lr=1e-4, cooldown_epochs=1, warmup_lr=1e-3)
    rates: list[float] = []

    class Recorder(ClassifyTask):
        def on_train_batch_start(self, batch, batch_idx: int) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    data = load_dataset("textures", 16)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
    loader = torch.utils.data.DataLoader(data.train, 32)
    trainer = L.Trainer(max_epochs=5, logger=False, enable_checkpointing=False, enable_model_summary=False,
                        **settings.trainer)  # fmt: skip
    trainer.fit(Recorder(model, settings, 3), loader)
    assert len(rates) == 30
    assert rates[:6] == pytest.approx([1e-3 + i / 6 * 9e-3 for i in range(6)])
    middle = rates[6:24]
    assert middle == sorted(middle, reverse=True)
    expected = [1e-4 + 0.5 * (1e-2 - 1e-4) * (1 + math.cos(math.pi * i / 24)) for i in range(6, 24)]
    assert middle == pytest.approx(expected)
    assert rates[24:] == pytest.approx([1e-4] * 6)


def test_an_exported_model_is_a_start_for_other_classes(trained: Path, tiny) -> None:
    settings = tiny(weights=str(trained), epochs=1, lr=1e-9, weight_decay=0.0, warmup_lr=0.0)
    train_classifier(settings)
    start = load_classifier(trained).model.state_dict()
    tuned = load_classifier(settings.output).model.state_dict()
    assert tuned["head.weight"].shape[0] == 3
    assert all(torch.allclose(start[n], tuned[n], atol=1e-6) for n in start if not n.startswith("head."))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "cifar"}, "data='cifar' is not known"),
        ({"model": "grid_vit_mcro"}, "model='grid_vit_mcro' is not known"),
        ({"attention": "neighbourhood"}, "attention='neighbourhood' is not known"),
        ({"model_options": {"depht": 2}}, "no option 'depht'"),
        ({"batch_size": 5000}, "batch_size=5000 on 1 process.es. exceeds the 960"),
        ({"opt": "adamq"}, "adamq"),
        ({"opt_options": {"bettas": 1}}, "bettas"),
        ({"schedule": "cosinus"}, "cosinus"),
        ({"trainer": {"accelerator": "abacus"}}, "abacus"),
        ({"trainer": {"precision": "7"}}, "7"),
        ({"resume": "auto"}, "holds no checkpoint to resume from"),
        ({"resume": "/nowhere/last.ckpt"}, "'/nowhere/last.ckpt' does not exist"),
        ({"ema_decay": 0.9, "trainer": {"strategy": "fsdp"}}, "not available with the strategy fsdp"),
    ],
)
def test_wrong_settings_are_told_and_leave_nothing_behind(tiny, changes: dict, message: str) -> None:
    settings = tiny(**changes)
    with pytest.raises(ValueError, match=message) as caught:
        train_classifier(settings)
    assert "\n" not in str(caught.value)
    assert not RunFolder(settings.output).settings.exists()


def test_a_run_is_neither_replaced_nor_mixed_with_another_by_accident(tiny) -> None:
    train_classifier(tiny(epochs=1))
    with pytest.raises(ValueError, match=r"holds a run; add --resume to go on or --overwrite"):
        train_classifier(tiny(epochs=1))
    with pytest.raises(ValueError, match=r"seed=3 differs from 0, that of the run to resume"):
        train_classifier(tiny(resume="auto", seed=3))
    notes = Path(tiny().output) / "notes.txt"
    notes.write_text("mine")
    assert train_classifier(tiny(epochs=1, seed=3, overwrite=True))["epoch"] == 1
    assert notes.read_text() == "mine"


def test_a_file_that_is_no_checkpoint_is_told(tiny, tmp_path: Path) -> None:
    path = tmp_path / "odd.ckpt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"odd\.ckpt' cannot be read"):
        train_classifier(tiny(resume=str(path)))
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="is not a checkpoint of a gridattn run"):
        train_classifier(tiny(resume=str(path)))


def test_a_terminated_training_does_not_pass_for_a_finished_one(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminate(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer._signal_connector.received_sigterm = True

    monkeypatch.setattr(base, "StepSeed", lambda seed: Terminate())
    with pytest.raises(SystemExit) as stopped:
        train_classifier(tiny())
    assert stopped.value.code == 143

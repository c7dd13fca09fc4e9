"""Facts of training, evaluation and prediction."""

import json
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gridattn.systems import get_system
from gridattn.systems.output import RunFolder
from gridattn.systems.routing_transformer.predict import predict
from gridattn.systems.routing_transformer.run import evaluate, train
from gridattn.systems.routing_transformer.task import RoutingTransformerSettings, SequenceTask, measure, summary
from gridattn.systems.settings import read_recipe

_TRAINER = {"accelerator": "cpu", "limit_train_batches": 2, "enable_progress_bar": False}
SMALL: dict[str, Any] = {"dim": 8, "depth": 1, "num_heads": 2, "local_heads": 1, "batch_size": 4, "epochs": 1}


def run(folder: Path, **changes: Any) -> dict[str, Any]:
    trainer = _TRAINER | changes.pop("trainer", {})
    return train(RoutingTransformerSettings(**{**SMALL, "output": str(folder), "trainer": trainer, **changes}))


@pytest.fixture(scope="module")
def recall(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("recall")
    return folder, run(folder)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("digits")
    return folder, run(folder, data="digits", flavour="paper", num_clusters=4, network={"reach": 3})


def test_a_uniform_model_has_as_many_bits_and_as_much_perplexity_as_its_symbols_say() -> None:
    symbols, counted = torch.randint(256, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    counted[1, 4:] = False
    nats, hits = measure(torch.zeros(2, 9, 256), symbols, counted)
    assert (nats[1, 4:] == 0).all()
    assert (hits[1, 4:] == 0).all()
    found = summary(nats.sum() / counted.sum(), hits.sum() / counted.sum())
    assert found["bits"] == pytest.approx(8)
    assert found["perplexity"] == pytest.approx(256, rel=1e-5)


@pytest.mark.parametrize("which", ["recall", "digits"])
def test_evaluation_repeats_the_validation(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder, metrics = request.getfixturevalue(which)
    report = evaluate(str(folder), device="cpu", output=str(tmp_path / "metrics.json"))
    for name in ("loss", "bits", "perplexity", "accuracy"):
        assert report[name] == pytest.approx(metrics[f"val_{name}"], rel=1e-4)
    assert report["bits"] == pytest.approx(report["loss"] / log(2))
    assert json.loads((tmp_path / "metrics.json").read_text()) == report
    stepwise = evaluate(str(folder), stepwise=True, limit=2, device="cpu")
    assert stepwise["sequences"] == 2
    assert stepwise["loss"] != report["loss"]


def test_a_text_is_continued_with_json_and_a_picture(recall: tuple[Path, Any], tmp_path: Path) -> None:
    result = predict(checkpoint=str(recall[0]), output=str(tmp_path / "own"), device="cpu")
    assert result["predictions"][0]["truth"].startswith("v")
    result = predict(["k3=v2 k1=v0 k3?"], str(recall[0]), str(tmp_path / "own"), device="cpu")
    prediction = result["predictions"][0]
    assert len(prediction["continuation"].split()) == 1
    assert len(prediction["prompt_bits"]) == 3
    assert json.loads((tmp_path / "own" / "predictions.json").read_text()) == result
    assert (tmp_path / "own" / "predictions.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="'why'"):
        predict(["why not"], str(recall[0]), str(tmp_path / "none"), device="cpu")
    assert not (tmp_path / "none").exists()


def test_an_image_keeps_its_upper_half(digits: tuple[Path, Any], tmp_path: Path) -> None:
    result = predict(checkpoint=str(digits[0]), output=str(tmp_path), samples=2, device="cpu")
    assert len(result["predictions"]) == 6
    files = [tmp_path / name for name in result["predictions"][0]["completions"]]
    from gridattn.data.images import read_image
    from gridattn.systems.routing_transformer.images import digits as images

    upper = (images()[1][0][:4, :, 0].astype(float) * 255 / 16).round()
    for file in files:
        assert (np.asarray(read_image(file).convert("L"))[:4] == upper).all()
    again = predict([str(files[0])], str(digits[0]), str(tmp_path / "again"), keep=0.9, samples=1, device="cpu")
    assert again["predictions"][0]["bits_per_dim"] > 0
    with pytest.raises(ValueError, match="keep=1"):
        predict(checkpoint=str(digits[0]), output=str(tmp_path), keep=1.0)


def test_centroids_move_once_an_optimiser_step_and_are_stored(tmp_path: Path) -> None:
    moved = []
    update = SequenceTask.optimizer_step

    def counting(self: SequenceTask, *args: Any, **kwargs: Any) -> None:
        update(self, *args, **kwargs)
        moved.append(self.model.stack.blocks[0].attention.kmeans.means.clone())  # pyright: ignore

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceTask, "optimizer_step", counting)
        run(tmp_path / "run", trainer={"limit_train_batches": 4, "accumulate_grad_batches": 2})
    assert len(moved) == 2
    from safetensors.torch import load_file

    stored = load_file(RunFolder(tmp_path / "run").last_model / "model.safetensors")
    assert torch.equal(stored["stack.blocks.0.attention.kmeans.means"], moved[-1])
    assert stored["stack.blocks.0.attention.kmeans.initted"]


def test_the_flag_makes_all_heads_local_and_options_of_training_run(tmp_path: Path) -> None:
    run(tmp_path / "local", routing=False)
    about = json.loads((RunFolder(tmp_path / "local").model / "trained.json").read_text())
    assert about["network"]["local_heads"] == about["network"]["num_heads"]
    options = {"truncate": True, "token_dropout": 0.2, "dropout": 0.1, "schedule": "rsqrt", "warmup_steps": 1}
    metrics = run(tmp_path / "options", **options)
    assert metrics["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "gpt"}, "variant='gpt'"),
        ({"data": "digits", "variant": "enwik8_8k"}, "variant='enwik8_8k' is for text"),
        ({"network": {"colour": 1}}, "colour"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"length": 1}, "length=1"),
        ({"flavour": "jax"}, "flavour='jax'"),
        ({"token_dropout": 1.0}, "token_dropout=1.0"),
    ],
)
def test_settings_that_cannot_be_are_named_before_a_folder_is_made(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_data_of_another_kind_is_refused(recall: tuple[Path, Any]) -> None:
    with pytest.raises(ValueError, match="data='digits' is image"):
        evaluate(str(recall[0]), "digits")


@pytest.mark.slow
def test_the_demo_reaches_its_threshold_and_local_heads_alone_do_not(tmp_path: Path) -> None:
    system = get_system("routing-transformer")
    assert system.demo is not None
    recipe = read_recipe("routing-transformer", "demo")
    found = [
        train(RoutingTransformerSettings(**recipe | changes, output=str(tmp_path / name)))[system.demo.metric]
        for name, changes in (("demo", {}), ("ablation", dict(system.demo.ablation)))
    ]
    assert found[0] >= system.demo.threshold
    assert found[0] - found[1] >= system.demo.margin

"""What holds for the training of every system: it survives a kill, spreads over processes, and runs in bfloat16."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import TINY
from torch import Tensor

from gridattn.systems import get_system, list_systems, recipe_names
from gridattn.systems.base import System
from gridattn.systems.output import RunFolder, load_run_checkpoint
from gridattn.systems.settings import read_recipe

PATIENCE = 600  # seconds; a few suffice where nothing else runs
STEPS = 4

every_system = pytest.mark.parametrize("slug", list_systems())


def _settings(slug: str, output: Path, **changes: Any) -> Any:
    trainer = {"accelerator": "cpu", "limit_train_batches": STEPS, "limit_val_batches": 1, "enable_progress_bar": False}
    trainer |= changes.pop("trainer", {})
    return get_system(slug).settings(**{**TINY[slug], "output": str(output), "trainer": trainer, **changes})


def _command(slug: str, settings: Any) -> list[str]:
    recipe = Path(f"{settings.output}.yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(settings.stored()))
    arguments = ["train", slug, "--recipe", str(recipe), "--output", settings.output]
    return [sys.executable, "-m", "gridattn", *arguments]


def _start(command: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _weights(output: Path, part: str = "last_model") -> dict[str, Tensor]:
    return load_file(getattr(RunFolder(output), part) / "model.safetensors")


def _train(slug: str, settings: Any) -> dict[str, Any]:
    return get_system(slug).train(settings)


@every_system
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(slug: str, tmp_path: Path) -> None:
    common: dict[str, Any] = {"epochs": 60, "checkpoint_every": 1, "schedule": "constant"}
    killed = _settings(slug, tmp_path / "killed", **common)
    process = _start(_command(slug, killed))
    last, ends = RunFolder(killed.output).last, time.monotonic() + PATIENCE
    step = 0
    try:
        while step < 2 or step % STEPS == 0:  # inside of an epoch
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < ends
            time.sleep(0.01)
            step = load_run_checkpoint(last)["global_step"] if last.is_file() else 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    epochs = load_run_checkpoint(last)["global_step"] // STEPS + 2
    _train(slug, _settings(slug, tmp_path / "killed", **common | {"epochs": epochs, "resume": "auto"}))
    _train(slug, _settings(slug, tmp_path / "whole", **common | {"epochs": epochs}))
    for part in ("model", "last_model"):
        expected, found = _weights(tmp_path / "whole", part), _weights(tmp_path / "killed", part)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@every_system
def test_two_processes_train_like_one_with_a_batch_of_twice_the_size(slug: str, tmp_path: Path) -> None:
    batch = TINY[slug]["batch_size"]
    common: dict[str, Any] = {"opt": "sgd", "lr": 1e-3, "epochs": 1, "trainer": {"limit_train_batches": 2}}
    two = common | {"batch_size": batch // 2, "trainer": common["trainer"] | {"devices": 2, "strategy": "ddp"}}
    process = _start(_command(slug, _settings(slug, tmp_path / "two", **two)))
    start = _settings(slug, tmp_path / "one", **common)
    _train(slug, start)
    try:
        log = process.communicate(timeout=PATIENCE)[0]
    finally:
        process.kill()
    assert process.returncode == 0, log
    expected, found = _weights(tmp_path / "one"), _weights(tmp_path / "two")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.allclose(tensor, found[name], atol=2e-6), f"{name} {(tensor - found[name]).abs().max()}"


@every_system
def test_bfloat16_training_gives_finite_weights_in_float32(slug: str, tmp_path: Path) -> None:
    metrics = _train(slug, _settings(slug, tmp_path / "run", epochs=1, trainer={"precision": "bf16-mixed"}))
    assert metrics["parameters"] > 0
    weights = _weights(tmp_path / "run")
    assert all(torch.isfinite(t).all() for t in weights.values() if t.is_floating_point())
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.float32}


@every_system
def test_the_recipes_are_settings_of_the_system_and_a_paper_is_among_them(slug: str) -> None:
    system: System = get_system(slug)
    assert {"demo", "paper"} <= set(recipe_names(slug))
    for recipe in recipe_names(slug):
        system.settings(**read_recipe(slug, recipe))


@every_system
def test_the_ablation_of_a_demo_is_made_of_settings_that_exist(slug: str) -> None:
    system: System = get_system(slug)
    assert system.demo is not None
    recipe = read_recipe(slug, "demo")
    ablated = system.settings(**recipe | system.demo.ablation)
    assert not system.demo.ablation or ablated != system.settings(**recipe)
    assert system.demo.margin > 0 or not system.demo.ablation


@every_system
def test_unknown_data_is_told_before_a_folder_is_made(slug: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(ValueError, match=r"nowhere"):
        _train(slug, _settings(slug, output, data="nowhere"))
    assert not output.exists()

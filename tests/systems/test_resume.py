"""A run that was killed and resumed ends with the weights of one that was not; two processes train like one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gridattn.systems.classify import load_classifier, train_classifier
from gridattn.systems.output import RunFolder, load_run_checkpoint

PATIENCE = 600  # seconds; a few suffice where nothing else runs
HARD = {"ema_decay": 0.9, "mixup": 0.3, "cutmix": 0.3, "drop_path_rate": 0.2, "augment": {"re_prob": 0.3}}


def _weights(output: str | Path, part: str) -> dict[str, torch.Tensor]:
    return load_classifier(getattr(RunFolder(output), part)).model.state_dict()


def _start(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "gridattn", "train", "classify", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(
    tiny: Callable, arguments: Callable, tmp_path: Path
) -> None:
    common = {**HARD, "epochs": 12, "checkpoint_every": 2, "trainer": {"limit_val_batches": 1}}
    killed = tiny(**common)
    process = _start(arguments(**common))
    last, ends = RunFolder(killed.output).last, time.monotonic() + PATIENCE
    step = 0
    try:
        # Killed as soon as a checkpoint inside the second epoch or later is there: 6 steps an epoch.
        while step < 8 or step % 6 == 0:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < ends
            time.sleep(0.01)
            step = load_run_checkpoint(last)["global_step"] if last.is_file() else 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    reached = load_run_checkpoint(last)["global_step"]
    assert 8 <= reached < 72

    train_classifier(tiny(**common, resume="auto"))
    whole = tiny(**common, output=str(tmp_path / "whole"))
    train_classifier(whole)
    for part in ("model", "last_model"):
        expected, found = _weights(whole.output, part), _weights(killed.output, part)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_finished_run_goes_on_with_more_epochs_from_where_it_was_moved_to(tiny: Callable, tmp_path: Path) -> None:
    constant = {"schedule": "constant"}
    first = tiny(**constant, epochs=1)
    train_classifier(first)
    moved = Path(first.output).rename(tmp_path / "moved")
    result = train_classifier(tiny(**constant, epochs=2, output=str(moved), resume="auto"))
    assert len(RunFolder(moved).history.read_text().splitlines()) == 3
    train_classifier(tiny(**constant, epochs=2))
    expected, found = _weights(first.output, "last_model"), _weights(moved, "last_model")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert result["model"] == str(moved / "model")


def test_two_processes_train_like_one_with_a_batch_of_twice_the_size(
    tiny: Callable, arguments: Callable, tmp_path: Path
) -> None:
    trainer = {"devices": 2, "strategy": "ddp", "limit_train_batches": 3}
    two = tiny(batch_size=16, opt="sgd", trainer=trainer)
    process = _start(arguments(batch_size=16, opt="sgd", trainer=trainer))
    one = tiny(batch_size=32, opt="sgd", trainer={"limit_train_batches": 3}, output=str(tmp_path / "one"))
    expected = train_classifier(one)
    try:
        log = process.communicate(timeout=PATIENCE)[0]
    finally:
        process.kill()
    assert process.returncode == 0, log
    expected_weights, found = _weights(one.output, "last_model"), _weights(two.output, "last_model")
    assert all(torch.allclose(expected_weights[n], found[n], atol=1e-6) for n in found)
    found_metrics = load_classifier(RunFolder(two.output).model).metrics
    assert found_metrics["val_accuracy"] == pytest.approx(expected["val_accuracy"], abs=1e-6)
    assert found_metrics["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)

"""A classifier small enough to be trained in a test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gridattn.systems.classify import ClassifySettings

_TINY: dict[str, Any] = {
    "image_size": 16,
    "attention": "global",
    "model_options": {"dims": [16], "depths": [1], "num_heads": [2], "patch_size": 4},
    "batch_size": 32,
    "epochs": 2,
    "lr": 1e-2,
}


@pytest.fixture(scope="session")
def tiny_values() -> dict[str, Any]:
    """Settings of a model and a training of a second."""
    return _TINY


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., ClassifySettings]:
    """Settings of a training of a second, with what is given laid over them."""

    def settings(**changes: Any) -> ClassifySettings:
        trainer = {"accelerator": "cpu", "limit_train_batches": 6, "enable_progress_bar": False}
        trainer |= changes.pop("trainer", {})
        return ClassifySettings(**{**_TINY, "output": str(tmp_path / "run"), "trainer": trainer, **changes})

    return settings


@pytest.fixture
def arguments(tiny: Callable[..., ClassifySettings]) -> Callable[..., list[str]]:
    """Command line arguments that give the settings of `tiny`."""

    def flags(**changes: Any) -> list[str]:
        settings = tiny(**changes)
        names = {**_TINY, **changes, "output": settings.output, "trainer": settings.trainer}
        # Mappings are written as flow YAML, as a user would quote them.
        return [f"--{name}={getattr(settings, name)}" for name in names]

    return flags

"""Every published variant whose model exists here has as many parameters as were counted."""

import json
from pathlib import Path

import pytest
import torch

from gridattn.models import create_model, list_models


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder: Path = metafunc.config.getoption("--goldens")
    models = set(list_models())
    cases = [
        pytest.param(name, record["params_counted"], record["config"], id=f"{file.parent.name}/{name}")
        for file in sorted(folder.glob("*/variants.json"))
        for name, record in json.loads(file.read_text()).items()
        if name in models and record.get("params_counted")
    ]
    if not cases:
        absent = pytest.mark.skip(reason=f"no variants in {folder}")
        cases = [pytest.param("", 0, {}, marks=absent, id="absent")]
    metafunc.parametrize(("name", "counted", "config"), cases)


def test_parameters(name: str, counted: int, config: dict) -> None:
    classes = config.get("num_classes")
    with torch.device("meta"):
        model = create_model(name, num_classes=classes if isinstance(classes, int) else None)
    assert sum(parameter.numel() for parameter in model.parameters()) == counted

"""Every published variant whose model exists here has as many parameters as were counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_index import load_variant_call

from gridattn.models import create_model, list_models


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder: Path = metafunc.config.getoption("--goldens")
    models = set(list_models())
    cases = []
    for file in sorted(folder.glob("*/variants.json")):
        slug = file.parent.name
        call = load_variant_call(slug) or (lambda name, config: (name, {}))
        for name, record in json.loads(file.read_text()).items():
            if not isinstance(record, dict) or not record.get("params_counted"):
                continue
            model, options = call(name, record["config"])
            if model in models:
                classes = record["config"].get("num_classes")
                options = ({"num_classes": classes} if isinstance(classes, int) else {}) | options
                cases.append(pytest.param(model, options, record["params_counted"], id=f"{slug}/{name}"))
    if not cases:
        absent = pytest.mark.skip(reason=f"no variants in {folder}")
        cases = [pytest.param("", {}, 0, marks=absent, id="absent")]
    metafunc.parametrize(("name", "options", "counted"), cases)


def test_parameters(name: str, options: dict[str, Any], counted: int) -> None:
    with torch.device("meta"):
        model = create_model(name, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == counted

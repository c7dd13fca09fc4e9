"""Every golden file under --goldens is run through its paper's adapter and compared tensor by tensor."""

from pathlib import Path

import pytest
from adapters_index import load_adapters, load_disputed
from case import read_case, relative_error

OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder: Path = metafunc.config.getoption("--goldens")
    files = sorted(folder.glob("*/*.safetensors")) if folder.is_dir() else []
    if files:
        metafunc.parametrize("path", files, ids=[f"{f.parent.name}/{f.stem}" for f in files])
    else:
        reason = pytest.mark.skip(reason=f"no golden tensors in {folder}")
        metafunc.parametrize("path", [pytest.param(folder, marks=reason)], ids=["absent"])


def test_golden(path: Path) -> None:
    adapters, pending = load_adapters(path.parent.name)
    if adapters is None:
        pytest.skip(f"{path.parent.name}: this paper is not built yet")
    case = read_case(path)
    if case.cls in pending:
        pytest.skip(f"{case.cls}: {pending[case.cls]}")
    assert case.cls in adapters, f"no adapter for class {case.cls!r}; known: {sorted(adapters)}"
    result = adapters[case.cls](case)
    expected = {f"out.{k}": v for k, v in case.outputs.items()} | {f"grad.{k}": v for k, v in case.grads.items()}
    missing = sorted(set(expected) - set(result))
    assert not missing, f"not computed: {missing}"
    disputed = load_disputed(path.parent.name)
    for key, tensor in expected.items():
        tolerance = GRADIENT_TOLERANCE if key.startswith("grad.") else OUTPUT_TOLERANCE
        agrees = relative_error(result[key], tensor) < tolerance
        assert agrees != ((case.name, key) in disputed), key
    for (name, key), reason in disputed.items():
        if name == case.name:
            pytest.xfail(f"{key} differs, all else agrees: {reason}")

"""Options and fixtures for the whole suite."""

from pathlib import Path

import pytest
import torch

DEFAULT_GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        type=Path,
        default=DEFAULT_GOLDENS,
        help="folder of golden tensors, laid out <slug>/<case>.safetensors; its tests are skipped where it is absent",
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

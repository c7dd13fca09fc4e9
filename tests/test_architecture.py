"""The rooms import downwards only, and importing the package stays cheap."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_rooms_import_downwards_only() -> None:
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


HEAVY = ("timm", "lightning", "matplotlib", "numba", "sklearn", "skimage", "torchvision", "typer")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, gridattn, gridattn.ops, gridattn.layers; print([m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_every_source_file_can_be_read_in_one_sitting() -> None:
    long = {
        str(file.relative_to(ROOT)): lines
        for file in (ROOT / "src").rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > 450
    }
    assert not long

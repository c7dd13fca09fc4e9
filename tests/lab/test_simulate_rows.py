"""The tables and files of `gridattn simulate`."""

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gridattn.cli import app

SETTING = ("--grid", "30x48x80", "--kernel", "18x24x24", "--tile-q", "4x8x8", "--tile-kv", "2x8x8")


def run(*arguments: str):
    return CliRunner().invoke(app, ["simulate", *arguments])


def test_a_setting_prints_its_tiles_and_bounds() -> None:
    line = run(*SETTING, "--attention-share", "0.607").output.splitlines()[-2]
    assert line.split() == ["1", "275", "of", "900", "3.27", "5.24", "11.11", "1.73"]


def test_a_sweep_ends_with_the_fastest_stride() -> None:
    lines = run(*SETTING, "--sweep").output.splitlines()
    assert lines[-2].split()[:4] == ["16x8x8", "81", "of", "900"]


def test_a_sweep_without_a_window_lists_windows_with_their_best_stride() -> None:
    output = run("--grid", "32x32", "--tile-q", "8", "--tile-kv", "8", "--sweep").output
    cells = [line.split() for line in output.splitlines() if line.strip().startswith(("8x8", "32x32"))]
    assert [line[:6] for line in cells] == [
        ["8x8", "64", "8x8", "1", "of", "16"],
        ["32x32", "1024", "1x1", "16", "of", "16"],
    ]


def test_all_tiles_of_a_family_of_kernels_are_compared() -> None:
    lines = run(*SETTING[:4], "--tiles", "blackwell").output.splitlines()
    rows = [line.split() for line in lines if " of " in line]
    assert len(rows) == 7
    assert ["4x8x8", "and", "2x8x8", "1", "275", "of", "900", "3.27"] in [row[:8] for row in rows]


@pytest.mark.parametrize("kernel", [(), ("--kernel", "10x8")], ids=["windows", "strides"])
def test_a_sweep_is_written_as_a_picture_and_as_numbers(kernel: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "new" / "sweep.png"
    setting = ("--grid", "24x16", *kernel, "--tile-q", "4", "--tile-kv", "4x2")
    done = run(*setting, "--sweep", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert out.read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in out.parent.iterdir()) == ["sweep.csv", "sweep.json", "sweep.png"]
    record = json.loads(out.with_suffix(".json").read_text())
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["stride"] for row in rows] == [row["stride"] for row in record["rows"]]
    assert [float(row["speedup"]) for row in rows] == [row["speedup"] for row in record["rows"]]
    assert record["grid"] == [24, 16]
    assert record["axes"][0]["windows"] == ([4, 8, 10, 12, 16, 20, 24] if kernel else [4, 8, 12, 16, 20, 24])
    assert all(row["speedup"] == row["dense_tiles"] / row["worst_tiles"] for row in record["rows"])
    if not kernel:
        assert any(row["on_front"] for row in record["rows"])


def test_presets_stand_beside_the_published_figures() -> None:
    output = run("--preset", "all").output
    for name in ("flux-90", "cosmos-56", "cosmos-89", "hunyuan-58", "hunyuan-91"):
        assert name in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--grid", "3xx4"), "--kernel is missing"),
        ((*SETTING[2:], "--grid", "3xx4"), "'3xx4' is not allowed"),
        (("--preset", "sora"), "preset='sora' is not known"),
        ((*SETTING, "--stride", "19"), "exceeds kernel_size"),
        ((*SETTING, "--attention-share", "2"), "attention_share=2.0 is not allowed"),
        ((*SETTING, "--out", "x.png"), "add --sweep"),
        ((*SETTING, "--sweep", "--out", "x.txt"), "'x.txt' is not a picture"),
        ((*SETTING, "--tiles", "flex"), "give one or the other"),
        ((*SETTING[:4], "--tiles", "volta"), "kernels='volta' is not known"),
        ((*SETTING[:4], "--tiles", "blackwell", "--sweep"), "--sweep takes one pair of tiles"),
        (("--grid", "2x2x2x2", "--kernel", "2", "--tiles", "flex"), "grid of 4 axes"),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert done.output.count("\n") == 1

"""The tables of `gridattn simulate`."""

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
    ],
)
def test_mistakes_are_answered_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert done.output.count("\n") == 1

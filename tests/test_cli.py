"""The command line: every command helps, does its work, and answers a mistake with one line and a non-zero code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gridattn.cli import app

COMMANDS = ("list", "train", "evaluate", "predict", "compare", "show", "simulate", "convert", "export")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two mechanisms, one batch each."""
    out = tmp_path_factory.mktemp("compare") / "out"
    tiny = ["--image-size", 16, "--epochs", 1, "--batch-size", 8, "--limit-batches", 1, "--out", out]
    done = run("compare", "--attention", "global,window", "--data", "digits", *map(str, tiny))
    assert done.exit_code == 0, done.output
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    help_text = run(command, "--help").output
    assert "Example" in help_text
    assert f"gridattn {command}" in help_text


def test_help_does_not_load_torch() -> None:
    code = "import sys, gridattn.cli; print([m for m in ('torch', 'matplotlib', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_program_reports_a_mistake_without_a_traceback() -> None:
    command = [sys.executable, "-m", "gridattn", "show", "--query", "middle", "--out", "x.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: query='middle'")


def test_debug_lets_the_error_through(monkeypatch: pytest.MonkeyPatch) -> None:
    mistake = ("show", "--query", "middle", "--out", "x.png")
    assert isinstance(run("--debug", *mistake).exception, ValueError)
    monkeypatch.setenv("GRIDATTN_DEBUG", "1")
    assert isinstance(run(*mistake).exception, ValueError)


def test_an_interrupt_ends_quietly_with_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gridattn.lab.listing.listing", interrupt)
    done = run("list")
    assert done.exit_code == 130
    assert done.output == ""


def test_list_json_names_what_the_registers_hold() -> None:
    from gridattn.layers import list_attentions

    listed = json.loads(run("list", "--json").output)
    assert [row["name"] for row in listed["attentions"]] == list_attentions()
    assert {"models", "systems", "datasets"} < set(listed)


def test_list_filters_by_kind_and_pattern() -> None:
    listed = json.loads(run("list", "--attentions", "*lobal", "--json").output)
    assert [row["name"] for row in listed["attentions"]] == ["global"]
    assert list(listed) == ["attentions"]
    assert "neighborhood" in run("list", "--attentions").output


def test_list_papers_states_a_computed_status() -> None:
    papers = json.loads(run("list", "--papers", "--json").output)["papers"]
    assert len(papers) == 32
    for paper in papers:
        whole = bool(paper["available"]) and not paper["missing"]
        assert (paper["status"] == "whole") == whole


def test_a_compared_model_can_be_shown_evaluated_and_used(trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "models" / "window"
    shown = run("show", "--checkpoint", checkpoint, "--out", tmp_path / "a.png", "--json", tmp_path / "a.json")
    assert shown.exit_code == 0, shown.output
    (view,) = json.loads((tmp_path / "a.json").read_text())["views"]
    assert view["attention"] == "window"
    assert view["trained"]
    panel = run("show", "--checkpoint", trained, "--attention", "window,global", "--out", tmp_path / "b.png")
    assert panel.exit_code == 0, panel.output
    arguments = ("--checkpoint", checkpoint, "--unseen", "digits", "--out", tmp_path / "p")
    predicted = run("predict", "classify", *arguments)
    assert predicted.exit_code == 0, predicted.output
    assert len(json.loads(predicted.output)["predictions"]) == 10
    assert {"predictions.json", "predictions.csv", "predictions.png", "unseen"} <= {
        f.name for f in (tmp_path / "p").iterdir()
    }
    measured = run("evaluate", "classify", "--checkpoint", checkpoint, "--data", "digits")
    assert measured.exit_code == 0, measured.output
    assert 0 <= json.loads(measured.output)["accuracy"] <= 1


def test_compare_exits_non_zero_where_a_mechanism_failed_and_reports_the_others(tmp_path: Path) -> None:
    arguments = "--attention global,window --data digits --image-size 16 --epochs 1 --batch-size 8 --limit-batches 1"
    done = run("compare", *arguments.split(), "--option", "window.window_size=-1", "--out", tmp_path / "out")
    assert done.exit_code == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    entries = {entry["name"]: entry for entry in results["attentions"]}
    assert "window_size" in entries["window"]["error"]
    assert entries["global"]["parameters"] > 0
    assert "window_size" in (tmp_path / "out" / "report.html").read_text()


BAD = {
    "unknown attention": ("show --attention nonsense --out {tmp}/x.png", "nonsense"),
    "unknown attention in compare": ("compare --attention nonsense --out {tmp}/x", "nonsense"),
    "pattern without a match": ("compare --attention zz* --out {tmp}/x", "zz*"),
    "unknown data": ("compare --attention global --data nowhere --out {tmp}/x", "nowhere"),
    "bad seeds": ("compare --attention global --seeds a,b --out {tmp}/x", "seeds"),
    "bad option": ("compare --attention global --option window_size=3 --out {tmp}/x", "NAME.KEY"),
    "unknown option": ("compare --attention global --option global.nonsense=3 --out {tmp}/x", "nonsense"),
    "unknown recipe": ("compare --recipe nonsense --out {tmp}/x", "nonsense"),
    "unknown setting": ("compare --attention global --set nonsense=1 --out {tmp}/x", "nonsense"),
    "unknown host": ("compare --attention global --host nonsense --out {tmp}/x", "nonsense"),
    "missing image": ("show --image {tmp}/no.png --attention global --out {tmp}/x.png", "no.png"),
    "corrupt image": ("show --image {tmp}/bad.png --attention global --out {tmp}/x.png", "bad.png"),
    "query outside": ("show --attention global --query 1.5,0.5 --out {tmp}/x.png", "outside"),
    "query pixels outside": ("show --attention global --query 5000,1 --out {tmp}/x.png", "outside"),
    "query of another form": ("show --attention global --query middle --out {tmp}/x.png", "ROW,COLUMN"),
    "layer": ("show --attention global --layer 99 --image-size 32 --out {tmp}/x.png", "layer=99"),
    "no attention": ("show --out {tmp}/x.png", "attention"),
    "unknown checkpoint": ("show --checkpoint {tmp}/nowhere --out {tmp}/x.png", "nowhere"),
    "picture format": ("show --attention global --image-size 32 --out {tmp}/x.nonsense", "nonsense"),
    "unknown system": ("train nonsense", "nonsense"),
    "unknown train setting": ("train classify --nonsense 3", "nonsense"),
    "predict without checkpoint": ("predict classify {tmp}/bad.png", "checkpoint"),
    "predict unknown checkpoint": ("predict classify {tmp}/bad.png --checkpoint {tmp}/nowhere", "nowhere"),
    "predict missing image": ("predict classify {tmp}/no.png --checkpoint {tmp}/nowhere", "no.png"),
    "evaluate without checkpoint": ("evaluate classify --data digits", "checkpoint"),
    "evaluate unknown checkpoint": ("evaluate classify --checkpoint {tmp}/nowhere --data digits", "nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_answered_by_one_line_and_a_non_zero_code(case: str, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG not really")
    arguments, word = BAD[case]
    done = run(*arguments.format(tmp=tmp_path).split())
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert word in done.stderr


def test_results_are_not_replaced_unless_asked(trained: Path) -> None:
    done = run("compare", "--attention", "global", "--out", trained)
    assert done.exit_code == 1
    assert "--overwrite" in done.stderr

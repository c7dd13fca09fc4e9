"""A comparison: what it writes, what it reuses, and that one failure does not take the others with it."""

import csv
import json
from pathlib import Path

import pytest

from gridattn.lab.compare import compare
from gridattn.lab.compare_settings import CompareSettings, read_settings, recipe_names

TINY = {"data": "digits", "image_size": 16, "epochs": 1, "batch_size": 8, "limit_batches": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare")
    compare(CompareSettings(attention=["global,window"], out=str(out), seeds=[0, 1], **TINY), command="as <typed>")
    return out


def test_the_table_holds_every_mechanism_with_mean_and_deviation_over_seeds(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    for entry in results["attentions"]:
        values = [run["accuracy"] for run in entry["runs"]]
        assert [run["seed"] for run in entry["runs"]] == [0, 1]
        assert entry["accuracy_mean"] == pytest.approx(sum(values) / 2)
        assert entry["accuracy_std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert all(len(run["curve"]) == 1 for run in entry["runs"])
        assert all(entry[key] > 0 for key in ("parameters", "macs", "latency_ms", "memory_bytes", "train_seconds"))
    with (folder / "results.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["global", "window"]


def test_the_report_needs_no_other_file_and_says_how_it_came_about(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    for outside in ("http://", "https://", "<link", 'src="/'):
        assert outside not in page
    assert page.count("data:image/png;base64,") == 3
    for stated in (
        "as &lt;typed&gt;",
        "digits",
        "1 epochs of 1 batches of 8 images",
        "torch",
        "viewport",
        "color-scheme",
    ):
        assert stated in page


def test_resuming_reuses_what_has_the_same_settings_and_trains_the_rest(folder: Path) -> None:
    kept = folder / "models" / "global" / "history.csv"
    before = kept.stat().st_mtime_ns
    lines: list[str] = []
    settings = CompareSettings(attention=["global,window"], out=str(folder), seeds=[0], resume=True, **TINY)
    compare(settings, log=lines.append)
    assert kept.stat().st_mtime_ns == before
    changed = CompareSettings(attention=["global"], out=str(folder), seeds=[0], resume=True, **{**TINY, "lr": 0.5})
    compare(changed, log=lines.append)
    assert kept.stat().st_mtime_ns > before


def test_a_recipe_is_a_start_that_arguments_are_laid_over() -> None:
    assert "demo" in recipe_names()
    recipe = read_settings("demo", {})
    assert read_settings("demo", {"epochs": 1, "lr": None}).lr == recipe.lr
    assert read_settings("demo", {"epochs": 1}).epochs == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seeds": [0, 0]}, "seeds"),
        ({"seeds": []}, "seeds"),
        ({"options": {"global": {"nonsense": 1}}}, "nonsense"),
        ({"train": {"lr": 1.0}}, "lr"),
        ({"limit_batches": -1}, "limit_batches"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        CompareSettings(**change)

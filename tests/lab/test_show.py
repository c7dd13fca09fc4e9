"""Where a point looks: exact weights where a mechanism has them, gradients where it has none."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gridattn.lab.selection import parse_query, select_attentions
from gridattn.lab.show import query_fractions, save, show
from gridattn.layers import attention_info, list_attentions
from gridattn.layers.raster import runs_on


@pytest.mark.parametrize("name", [name for name in list_attentions() if runs_on(name, 2)])
def test_every_mechanism_can_be_shown_and_the_title_says_what_is_drawn(name: str) -> None:
    shown = show("rocket", name, image_size=56)
    (view,) = shown.views
    assert view.exact == attention_info(name).exact_map
    assert np.isfinite(view.weights).all()
    assert view.weights.sum() == pytest.approx(1, abs=1e-3)
    title = shown.figure.axes[1].get_title()
    assert ("gradients" in title) != view.exact
    assert "untrained" in title


def test_a_wide_picture_keeps_its_shape_and_the_query_its_place() -> None:
    picture = Image.new("RGB", (200, 100), "white")
    (view,) = show(picture, "global", image_size=32, query=(99, 0)).views
    assert view.weights.shape == (8, 16)
    assert view.query == (7, 0)


def test_pixels_and_fractions_name_the_same_point() -> None:
    assert query_fractions(parse_query("25,150"), (200, 100)) == query_fractions(parse_query("0.25,0.75"), (200, 100))


def test_the_layer_and_options_asked_for_are_used() -> None:
    arguments = {"image_size": 64, "options": {"neighborhood": {"kernel_size": 3}}}
    first, last = (show("grass", "neighborhood", layer=layer, **arguments).views[0] for layer in (0, -1))
    assert (first.layer, last.layer) == (0, 3)
    assert (first.weights > 0).sum() == 9


def test_numbers_and_picture_are_written(tmp_path: Path) -> None:
    save(show("grass", "global,window", image_size=32), tmp_path / "new" / "a.svg", tmp_path / "new" / "a.json")
    assert "<svg" in (tmp_path / "new" / "a.svg").read_text()
    views = json.loads((tmp_path / "new" / "a.json").read_text())["views"]
    assert [view["attention"] for view in views] == ["global", "window"]
    assert views[0]["reached"] == 64


def test_patterns_select_each_mechanism_once() -> None:
    assert select_attentions(["window,w*ndow", "global"]) == ["window", "global"]
    assert select_attentions("all") == [name for name in list_attentions() if runs_on(name, 2)]

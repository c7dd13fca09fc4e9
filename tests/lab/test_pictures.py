"""Patterns: what a picture shows is what the mechanism reaches."""

import numpy as np
import pytest

from gridattn.lab.pictures import draw_pattern, main, pattern_weights
from gridattn.layers import list_attentions


@pytest.mark.parametrize("name", list_attentions())
def test_every_attention_can_draw_where_it_looks(name: str) -> None:
    from gridattn.layers import attention_info

    info = attention_info(name)
    grid = (14,) * (2 if 2 in info.ranks else info.ranks[0])
    weights, exact = pattern_weights(name, grid, samples=2)
    assert weights.shape == grid
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1, abs=1e-4)
    assert exact == info.exact_map


def test_global_attention_reaches_everything_and_a_neighborhood_its_window() -> None:
    assert (pattern_weights("global", (6, 6))[0] > 0).all()
    weights, _ = pattern_weights("neighborhood", (9, 9), (4, 4), kernel_size=3)
    rows, columns = np.nonzero(weights)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 5, 3, 5)


def test_the_same_seed_gives_the_same_picture() -> None:
    first, second, other = (pattern_weights("global", (5, 5), seed=seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_the_middle_an_edge_and_a_corner_are_drawn_unless_a_query_is_named() -> None:
    panels = [axes for axes in draw_pattern("global", (4, 4), samples=1).axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["query 2, 2", "query 2, 0", "query 0, 0"]
    assert len([axes for axes in draw_pattern("global", (4, 4), (1, 1), samples=1).axes if axes.get_title()]) == 1


def test_lines_and_volumes_can_be_drawn() -> None:
    for grid in ((12,), (3, 4, 5)):
        assert draw_pattern("global", grid, samples=1).axes


def test_a_query_outside_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="query"):
        pattern_weights("global", (4, 4), (4, 0))


def test_the_module_writes_one_file_a_mechanism(tmp_path) -> None:
    main(["--out", str(tmp_path), "--attention", "*lobal", "--grid", "6"])
    assert [file.name for file in tmp_path.iterdir()] == ["global.png"]

"""A demo's row says whether what it claims holds."""

import pytest

from gridattn.lab.demos import demo_row, run_demos
from gridattn.systems import get_system, list_systems
from gridattn.systems.base import Demo

RISING = Demo("accuracy", threshold=0.8, baseline="chance", ablation={"attention": None}, margin=0.1)
FALLING = Demo("error", threshold=2.0, baseline="the mean", ablation={"depth": 0}, margin=0.5, higher_is_better=False)


@pytest.mark.parametrize(
    ("demo", "reached", "ablated", "holds"),
    [
        (RISING, 0.85, 0.7, True),
        (RISING, 0.79, 0.5, False),
        (RISING, 0.85, 0.8, False),
        (FALLING, 1.5, 2.5, True),
        (FALLING, 2.1, 9.0, False),
        (FALLING, 1.5, 1.9, False),
    ],
)
def test_a_demo_holds_where_it_reaches_its_threshold_and_its_mechanism_is_worth_the_margin(
    demo: Demo, reached: float, ablated: float, holds: bool
) -> None:
    assert demo_row("x", demo, reached, ablated, 1.0)["holds"] is holds


def test_every_system_has_a_demo() -> None:
    assert [slug for slug in list_systems() if get_system(slug).demo is None] == []


def test_an_unknown_system_is_told_before_anything_runs(tmp_path) -> None:
    with pytest.raises(ValueError, match="'nothing' is not known"):
        run_demos(["nothing"], tmp_path)
    assert not list(tmp_path.iterdir())

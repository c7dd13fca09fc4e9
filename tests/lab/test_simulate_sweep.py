"""Facts about sweeps of the tile model, and about the tiles of our own CPU kernels."""

from itertools import product
from math import ceil, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.lab.simulate import simulate
from gridattn.lab.simulate_sweep import axis_tables, best_stride, default_windows, sweep_strides, sweep_windows
from gridattn.lab.simulate_tiles import cpu_cost, simulate_cpu, tile_pairs
from gridattn.ops.neighborhood.cpu_tiles import make_tiling
from gridattn.ops.neighborhood.plan import make_plan

TILES = {"query_tile": (4, 3), "key_tile": (2, 3)}


def test_the_sweep_keeps_just_the_strides_that_no_smaller_stride_matches() -> None:
    setting = {"query_tile": (2, 3), "key_tile": (2, 2)}
    kept = {choice.stride: choice.simulation.max_visited for choice in sweep_strides((12, 10), (4, 6), **setting)}
    visits = {
        stride: simulate((12, 10), (4, 6), stride, **setting).max_visited
        for stride in product(range(1, 5), range(1, 7))
    }
    for stride, count in visits.items():
        beaten = any(
            other != stride and all(o <= s for o, s in zip(other, stride)) and visits[other] <= count
            for other in visits
        )
        assert (stride in kept) == (not beaten)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_best_stride_is_the_last_of_the_sweep(data: st.DataObject) -> None:
    grid = data.draw(st.tuples(st.integers(4, 20), st.integers(4, 12)))
    kernel = tuple(data.draw(st.integers(2, size)) for size in grid)
    options = {
        name: data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5))) for name in ("query_tile", "key_tile")
    } | {"key_tiling": data.draw(st.sampled_from(("static", "dynamic")))}
    causal = data.draw(st.booleans())
    best = best_stride(grid, kernel, 1, causal, **options)
    assert best == sweep_strides(grid, kernel, 1, causal, **options)[-1]
    assert best.simulation == simulate(grid, kernel, best.stride, 1, causal, **options)


def test_a_window_of_a_sweep_stands_with_its_best_stride_and_without() -> None:
    grid = (12, 10)
    found = sweep_windows(grid, **TILES, windows=[(4, 12), (5, 6, 9)])
    assert {choice.kernel_size for choice in found} == set(product((4, 12), (5, 6, 9)))
    for choice in found:
        best = best_stride(grid, choice.kernel_size, **TILES)
        assert (choice.stride, choice.simulation) == (best.stride, best.simulation)
        assert choice.unstrided == simulate(grid, choice.kernel_size, **TILES)


def test_no_window_beats_one_on_the_front() -> None:
    found = sweep_windows((24, 18), **TILES)
    points = {(choice.visible, choice.simulation.speedup): choice.on_front for choice in found}
    for (visible, speedup), on_front in points.items():
        beaten = any((v, s) != (visible, speedup) and v >= visible and s >= speedup for v, s in points)
        assert on_front != beaten
    assert 1 < sum(points.values()) < len(points)


def test_the_speedup_of_a_grid_is_the_product_over_its_axes() -> None:
    grid, windows = (13, 18), [(2, 5, 13), (4, 9)]
    tables = axis_tables(grid, **TILES, windows=windows)
    for (i, first), (j, second) in product(*(enumerate(of) for of in windows)):
        for (a, s), (b, t) in product(*(enumerate(table.strides) for table in tables)):
            along = tables[0].speedup[i, a] * tables[1].speedup[j, b]
            if s > first or t > second:
                assert np.isnan(along)
                continue
            found = simulate(grid, (first, second), (s, t), **TILES)
            assert along == pytest.approx(float(found.speedup))
            assert (tables[0].block_sparse[i, a] and tables[1].block_sparse[j, b]) == found.fully_block_sparse


@pytest.mark.parametrize(("length", "tile"), [(256, 8), (30, 2), (7, 8), (100, 1), (2, 2), (17, 1)])
def test_windows_of_a_sweep_are_whole_tiles_and_the_axis_itself(length: int, tile: int) -> None:
    windows = default_windows(length, tile)
    assert windows[-1] == length
    assert all(2 <= size == ceil(size / tile) * tile for size in windows[:-1])
    assert len(windows) <= 16
    assert list(windows) == sorted(set(windows))


def test_dilated_axes_are_swept_up_to_the_length_of_their_groups() -> None:
    found = sweep_windows((23, 12), (3, 1), **TILES)
    assert max(choice.kernel_size for choice in found) == (7, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dilation": (13, 1)}, r"leaves no window on axis 0; 2 \* dilation <= grid"),
        ({"windows": [(4,)]}, "2 lists of kernel sizes"),
        ({"windows": [(4, 25), (3,)]}, "exceeds the grid"),
        ({"windows": [(1, 4), (3,)]}, "at least 2"),
        ({"key_tiling": "magic"}, "key_tiling='magic' is not known"),
        ({"key_tile": 0}, "key_tile=0 is not allowed"),
    ],
)
def test_wrong_settings_are_named(change: dict, message: str) -> None:
    for sweep in (sweep_windows, axis_tables):
        with pytest.raises(ValueError, match=message):
            sweep(**{"grid": (24, 18), **TILES, **change})


@pytest.mark.parametrize(
    ("grid", "kernel", "stride", "dilation", "causal"),
    [
        ((64, 64), 16, 4, 1, False),
        ((31, 17), (7, 5), (3, 1), (2, 3), (True, False)),
        ((5, 6, 20), 4, (1, 2, 4), 1, False),
        ((100,), 40, 8, 1, False),
    ],
)
def test_keys_counted_for_the_tile_kernel_are_those_of_its_tables(grid, kernel, stride, dilation, causal) -> None:
    plan = make_plan(grid, kernel, stride, dilation, causal)
    which, found = simulate_cpu(plan)
    tiling = make_tiling(plan, 256, 1)
    assert which == "tiles"
    assert found.total_visited == cpu_cost(plan) == prod(int(of_axis[:, 3].sum()) for of_axis in tiling.tiles)
    assert found.max_visited == tiling.capacity[0]


def test_the_row_kernel_visits_what_each_query_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gridattn.lab.simulate_tiles.rows_are_faster", lambda plan: True)
    plan = make_plan((32, 24), 7)
    which, found = simulate_cpu(plan)
    assert (which, found.total_visited) == ("rows", plan.num_visible)
    assert cpu_cost(plan) == plan.num_visible // 16


def test_an_unknown_family_of_kernels_is_named() -> None:
    with pytest.raises(ValueError, match="kernels='volta' is not known"):
        tile_pairs("volta", 2)

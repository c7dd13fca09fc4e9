"""Facts about the tile model of neighborhood attention."""

from math import ceil, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.lab.presets import PRESETS
from gridattn.lab.simulate import end_to_end, simulate
from gridattn.ops.neighborhood.plan import AxisPlan


@st.composite
def problems(draw: st.DrawFn, max_rank: int = 3) -> dict:
    rank = draw(st.integers(1, max_rank))
    grid, kernel, stride, dilation, causal, q_tile, k_tile = [], [], [], [], [], [], []
    for _ in range(rank):
        grid.append(draw(st.integers(2, 24 if rank == 1 else 9)))
        dilation.append(draw(st.integers(1, grid[-1] // 2)))
        kernel.append(draw(st.integers(2, grid[-1] // dilation[-1])))
        stride.append(draw(st.integers(1, kernel[-1])))
        causal.append(draw(st.booleans()))
        q_tile.append(draw(st.integers(1, 5)))
        k_tile.append(draw(st.integers(1, 5)))
    return {
        "grid": tuple(grid),
        "kernel_size": tuple(kernel),
        "stride": tuple(stride),
        "dilation": tuple(dilation),
        "is_causal": tuple(causal),
        "query_tile": tuple(q_tile),
        "key_tile": tuple(k_tile),
    }


def brute_force_axis(length: int, kernel: int, stride: int, dilation: int, causal: bool, q_tile: int, k_tile: int):
    """Tiles with at least one visible pair, and whether all pairs of each such tile are visible, by definition."""
    counts, full = [], True
    for group in range(dilation):
        size = -(-(length - group) // dilation)
        mask = AxisPlan(size, kernel, stride, 1, causal).mask
        for q in range(0, size, q_tile):
            blocks = [mask[q : q + q_tile, k : k + k_tile] for k in range(0, size, k_tile)]
            counts.append(sum(block.any() for block in blocks))
            full &= all(block.all() or not block.any() for block in blocks)
    return counts, full


@settings(max_examples=150, deadline=None)
@given(problems())
def test_static_counts_are_those_of_tiles_that_hold_a_visible_pair(problem: dict) -> None:
    found = simulate(**problem)
    axes = [brute_force_axis(*axis) for axis in zip(*problem.values())]
    assert found.max_visited == prod(max(counts) for counts, _ in axes)
    assert found.total_visited == prod(sum(counts) for counts, _ in axes)
    assert found.query_tiles == prod(len(counts) for counts, _ in axes)
    assert found.fully_block_sparse == all(full for _, full in axes)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_dynamic_tiles_are_at_most_one_fewer_per_axis(problem: dict) -> None:
    static = simulate(**problem).per_axis_max
    dynamic = simulate(**problem, key_tiling="dynamic").per_axis_max
    assert all(d <= s <= d + 1 for d, s in zip(dynamic, static))


@settings(max_examples=100, deadline=None)
@given(problems(), st.randoms())
def test_permuting_the_axes_changes_nothing(problem: dict, random) -> None:
    order = list(range(len(problem["grid"])))
    random.shuffle(order)
    swapped = {name: tuple(value[i] for i in order) for name, value in problem.items()}
    a, b = simulate(**problem), simulate(**swapped)
    assert (a.max_visited, a.total_visited, a.fully_block_sparse) == (
        b.max_visited,
        b.total_visited,
        b.fully_block_sparse,
    )


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(2, 4))
def test_a_larger_key_tile_never_covers_fewer_keys(problem: dict, factor: int) -> None:
    small = simulate(**problem)
    large = simulate(**{**problem, "key_tile": tuple(factor * t for t in problem["key_tile"])})
    for a, b in zip(small.per_axis_max, large.per_axis_max):
        assert b * factor >= a


@settings(max_examples=40, deadline=None)
@given(problems(max_rank=2), st.integers(1, 6), st.integers(1, 6))
def test_flat_tiles_count_the_runs_of_the_flattened_grid(problem: dict, q_tile: int, k_tile: int) -> None:
    keys = ("grid", "kernel_size", "stride", "dilation", "is_causal")
    axes = [AxisPlan(*axis) for axis in zip(*(problem[key] for key in keys))]
    mask = axes[0].mask
    for axis in axes[1:]:
        mask = np.kron(mask, axis.mask)
    n = len(mask)
    blocks = [[mask[q : q + q_tile, k : k + k_tile] for k in range(0, n, k_tile)] for q in range(0, n, q_tile)]
    counts = [sum(block.any() for block in row) for row in blocks]
    found = simulate(**{k: problem[k] for k in keys}, query_tile=q_tile, key_tile=k_tile, flat_tiles=True)
    assert (found.max_visited, found.total_visited) == (max(counts), sum(counts))
    assert found.fully_block_sparse == all(b.all() or not b.any() for row in blocks for b in row)


def test_single_position_tiles_visit_exactly_the_window() -> None:
    assert simulate((12, 9), (5, 4), query_tile=1, key_tile=1).max_visited == 20


def test_block_sparse_settings_reach_the_arithmetic_bound() -> None:
    found = simulate((256, 256), 80, 16, query_tile=(16, 16), key_tile=(16, 8))
    assert found.fully_block_sparse
    assert found.speedup == found.flop_speedup


def test_a_window_as_long_as_its_axis_needs_no_mask_there() -> None:
    for tiling in ("static", "dynamic"):
        found = simulate((15,), 15, query_tile=4, key_tile=4, key_tiling=tiling)
        assert found.max_visited == 4
        assert found.fully_block_sparse


def test_the_smallest_block_sparse_stride_of_the_one_dimensional_case_is_256() -> None:
    def sparse(stride: int) -> bool:
        return simulate((32768,), 2048, stride, query_tile=128, key_tile=128).fully_block_sparse

    assert not sparse(128)
    assert sparse(256)


def test_additional_keys_fill_tiles_whether_dense_or_not() -> None:
    plain, extra = (simulate((16,), 4, query_tile=4, key_tile=4, additional_keys=n) for n in (0, 5))
    assert (extra.dense_tiles, extra.max_visited) == (plain.dense_tiles + 2, plain.max_visited + 2)
    assert extra.total_visited == plain.total_visited + 2 * plain.query_tiles


def test_balanced_work_would_be_faster_than_the_worst_tile() -> None:
    found = simulate((30, 48, 80), (18, 24, 24), query_tile=(4, 8, 8), key_tile=(2, 8, 8))
    assert found.total_visited / found.query_tiles == pytest.approx(171.6)
    assert float(found.mean_speedup) == pytest.approx(5.24, abs=0.01)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)
def test_published_end_to_end_figures_are_reproduced(preset) -> None:
    for stride, (all_steps, some_steps) in preset.published.items():
        found = simulate(
            preset.grid, preset.kernel_size, stride, query_tile=preset.query_tile, key_tile=preset.key_tile
        )
        assert end_to_end(found.speedup, preset.attention_share) == pytest.approx(all_steps, abs=0.02)
        if some_steps is not None:
            partial = end_to_end(found.speedup, preset.attention_share, preset.step_fraction)
            assert partial == pytest.approx(some_steps, abs=0.02)


def test_end_to_end_of_no_gain_is_one_and_grows_with_each_argument() -> None:
    assert end_to_end(1, 0.6, 0.7) == 1
    assert end_to_end(3, 0.6, 0.7) > end_to_end(2, 0.6, 0.7) > end_to_end(2, 0.5, 0.7) > end_to_end(2, 0.5, 0.6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_tiling": "magic"}, "key_tiling='magic' is not known"),
        ({"query_tile": 0}, "query_tile=0 is not allowed"),
        ({"kernel_size": 20}, "exceeds"),
        ({"additional_keys": -1}, "additional_keys=-1 is not allowed"),
        ({"flat_tiles": True, "key_tiling": "dynamic"}, "only 'static' is"),
    ],
)
def test_wrong_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(**{"grid": (16,), "kernel_size": 4, "query_tile": 4, "key_tile": 4, **change})


def test_dense_tiles_count_padded_ones() -> None:
    assert simulate((13,), 5, query_tile=4, key_tile=4).dense_tiles == ceil(13 / 4)

"""Every figure that was published for the tile model, reproduced to its printed digits."""

from math import prod

import pytest

from gridattn.lab.simulate import Simulation, end_to_end, permutation_bytes, simulate
from gridattn.lab.simulate_tiles import KERNELS, tile_pairs

FLUX, COSMOS, HUNYUAN = (256, 256), (16, 44, 80), (30, 48, 80)
# Grid, window, tiles; share of self-attention in the run time, of which the paper gives the factors for two models;
# steps with sparse attention.
SETTINGS = {
    "flux 80x80": (FLUX, (80, 80), (16, 16), (16, 8), 0.568 * 0.912, 19 / 28),
    "cosmos 16x32x48": (COSMOS, (16, 32, 48), (8, 4, 8), (4, 4, 8), 0.587, 23 / 35),
    "cosmos 16x24x16": (COSMOS, (16, 24, 16), (8, 4, 8), (4, 4, 8), 0.587, 23 / 35),
    "hunyuan 30x40x40": (HUNYUAN, (30, 40, 40), (2, 16, 8), (2, 8, 8), 0.654 * 0.928, 35 / 50),
    "hunyuan 18x24x24": (HUNYUAN, (18, 24, 24), (4, 8, 8), (2, 8, 8), 0.654 * 0.928, 35 / 50),
}
# Setting, stride; end-to-end speed-up by arithmetic and simulated, with all steps and with some; tiles visited of all,
# the speed-up of the operator that this is, and whether it is fully block-sparse.
PUBLISHED = [
    ("flux 80x80", (1, 1), "1.88", "1.76", "1.46", "1.42", 84, 512, "6.10", False),
    ("flux 80x80", (16, 1), "1.88", "1.84", "1.46", "1.45", 60, 512, "8.53", False),
    ("flux 80x80", (16, 16), "1.88", "1.88", "1.46", "1.46", 50, 512, "10.24", True),
    ("cosmos 16x32x48", (1, 1, 1), "1.50", "1.35", "1.28", "1.21", 252, 440, "1.75", False),
    ("cosmos 16x32x48", (1, 8, 1), "1.50", "1.42", "1.28", "1.24", 224, 440, "1.96", False),
    ("cosmos 16x32x48", (1, 1, 16), "1.50", "1.42", "1.28", "1.24", 216, 440, "2.04", False),
    ("cosmos 16x32x48", (1, 8, 16), "1.50", "1.50", "1.28", "1.28", 192, 440, "2.29", True),
    ("cosmos 16x24x16", (1, 1, 1), "2.10", "1.90", "1.52", "1.45", 84, 440, "5.24", False),
    ("cosmos 16x24x16", (1, 8, 1), "2.10", "1.96", "1.52", "1.48", 72, 440, "6.11", False),
    ("cosmos 16x24x16", (1, 1, 16), "2.10", "2.05", "1.52", "1.51", 56, 440, "7.86", False),
    ("cosmos 16x24x16", (1, 8, 16), "2.10", "2.10", "1.52", "1.52", 48, 440, "9.17", True),
    ("hunyuan 30x40x40", (1, 1, 1), "1.55", "1.21", "1.33", "1.14", 630, 900, "1.43", False),
    ("hunyuan 30x40x40", (1, 1, 8), "1.55", "1.44", "1.33", "1.27", 450, 900, "2.00", False),
    ("hunyuan 30x40x40", (1, 32, 8), "1.55", "1.55", "1.33", "1.33", 375, 900, "2.40", True),
    ("hunyuan 30x40x40", (30, 40, 40), "1.55", "1.44", None, None, 450, 900, "2.00", False),
    ("hunyuan 18x24x24", (1, 1, 1), "2.23", "1.73", "1.63", "1.42", 275, 900, "3.27", False),
    ("hunyuan 18x24x24", (2, 1, 1), "2.23", "1.78", "1.63", "1.44", 250, 900, "3.60", False),
    ("hunyuan 18x24x24", (1, 1, 8), "2.23", "1.99", "1.63", "1.53", 165, 900, "5.45", False),
    ("hunyuan 18x24x24", (2, 1, 8), "2.23", "2.02", "1.63", "1.55", 150, 900, "6.00", False),
    ("hunyuan 18x24x24", (1, 8, 8), "2.23", "2.17", "1.63", "1.61", 99, 900, "9.09", False),
    ("hunyuan 18x24x24", (2, 8, 8), "2.23", "2.20", "1.63", "1.62", 90, 900, "10.00", False),
    ("hunyuan 18x24x24", (16, 8, 8), "2.23", "2.23", "1.63", "1.63", 81, 900, "11.11", True),
    ("hunyuan 18x24x24", (18, 24, 24), "2.23", "2.06", None, None, 135, 900, "6.67", False),
]


# Where the printed figures do not follow: the first would need a speed-up of 1.8 instead of 1.75.
DEVIATIONS = {("cosmos 16x32x48", (1, 1, 1)): 0.03, ("hunyuan 18x24x24", (18, 24, 24)): 0.01}


def simulated(setting: str, stride: tuple[int, ...]) -> Simulation:
    grid, window, query_tile, key_tile, *_ = SETTINGS[setting]
    return simulate(grid, window, stride, query_tile=query_tile, key_tile=key_tile)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[0]} {'x'.join(map(str, row[1]))}")
def test_tiles_and_speedups_of_the_operator(row: tuple) -> None:
    setting, stride, *_, visited, dense, speedup, sparse = row
    found = simulated(setting, stride)
    assert (found.max_visited, found.dense_tiles, found.fully_block_sparse) == (visited, dense, sparse)
    assert f"{float(found.speedup):.2f}" == speedup
    assert (found.speedup == found.flop_speedup) == sparse


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[0]} {'x'.join(map(str, row[1]))}")
def test_end_to_end_speedups_follow_from_those_of_the_operator_at_one_digit(row: tuple) -> None:
    """The paper rounds the operator's speed-up to one digit before it goes on."""
    setting, stride, *printed = row[:6]
    *_, share, some = SETTINGS[setting]
    found = simulated(setting, stride)
    flop, simulation = (round(float(speedup), 1) for speedup in (found.flop_speedup, found.speedup))
    ours = [end_to_end(speedup, share, steps) for steps in (1.0, some) for speedup in (flop, simulation)]
    for value, text in zip(ours, printed):
        if text is not None and f"{value:.2f}" != text:
            assert round(abs(float(f"{value:.2f}") - float(text)), 2) <= DEVIATIONS.get((setting, stride), 0.0)


@pytest.mark.parametrize(
    ("grid", "window", "stride", "query_tile", "key_tile", "speedup"),
    [
        ((32768,), 2048, 1, 128, 128, "15.1"),
        ((32768,), 2048, 256, 128, 128, "16.0"),
        ((32768,), 2048, 2048, 128, 128, "16.0"),
        (FLUX, 80, 1, (16, 8), (16, 8), "6.65"),
        (FLUX, 80, 16, (16, 8), (16, 8), "10.24"),
        (HUNYUAN, (18, 24, 24), 1, (2, 8, 8), (2, 8, 8), "3.6"),
        (HUNYUAN, (18, 24, 24), (16, 8, 8), (2, 8, 8), (2, 8, 8), "11.1"),
    ],
)
def test_problems_of_the_published_timings(grid, window, stride, query_tile, key_tile, speedup) -> None:
    found = simulate(grid, window, stride, query_tile=query_tile, key_tile=key_tile)
    assert f"{float(found.speedup):.{len(speedup.partition('.')[2])}f}" == speedup


@pytest.mark.parametrize(
    ("window", "stride", "dilation", "sparsity"),
    [
        ((4, 16), 1, (11, 5), 98),
        ((12, 16), (4, 1), (1, 5), 95),
        ((12, 24), (4, 8), 1, 92),
        ((20, 40), (4, 8), 1, 77),
        ((28, 56), (4, 8), 1, 55),
    ],
)
def test_settings_of_a_later_generator_are_fully_block_sparse(window, stride, dilation, sparsity: int) -> None:
    def of_frames(value) -> tuple[int, ...]:
        return (1, *((value, value) if isinstance(value, int) else value))

    grid = (24, 44, 80)
    found = simulate(
        grid, (24, *window), of_frames(stride), of_frames(dilation), query_tile=(8, 4, 8), key_tile=(4, 4, 8)
    )
    assert found.fully_block_sparse
    assert round(100 * (1 - prod(window) / prod(grid[1:]))) == sparsity


@pytest.mark.parametrize(
    ("setting", "per_axis_max", "dense", "total", "sparse"),
    [
        ({"grid": (16,), "kernel_size": 4, "query_tile": 4, "key_tile": 4}, (3,), 4, 10, False),
        ({"grid": (16,), "kernel_size": 4, "stride": 4, "query_tile": 4, "key_tile": 4}, (1,), 4, 4, True),
        ({"grid": (16,), "kernel_size": 8, "stride": 4, "query_tile": 4, "key_tile": 2}, (4,), 8, 16, True),
        ({"grid": (16,), "kernel_size": 8, "stride": 4, "query_tile": 4, "key_tile": 4}, (3,), 4, 10, False),
        ({"grid": (16,), "kernel_size": 8, "stride": 8, "query_tile": 4, "key_tile": 4}, (2,), 4, 8, True),
        ({"grid": (15,), "kernel_size": 5, "query_tile": 4, "key_tile": 2}, (4,), 8, 14, False),
        (
            {
                "grid": (13, 11),
                "kernel_size": (5, 3),
                "dilation": (2, 3),
                "query_tile": (4, 2),
                "key_tile": (4, 2),
            },
            (2, 2),
            24,
            None,
            False,
        ),
        (
            {"grid": (8, 8), "kernel_size": 4, "stride": 2, "query_tile": 2, "key_tile": 2, "key_tiling": "dynamic"},
            (2, 2),
            16,
            64,
            True,
        ),
        ({"grid": (8, 8), "kernel_size": 4, "stride": 2, "query_tile": 2, "key_tile": 2}, (3, 3), 16, 100, False),
        (
            {"grid": HUNYUAN, "kernel_size": (18, 24, 24), "query_tile": (4, 8, 8), "key_tile": (2, 8, 8)},
            (11, 5, 5),
            900,
            None,
            False,
        ),
    ],
)
def test_cases_worked_by_hand(setting: dict, per_axis_max, dense, total, sparse: bool) -> None:
    found = simulate(**setting)
    assert found.per_axis_max == per_axis_max
    assert found.dense_tiles == dense
    assert found.fully_block_sparse == sparse
    assert total is None or found.total_visited == total


def test_dilated_groups_of_two_lengths_by_hand() -> None:
    found = simulate((13, 11), (5, 3), dilation=(2, 3), query_tile=(4, 2), key_tile=(4, 2))
    assert (float(found.speedup), round(float(found.flop_speedup), 3)) == (6.0, 9.533)


def test_a_tile_that_divides_window_and_stride_is_not_enough_for_static_key_tiles() -> None:
    for stride, tiling, sparse in ((128, "static", False), (128, "dynamic", True), (256, "static", True)):
        found = simulate((32768,), 2048, stride, query_tile=128, key_tile=128, key_tiling=tiling)
        assert found.fully_block_sparse == sparse


@pytest.mark.parametrize(("grid", "heads", "gigabytes"), [(COSMOS, 32, "6.9"), (HUNYUAN, 24, "10.5")])
def test_bytes_moved_by_the_token_permutation(grid, heads: int, gigabytes: str) -> None:
    assert f"{permutation_bytes(grid, heads, 128, batch=2) / 2**30:.1f}" == gigabytes


def test_published_tiles_of_a_family_have_equally_many_tokens() -> None:
    for name in KERNELS:
        for rank in (1, 2, 3):
            tokens = {(prod(pair.query), prod(pair.key)) for pair in tile_pairs(name, rank)}
            assert len(tokens) == 1, (name, rank)

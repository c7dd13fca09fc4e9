"""Facts that hold for every registered attention."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gridattn.layers import attention_info, create_attention, list_attentions
from gridattn.layers.common import GridAttention

GRIDS = {
    1: [(29,), (16,), (1,)],
    2: [(14, 14), (9, 13), (3, 17), (1, 1)],
    3: [(4, 6, 5), (3, 3, 7)],
    4: [(3, 2, 6, 5), (1, 3, 4, 7)],
}
NAMES = list_attentions()
CASES = [(name, rank) for name in NAMES for rank in attention_info(name).ranks]


def build(name: str, rank: int, **options) -> GridAttention:
    torch.manual_seed(0)
    return create_attention(name, dim=32, num_heads=4, grid=GRIDS[rank][0], **options).eval()


def allowed_grids(name: str, rank: int) -> list[tuple[int, ...]]:
    return [grid for grid in GRIDS[rank] if min(grid) >= attention_info(name).min_size]


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_takes_any_grid_and_returns_its_shape(name: str, rank: int) -> None:
    layer = build(name, rank)
    for grid in allowed_grids(name, rank):
        for batch in (1, 2, 0):
            x = torch.randn(batch, *grid, 32)
            y = layer(x)
            assert y.shape == x.shape
            assert torch.isfinite(y).all()


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_samples_of_a_batch_do_not_mix(name: str, rank: int) -> None:
    layer = build(name, rank)
    x = torch.randn(3, *GRIDS[rank][0], 32)
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_gradients_reach_input_and_parameters(name: str, rank: int) -> None:
    layer = build(name, rank).train()
    x = torch.randn(2, *GRIDS[rank][0], 32, requires_grad=True)
    y = layer(x)
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().sum() > 0
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_runs_in_bfloat16_autocast_and_float64(name: str, rank: int) -> None:
    layer = build(name, rank)
    x = torch.randn(1, *GRIDS[rank][0], 32)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x)
    assert (half.float() - expected).abs().max() < 0.1 * expected.abs().max() + 0.05
    torch.testing.assert_close(layer.double()(x.double()).float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_macs_are_what_torch_counts(name: str, rank: int) -> None:
    layer = build(name, rank)
    for grid in allowed_grids(name, rank)[:2]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.randn(1, *grid, 32))
        counted = counter.get_total_flops() / 2
        assert abs(layer.macs(grid) - counted) <= 0.02 * counted, (grid, layer.macs(grid), counted)
        assert layer.memory(grid) > 0


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_attention_map_is_a_distribution_over_the_grid_or_says_it_is_not_exact(name: str, rank: int) -> None:
    layer = build(name, rank)
    grid = GRIDS[rank][0]
    weights = layer.attention_map(torch.randn(2, *grid, 32), tuple(size // 2 for size in grid))
    assert weights.shape[0] == 2
    assert weights.shape[2:] == grid
    assert torch.isfinite(weights).all()
    assert weights.sum() > 0
    if not layer.exact_map:
        assert (weights >= 0).all()


def _compare_compiled(layer: GridAttention, grids: list[tuple[int, ...]], **options: Any) -> None:
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, **options)
    for grid in grids:  # from the second one on a trace leaves sizes open
        x = torch.randn(2, *grid, 32)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_compiles_as_one_graph(name: str, rank: int) -> None:
    _compare_compiled(build(name, rank), GRIDS[rank][:1], backend="aot_eager")


@pytest.mark.parametrize("name", ["epipolar", "neighborhood", "selective_scan", "window"])
def test_one_compiled_layer_takes_sizes_that_change(name: str) -> None:
    rank = 4 if name == "epipolar" else 2
    _compare_compiled(build(name, rank), allowed_grids(name, rank)[:2], backend="eager", dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rank"), CASES)
def test_one_compiled_layer_takes_every_grid(name: str, rank: int) -> None:
    _compare_compiled(build(name, rank), allowed_grids(name, rank), backend="aot_eager")
    _compare_compiled(build(name, rank), allowed_grids(name, rank)[:2], backend="eager", dynamic=True)


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_exports(name: str, rank: int) -> None:
    layer = build(name, rank)
    x = torch.randn(2, *GRIDS[rank][0], 32)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_wrong_input_is_named(name: str, rank: int) -> None:
    layer = build(name, rank)
    grid = GRIDS[rank][0]
    with pytest.raises(ValueError, match=r"x has 31 channels.*dim=32"):
        layer(torch.randn(1, *grid, 31))
    with pytest.raises(ValueError, match=r"x has shape.*takes"):
        layer(torch.randn(*grid, 32))
    with pytest.raises(ValueError, match="is not a position of the grid"):
        layer.attention_map(torch.randn(1, *grid, 32), tuple(size for size in grid))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_settings_are_named(name: str) -> None:
    rank = attention_info(name).ranks[0]
    with pytest.raises(ValueError, match="no_such_option"):
        create_attention(name, dim=32, num_heads=4, grid=GRIDS[rank][0], no_such_option=1)
    with pytest.raises(ValueError, match="dim=-32"):
        create_attention(name, dim=-32, num_heads=4, grid=GRIDS[rank][0])
    refused = next((r for r in GRIDS if r not in attention_info(name).ranks), None)
    if refused is not None:
        with pytest.raises(ValueError, match="axes; attention"):
            create_attention(name, dim=32, num_heads=4, grid=GRIDS[refused][0])


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"attention='nowhere' is not known; allowed: .*global"):
        create_attention("nowhere", dim=32)

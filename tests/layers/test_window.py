"""Facts of window attention."""

from math import prod
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.layers import GlobalAttention, WindowAttention
from gridattn.ops import neighborhood_attention
from gridattn.ops.partition import merge_windows, partition_windows, window_mask

SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=3)


def layer(window_size=4, partition="block", shifted=False, **options) -> WindowAttention:
    torch.manual_seed(0)
    built = WindowAttention(
        16, 2, window_size=window_size, partition=partition, shifted=shifted, **{"grid": (8, 8)} | options
    )
    if built.relative_position_bias is not None:
        torch.nn.init.normal_(built.relative_position_bias)
    return built.double().eval()


def influence(attention: WindowAttention, grid: tuple[int, ...], query: tuple[int, ...]) -> torch.Tensor:
    """Which positions the output at `query` depends on."""
    x = torch.randn(1, *grid, 16, dtype=torch.float64, requires_grad=True)
    attention(x)[(0, *query)].sum().backward()
    assert x.grad is not None
    return x.grad[0].abs().sum(-1) > 1e-12


@settings(deadline=None, max_examples=30)
@given(SIZES, st.sampled_from(["block", "grid"]), st.booleans())
def test_merging_undoes_partitioning(sizes, layout, shifted) -> None:
    grid, window = zip(*sizes)
    shift = tuple(w // 2 for w in window) if shifted else None
    x = torch.randn(2, *grid, 3)
    windows = partition_windows(x, window, layout, shift)
    assert torch.equal(merge_windows(windows, window, grid, layout, shift), x)


@settings(deadline=None, max_examples=30)
@given(SIZES, st.sampled_from(["block", "grid"]))
def test_in_a_mask_every_real_position_sees_all_real_ones_of_its_window_and_no_padding(sizes, layout) -> None:
    grid, window = zip(*sizes)
    real = partition_windows(torch.ones(1, *grid), window, layout)[0] > 0
    mask = window_mask(grid, window, layout)
    if mask is None:
        assert real.all()
    else:
        assert torch.equal(mask, real.unsqueeze(1) == real.unsqueeze(2))


def test_blocks_hold_neighbours_and_grids_hold_lattices() -> None:
    rows = torch.arange(36).view(1, 6, 6)
    block = partition_windows(rows, (3, 3), "block")[0]
    lattice = partition_windows(rows, (3, 3), "grid")[0]
    assert block[2].tolist() == [18, 19, 20, 24, 25, 26, 30, 31, 32]  # block (1, 0)
    assert lattice[1].tolist() == [1, 3, 5, 13, 15, 17, 25, 27, 29]  # residues (0, 1) of a step of 2


@pytest.mark.parametrize("grid", [(6, 7), (3, 9), (1, 5)])
@pytest.mark.parametrize("options", [{}, {"partition": "grid"}, {"shifted": True}])
@pytest.mark.parametrize("bias", [True, False])
def test_padding_has_no_influence_at_all(grid, options, bias, monkeypatch) -> None:
    attention = layer(bias=bias, **options)
    x = torch.randn(2, *grid, 16, dtype=torch.float64)
    expected = attention(x)
    pad = torch.nn.functional.pad
    amounts = []

    def pad_with_noise(tensor, amount):
        amounts.append(amount)
        return pad(tensor, amount, value=37.0) if max(amount) > 0 else pad(tensor, amount)

    monkeypatch.setattr("gridattn.ops.padding.F.pad", pad_with_noise)
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=0)
    assert amounts or all(size <= 4 or size % 4 == 0 for size in grid)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(2, 5)), min_size=1, max_size=3),
    st.sampled_from(["block", "grid"]),
    st.booleans(),
)
def test_the_cpu_kernel_and_cut_windows_agree(sizes, partition, bias) -> None:
    grid, window = tuple(n * w for n, w in sizes), [w for _, w in sizes]
    attention = layer(window, partition, grid=grid, bias=bias)
    results = []
    for limit in (0, 10**9):
        with mock.patch("gridattn.layers.window.KERNEL_TOKENS_TRAINED", limit):
            x = torch.linspace(-1, 1, 2 * prod(grid) * 16, dtype=torch.float64).sin().view(2, *grid, 16)
            x.requires_grad_()
            out = attention(x)
            gradients = torch.autograd.grad(out.square().sum(), [x, *attention.parameters()])
            results.append((out, *gradients))
    for by_kernel, by_windows in zip(*results):
        torch.testing.assert_close(by_kernel, by_windows)


def test_large_grids_take_the_kernel_and_odd_ones_do_not() -> None:
    attention = layer(window_size=7).float()
    for grid, used in (((28, 28), True), ((28, 29), False), ((7, 7), False)):
        with (
            mock.patch("gridattn.layers.window.neighborhood_attention", wraps=neighborhood_attention) as kernel,
            torch.no_grad(),
        ):
            attention(torch.randn(1, *grid, 16))
        assert kernel.called is used


def test_a_position_depends_on_its_own_window_only() -> None:
    seen = influence(layer(), (10, 7), (5, 6))
    expected = torch.zeros(10, 7, dtype=torch.bool)
    expected[4:8, 4:7] = True
    assert torch.equal(seen, expected)


def test_a_lattice_holds_the_positions_of_one_residue() -> None:
    seen = influence(layer(partition="grid"), (8, 10), (3, 4))  # steps 2 and 3
    expected = torch.zeros(8, 10, dtype=torch.bool)
    expected[1::2, 1::3] = True
    assert torch.equal(seen, expected)


def test_shifted_blocks_start_half_a_block_later_and_do_not_wrap_around() -> None:
    attention = layer(shifted=True)
    blocks = [range(2), range(2, 6), range(6, 8)]
    for block in blocks:
        seen = influence(attention, (8, 3), (block[0], 1))
        assert seen.any(1).nonzero().flatten().tolist() == list(block)
    seen = influence(attention, (9, 3), (8, 1))
    assert seen.any(1).nonzero().flatten().tolist() == [6, 7, 8]


def test_one_window_over_the_whole_grid_is_global_attention() -> None:
    dense = GlobalAttention(16, 2).double().eval()
    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    for partition in ("block", "grid"):
        windowed = layer(window_size=(5, 7), partition=partition, bias=False)
        windowed.load_state_dict(dense.state_dict())
        torch.testing.assert_close(windowed(x), dense(x))


def test_the_bias_belongs_to_the_offset_from_query_to_key() -> None:
    attention = layer(grid=(8,), qkv_bias=False)
    assert attention.relative_position_bias is not None
    with torch.no_grad():
        attention.qkv.weight[:32].zero_()  # equal logits but for the bias
        attention.relative_position_bias.zero_()
        attention.relative_position_bias[:, 3 + 2] = 50.0  # two after the query
    weights = attention.attention_map(torch.randn(1, 8, 16, dtype=torch.float64), (5,))
    assert weights[0, 0].argmax() == 7


def test_the_map_is_the_softmax_of_the_window() -> None:
    weights = layer(window_size=3).attention_map(torch.randn(2, 7, 5, 16, dtype=torch.float64), (4, 4))
    torch.testing.assert_close(weights.flatten(2).sum(2), torch.ones(2, 2))
    assert (weights[:, :, 3:6, 3:5] > 0).all()
    assert weights.flatten(2).gt(0).sum(2).unique().tolist() == [6]


def test_one_exported_graph_serves_all_grids_of_two_windows_or_more_per_axis() -> None:
    attention = layer().float()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        attention, (torch.randn(2, 9, 11, 16),), dynamic_shapes=({0: dynamic, 1: dynamic, 2: dynamic},)
    ).module()
    for grid in ((8, 8), (13, 5), (6, 20)):
        x = torch.randn(3, *grid, 16)
        torch.testing.assert_close(program(x), attention(x))


def test_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="shifted=True is not allowed with partition='grid'"):
        WindowAttention(16, 2, partition="grid", shifted=True)
    with pytest.raises(ValueError, match=r"partition='rows' is not known; allowed: 'block', 'grid'"):
        WindowAttention(16, 2, partition="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window_size=0"):
        WindowAttention(16, 2, window_size=0)

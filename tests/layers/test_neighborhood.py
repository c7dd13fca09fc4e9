"""Facts of the neighborhood attention layer; the operator has its own tests."""

import pytest
import torch

from gridattn.layers import GlobalAttention, NeighborhoodAttention, WindowAttention


def layer(**options) -> NeighborhoodAttention:
    torch.manual_seed(0)
    built = NeighborhoodAttention(16, 2, **{"grid": (8, 8), "kernel_size": 3} | options)
    if built.relative_position_bias is not None:
        torch.nn.init.normal_(built.relative_position_bias)
    return built.double().eval()


def grid_input(*grid: int) -> torch.Tensor:
    return torch.randn(2, *grid, 16, dtype=torch.float64)


def test_a_border_query_sees_a_whole_window_pushed_inside() -> None:
    weights = layer().attention_map(grid_input(7, 8), (0, 7))
    assert (weights[:, :, :3, 5:] > 0).all()
    torch.testing.assert_close(weights.flatten(2).sum(2), torch.ones(2, 2))
    assert weights.flatten(2).gt(0).sum(2).unique().tolist() == [9]


def test_dilated_a_query_sees_every_dth_key() -> None:
    weights = layer(dilation=(2, 1)).attention_map(grid_input(9, 5), (4, 2))
    seen = weights[0, 0] > 0
    assert seen.any(1).nonzero().flatten().tolist() == [2, 4, 6]
    assert seen.any(0).nonzero().flatten().tolist() == [1, 2, 3]


def test_a_causal_axis_hides_later_keys() -> None:
    weights = layer(is_causal=(True, False)).attention_map(grid_input(8, 8), (4, 4))
    assert (weights[0, 0] > 0).any(1).nonzero().flatten().tolist() == [2, 3, 4]


def test_a_window_over_the_grid_is_global_attention() -> None:
    dense = GlobalAttention(16, 2).double().eval()
    local = layer(kernel_size=(5, 7), bias=False)
    local.load_state_dict(dense.state_dict())
    x = grid_input(5, 7)
    torch.testing.assert_close(local(x), dense(x))


def test_stride_equal_to_the_kernel_is_window_attention_with_the_same_bias() -> None:
    windows = WindowAttention(16, 2, window_size=4).double().eval()
    blocks = layer(kernel_size=4, stride=4)
    blocks.load_state_dict(windows.state_dict())
    x = grid_input(8, 12)
    torch.testing.assert_close(blocks(x), windows(x))


@pytest.mark.parametrize("grid", [(2, 5), (1, 5), (5, 1), (1, 1), (2, 2)])
def test_shrinking_attends_over_short_axes_wholly(grid) -> None:
    """On axes up to the kernel size, the layer equals dense attention with the centre of the bias table."""
    local = layer(kernel_size=5)
    dense = WindowAttention(16, 2, window_size=5).double().eval()
    dense.load_state_dict(local.state_dict())
    x = grid_input(*grid)
    torch.testing.assert_close(local(x), dense(x))


def test_shrinking_keeps_the_window_and_lowers_the_dilation_first() -> None:
    weights = layer(grid=(9,), kernel_size=3, dilation=4).attention_map(grid_input(7), (3,))
    assert weights[0, 0].nonzero().flatten().tolist() == [1, 3, 5]


def test_padded_positions_are_attended_to_like_any_other() -> None:
    local = layer(small_grid="pad", dilation=2)
    x = grid_input(4, 7)
    whole = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 2))
    torch.testing.assert_close(local(x), local(whole)[:, :4])
    assert local.attention_map(x, (0, 0)).flatten(2).sum(2).max() < 1


def test_a_grid_that_is_too_small_is_refused_on_request() -> None:
    with pytest.raises(ValueError, match=r"kernel_size=\(3, 3\) with dilation=\(2, 2\) exceeds the grid \(5, 9\)"):
        layer(small_grid="error", dilation=2)(grid_input(5, 9))


def test_the_bias_gets_a_gradient_at_visible_offsets_only() -> None:
    local = layer(kernel_size=5, stride=1)
    assert local.relative_position_bias is not None
    local(grid_input(3, 9)).square().sum().backward()
    grad = local.relative_position_bias.grad
    assert grad is not None
    assert (grad[:, 2:7] != 0).all()
    assert (grad[:, [0, 1, 7, 8]] == 0).all()  # a window of 3 has offsets of -2 to 2


def test_padding_counts_in_the_cost() -> None:
    assert (
        layer(small_grid="pad", dilation=2).macs((6, 6)) - layer(small_grid="pad", dilation=2).macs((6, 5)) == 6 * 256
    )


def test_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="small_grid='crop' is not known"):
        NeighborhoodAttention(16, 2, small_grid="crop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"stride=\(5, 5\) exceeds kernel_size=\(3, 3\)"):
        NeighborhoodAttention(16, 2, kernel_size=3, stride=5)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((9, 7), {"kernel_size": 5, "stride": 2}),
        ((4, 6), {"kernel_size": 5, "dilation": 2, "small_grid": "pad"}),
        ((2, 7), {"kernel_size": 5, "dilation": (1, 2), "is_causal": (False, True)}),
        ((1, 7), {"kernel_size": 5}),
        ((1, 1), {"kernel_size": 5}),
    ],
)
def test_at_positions_the_layer_gives_what_it_gives_there_on_the_whole_grid(grid, options) -> None:
    local = layer(**options)
    x = grid_input(*grid)
    positions = torch.stack([torch.randint(n, (2, 5)) for n in grid], dim=-1)
    got = local(x, positions=positions)
    torch.testing.assert_close(got, local(x)[torch.arange(2)[:, None], positions[..., 0], positions[..., 1]])
    torch.testing.assert_close(local(x, positions=positions[0])[0], got[0])


@pytest.mark.parametrize(
    ("grid", "options"),
    [((9, 7), {"stride": 2}), ((4, 6), {"small_grid": "pad"}), ((4, 3), {}), ((1, 7), {}), ((1, 1), {})],
)
def test_every_token_gets_the_window_that_it_chose(grid, options) -> None:
    local = layer(kernel_size=5, token_kernel_sizes=[3, (5, 4)], **options)
    x = grid_input(*grid)
    one, two = (local(x, choice=torch.full(grid, number)) for number in (0, 1))
    choice = torch.randint(2, (2, *grid))
    torch.testing.assert_close(local(x, choice=choice), torch.where(choice[..., None] == 0, one, two))
    whole = layer(kernel_size=5, token_kernel_sizes=[5], **options)
    torch.testing.assert_close(whole(x, choice=torch.zeros(grid, dtype=torch.int64)), whole(x))


def test_positions_and_choices_that_do_not_fit_are_named() -> None:
    x, positions, choice = grid_input(8, 8), torch.zeros(3, 2).long(), torch.zeros(8, 8).long()
    with pytest.raises(ValueError, match="positions go from 0 to 8 on axis 1; 0 to 7 is allowed"):
        layer()(x, positions=torch.tensor([[0, 0], [0, 8]]))
    with pytest.raises(ValueError, match="token_kernel_sizes is empty"):
        layer()(x, choice=choice)
    with pytest.raises(ValueError, match="positions and choice are both given"):
        layer(token_kernel_sizes=[3])(x, positions=positions, choice=choice)
    with pytest.raises(ValueError, match=r"choice has shape \(8, 7\)"):
        layer(token_kernel_sizes=[3])(x, choice=choice[:, :7])
    with pytest.raises(ValueError, match=r"token_kernel_sizes=\(3, 5\) has \(5, 5\); from stride=\(1, 1\)"):
        layer(token_kernel_sizes=[3, 5])

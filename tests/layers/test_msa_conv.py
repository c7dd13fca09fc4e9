"""Facts about MSA-Conv layers."""

import pytest
import torch

from gridattn.layers.msa_conv import MSAConv, MSAConvLayer


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_of_the_released_layer() -> None:
    assert count(MSAConvLayer(64, 64)) == 49_344
    assert count(MSAConvLayer(64, 128, kernel_size=7)) == 413_888


def test_with_a_window_of_one_the_released_layer_is_a_convolution_of_value_plus_input() -> None:
    layer, x = MSAConvLayer(8, 6, kernel_size=1).eval(), torch.randn(2, 4, 5, 8)
    value = layer.qkv(x)[..., 16:]
    expected = ((value + x) @ layer.conv.weight.flatten(1).T).relu()
    torch.testing.assert_close(layer(x), expected)


def test_away_from_the_border_a_shift_of_the_input_shifts_the_output() -> None:
    layer, x = MSAConv(8, 2, dilation=2).eval(), torch.randn(1, 12, 12, 8)
    moved = layer(x.roll((1, 2), (1, 2)))
    torch.testing.assert_close(moved[:, 4:9, 4:9], layer(x)[:, 3:8, 2:7])


def test_a_cyclic_shift_makes_opposite_borders_neighbours() -> None:
    x = torch.randn(1, 6, 6, 8)
    changed = x.clone()
    changed[:, -1] += 1
    for shift, reaches in ((None, False), ((1, 1), True), ((-1, 1), True)):
        layer = MSAConv(8, 2, shift=shift).eval()
        assert torch.allclose(layer(x)[:, 0], layer(changed)[:, 0]) is not reaches


def test_a_shift_around_a_window_of_one_changes_nothing() -> None:
    plain, shifted = MSAConv(8, 2, kernel_size=1), MSAConv(8, 2, kernel_size=1, shift=(2, -1))
    shifted.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 4, 8)
    torch.testing.assert_close(shifted(x), plain(x))


def test_the_attention_map_of_a_shifted_layer_wraps_around() -> None:
    weights = MSAConv(8, 2, shift=(1, 0)).attention_map(torch.randn(1, 6, 6, 8), (5, 2))
    rows, columns = (weights[0, 0] > 0).nonzero(as_tuple=True)
    assert set(rows.tolist()) == {5, 0}  # row 5 is rolled to the first row: row 4 lies beyond the border
    assert set(columns.tolist()) == {1, 2, 3}


def test_weights_of_an_inner_position_sum_to_one_and_lie_in_its_window() -> None:
    weights = MSAConv(8, 2).attention_map(torch.randn(1, 6, 6, 8), (2, 3))
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(1, 2))
    torch.testing.assert_close(weights[..., 1:4, 2:5].sum((2, 3)), torch.ones(1, 2))


def test_one_exported_program_serves_every_grid() -> None:
    layer = MSAConv(8, 2, kernel_size=5, projection="conv").eval()
    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(2, 14, 14, 8),), dynamic_shapes=({1: height, 2: width},))
    x = torch.randn(2, 9, 17, 8)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)


def test_attention_dropout_acts_in_training_only() -> None:
    layer, x = MSAConv(8, 2, attention_dropout=0.5), torch.randn(1, 5, 5, 8)
    assert (layer(x) - layer(x)).abs().max() > 0
    assert torch.equal(layer.eval()(x), layer(x))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="has no centre"):
        MSAConv(8, 2, kernel_size=2)
    with pytest.raises(ValueError, match=r"shift=\(1,\) is not allowed; 2 ints are, one per axis"):
        MSAConv(8, 2, shift=(1,))
    with pytest.raises(ValueError, match="projection='dense' is not known; allowed: 'pointwise', 'conv'"):
        MSAConv(8, 2, projection="dense")

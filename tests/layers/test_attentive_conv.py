"""Facts about attentive convolution and the block of AttNet."""

import pytest
import torch

from gridattn.layers.attentive_conv import AttentiveConv, AttentiveConvBlock, GatedFeedForward
from gridattn.ops.large_kernel import depthwise_conv


def test_the_kernels_of_a_sample_depend_on_that_sample_only() -> None:
    layer, x = AttentiveConv(8), torch.randn(3, 6, 5, 8)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(layer.kernels(x[order]), layer.kernels(x)[order])
    assert (layer.kernels(x)[0] - layer.kernels(x)[1]).abs().max() > 1e-4


def test_without_tap_weights_it_is_a_static_convolution_with_one_kernel_for_all_channels() -> None:
    layer, x = AttentiveConv(8), torch.randn(2, 6, 5, 8)
    torch.nn.init.zeros_(layer.kernel_gen.weight)
    bias = layer.kernel_gen.bias
    static = (bias - 0.5 * bias.mean()).view(1, 1, 3, 3).expand(8, 1, 3, 3)
    torch.testing.assert_close(layer(x), layer.proj(depthwise_conv(layer.x_proj(x), static)))


def test_half_of_the_mean_is_inhibited_at_first() -> None:
    layer, x = AttentiveConv(8), torch.randn(2, 6, 5, 8)
    inhibited = layer.kernels(x).mean((2, 3))
    torch.nn.init.constant_(layer.difference_control, -50.0)
    torch.testing.assert_close(inhibited, 0.5 * layer.kernels(x).mean((2, 3)))


@pytest.mark.parametrize(("dim", "expansion", "hidden"), [(64, 8, 341), (16, 4.0, 42)])
def test_the_gated_feed_forward_has_two_thirds_of_the_expanded_width(dim: int, expansion: float, hidden: int) -> None:
    assert GatedFeedForward(dim, expansion).fc2.in_features == hidden


def test_a_block_with_tiny_layer_scales_is_nearly_the_identity_and_without_them_is_not() -> None:
    x = torch.randn(2, 6, 5, 8)
    assert (AttentiveConvBlock(8)(x) - x).abs().max() < 1e-4
    assert (AttentiveConvBlock(8, layer_scale=None)(x) - x).abs().max() > 1e-2


def test_cost_is_linear_in_the_number_of_positions_up_to_the_making_of_the_kernels() -> None:
    layer = AttentiveConv(32)
    making = 32 * 9 * (32 + 9)
    assert layer.macs((28, 14)) - making == 2 * (layer.macs((14, 14)) - making)


def test_one_exported_program_serves_every_grid() -> None:
    block = AttentiveConvBlock(8, norm=True).eval()
    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    program = torch.export.export(block, (torch.randn(2, 14, 14, 8),), dynamic_shapes=({1: height, 2: width},))
    x = torch.randn(2, 9, 17, 8)
    torch.testing.assert_close(program.module()(x), block(x))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="kernel_size=4 is not allowed; every entry must be odd"):
        AttentiveConv(8, kernel_size=4)
    with pytest.raises(ValueError, match="activation='relu' is not known; allowed: 'gelu', 'gelu_tanh', 'silu'"):
        AttentiveConv(8, activation="relu")

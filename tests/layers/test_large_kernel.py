"""Facts about large kernel attention and the block of the Visual Attention Network."""

import pytest
import torch

from gridattn.layers.large_kernel import LargeKernelAttention, VisualAttention, VisualAttentionBlock


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("dim", "without_biases"), [(32, 3_392), (64, 8_832), (128, 25_856), (512, 300_032)])
def test_parameters_are_those_of_the_three_convolutions(dim: int, without_biases: int) -> None:
    assert count(LargeKernelAttention(dim)) == without_biases + 3 * dim


def test_an_output_depends_on_inputs_up_to_a_distance_of_eleven_and_no_further() -> None:
    layer = LargeKernelAttention(4).double()
    x = torch.randn(1, 31, 31, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[0, 15, 15].sum(), x)
    seen = grad[0].abs().sum(-1) > 0
    box = torch.zeros_like(seen)
    box[4:27, 4:27] = True
    assert torch.equal(seen, box)


def test_far_from_the_borders_a_shift_of_the_input_shifts_the_output() -> None:
    layer = VisualAttention(8).double().eval()
    x = torch.randn(1, 40, 40, 8, dtype=torch.float64)
    moved = layer(x.roll((1, 2), (1, 2)))
    torch.testing.assert_close(moved[:, 15:25, 15:25], layer(x)[:, 14:24, 13:23])


def test_with_a_silent_last_projection_the_attention_module_is_its_shortcut() -> None:
    layer = VisualAttention(8)
    torch.nn.init.zeros_(layer.proj_2.weight)
    torch.nn.init.zeros_(layer.proj_2.bias)
    x = torch.randn(2, 6, 5, 8)
    assert torch.equal(layer(x), x)


def test_a_block_with_layer_scales_of_zero_is_the_identity() -> None:
    block = VisualAttentionBlock(8, layer_scale=0.0).eval()
    x = torch.randn(2, 6, 5, 8)
    assert torch.equal(block(x), x)


def test_a_dropped_path_leaves_whole_samples_unchanged() -> None:
    block = VisualAttentionBlock(8, drop_path=0.5).train()
    x = torch.randn(64, 3, 3, 8)
    unchanged = (block(x) == x).flatten(1).all(1)
    assert 0 < unchanged.sum() < 64


def test_batch_normalisation_of_the_block_uses_all_positions_of_the_batch() -> None:
    block = VisualAttentionBlock(4).train()
    x = 3 + torch.randn(4, 6, 5, 4)
    block(x)
    torch.testing.assert_close(block.norm1.running_mean, 0.1 * x.mean((0, 1, 2)))
    torch.testing.assert_close(block.norm1.running_var, 0.9 + 0.1 * x.flatten(0, 2).var(0))


def test_even_nominal_kernels_keep_the_size_of_the_grid() -> None:
    layer = LargeKernelAttention(8, kernel_size=7, dilation=2)
    assert layer.dilated.weight.shape == (8, 1, 4, 4)
    assert layer(torch.randn(1, 9, 6, 8)).shape == (1, 9, 6, 8)


def test_cost_grows_linearly_with_the_number_of_positions() -> None:
    layer = LargeKernelAttention(32)
    assert layer.macs((24, 15)) == 2 * layer.macs((12, 15)) == 2 * 12 * 15 * 32 * (25 + 49 + 32)


def test_one_exported_program_serves_every_grid() -> None:
    block = VisualAttentionBlock(8).eval()
    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    program = torch.export.export(block, (torch.randn(2, 14, 14, 8),), dynamic_shapes=({1: height, 2: width},))
    x = torch.randn(2, 9, 17, 8)
    torch.testing.assert_close(program.module()(x), block(x))

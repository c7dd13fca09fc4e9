"""Facts about attentive convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.ops.attentive_conv import attentive_kernels, lateral_inhibition, pool_context, routed_conv


def routed_reference(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """The equation: one shifted copy of the zero-padded grid per tap, weighted per sample and channel."""
    sizes, grid = kernel.shape[2:], x.shape[1:-1]
    padded = F.pad(x, [0, 0, *(size // 2 for size in reversed(sizes) for _ in range(2))])
    y = torch.zeros_like(x)
    for tap in torch.cartesian_prod(*[torch.arange(size) for size in sizes]).reshape(-1, len(sizes)).tolist():
        window = padded[(slice(None), *[slice(t, t + n) for t, n in zip(tap, grid)])]
        y = y + window * kernel[(slice(None), slice(None), *tap)].view(len(x), *[1] * len(grid), -1)
    return y


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1, 3, 5])), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_a_routed_convolution_is_the_sum_over_taps_of_each_sample(axes, batch: int) -> None:
    grid, kernel_size = zip(*axes)
    x = torch.randn(batch, *grid, 4, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(batch, 4, *kernel_size, dtype=torch.float64, requires_grad=True)
    ours, theirs = routed_conv(x, kernel), routed_reference(x, kernel)
    torch.testing.assert_close(ours, theirs)
    cotangent, inputs = torch.randn_like(ours), (x, kernel)
    for a, b in zip(torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(theirs, inputs, cotangent)):
        torch.testing.assert_close(a, b)


def test_bands_are_runs_of_the_row_major_sequence_that_overlap_where_they_do_not_divide_it() -> None:
    sequence = torch.arange(49.0)
    pooled = pool_context(sequence.view(1, 7, 7, 1), 3).flatten()
    edges = [(0, 6), (5, 11), (10, 17), (16, 22), (21, 28), (27, 33), (32, 39), (38, 44), (43, 49)]
    torch.testing.assert_close(pooled, torch.stack([sequence[a:b].mean() for a, b in edges]))
    nine_bins_of_seven = pool_context(torch.arange(63.0).view(1, 9, 7, 1), 3).flatten()
    torch.testing.assert_close(nine_bins_of_seven, torch.arange(63.0).view(9, 7).mean(1))


def test_a_grid_context_turns_with_the_image_and_bands_do_not() -> None:
    x = torch.randn(1, 6, 6, 2)
    for context, turns in (("grid", True), ("bands", False)):
        pooled, turned = (pool_context(t, 3, context=context).unflatten(1, (3, 3)) for t in (x, x.transpose(1, 2)))
        assert torch.allclose(turned, pooled.transpose(1, 2), atol=1e-6) is turns


@pytest.mark.parametrize("context", ["bands", "grid"])
def test_pooling_first_equals_projecting_first(context: str) -> None:
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 7, 9, 6), (6, 6), (6,)))
    pool_last = pool_context(F.linear(x, weight, bias), 3, context=context)
    pool_first = F.linear(pool_context(x, 3, context=context), weight, bias)
    torch.testing.assert_close(pool_first, pool_last)


def test_moving_positions_within_a_band_keeps_the_kernels_and_between_bands_changes_them() -> None:
    x, mix, taps, control = torch.randn(1, 9, 4, 6), torch.randn(6, 6), torch.randn(9, 9), torch.randn(6)
    swapped, moved = x.clone(), x.clone()
    swapped[:, 4, [0, 3]] = x[:, 4, [3, 0]]
    moved[:, [4, 7], 0] = x[:, [7, 4], 0]
    kernels = [attentive_kernels(t, mix, None, taps, None, control, kernel_size=(3, 3)) for t in (x, swapped, moved)]
    torch.testing.assert_close(kernels[0], kernels[1])
    assert (kernels[0] - kernels[2]).abs().max() > 1e-3


def test_inhibition_scales_the_mean_of_a_kernel_and_full_inhibition_makes_it_sum_to_zero() -> None:
    kernel, control = torch.randn(2, 4, 3, 5), torch.randn(4)
    inhibited = lateral_inhibition(kernel, control)
    torch.testing.assert_close(inhibited.mean((2, 3)), (1 - control.sigmoid()) * kernel.mean((2, 3)))
    full = lateral_inhibition(kernel, torch.full((4,), 50.0))
    torch.testing.assert_close(full.sum((2, 3)), torch.zeros(2, 4), atol=1e-5, rtol=0)
    flat = routed_conv(torch.ones(2, 5, 7, 4), full)
    torch.testing.assert_close(flat[:, 1:-1, 2:-2], torch.zeros(2, 3, 3, 4), atol=1e-5, rtol=0)


def test_wrong_arguments_are_named() -> None:
    x = torch.randn(2, 5, 5, 4)
    with pytest.raises(ValueError, match=r"kernel has shape \(1, 4, 3, 3\); \(2, 4, 2 kernel sizes\) is allowed"):
        routed_conv(x, torch.randn(1, 4, 3, 3))
    with pytest.raises(ValueError, match="context='rows' is not known; allowed: 'bands', 'grid'"):
        pool_context(x, 3, context="rows")

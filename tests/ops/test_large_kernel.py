"""Facts about large kernels made of small convolutions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.ops.large_kernel import decompose_kernel, depthwise_conv, large_kernel_attention


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dilation: tuple[int, ...]) -> torch.Tensor:
    """The equation: one shifted copy of the zero-padded grid per tap."""
    kernel, grid = weight.shape[2:], x.shape[1:-1]
    left = [d * (k - 1) // 2 for k, d in zip(kernel, dilation)]
    padded = F.pad(x, [0, 0, *(n for k, d in reversed(list(zip(kernel, dilation))) for n in (d * k, d * k))])
    y = torch.zeros_like(x) + bias
    for tap in torch.cartesian_prod(*[torch.arange(k) for k in kernel]).reshape(-1, len(kernel)).tolist():
        start = [d * k + d * t - p for t, d, k, p in zip(tap, dilation, kernel, left)]
        window = padded[(slice(None), *[slice(s, s + n) for s, n in zip(start, grid)])]
        y = y + window * weight[(slice(None), 0, *tap)]
    return y


@st.composite
def problems(draw):
    rank = draw(st.integers(1, 3))
    axis = st.tuples(st.integers(1, 9 if rank < 3 else 5), st.integers(1, 5 if rank < 3 else 3), st.integers(1, 4))
    return [list(values) for values in zip(*[draw(axis) for _ in range(rank)])]


@settings(deadline=None, max_examples=30)
@given(problems(), st.sampled_from(["direct", "phases"]))
def test_every_backend_computes_the_sum_over_taps_and_its_gradients(problem, backend: str) -> None:
    grid, kernel, dilation = problem
    make = {"dtype": torch.float64, "requires_grad": True}
    x, weight, bias = torch.randn(2, *grid, 3, **make), torch.randn(3, 1, *kernel, **make), torch.randn(3, **make)
    expected = reference(x, weight, bias, dilation)
    actual = depthwise_conv(x, weight, bias, dilation=dilation, backend=backend)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (x, weight, bias), cotangent),
        torch.autograd.grad(expected, (x, weight, bias), cotangent),
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("grid", [(19, 22), (20, 23), (2, 31), (1, 1)])
def test_phases_agree_with_the_dilated_convolution_in_float32_on_grids_that_the_dilation_does_not_divide(
    grid,
) -> None:
    x, weight, bias = torch.randn(2, *grid, 6), torch.randn(6, 1, 7, 7) / 7, torch.randn(6)
    direct, phases = (depthwise_conv(x, weight, bias, dilation=3, backend=b) for b in ("direct", "phases"))
    torch.testing.assert_close(phases, direct, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "sizes"), [(21, 3, (5, 7)), (7, 2, (3, 4)), (14, 3, (5, 5)), (28, 4, (7, 7))]
)
def test_a_large_kernel_splits_into_the_sizes_of_the_paper(kernel_size: int, dilation: int, sizes) -> None:
    assert decompose_kernel(kernel_size, dilation) == sizes


def test_the_output_is_zero_wherever_the_input_is() -> None:
    x = torch.randn(1, 9, 9, 4) * (torch.rand(1, 9, 9, 4) > 0.5)
    weights = [torch.randn(4, 1, 5, 5), torch.randn(4), torch.randn(4, 1, 7, 7), torch.randn(4), torch.randn(4, 4)]
    y = large_kernel_attention(x, *weights, torch.randn(4))
    assert (y[x == 0] == 0).all()
    assert (y[x != 0] != 0).all()


def test_the_point_wise_map_scales_the_output_and_a_constant_one_is_the_identity() -> None:
    x = torch.randn(1, 9, 9, 4)
    convs = [torch.randn(4, 1, 5, 5), torch.randn(4), torch.randn(4, 1, 7, 7), torch.randn(4)]
    mix, bias = torch.randn(4, 4), torch.randn(4)
    torch.testing.assert_close(
        large_kernel_attention(x, *convs, 3 * mix, 3 * bias), 3 * large_kernel_attention(x, *convs, mix, bias)
    )
    assert torch.equal(large_kernel_attention(x, *convs, torch.zeros(4, 4), torch.ones(4)), x)


def test_wrong_arguments_are_named() -> None:
    x = torch.randn(1, 5, 5, 4)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 1, 3, 3\); \(4, 1, 2 kernel sizes\)"):
        depthwise_conv(x, torch.randn(3, 1, 3, 3))
    with pytest.raises(ValueError, match="backend='fft' is not known; allowed: 'auto', 'direct', 'phases'"):
        depthwise_conv(x, torch.randn(4, 1, 3, 3), backend="fft")
    with pytest.raises(ValueError, match="dilation=0 is not allowed"):
        depthwise_conv(x, torch.randn(4, 1, 3, 3), dilation=0)
    with pytest.raises(ValueError, match="1 to 3 grid axes"):
        depthwise_conv(torch.randn(2, 4), torch.randn(4, 1))

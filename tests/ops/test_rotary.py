"""Facts of rotary positions."""

import pytest
import torch

from gridattn.ops.rotary import rotary_frequencies, rotate


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_pair_turns_by_its_angle_in_every_precision(interleaved) -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    angle = torch.arange(5.0, dtype=torch.float64).view(5, 1, 1) * rotary_frequencies(8).double()
    pairs = x.unflatten(-1, (4, 2)) if interleaved else x.unflatten(-1, (2, 4)).mT
    a, b = pairs.unbind(-1)
    turned = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
    expected = (turned if interleaved else turned.mT).flatten(-2)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        y = rotate(x.to(dtype), angle.sin().to(dtype), angle.cos().to(dtype), interleaved=interleaved)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


def test_a_strided_input_and_its_gradient_are_those_of_a_contiguous_one() -> None:
    sin, cos = torch.randn(2, 5, 1, 4).unbind(0)
    wide = torch.randn(2, 5, 3, 16, requires_grad=True)
    strided, contiguous = wide[..., ::2], wide[..., ::2].detach().contiguous().requires_grad_()
    rotate(strided, sin, cos).square().sum().backward()
    rotate(contiguous, sin, cos).square().sum().backward()
    torch.testing.assert_close(wide.grad[..., ::2], contiguous.grad)

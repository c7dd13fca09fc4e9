"""Linear layers by oneDNN in inference."""

from unittest import mock

import pytest
import torch
from torch import nn

from gridattn.layers import linear as module
from gridattn.layers.linear import apply_linear
from gridattn.layers.mlp import Mlp


@pytest.fixture(autouse=True)
def any_size():
    with mock.patch.object(module, "ONEDNN_MACS", dict.fromkeys(module.ONEDNN_MACS, 1)):
        yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ReLU()])
@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (1, 4, 3, 8)])
def test_one_pass_gives_what_two_give(bias, activation, shape) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(8, 12, bias=bias), torch.randn(shape)
    expected = linear(x) if activation is None else activation(linear(x))
    with torch.no_grad(), mock.patch.object(module, "_ONEDNN", wraps=module._ONEDNN) as call:
        torch.testing.assert_close(apply_linear(linear, x, activation), expected, rtol=1e-5, atol=1e-6)
    assert call.called is (module._ONEDNN is not None and not isinstance(activation, nn.ReLU))


def test_strided_input_is_taken() -> None:
    linear, x = nn.Linear(8, 12), torch.randn(8, 5, 3).movedim(0, -1)
    with torch.no_grad():
        torch.testing.assert_close(apply_linear(linear, x, nn.GELU()), nn.GELU()(linear(x)), rtol=1e-5, atol=1e-6)


def refusals():
    plain = nn.Linear(8, 12)
    hooked = nn.Linear(8, 12)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    replaced = nn.Sequential(nn.Linear(8, 12))
    x = torch.randn(3, 8)
    yield "hooks", hooked, x
    yield "another module", replaced, x
    yield "float64", nn.Linear(8, 12).double(), x.double()
    yield "bfloat16", nn.Linear(8, 12).bfloat16(), x.bfloat16()
    yield "no rows", plain, x[:0]


@pytest.mark.parametrize(("linear", "x"), [pytest.param(*case, id=name) for name, *case in refusals()])
def test_everything_else_is_called_as_it_is(linear, x) -> None:
    with torch.no_grad(), mock.patch.object(module, "_ONEDNN") as call:
        assert torch.equal(apply_linear(linear, x), linear(x))
    assert not call.called


def test_gradients_and_autocast_keep_the_module() -> None:
    linear, x = nn.Linear(8, 12), torch.randn(3, 8)
    with mock.patch.object(module, "_ONEDNN") as call:
        assert apply_linear(linear, x).requires_grad
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert apply_linear(linear, x).dtype == torch.bfloat16
    assert not call.called


def test_a_trace_is_not_bound_to_the_sizes_that_onednn_gains_by() -> None:
    layer, x = Mlp(8, 12), torch.randn(20, 8)
    with mock.patch.object(module, "ONEDNN_MACS", dict.fromkeys(module.ONEDNN_MACS, 1000)), torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
        torch.testing.assert_close(program(x[:3]), layer(x[:3]), rtol=1e-5, atol=1e-6)

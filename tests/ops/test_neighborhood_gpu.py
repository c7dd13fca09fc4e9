"""The backends on a CUDA device agree with the definition, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from neighborhood_problems import Problem, problems
from torch import Tensor

from gridattn.ops import TileLayout, neighborhood_attention, neighborhood_attention_in_layout
from gridattn.ops.neighborhood import BACKENDS

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on_device(problem: Problem, backend: str) -> Problem:
    """The problem on the GPU with channels that FlexAttention takes, without the options that the backend lacks."""
    tensors = {
        name: t if name == "bias" else torch.nn.functional.pad(t, (0, 16)) + 0.01
        for name, t in problem.tensors.items()
        if name not in BACKENDS[backend].lacks
    }
    mask = None if problem.key_mask is None or "key_mask" in BACKENDS[backend].lacks else problem.key_mask.to(DEVICE)
    return Problem({name: t.to(DEVICE) for name, t in tensors.items()}, problem.settings, mask)


@pytest.mark.parametrize("backend", ["triton", "flex", "tiled"])
@settings(deadline=None, max_examples=20)
@given(problem=problems())
def test_agrees_with_the_definition_forward_and_backward(backend: str, problem: Problem) -> None:
    problem = on_device(problem, backend)
    expected = problem.run("reference", torch.float64)
    for name, tensor in problem.run(backend, torch.float32).items():
        torch.testing.assert_close(
            tensor.double(), expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", ["triton", "flex", "auto"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_in_training(backend: str, dtype: torch.dtype) -> None:
    leaves = [torch.randn(2, 40, 36, 4, 64, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3)]
    exact = [t.detach().double().requires_grad_() for t in leaves]

    def run(tensors: list[Tensor], name: str) -> tuple[Tensor, ...]:
        out = neighborhood_attention(*tensors, (13, 8), stride=(2, 1), backend=name)
        return out, *torch.autograd.grad(out.double().sin().sum(), tensors)

    for got, expected in zip(run(leaves, backend), run(exact, "tiled")):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=5e-2, atol=5e-2)


def test_tokens_in_tile_order_give_the_same() -> None:
    layout = TileLayout((40, 36), (16, 8))
    q, k, v = (torch.randn(2, 40, 36, 4, 64, device=DEVICE) for _ in range(3))
    bias = torch.randn(4, 25, 15, device=DEVICE)
    got = neighborhood_attention_in_layout(*map(layout.to_tiles, (q, k, v)), layout, (13, 8), bias=bias)
    expected = neighborhood_attention(q, k, v, (13, 8), bias=bias, backend="tiled")
    torch.testing.assert_close(layout.to_grid(got), expected, rtol=1e-3, atol=1e-3)

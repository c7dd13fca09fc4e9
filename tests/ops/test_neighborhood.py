"""Neighborhood attention: every backend agrees with the definition, and the definition with hand-worked numbers."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from neighborhood_problems import Problem, installed_backends, problems
from torch import Tensor

from gridattn.ops import neighborhood_attention
from gridattn.ops.neighborhood import tiled

BACKENDS = ["reference", *installed_backends()]


@pytest.mark.parametrize("backend", installed_backends())
@settings(deadline=None, max_examples=300)
@given(problem=problems())
def test_backend_agrees_with_the_definition_forward_and_backward(backend: str, problem: Problem) -> None:
    expected = problem.run("reference", torch.float64)
    for name, tensor in problem.run(backend, torch.float32).items():
        torch.testing.assert_close(
            tensor.double(), expected[name], rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@settings(deadline=None, max_examples=60)
@given(problem=problems())
def test_working_in_chunks_changes_neither_results_nor_gradients(problem: Problem) -> None:
    with mock.patch.object(tiled, "CHUNK_ELEMENTS", 1):
        got = problem.run("tiled", torch.float64)
    torch.testing.assert_close(got, problem.run("reference", torch.float64))


HAND = {
    "query": [(0.5, -1), (1, 0), (0, 1), (-0.5, 0.5), (1, 1)],
    "key": [(1, 0), (0, 1), (1, 1), (-1, 0.5), (0.5, -0.5)],
    "value": [(1,), (2,), (3,), (4,), (5,)],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "out", "lse"),
    [
        (
            {"kernel_size": 3},
            [1.724388, 2.000000, 2.889789, 3.912452, 3.464658],
            [0.962936, 1.620621, 1.701169, 1.224270, 1.760516],
        ),
        (
            {"kernel_size": 3, "stride": 2},
            [1.724388, 2.000000, 3.680840, 3.912452, 3.464658],
            [0.962936, 1.620621, 1.424173, 1.224270, 1.760516],
        ),
        (
            {"kernel_size": 2, "dilation": 2, "is_causal": True},
            [1.0, 2.0, 2.339523, 3.088159, 3.391141],
            [0.353553, 0.0, 1.107940, 1.138990, 1.631835],
        ),
    ],
)
def test_hand_worked_numbers(backend: str, options: dict, out: list[float], lse: list[float]) -> None:
    tensors = {name: torch.tensor(rows, dtype=torch.float32)[None, :, None] for name, rows in HAND.items()}
    got = neighborhood_attention(**tensors, **options, backend=backend, return_lse=True)
    torch.testing.assert_close(got[0].flatten(), torch.tensor(out), atol=2e-6, rtol=0)
    torch.testing.assert_close(got[1].flatten(), torch.tensor(lse), atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_in_float64_match_finite_differences(backend: str, causal: bool) -> None:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    tensors = [randn(1, 5, 4, 2, 2), randn(1, 5, 4, 1, 2), randn(1, 5, 4, 1, 3), randn(2, 3, 5)]
    extra = [randn(1, 2, 1, 2), randn(1, 2, 1, 3)]
    mask = torch.ones(1, 5, 4, dtype=torch.bool)
    mask[0, 2, 1] = mask[0, 0, 0] = False

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, keys: Tensor, values: Tensor) -> tuple:
        return neighborhood_attention(
            query,
            key,
            value,
            (2, 3),
            stride=(1, 2),
            dilation=(2, 1),
            is_causal=(causal, False),
            bias=bias,
            key_mask=mask,
            additional_keys=keys,
            additional_values=values,
            return_lse=True,
            backend=backend,
        )

    assert torch.autograd.gradcheck(run, (*tensors, *extra), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_stays_close_and_keeps_its_dtype(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = (torch.randn(2, 9, 11, 2, 16).to(dtype).requires_grad_() for _ in range(3))
    bias = 0.5 * torch.randn(2, 9, 5)
    out, lse = neighborhood_attention(q, k, v, (5, 3), bias=bias, backend=backend, return_lse=True)
    exact = neighborhood_attention(*(t.detach().double() for t in (q, k, v)), (5, 3), bias=bias, backend="reference")
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        neighborhood_attention(q, k, v, (5, 3), bias=bias, backend=backend), out, atol=tolerance, rtol=tolerance
    )
    assert all(g.dtype == dtype for g in torch.autograd.grad(out.float().sum(), (q, k, v)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_empty_results_and_gradients(backend: str) -> None:
    q, k, v = (torch.randn(0, 6, 7, 2, 4, requires_grad=True) for _ in range(3))
    out, lse = neighborhood_attention(q, k, v, 3, backend=backend, return_lse=True)
    alone = neighborhood_attention(q, k, v, 3, backend=backend)
    assert out.shape == alone.shape == (0, 6, 7, 2, 4)
    assert lse.shape == (0, 6, 7, 2)
    (out.sum() + alone.sum() + lse.sum()).backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_without_keys_inside_a_trace_gives_zero_and_no_nan(backend: str) -> None:
    q, k, v = (torch.randn(1, 8, 1, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[False, False, False, False, True, True, True, True]])

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple:
        pair = neighborhood_attention(q, k, v, 3, key_mask=mask, backend=backend, return_lse=True)
        return *pair, neighborhood_attention(q, k, v, 3, key_mask=mask, backend=backend)

    out, lse, alone = torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v, mask)
    for result in (out, alone):
        assert result[0, :3].eq(0).all()
        assert result[0, 3:].ne(0).all()
    assert lse[0, :3].eq(-torch.inf).all()
    assert lse[0, 3:].isfinite().all()
    grads = torch.autograd.grad(out.sum() + alone.sum() + lse[0, 3:].sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"stride": 2, "is_causal": True}, {"dilation": 2, "return_lse": True}])
def test_compiles_as_one_graph_with_the_same_results_and_gradients(backend: str, options: dict) -> None:
    q, k, v = (torch.randn(2, 9, 7, 2, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 5, 5, requires_grad=True)
    mask = torch.rand(2, 9, 7) > 0.05

    def run(*tensors: Tensor) -> Tensor:
        result = neighborhood_attention(*tensors[:3], 3, bias=tensors[3], key_mask=mask, backend=backend, **options)
        return torch.cat([t.flatten() for t in result]) if isinstance(result, tuple) else result

    eager, compiled = run(q, k, v, bias), torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v, bias)
    torch.testing.assert_close(compiled, eager)
    weight = torch.randn_like(eager)
    grads = [torch.autograd.grad((out * weight).sum(), (q, k, v, bias)) for out in (eager, compiled)]
    torch.testing.assert_close(grads[1], grads[0])


def test_an_exported_program_holds_only_plain_operators_and_gives_the_same_result() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor) -> Tensor:
            out = neighborhood_attention(
                q, k, v, (3, 4), dilation=(1, 2), additional_keys=extra, additional_values=extra
            )
            assert isinstance(out, Tensor)
            return out

    tensors = [*torch.randn(3, 2, 9, 11, 2, 8), torch.randn(2, 3, 2, 8)]
    program = torch.export.export(Attend(), tuple(tensors))
    calls = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert calls <= {"aten", "<built-in function getitem>"}
    torch.testing.assert_close(program.module()(*tensors), Attend()(*tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_in_the_dtype_of_autocast(backend: str) -> None:
    q, k, v = (torch.randn(1, 8, 2, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = neighborhood_attention(q, k, v, 3, backend=backend, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    halves = [t.bfloat16() for t in (q, k, v)]
    torch.testing.assert_close(lse, neighborhood_attention(*halves, 3, backend=backend, return_lse=True)[1])
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend: str) -> None:
    q, k, v = torch.randn(3, 2, 13, 9, 2, 8)
    runs = [neighborhood_attention(q, k, v, (5, 4), stride=2, backend=backend) for _ in range(2)]
    assert torch.equal(runs[0], runs[1])

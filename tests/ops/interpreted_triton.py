"""The Triton kernels in Triton's interpreter; run by test_neighborhood_triton.py in a process of its own, since Triton
asks when it is imported whether it is to interpret."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from neighborhood_problems import Problem, problems
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gridattn.ops import neighborhood_attention
from gridattn.ops.neighborhood import reference, triton_ops
from gridattn.ops.neighborhood.plan import make_plan
from gridattn.ops.neighborhood.triton_tables import make_tables


def without_bias(problem: Problem) -> Problem:
    """The problem without the option that the kernels do not take."""
    tensors = {name: tensor for name, tensor in problem.tensors.items() if name != "bias"}
    return Problem(tensors, problem.settings, problem.key_mask)


@settings(deadline=None, max_examples=4)
@given(problem=problems())
def test_agrees_with_the_definition_forward_and_backward(problem: Problem) -> None:
    problem = without_bias(problem)
    expected = problem.run("reference", torch.float64)
    for name, tensor in problem.run("triton", torch.float32).items():
        torch.testing.assert_close(
            tensor.double(), expected[name], rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((150,), {"kernel_size": 90, "stride": 30}),
        ((100,), {"kernel_size": 65, "stride": 3, "is_causal": True}),
        ((17, 12), {"kernel_size": (5, 6), "dilation": (3, 2), "stride": (2, 3)}),
        ((4, 3, 9), {"kernel_size": (2, 3, 4), "is_causal": (True, False, False), "dilation": (2, 1, 2)}),
    ],
)
def test_whole_tiles_and_masked_tiles_add_up(grid: tuple[int, ...], options: dict) -> None:
    tensors = {
        "query": torch.randn(1, *grid, 2, 24, dtype=torch.float64, requires_grad=True),
        "key": torch.randn(1, *grid, 1, 24, dtype=torch.float64, requires_grad=True),
        "value": torch.randn(1, *grid, 1, 20, dtype=torch.float64, requires_grad=True),
    }

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        cast = [t.to(dtype) for t in tensors.values()]
        out, lse = neighborhood_attention(*cast, **options, backend=backend, return_lse=True)
        return [out, lse, *torch.autograd.grad(out.sin().sum() + lse.cos().sum(), list(tensors.values()))]

    for got, expected in zip(run("triton", torch.float32), run("reference", torch.float64)):
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-5)


def test_these_problems_have_tiles_that_are_skipped_and_tiles_without_a_mask() -> None:
    tables = make_tables(make_plan((150,), 90, 30), 32, 32, torch.device("cpu"))
    for starts, partials, columns in ((tables.starts, tables.partials, tables.columns), tables.by_key):
        assert 0 < int((partials - starts[:-1]).sum()) < len(columns)
        assert len(columns) < (len(tables.starts) - 1) * (len(tables.by_key[0]) - 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_stays_close_and_keeps_its_dtype(dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = (torch.randn(1, 7, 6, 1, 16).to(dtype).requires_grad_() for _ in range(3))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out, lse = neighborhood_attention(q, k, v, (5, 3), backend="triton", return_lse=True)
    expected = neighborhood_attention(*exact, (5, 3), backend="reference")
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    grads = torch.autograd.grad(out.sin().sum(), (q, k, v))
    for grad, other in zip(grads, torch.autograd.grad(expected.sin().sum(), exact)):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), other, atol=8 * tolerance, rtol=8 * tolerance)


def test_slices_of_one_projection_and_any_memory_order_are_taken() -> None:
    qkv = torch.randn(2, 6, 7, 3, 2, 8)
    slices = [*qkv.unbind(dim=-3)[:2], torch.randn(2, 2, 7, 6, 8).permute(0, 3, 2, 1, 4)]
    got = neighborhood_attention(*slices, 3, backend="triton")
    torch.testing.assert_close(got, neighborhood_attention(*slices, 3, backend="reference"))


def test_whatever_masked_keys_hold_does_not_matter_and_a_query_without_keys_gets_zero() -> None:
    plan = make_plan((9, 8), 3)
    q, k, v = (torch.randn(2, 9, 8, 2, 16, requires_grad=True) for _ in range(3))
    mask = torch.rand(9, 8, 2).movedim(-1, 0) > 0.4  # in any memory order
    mask[0, :4, :4] = False

    def run(k: Tensor, v: Tensor, attend: Callable) -> list[Tensor]:
        out, lse = attend(q, k, v, plan, 0.3, None, mask)
        return [out, lse, *torch.autograd.grad(out.sin().sum() + lse[lse.isfinite()].cos().sum(), (q, k, v))]

    expected, clean = run(k, v, reference.attend), run(k, v, triton_ops.attend)
    k.data[~mask] = v.data[~mask] = torch.nan
    assert (clean[1] == -torch.inf).any()
    for own, other, dirty in zip(clean, expected, run(k, v, triton_ops.attend)):
        torch.testing.assert_close(own, other, rtol=2e-4, atol=2e-5)
        assert torch.equal(dirty, own)


def test_is_a_well_formed_operator() -> None:
    tensors = [torch.randn(1, 6, heads, 8, requires_grad=True) for heads in (2, 1, 1)]
    geometry = ([3], [2], [1], [True])
    mask = torch.ones(1, 6, dtype=torch.bool)
    torch.library.opcheck(torch.ops.gridattn.neighborhood_triton.default, (*tensors, mask, *geometry, 0.3))


def test_compiles_into_one_graph_with_gradients() -> None:
    tensors = [torch.randn(1, 6, 7, 2, 8, requires_grad=True) for _ in range(3)]

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse = neighborhood_attention(2 * query, key, value, 3, backend="triton", return_lse=True)
        return out.sin().sum() + lse.cos().sum()

    expected = torch.autograd.grad(step(*tensors), tensors)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*tensors), tensors), expected)


def test_an_empty_batch_gives_empty_results() -> None:
    q = torch.randn(0, 6, 6, 2, 8, requires_grad=True)
    out, lse = neighborhood_attention(q, q, q, 3, backend="triton", return_lse=True)
    assert (out.shape, lse.shape) == ((0, 6, 6, 2, 8), (0, 6, 6, 2))
    (out.sum() + lse.sum()).backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape


def test_counts_the_operations_of_visible_pairs_only() -> None:
    plan = make_plan((5, 6), (3, 5), is_causal=(True, False))
    q, k, v = (torch.randn(1, 5, 6, 2, depth, requires_grad=True) for depth in (8, 8, 12))
    with FlopCounterMode(display=False) as counter:
        out, _ = triton_ops.attend(q, k, v, plan, 0.3)
    assert counter.get_total_flops() == 2 * 2 * plan.num_visible * (8 + 12)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * plan.num_visible * (3 * 8 + 2 * 12)


def test_says_what_it_does_not_take() -> None:
    q = torch.randn(1, 6, 2, 8)
    with pytest.raises(ValueError, match="backend='triton' cannot run this problem: it does not take bias"):
        neighborhood_attention(q, q, q, 3, bias=torch.zeros(2, 5), backend="triton")
    with pytest.raises(ValueError, match=r"torch.float64 is not one of"):
        neighborhood_attention(*[q.double()] * 3, 3, backend="triton")
    wide = torch.randn(1, 6, 1, 300)
    with pytest.raises(ValueError, match="a head has 300 channels; at most 256"):
        neighborhood_attention(wide, wide, wide, 3, backend="triton")

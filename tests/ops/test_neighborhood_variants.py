"""Queries at given positions, packed grids, and window sizes per query: each equals what it is made of, forward and
backward."""

from collections.abc import Callable
from math import prod
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neighborhood_problems import Problem, installed_backends, problems
from torch import Tensor

from gridattn.ops import (
    neighborhood_attention,
    neighborhood_attention_at,
    neighborhood_attention_mixed,
    neighborhood_attention_packed,
)
from gridattn.ops.neighborhood import make_plan, mixed, tiled
from gridattn.ops.neighborhood.checks import count_visible_keys
from gridattn.ops.relative_bias import crop_relative_bias

WAYS = ["reference", "gather", "grid", "auto"]


def run(attend: Callable[..., Any], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, lse and the gradients of a function of both."""
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    out, lse = attend(**leaves, return_lse=True)
    alone = attend(**leaves)
    loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in (out, lse, alone))
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), grads)]
    return {"out": out, "lse": lse, "alone": alone, **{f"grad {name}": g for name, g in zip(leaves, grads)}}


@st.composite
def asked_problems(draw: st.DrawFn) -> tuple[Problem, Tensor]:
    """A problem and distinct positions on its grid, for all samples or for each."""
    problem = draw(problems())
    batch, *grid = problem.tensors["key"].shape[:-2]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    count = draw(st.integers(1, prod(grid)))
    samples = draw(st.sampled_from([1, batch]))
    flat = torch.stack([torch.randperm(prod(grid), generator=generator)[:count] for _ in range(samples)])
    places = torch.stack(torch.unravel_index(flat, grid), dim=-1)
    return problem, places[0] if samples == 1 and draw(st.booleans()) else places.expand(batch, -1, -1)


def take(tensor: Tensor, places: Tensor) -> Tensor:
    """(B, *grid, ...) at (M, rank) or (B, M, rank)."""
    sample = torch.arange(len(tensor))[:, None]
    return tensor[(sample, *places.expand(len(tensor), *places.shape[-2:]).unbind(-1))]


@settings(deadline=None, max_examples=40)
@given(asked=asked_problems())
@pytest.mark.parametrize("way", WAYS)
def test_a_query_at_a_position_gives_what_the_whole_grid_gives_there(way: str, asked: tuple[Problem, Tensor]) -> None:
    problem, places = asked
    options = {**problem.settings, "key_mask": problem.key_mask}

    def whole(query: Tensor, return_lse: bool = False, **others: Tensor) -> Any:
        result = neighborhood_attention(query, **others, **options, return_lse=return_lse, backend="reference")
        return tuple(take(t, places) for t in result) if return_lse else take(result, places)

    def there(query: Tensor, key: Tensor, value: Tensor, return_lse: bool = False, **others: Tensor) -> Any:
        query = take(query, places)
        return neighborhood_attention_at(
            query, key, value, places, **others, **options, return_lse=return_lse, backend=way
        )

    torch.testing.assert_close(run(there, problem.tensors), run(whole, problem.tensors))


@settings(deadline=None, max_examples=20)
@given(asked=asked_problems())
def test_gathering_in_chunks_changes_neither_results_nor_gradients(asked: tuple[Problem, Tensor]) -> None:
    problem, places = asked

    def there(way: str) -> Callable[..., Any]:
        def attend(query: Tensor, key: Tensor, value: Tensor, return_lse: bool = False, **others: Tensor) -> Any:
            options = {**problem.settings, "key_mask": problem.key_mask, "return_lse": return_lse, "backend": way}
            return neighborhood_attention_at(take(query, places), key, value, places, **others, **options)

        return attend

    with mock.patch.object(tiled, "CHUNK_ELEMENTS", 1):
        got = run(there("gather"), problem.tensors)
    torch.testing.assert_close(got, run(there("reference"), problem.tensors))


@pytest.mark.parametrize("way", ["reference", "gather", "auto"])
def test_a_position_asked_twice_answers_both_queries(way: str) -> None:
    q, k, v = torch.randn(1, 4, 2, 8), *torch.randn(2, 1, 6, 7, 2, 8)
    places = torch.tensor([[2, 3], [0, 6], [2, 3], [5, 0]])
    together = neighborhood_attention_at(q, k, v, places, 3, backend=way)
    for m in range(4):
        alone = neighborhood_attention_at(q[:, m : m + 1], k, v, places[m : m + 1], 3, backend="reference")
        torch.testing.assert_close(together[:, m : m + 1], alone)


def test_the_part_of_the_grid_without_queries_does_not_count() -> None:
    """Neither keys that no window holds nor a mask without keys elsewhere matter."""
    q, k, v = torch.randn(1, 3, 2, 8), *torch.randn(2, 1, 30, 2, 8)
    mask = torch.zeros(1, 30, dtype=torch.bool)
    mask[:, 4:9] = True
    places = torch.tensor([[5], [6], [7]])
    k[:, 9:] = torch.nan
    for way in WAYS:
        assert neighborhood_attention_at(q, k, v, places, 3, key_mask=mask, backend=way).isfinite().all()


@settings(deadline=None, max_examples=40)
@given(problem=problems(), data=st.data())
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_packed_grids_give_what_each_gives_alone(backend: str, problem: Problem, data: st.DataObject) -> None:
    first = problem.tensors["query"].shape[1:-2]
    grids = [first] + [
        data.draw(st.sampled_from([first, tuple(n + data.draw(st.integers(0, 3)) for n in first)])) for _ in range(3)
    ]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    leaves = {
        name: torch.randn(sum(map(prod, grids)), *problem.tensors[name].shape[-2:], generator=generator).double()
        for name in ("query", "key", "value")
    }
    if "bias" in problem.tensors:
        leaves["bias"] = problem.tensors["bias"]
    if "additional_keys" in problem.tensors:
        for name in ("additional_keys", "additional_values"):
            shape = len(grids), *problem.tensors[name].shape[1:]
            leaves[name] = torch.randn(shape, generator=generator).double()
    mask = torch.rand(sum(map(prod, grids)), generator=generator) > 0.3 if data.draw(st.booleans()) else None
    bounds = [0, *torch.tensor([prod(grid) for grid in grids]).cumsum(0).tolist()]
    options = problem.settings
    if mask is not None:
        for grid, low, high in zip(grids, bounds, bounds[1:]):
            plan = make_plan(grid, *(options[n] for n in ("kernel_size", "stride", "dilation", "is_causal")))
            mask[low:high] |= (count_visible_keys(mask[low:high].view(1, *grid), plan) == 0).flatten()

    def alone(return_lse: bool = False, **t: Tensor) -> Any:
        results = []
        for sample, (grid, low, high) in enumerate(zip(grids, bounds, bounds[1:])):
            tensors = {n: t[n][low:high].unflatten(0, grid)[None] for n in ("query", "key", "value")}
            tensors |= {n: t[n][sample : sample + 1] for n in t if n.startswith("additional")}
            kept = None if mask is None else mask[low:high].view(1, *grid)
            tensors |= {"bias": t.get("bias"), "key_mask": kept}
            result = neighborhood_attention(**tensors, **options, return_lse=return_lse, backend="reference")
            results.append([r.flatten(0, len(grid)) for r in (result if return_lse else [result])])
        joined = [torch.cat(parts) for parts in zip(*results)]
        return joined if return_lse else joined[0]

    def packed(return_lse: bool = False, **t: Tensor) -> Any:
        return neighborhood_attention_packed(
            **t, grids=grids, key_mask=mask, **options, return_lse=return_lse, backend=backend
        )

    torch.testing.assert_close(run(packed, leaves), run(alone, leaves))


@pytest.mark.parametrize("backend", installed_backends())
def test_packed_grids_give_the_bits_of_calls_on_their_own(backend: str) -> None:
    grids = [(7, 9), (5, 5), (7, 9), (12, 6)]
    q, k, v = torch.randn(3, sum(map(prod, grids)), 4, 16)
    got = neighborhood_attention_packed(q, k, v, grids, 5, stride=2, backend=backend).split([prod(g) for g in grids])
    begin = 0
    for part, grid in zip(got, grids):
        own = [t[begin : begin + prod(grid)].view(1, *grid, 4, 16) for t in (q, k, v)]
        expected = neighborhood_attention(*own, 5, stride=2, backend=backend)[0].flatten(0, 1)
        if backend == "cpu":
            assert torch.equal(part, expected)
        torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-6)
        begin += prod(grid)


@st.composite
def mixed_problems(draw: st.DrawFn) -> tuple[Problem, list, Tensor]:
    """A problem without additional tokens, window sizes and a choice among them."""
    problem = draw(problems().filter(lambda p: "additional_keys" not in p.tensors))
    batch, *grid, heads, _ = problem.tensors["query"].shape
    smallest = [max(2, s) for s in problem.settings["stride"]]
    top = problem.settings["kernel_size"]
    sizes = [
        tuple(draw(st.integers(low, high)) for low, high in zip(smallest, top)) for _ in range(draw(st.integers(0, 2)))
    ]
    sizes.insert(draw(st.integers(0, len(sizes))), tuple(top))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = draw(st.sampled_from([grid, [batch, *grid], [1, *grid, heads], [batch, *grid, heads]]))
    choice = torch.randint(len(sizes), shape, generator=generator)
    if draw(st.booleans()) and shape == grid:
        choice[grid[0] // 2 :] = draw(st.integers(0, len(sizes) - 1))
    if problem.key_mask is not None:
        for size in sizes:
            plan = make_plan(grid, size, *(problem.settings[n] for n in ("stride", "dilation", "is_causal")))
            problem.key_mask |= count_visible_keys(problem.key_mask, plan) == 0
    return problem, sizes, choice


@settings(deadline=None, max_examples=40)
@given(drawn=mixed_problems())
@pytest.mark.parametrize("cost", [0, 4, 1e9])
def test_every_query_gets_the_window_size_that_it_chose(cost: float, drawn: tuple[Problem, list, Tensor]) -> None:
    problem, sizes, choice = drawn
    batch, *grid, heads, _ = problem.tensors["query"].shape
    options = {n: problem.settings[n] for n in ("stride", "dilation", "is_causal", "scale")}
    options["key_mask"] = problem.key_mask
    spread = choice if choice.ndim > len(grid) else choice[None]
    spread = (spread if choice.ndim == len(grid) + 2 else spread[..., None]).expand(batch, *grid, heads)

    def one_by_one(bias: Tensor | None = None, return_lse: bool = False, **t: Tensor) -> Any:
        out, lse = 0, 0
        for number, size in enumerate(sizes):
            cropped = None if bias is None else crop_relative_bias(bias, size)
            of_size = neighborhood_attention(
                **t, kernel_size=size, bias=cropped, **options, return_lse=True, backend="reference"
            )
            out, lse = out + of_size[0] * (spread == number)[..., None], lse + of_size[1] * (spread == number)
        return (out, lse) if return_lse else out

    def together(return_lse: bool = False, backend: str = "auto", **t: Tensor) -> Any:
        return neighborhood_attention_mixed(
            **t, kernel_sizes=sizes, choice=choice, **options, return_lse=return_lse, backend=backend
        )

    expected = run(one_by_one, problem.tensors)
    with mock.patch.object(mixed, "gather_cost", return_value=cost):
        torch.testing.assert_close(run(together, problem.tensors), expected)
    if cost == 0:
        torch.testing.assert_close(run(lambda **t: together(**t, backend="reference"), problem.tensors), expected)


def test_equal_choices_are_the_operator_itself() -> None:
    q, k, v = torch.randn(3, 2, 9, 8, 4, 16)
    choice = torch.ones(9, 8, dtype=torch.uint8)
    got = neighborhood_attention_mixed(q, k, v, [3, 5, 7], choice)
    assert torch.equal(got, neighborhood_attention(q, k, v, 5))


def randn64(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_at_positions_match_finite_differences(way: str) -> None:
    places = torch.tensor([[[0, 0], [3, 2], [4, 3]], [[4, 1], [2, 2], [1, 0]]])
    mask = torch.rand(2, 5, 4) > 0.1
    mask[0, 0, 0] = mask[0, 3, 2] = mask[0, 4, 3] = mask[1, 4, 1] = mask[1, 2, 2] = mask[1, 1, 0] = True

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple:
        options = {"dilation": (2, 1), "is_causal": (True, False), "key_mask": mask, "return_lse": True}
        return neighborhood_attention_at(q, k, v, places, (2, 3), bias=bias, backend=way, **options)

    tensors = randn64(2, 3, 2, 2), randn64(2, 5, 4, 1, 2), randn64(2, 5, 4, 1, 3), randn64(2, 3, 5)
    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)


def test_gradients_of_packed_grids_match_finite_differences() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple:
        return neighborhood_attention_packed(q, k, v, [(3, 4), (5, 3), (3, 4)], (2, 3), bias=bias, return_lse=True)

    tensors = randn64(39, 2, 2), randn64(39, 1, 2), randn64(39, 1, 3), randn64(2, 3, 5)
    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)


@pytest.mark.parametrize("cost", [0, 1e9])
def test_gradients_with_mixed_windows_match_finite_differences(cost: float) -> None:
    choice = torch.randint(2, (1, 5, 4, 2))

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple:
        return neighborhood_attention_mixed(q, k, v, [(2, 3), (4, 2)], choice, bias=bias, return_lse=True)

    tensors = randn64(1, 5, 4, 2, 2), randn64(1, 5, 4, 1, 2), randn64(1, 5, 4, 1, 3), randn64(2, 7, 5)
    with mock.patch.object(mixed, "gather_cost", return_value=cost):
        assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)


class At(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, places: Tensor) -> Tensor:
        return neighborhood_attention_at(q[:, :5, 0], k, v, places, 3, bias=bias)


class Packed(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, choice: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 2) for t in (q, k, v))
        return neighborhood_attention_packed(q, k, v, [(9, 7), (7, 9)], 3, bias=bias)


class Mixed(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, choice: Tensor) -> Tensor:
        return neighborhood_attention_mixed(q, k, v, [2, 3], choice, bias=bias)


@pytest.mark.parametrize(
    ("module", "last"),
    [(At(), torch.randint(7, (2, 5, 2))), (Packed(), torch.zeros(())), (Mixed(), torch.randint(2, (9, 7)))],
    ids=["at", "packed", "mixed"],
)
def test_compiles_as_one_graph_and_exports(module: torch.nn.Module, last: Tensor) -> None:
    leaves = [
        *(torch.randn(2, 9, 7, 2, 8, requires_grad=True) for _ in range(3)),
        torch.randn(2, 5, 5).requires_grad_(),
    ]
    eager, compiled = (f(*leaves, last) for f in (module, torch.compile(module, backend="aot_eager", fullgraph=True)))
    torch.testing.assert_close(compiled, eager)
    weight = torch.randn_like(eager)
    grads = [torch.autograd.grad((out * weight).sum(), leaves) for out in (eager, compiled)]
    torch.testing.assert_close(grads[1], grads[0])
    inputs = (*(t.detach() for t in leaves), last)
    torch.testing.assert_close(torch.export.export(module, inputs).module()(*inputs), eager.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 1, 9, 7, 2, 8)
    places, choice = torch.tensor([[0, 0], [8, 6], [4, 4]]), torch.arange(63).view(9, 7) % 2

    def results(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        tokens = [t.flatten(0, 2) for t in (q, k, v)]
        return [
            *(
                neighborhood_attention_at(take(q, places), k, v, places, 3, return_lse=True, backend=way)
                for way in WAYS
            ),
            neighborhood_attention_packed(*tokens, grids=[(9, 7)], kernel_size=3, return_lse=True),
            neighborhood_attention_mixed(q, k, v, [3, 5], choice, return_lse=True),
        ]

    exact = results(q, k, v)
    halves = results(q.to(dtype), k.to(dtype), v.to(dtype))
    with torch.autocast("cpu", dtype):
        cast = results(q, k, v)
    for got in (halves, cast):
        for (out, lse), (expected, expected_lse) in zip(got, exact):
            assert (out.dtype, lse.dtype) == (dtype, torch.float32)
            torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)
            torch.testing.assert_close(lse, expected_lse, rtol=3e-2, atol=3e-2)


def test_nothing_asked_gives_nothing() -> None:
    k, v = torch.randn(2, 2, 6, 7, 2, 4)
    assert neighborhood_attention_at(torch.randn(2, 0, 2, 4), k, v, torch.zeros(0, 2).long(), 3).shape == (2, 0, 2, 4)
    none, places = torch.randn(0, 5, 2, 4), torch.zeros(5, 2).long()
    out, lse = neighborhood_attention_at(none, k[:0], v[:0], places, 3, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 5, 2, 4), (0, 5, 2))
    choice = torch.zeros(6, 7).long()
    assert neighborhood_attention_mixed(k[:0], k[:0], v[:0], [3], choice).shape == (0, 6, 7, 2, 4)


def case(**changes: Any) -> dict[str, Any]:
    q, kv = torch.randn(2, 4, 2, 8), torch.randn(2, 6, 7, 2, 8)
    return {"query": q, "key": kv, "value": kv, "positions": torch.zeros(4, 2).long(), "kernel_size": 3} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": torch.zeros(4, 3).long()}, r"positions has shape \(4, 3\); \(M, rank\) = \(4, 2\)"),
        ({"positions": torch.zeros(5, 2).long()}, r"positions has shape \(5, 2\)"),
        ({"positions": torch.zeros(4, 2)}, "positions is torch.float32; a tensor of integers"),
        ({"positions": [[0, 0]] * 4}, "positions is list; a tensor of integers"),
        ({"positions": torch.tensor([[0, 7]] * 4)}, "positions go from 7 to 7 on axis 1; 0 to 6 is allowed"),
        ({"positions": torch.tensor([[-1, 0]] * 4)}, "positions go from -1 to -1 on axis 0; 0 to 5 is allowed"),
        ({"backend": "grid"}, "positions hold a position twice in one sample"),
        ({"backend": "tiled"}, "backend='tiled' is not known"),
        ({"query": torch.randn(2, 6, 7, 2, 8)}, r"query has shape \(2, 6, 7, 2, 8\); \(batch, number of positions"),
        ({"query": torch.randn(3, 4, 2, 8)}, "query has batch 3 but key has 2"),
        ({"query": torch.randn(2, 4, 3, 8)}, "query has 3 heads; a multiple of the 2 heads of key"),
        ({"value": torch.randn(2, 7, 6, 2, 8)}, r"value has batch and grid \(2, 7, 6\)"),
        ({"kernel_size": 7}, r"kernel_size=\(7, 7\) .* exceeds the grid \(6, 7\)"),
        ({"bias": torch.zeros(2, 5, 4)}, r"bias has shape \(2, 5, 4\)"),
        ({"key_mask": torch.zeros(2, 6, 7).bool()}, "key_mask leaves 2 queries without a key"),
        ({"additional_keys": torch.zeros(2, 1, 2, 8)}, "additional_values is None"),
    ],
)
def test_what_does_not_fit_at_positions_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neighborhood_attention_at(**case(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grids": []}, r"grids=\[\] is not allowed; a sequence of at least one grid"),
        ({"grids": 42}, "grids=42 is not allowed"),
        ({"grids": [(6, 7), 6]}, r"grids\[1\]=6 has 1 axes but grids\[0\] has 2"),
        ({"grids": [(6, -7)]}, r"grids\[0\]=\(6, -7\) is not allowed"),
        ({"grids": [(6, 7), (2, 2)]}, "query has 42 tokens; 46 are allowed"),
        ({"grids": [(4, 5), (11, 2)]}, r"kernel_size=\(3, 3\) .* exceeds the grid \(11, 2\)"),
        ({"query": torch.randn(42, 8)}, r"query has shape \(42, 8\); \(tokens, heads, head_dim\) is allowed"),
        ({"key_mask": torch.zeros(42)}, "key_mask is torch.float32"),
        ({"key_mask": torch.zeros(41).bool()}, r"key_mask has shape \(41,\); \(tokens,\) = \(42,\)"),
        ({"key_mask": torch.arange(42) < 21}, r"key_mask leaves 18 queries .* position \(2, 0\) of sample 1"),
        ({"additional_keys": torch.zeros(1, 1, 2, 8), "additional_values": torch.zeros(1, 1, 2, 8)}, "additional_keys"),
    ],
)
def test_what_does_not_fit_packed_is_named(changes: dict, message: str) -> None:
    x = torch.randn(42, 2, 8)
    problem = {"query": x, "key": x, "value": x, "grids": [(6, 3), (8, 3)], "kernel_size": 3} | changes
    with pytest.raises(ValueError, match=message):
        neighborhood_attention_packed(**problem)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_sizes": []}, r"kernel_sizes=\[\] is not allowed"),
        ({"kernel_sizes": 3}, "kernel_sizes=3 is not allowed"),
        ({"kernel_sizes": [3, 7]}, r"kernel_size=\(7, 7\) .* exceeds the grid"),
        ({"stride": 4}, r"stride=\(4, 4\) exceeds kernel_size=\(3, 3\)"),
        ({"choice": torch.zeros(7, 6).long()}, r"choice has shape \(7, 6\); \(\*grid\) = \(6, 7\)"),
        ({"choice": torch.zeros(2, 6, 7, 3).long()}, r"choice has shape \(2, 6, 7, 3\)"),
        ({"choice": torch.zeros(6, 7)}, "choice is torch.float32"),
        ({"choice": torch.full((6, 7), 2)}, "choice goes from 2 to 2; 0 to 1 is allowed"),
        ({"bias": torch.zeros(2, 5, 5)}, r"bias has shape \(2, 5, 5\); .* = \(2, 9, 9\)"),
        ({"key_mask": torch.zeros(2, 6, 7).bool()}, "key_mask leaves 84 queries without a key"),
    ],
)
def test_what_does_not_fit_mixed_is_named(changes: dict, message: str) -> None:
    x = torch.randn(2, 6, 7, 2, 8)
    problem = {"query": x, "key": x, "value": x, "kernel_sizes": [3, 5], "choice": torch.zeros(6, 7).long()} | changes
    with pytest.raises(ValueError, match=message):
        neighborhood_attention_mixed(**problem)


def test_only_the_windows_that_are_chosen_must_keep_a_key() -> None:
    x = torch.randn(1, 9, 1, 4)
    mask = torch.arange(9)[None] >= 3
    with pytest.raises(ValueError, match="key_mask leaves 2 queries without a key"):
        neighborhood_attention_mixed(x, x, x, [3, 7], torch.zeros(9).long(), key_mask=mask)
    choice = (torch.arange(9) < 3).long()
    assert neighborhood_attention_mixed(x, x, x, [3, 7], choice, key_mask=mask).isfinite().all()

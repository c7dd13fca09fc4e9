"""Facts about the branches of polarized self-attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.ops.polarized import channel_context, spatial_score

GRIDS = st.lists(st.integers(1, 6), min_size=1, max_size=3)


def problem(grid: list[int], inner: int, query_rows: int, bias: bool) -> list[torch.Tensor | None]:
    shapes = [(2, *grid, 6), (query_rows, 6), (query_rows,), (inner, 6), (inner,)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return tensors if bias else [tensors[0], tensors[1], None, tensors[3], None]


def assert_same_with_gradients(function, arguments, **options) -> None:
    leaves = [a for a in arguments if a is not None]
    fast, slow = (function(*arguments, backend=backend, **options) for backend in ("auto", "reference"))
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(slow)
    for ours, theirs in zip(
        torch.autograd.grad(fast, leaves, cotangent), torch.autograd.grad(slow, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=15)
@given(GRIDS, st.integers(1, 5), st.booleans())
def test_averaging_before_projecting_changes_nothing(grid, inner: int, bias: bool) -> None:
    assert_same_with_gradients(channel_context, problem(grid, inner, 1, bias))


@settings(deadline=None, max_examples=30)
@given(GRIDS, st.integers(1, 5), st.booleans(), st.sampled_from(["query", "score", "value"]))
def test_scoring_without_projected_values_changes_nothing(grid, inner: int, bias: bool, softmax: str) -> None:
    assert_same_with_gradients(spatial_score, problem(grid, inner, inner, bias), softmax=softmax)


def test_scores_with_a_softmax_over_positions_sum_to_one() -> None:
    score = spatial_score(*problem([4, 5], 3, 3, True), softmax="score")
    torch.testing.assert_close(score.sum((1, 2)), torch.ones(2, dtype=torch.float64))


def test_the_context_of_a_constant_grid_is_its_projected_value() -> None:
    x, *weights = problem([4, 5], 3, 1, True)
    x = x[:, :1, :1].expand(2, 4, 5, 6)
    expected = torch.nn.functional.linear(x[:, 0, 0], weights[2], weights[3])
    torch.testing.assert_close(channel_context(x, *weights), expected)


def test_wrong_arguments_are_named() -> None:
    arguments = problem([4, 5], 3, 3, True)
    with pytest.raises(ValueError, match="softmax='key' is not known; allowed: 'query', 'score', 'value'"):
        spatial_score(*arguments, softmax="key")
    with pytest.raises(ValueError, match="backend='fast' is not known"):
        channel_context(*arguments, backend="fast")

"""Facts about gated positional attention as an operation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gridattn.ops.gated_positional import (
    attention_distance,
    axis_weights,
    gated_positional_attention,
    gated_positional_weights,
    positional_weights,
    relative_coordinates,
)


def draw(*grid: int, heads: int = 2, channels: int = 4) -> list[Tensor]:
    return list(torch.randn(3, 2, *grid, heads, channels, dtype=torch.float64).unbind(0))


@settings(max_examples=30, deadline=None)
@given(grid=st.lists(st.integers(1, 5), min_size=1, max_size=3), heads=st.integers(1, 3), biased=st.booleans())
def test_the_separable_form_equals_the_dense_one_forward_and_backward(grid, heads, biased) -> None:
    query, key, value = draw(*grid, heads=heads)
    weight, gate = torch.randn(heads, len(grid) + 1).double(), torch.rand(heads).double()
    bias = torch.randn(heads).double() if biased else None
    leaves = [x.requires_grad_() for x in (query, key, value, weight, gate)]
    results = []
    for backend in ("auto", "reference"):
        out = gated_positional_attention(
            query, key, value, weight, gate, position_bias=bias, scale=0.3, backend=backend
        )
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(results[0], results[1])


def test_the_separable_form_equals_the_dense_one_in_float32() -> None:
    weight = torch.randn(4, 3)
    rows, columns = axis_weights((6, 7), weight)
    product = torch.einsum("hyv,hxw->hyxvw", rows, columns).reshape(4, 42, 42)
    torch.testing.assert_close(product, positional_weights((6, 7), weight), rtol=0, atol=1e-6)


def test_positional_rows_sum_to_one_and_a_bias_changes_nothing() -> None:
    weight, bias = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    plain = positional_weights((4, 5), weight)
    torch.testing.assert_close(plain.sum(-1), torch.ones(3, 20, dtype=torch.float64))
    torch.testing.assert_close(positional_weights((4, 5), weight, bias), plain)
    query, key, value = draw(4, 5, heads=3)
    gate = torch.rand(3, dtype=torch.float64)
    torch.testing.assert_close(
        gated_positional_attention(query, key, value, weight, gate, position_bias=bias),
        gated_positional_attention(query, key, value, weight, gate),
    )


def test_rows_of_the_mixture_sum_to_one_for_any_gate_and_without_content_all_samples_share_them() -> None:
    query, key, _ = draw(4, 4)
    weight = torch.randn(2, 3, dtype=torch.float64)
    for gate in (0.0, 0.3, 1.0):
        weights = gated_positional_weights(query, key, weight, torch.full((2,), gate, dtype=torch.float64))
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 16, dtype=torch.float64))
    torch.testing.assert_close(weights[0], weights[1])


def test_dropout_of_the_mixture_keeps_its_mean() -> None:
    query, key, value = draw(3, 3)
    args = (query, key, value, torch.randn(2, 3).double(), torch.rand(2).double())
    runs = torch.stack([gated_positional_attention(*args, dropout=0.3) for _ in range(1500)])
    assert runs.std(0).min() > 0.01
    torch.testing.assert_close(runs.mean(0), gated_positional_attention(*args), rtol=0, atol=0.12)


def test_coordinates_go_from_the_query_to_the_key_with_the_last_axis_first() -> None:
    coordinates = relative_coordinates((3, 4))
    assert coordinates.shape == (12, 12, 3)
    assert coordinates[1 * 4 + 3, 2 * 4 + 1].tolist() == [-2, 1, 5]
    assert (coordinates.diagonal() == 0).all()


@pytest.mark.parametrize(("grid", "distance"), [((7, 7), 3.609465), ((14, 14), 7.280764)])
def test_uniform_attention_lies_the_mean_pairwise_distance_away(grid: tuple[int, int], distance: float) -> None:
    n = grid[0] * grid[1]
    assert attention_distance(torch.full((n, n), 1 / n), grid).item() == pytest.approx(distance, rel=1e-5)
    assert attention_distance(torch.eye(n), grid) == 0


def test_shapes_that_do_not_fit_are_named() -> None:
    query, key, value = draw(4, 4)
    with pytest.raises(ValueError, match=r"position_weight \(2, 2\).*must be \(2, 3\)"):
        gated_positional_attention(query, key, value, torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"key \(2, 3, 4, 2, 4\)"):
        gated_positional_attention(query, key[:, :3], value, torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="N=12"):
        attention_distance(torch.eye(9), (3, 4))

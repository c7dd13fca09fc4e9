"""Facts about deformable sampling."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gridattn.ops.deformable import deformable_attention, deformable_weights

BACKENDS = ("reference", "grid_sample", "gather")


def problem(shapes, *, batch=2, queries=3, heads=2, points=2, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    options = {"generator": random, "dtype": torch.float64}
    value = torch.randn(batch, sum(map(prod, shapes)), heads, 3, **options)
    locations = torch.rand(batch, queries, heads, len(shapes), points, len(shapes[0]), **options) * 1.8 - 0.4
    weights = torch.randn(batch, queries, heads, len(shapes), points, **options)
    return value, locations, weights


@st.composite
def pyramids(draw) -> list[tuple[int, ...]]:
    rank = draw(st.integers(1, 3))
    size = st.integers(1, 5)
    return draw(st.lists(st.tuples(*[size] * rank), min_size=1, max_size=3))


@settings(deadline=None, max_examples=20)
@given(pyramids(), st.integers(0, 2), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_all_backends_compute_the_weighted_sum_of_interpolated_values(shapes, batch, queries, points, seed) -> None:
    leaves = problem(shapes, batch=batch, queries=queries, points=points, seed=seed)
    value, locations, weights = (t.requires_grad_() for t in leaves)
    results = []
    for backend in BACKENDS:
        out = deformable_attention(value, shapes, locations, weights, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), (value, locations, weights))
        results.append((out, *grads))
    for ours in results[1:]:
        for a, b in zip(ours, results[0]):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_centre_of_a_position_reads_that_position_alone(backend: str) -> None:
    value, _, _ = problem([(3, 5)], batch=1, heads=1)
    row, column = 2, 1
    location = torch.tensor([(column + 0.5) / 5, (row + 0.5) / 3], dtype=torch.float64).view(1, 1, 1, 1, 1, 2)
    out = deformable_attention(value, [(3, 5)], location, torch.ones(1, 1, 1, 1, 1).double(), backend=backend)
    torch.testing.assert_close(out[0, 0, 0], value[0, row * 5 + column, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_linear_ramp_is_read_as_its_own_value_between_positions(backend: str) -> None:
    height, width = 4, 6
    y, x = torch.meshgrid((torch.arange(4) + 0.5) / height, (torch.arange(6) + 0.5) / width, indexing="ij")
    value = (2 * x - 3 * y).double().view(1, -1, 1, 1)
    locations = torch.rand(1, 7, 1, 1, 1, 2, dtype=torch.float64) * 0.7 + 0.15
    out = deformable_attention(value, [(height, width)], locations, torch.ones(1, 7, 1, 1, 1).double(), backend=backend)
    torch.testing.assert_close(out.flatten(), (locations @ torch.tensor([2.0, -3.0]).double()).flatten())


@pytest.mark.parametrize("backend", BACKENDS)
def test_points_half_a_position_or_more_outside_read_zero_and_send_no_gradient(backend: str) -> None:
    value, locations, weights = problem([(3, 4)])
    locations = (locations.sign() * 50 - 20).requires_grad_()
    out = deformable_attention(value, [(3, 4)], locations, weights, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), locations)
    assert not out.any()
    assert not grad.any()


def test_levels_add_up_and_each_reads_its_own_part_of_the_memory() -> None:
    shapes = [(3, 4), (2, 2)]
    value, locations, weights = problem(shapes)
    whole = deformable_attention(value, shapes, locations, weights)
    first = deformable_attention(value[:, :12], shapes[:1], locations[:, :, :, :1], weights[:, :, :, :1])
    second = deformable_attention(value[:, 12:], shapes[1:], locations[:, :, :, 1:], weights[:, :, :, 1:])
    torch.testing.assert_close(whole, first + second)


def test_dense_weights_of_points_inside_sum_to_the_weights_of_the_points() -> None:
    _, locations, weights = problem([(4, 5)])
    dense = deformable_weights([(4, 5)], locations.clamp(0.2, 0.8), weights)
    torch.testing.assert_close(dense.sum(-1), weights.sum((-1, -2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_computed_in_float32(backend: str) -> None:
    value, locations, weights = (t.to(torch.bfloat16) for t in problem([(6, 7)]))
    out = deformable_attention(value, [(6, 7)], locations.float(), weights, backend=backend)
    expected = deformable_attention(value.float(), [(6, 7)], locations.float(), weights.float(), backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())


def test_wrong_arguments_are_named() -> None:
    value, locations, weights = problem([(3, 4)])
    with pytest.raises(ValueError, match=r"value has 12 positions; shapes=\[\(3, 5\)\] have 15"):
        deformable_attention(value, [(3, 5)], locations, weights)
    with pytest.raises(ValueError, match="locations has shape"):
        deformable_attention(value, [(3, 4)], locations[..., :1], weights)
    with pytest.raises(ValueError, match="weights has shape"):
        deformable_attention(value, [(3, 4)], locations, weights[..., :1])
    with pytest.raises(ValueError, match=r"shapes=\[\] is not allowed"):
        deformable_attention(value, [], locations, weights)
    with pytest.raises(ValueError, match="value has shape"):
        deformable_attention(value[0], [(3, 4)], locations, weights)
    with pytest.raises(ValueError, match="backend='cuda'"):
        deformable_attention(value, [(3, 4)], locations, weights, backend="cuda")

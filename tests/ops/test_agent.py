"""Facts about agent attention as a function: products, pooled agents and their position biases."""

from math import ceil, floor, prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gridattn.ops.agent import agent_attention, agent_attention_reference, agent_bias, pool_agents, pool_real_agents

GRIDS = st.lists(st.integers(1, 7), min_size=1, max_size=3)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@settings(deadline=None, max_examples=25)
@given(GRIDS, st.integers(1, 5), st.integers(0, 2), st.booleans(), st.sampled_from(["fused", "products"]))
def test_every_backend_equals_the_definition_forward_and_backward(grid, agents, batch, biased, backend) -> None:
    query, key, value = (double(batch, *grid, 2, 3) for _ in range(3))
    pooled = pool_agents(query, (agents,) * len(grid))
    n, count = agents ** len(grid), prod(grid)
    biases = [double(2, n, count), double(2, count, n)] if biased else [None, None]
    options = {"aggregate_bias": biases[0], "broadcast_bias": biases[1], "broadcast_scale": 0.7}
    out = agent_attention(query, key, value, pooled, **options, backend=backend)
    expected = agent_attention_reference(query, key, value, pooled, **options)
    torch.testing.assert_close(out, expected)
    leaves, cotangent = [query, key, value, *(b for b in biases if b is not None)], torch.randn_like(out)
    grads, expected_grads = (
        torch.autograd.grad(t, leaves, cotangent, retain_graph=True, materialize_grads=True) for t in (out, expected)
    )
    for ours, theirs in zip(grads, expected_grads):
        torch.testing.assert_close(ours, theirs)


def test_it_is_linear_attention_whose_implied_rows_sum_to_one() -> None:
    query, key = double(1, 5, 4, 2, 3), double(1, 5, 4, 2, 3)
    agents = pool_agents(query, (2, 2))
    q, k, a = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, agents))
    phi_q, phi_k = (3**-0.5 * q @ a.mT).softmax(-1), (3**-0.5 * a @ k.mT).softmax(-1).mT
    weights = phi_q @ phi_k.mT
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 20).double())
    unit = torch.eye(20).double().view(1, 5, 4, 1, 20).expand(-1, -1, -1, 2, -1)
    out = agent_attention(query, key, unit, agents, scale=3**-0.5)
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), weights)


def test_equal_values_come_out_everywhere_whatever_the_biases() -> None:
    query, key = double(1, 6, 2, 3), double(1, 8, 2, 3)
    value = double(1, 1, 2, 3).expand(1, 8, 2, 3)
    biases = {"aggregate_bias": double(2, 4, 8), "broadcast_bias": double(2, 6, 4)}
    out = agent_attention(query, key, value, pool_agents(query, (4,)), **biases)
    torch.testing.assert_close(out, value[:, :6])


class LargestTensor(TorchDispatchMode):
    """Elements of the largest result of any operator."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.numel())
        return out


def test_no_tensor_of_all_pairs_exists_on_a_grid_of_256_by_256() -> None:
    x = torch.randn(1, 256, 256, 1, 4)
    bias = torch.randn(1, 49, 256 * 256)
    with LargestTensor() as seen:
        agent_attention(x, x, x, pool_agents(x, (7, 7)), aggregate_bias=bias, broadcast_bias=bias.mT)
    assert seen.largest <= 49 * 256 * 256


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 11), st.integers(1, 6))
def test_agents_are_means_of_overlapping_cells_in_row_major_order(size, agents) -> None:
    x = double(1, size, 2, 1, 1)
    pooled = pool_agents(x, (agents, 2))
    for i in range(agents):
        cell = x[0, floor(i * size / agents) : ceil((i + 1) * size / agents)].mean(0)
        torch.testing.assert_close(pooled[0, i], cell)


def test_agents_of_a_padded_window_are_means_of_its_real_positions() -> None:
    real = torch.zeros(1, 4, 6, dtype=torch.bool)
    real[:, :3, :2] = True
    x = double(1, 4, 6, 1, 2).detach() * real[..., None, None]
    pooled, alive = pool_real_agents(x, (2, 3), real)
    assert alive.tolist() == [[True, False, False, True, False, False]]
    torch.testing.assert_close(pooled[0, 0, 0], x[0, :2, :2].mean((0, 1)))
    torch.testing.assert_close(pooled[0, 1, 0], x[0, 2:3, :2].mean((0, 1)))


def test_a_bias_is_a_stretched_block_plus_a_line_along_every_axis() -> None:
    block, rows, columns = double(2, 4, 7, 7), double(2, 4, 5), double(2, 4, 9)
    bias = agent_bias(block, [rows, columns], (5, 9), (2, 2), (2, 2))
    stretched = F.interpolate(block, size=(5, 9), mode="bilinear")
    torch.testing.assert_close(bias, (stretched + rows.unsqueeze(3) + columns.unsqueeze(2)).flatten(2))


def test_on_another_grid_lines_are_stretched_as_the_map_that_they_add_up_to() -> None:
    block, rows, columns = torch.zeros(2, 4, 7, 7).double(), double(2, 4, 8), double(2, 4, 8)
    bias = agent_bias(block, [rows, columns], (5, 11), (2, 2), (2, 2))
    summed = F.interpolate(rows.unsqueeze(3) + columns.unsqueeze(2), size=(5, 11), mode="bilinear")
    torch.testing.assert_close(bias, summed.flatten(2))


def test_agents_of_another_number_interpolate_the_biases_over_the_row_major_grid_of_agents() -> None:
    block, line = double(2, 6, 7), double(2, 6, 5)  # 3 x 2 agents on a grid of one axis
    bias = agent_bias(block, [line], (5,), (3, 2), (4, 5))
    native = agent_bias(block, [line], (5,), (3, 2), (3, 2))
    expected = F.interpolate(native.mT.unflatten(2, (3, 2)), size=(4, 5), mode="bilinear")
    torch.testing.assert_close(bias, expected.flatten(2).mT)
    swapped = agent_bias(block, [line], (5,), (2, 3), (4, 5))
    assert not torch.allclose(bias, swapped)


def test_tensors_that_do_not_fit_are_named() -> None:
    x = torch.zeros(1, 4, 2, 3)
    with pytest.raises(ValueError, match="agents has shape"):
        agent_attention(x, x, x, x[..., :1])
    with pytest.raises(ValueError, match="key has shape"):
        agent_attention(x, x[:, :, :1], x, x)
    with pytest.raises(ValueError, match="value has shape"):
        agent_attention(x, x, x[:, 1:], x)
    with pytest.raises(ValueError, match="backend='cuda' is not known"):
        agent_attention(x, x, x, x, backend="cuda")

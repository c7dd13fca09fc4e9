"""Facts about attention among channels."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gridattn.ops.channel_attention import channel_attention, channel_self_attention, channel_weights


def draw(*grid: int, groups: int = 3, channels: int = 4) -> list[Tensor]:
    return list(torch.randn(3, 2, *grid, groups, channels, dtype=torch.float64).unbind(0))


def test_row_i_weighs_the_channels_of_the_value_by_products_over_all_positions() -> None:
    query, key, value = draw(3, 5)
    out = channel_attention(query, key, value, scale=0.3)
    logits = torch.tensor([[(query[1, ..., 2, i] * key[1, ..., 2, j]).sum() for j in range(4)] for i in range(4)])
    weights = (0.3 * logits).softmax(-1).double()
    torch.testing.assert_close(out[1, 2, 4, 2], weights @ value[1, 2, 4, 2])


def test_weights_are_one_small_matrix_per_group_with_rows_that_sum_to_one() -> None:
    query, key, _ = draw(7, 5)
    weights = channel_weights(query, key)
    assert weights.shape == (2, 3, 4, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 4, dtype=torch.float64))


def test_any_permutation_of_the_positions_leaves_the_weights_and_permutes_the_output() -> None:
    query, key, value = draw(35)
    order = torch.randperm(35)
    torch.testing.assert_close(channel_weights(query[:, order], key[:, order]), channel_weights(query, key))
    permuted = channel_attention(query[:, order], key[:, order], value[:, order])
    torch.testing.assert_close(permuted, channel_attention(query, key, value)[:, order])


def test_a_zero_query_averages_the_channels_of_the_group() -> None:
    query, key, value = draw(4, 4)
    out = channel_attention(torch.zeros_like(query), key, value)
    torch.testing.assert_close(out, value.mean(-1, keepdim=True).expand_as(value))


def test_the_output_is_linear_in_the_value() -> None:
    query, key, value = draw(4, 4)
    other = torch.randn_like(value)
    together = channel_attention(query, key, 2 * value + other)
    apart = 2 * channel_attention(query, key, value) + channel_attention(query, key, other)
    torch.testing.assert_close(together, apart)


def test_large_float16_maps_do_not_overflow() -> None:
    query = torch.full((1, 64, 64, 1, 4), 8.0, dtype=torch.float16)  # products sum to 262144, float16 ends at 65504
    weights = channel_weights(query, query, scale=1.0)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.25))


@settings(max_examples=25, deadline=None)
@given(
    grid=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    groups=st.integers(1, 3),
    channels=st.integers(1, 4),
    biased=st.booleans(),
    batch=st.integers(0, 2),
)
def test_the_gram_matrix_form_equals_attention_between_its_projections(grid, groups, channels, biased, batch) -> None:
    dim = groups * channels
    shapes = [(batch, *grid, dim), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
    x, weight, bias, proj, proj_bias = leaves = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    if not biased:
        bias = proj_bias = None
        leaves = [x, weight, proj]
    gram = channel_self_attention(x, weight, bias, proj, proj_bias, num_groups=groups, scale=0.2)
    query, key, value = F.linear(x, weight, bias).unflatten(-1, (3, groups, channels)).unbind(-3)
    plain = F.linear(channel_attention(query, key, value, scale=0.2).flatten(-2), proj, proj_bias)
    ours, expected = ([y, *torch.autograd.grad(y.square().sum(), leaves)] for y in (gram, plain))
    torch.testing.assert_close(ours, expected)


def test_unequal_shapes_are_named() -> None:
    query, key, value = draw(4, 4)
    with pytest.raises(ValueError, match=r"query \(2, 4, 4, 3, 4\), key \(2, 4, 3, 3, 4\)"):
        channel_attention(query, key[:, :, :3], value)

"""Facts about attention at two scales, its significance map and token reallocation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gridattn.ops import hybrid_scale
from gridattn.ops.hybrid_scale import (
    GROUP_SIZES,
    hybrid_scale_attention,
    hybrid_scale_reference,
    reallocate_tokens,
    reallocate_tokens_reference,
    significance_map,
    token_count,
)

GRIDS = st.lists(st.integers(1, 9), min_size=1, max_size=3)


def problem(grid, patch, heads=4, batch=2, dim=3) -> list[Tensor]:
    coarse = [-(-n // p) for n, p in zip(grid, patch)]
    shapes = [(*grid, heads), *[(*coarse, heads // 2)] * 2, *[(*grid, heads // 2)] * 2]
    return [torch.randn(batch, *shape, dim, dtype=torch.float64, requires_grad=True) for shape in shapes]


def sums(reduction: int) -> tuple[list[Tensor], list[Tensor]]:
    sizes = GROUP_SIZES[reduction]
    return [torch.randn(f, dtype=torch.float64) for f in sizes], [torch.randn((), dtype=torch.float64) for _ in sizes]


def means(reduction: int) -> tuple[list[Tensor], list[Tensor]]:
    sizes = GROUP_SIZES[reduction]
    zeros = [torch.zeros((), dtype=torch.float64)] * len(sizes)
    return [torch.full((f,), 1 / f, dtype=torch.float64) for f in sizes], zeros


@settings(deadline=None, max_examples=25)
@given(GRIDS, st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_fused_attention_and_map_equal_their_definition_forward_and_backward(grid, window, size, stretch) -> None:
    tensors = problem(grid, patch=[size] * len(grid))
    query, coarse_key, _, key, _ = tensors
    patch = None if stretch else [size] * len(grid)
    out = hybrid_scale_attention(*tensors, window)
    expected, expected_map = hybrid_scale_reference(*tensors, window, patch=patch)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(significance_map(query, coarse_key, key, window, patch=patch), expected_map)
    cotangent = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, tensors, cotangent), torch.autograd.grad(expected, tensors, cotangent)
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_map_is_positive_sums_to_one_per_window_and_per_coarse_grid_and_has_no_gradient() -> None:
    query, coarse_key, _, key, _ = problem((8, 12), patch=(4, 4))
    silent = torch.zeros_like
    total = significance_map(query, coarse_key, key, 4, patch=(4, 4))
    assert not total.requires_grad
    assert (total > 0).all()
    # With equal logits at one scale that scale adds a constant, so the other one is what varies.
    local = significance_map(query, silent(coarse_key), key, 4, patch=(4, 4)) - 1 / 6
    torch.testing.assert_close(local.unfold(1, 4, 4).unfold(2, 4, 4).sum((-1, -2)), torch.ones(2, 2, 3).double())
    coarse = significance_map(query, coarse_key, silent(key), 4, patch=(4, 4)) - 1 / 16
    torch.testing.assert_close(coarse[:, ::4, ::4].sum((1, 2)), torch.ones(2).double())
    torch.testing.assert_close(total, local + coarse)
    torch.testing.assert_close(total.mean((1, 2)), torch.full((2,), 1 / 16 + 1 / 6).double())


def test_padding_at_a_border_neither_raises_nor_lowers_the_level_of_a_position() -> None:
    query, coarse_key, _, key, _ = problem((5, 7), patch=(5, 7))
    level = significance_map(query, coarse_key, torch.zeros_like(key), 4)
    torch.testing.assert_close(level[:, :4, :4], torch.full((2, 4, 4), 1 + 1 / 16).double())
    torch.testing.assert_close(level[:, 4:, 4:], torch.full((2, 1, 3), 1 + 1 / 16).double())


def test_a_map_made_in_many_parts_is_the_same(monkeypatch) -> None:
    query, coarse_key, _, key, _ = problem((6, 5), patch=(2, 2))
    whole = significance_map(query, coarse_key, key, 3)
    monkeypatch.setattr(hybrid_scale, "_WEIGHTS_AT_ONCE", 100)
    torch.testing.assert_close(significance_map(query, coarse_key, key, 3), whole)


def test_local_heads_see_their_window_only_and_global_heads_all_coarse_positions() -> None:
    tensors = problem((6, 6), patch=(3, 3), batch=1)
    out = hybrid_scale_attention(*tensors, 3)
    coarse_value, value = tensors[2], tensors[4]
    near = torch.autograd.grad(out[0, 1, 4, 2:].sum(), (coarse_value, value), retain_graph=True, materialize_grads=True)
    assert not near[0].any()
    assert near[1][0].abs().sum((-1, -2)).nonzero().tolist() == [[y, x] for y in range(3) for x in range(3, 6)]
    far = torch.autograd.grad(out[0, 1, 4, :2].sum(), (coarse_value, value), materialize_grads=True)
    assert far[0].all()
    assert not far[1].any()


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 3, 50, 784])
def test_reallocation_equals_its_definition_forward_and_backward(reduction, count) -> None:
    x = torch.randn(2, count, 3, dtype=torch.float64, requires_grad=True)
    significance = torch.rand(2, count).round(decimals=2)  # with ties
    weights, biases = sums(reduction)
    leaves = (x, *(t.requires_grad_() for t in (*weights, *biases)))
    tokens = reallocate_tokens(x, significance, weights, biases)
    expected = reallocate_tokens_reference(x, significance, weights, biases)
    assert tokens.shape[1] == token_count(count, GROUP_SIZES[reduction])
    torch.testing.assert_close(tokens, expected)
    cotangent = torch.randn_like(tokens)
    ours, theirs = (torch.autograd.grad(t, leaves, cotangent, materialize_grads=True) for t in (tokens, expected))
    for our, their in zip(ours, theirs):
        torch.testing.assert_close(our, their)


def test_token_counts_are_those_of_the_paper() -> None:
    counts = {(3136, 8): 60, (784, 4): 60, (196, 2): 147, (392, 4): 30, (12544, 8): 240}
    for (count, reduction), tokens in counts.items():
        assert token_count(count, GROUP_SIZES[reduction]) == tokens


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_only_ranks_matter(reduction) -> None:
    x, significance = torch.randn(2, 196, 3).double(), torch.rand(2, 196).double()
    plain = reallocate_tokens(x, significance, *(parameters := sums(reduction)))
    assert torch.equal(reallocate_tokens(x, significance.exp() - 5, *parameters), plain)
    assert not torch.allclose(reallocate_tokens(x, significance[:, torch.randperm(196)], *parameters), plain)


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_with_distinct_values_the_order_of_flattening_does_not_matter(reduction) -> None:
    x, significance = torch.randn(1, 196, 3).double(), torch.randperm(196).double().unsqueeze(0)
    order = torch.randperm(196)
    parameters = sums(reduction)
    tokens = reallocate_tokens(x, significance, *parameters)
    assert torch.equal(reallocate_tokens(x[:, order], significance[:, order], *parameters), tokens)


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_weights_of_one_over_the_size_make_means_of_groups(reduction) -> None:
    x = torch.randn(1, 784, 2).double()
    order = torch.randperm(784)
    significance = order.argsort().double().unsqueeze(0)  # x[order] is sorted
    tokens = reallocate_tokens(x, significance, *means(reduction))
    last = GROUP_SIZES[reduction][-1]
    torch.testing.assert_close(tokens[0, -1], x[0, order[-last:]].mean(0))
    first = GROUP_SIZES[reduction][0]
    torch.testing.assert_close(tokens[0, 0], x[0, order[:first]].mean(0))
    same = reallocate_tokens(torch.ones_like(x), significance, *means(reduction))
    torch.testing.assert_close(same, torch.ones_like(same))


def test_another_ranking_with_the_same_groups_makes_the_same_means() -> None:
    x, rank = torch.randn(1, 784, 2).double(), torch.arange(784).view(1, 784)
    group = 28 * (rank // 28)
    shuffled = group + (rank % 28).flip(1)  # the order inside every 28 neighbours in rank is turned round
    parameters = means(8)
    torch.testing.assert_close(reallocate_tokens(x, shuffled, *parameters), reallocate_tokens(x, rank, *parameters))


def test_arguments_that_do_not_fit_are_named() -> None:
    query, coarse_key, coarse_value, key, value = problem((4, 4), patch=(2, 2))
    with pytest.raises(ValueError, match="coarse_key has 4 heads; half of the query's 4 heads"):
        hybrid_scale_attention(query, query, coarse_value, key, value)
    with pytest.raises(ValueError, match=r"key has .*query \(4, 4\)"):
        hybrid_scale_attention(query, coarse_key, coarse_value, key[:, 1:], value)
    with pytest.raises(ValueError, match="window_size=0"):
        hybrid_scale_attention(query, coarse_key, coarse_value, key, value, 0)
    with pytest.raises(ValueError, match="significance has shape"):
        reallocate_tokens(torch.zeros(1, 4, 2), torch.zeros(1, 5), *sums(2))
    with pytest.raises(ValueError, match="weights has 1 entries"):
        reallocate_tokens(torch.zeros(1, 4, 2), torch.zeros(1, 4), [torch.ones(1)], [torch.ones(())])

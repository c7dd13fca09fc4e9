"""Facts of routing attention, of its centroids and of local blocks."""

from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.ops.block_attention import block_attention
from gridattn.ops.centroids import (
    average_step,
    centroid_similarity,
    cluster_sums,
    commitment_loss,
    kmeans_step,
    nearest_centroid,
    normalize_vectors,
)
from gridattn.ops.routing import cluster_members, gather_members, routing_attention, scatter_members


def tokens(*grid: int, heads: int = 2, channels: int = 6) -> list[torch.Tensor]:
    return list(torch.randn(3, 2, *grid, heads, channels, dtype=torch.float64).unbind(0))


def centroids(clusters: int, heads: int = 2, channels: int = 6) -> torch.Tensor:
    return normalize_vectors(torch.randn(heads, clusters, channels, dtype=torch.float64))


def dense(q, k, v, allowed, scale=None) -> torch.Tensor:
    flat = [t.flatten(1, -3).transpose(1, 2) for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*flat, attn_mask=allowed, scale=scale)
    return out.transpose(1, 2).reshape(v.shape)


def by_the_definition(q, k, v, means, size, is_causal) -> torch.Tensor:
    """One cluster after the other, one query after the other; k None is shared."""
    out, count = torch.zeros_like(v), torch.zeros(*v.shape[:-1])
    keys = normalize_vectors(q) if k is None else k
    for b in range(q.shape[0]):
        for h, c in ((h, c) for h in range(q.shape[2]) for c in range(means.shape[1])):
            take = [(normalize_vectors(t[b, :, h]) @ means[h, c]).topk(size).indices.tolist() for t in (q, keys)]
            for i in take[0]:
                seen = [j for j in take[1] if not (is_causal and j > i) and not (k is None and j == i)] or [i]
                weights = (keys[b, seen, h] @ q[b, i, h] * q.shape[-1] ** -0.5).softmax(0)
                out[b, i, h] += weights @ v[b, seen, h]
                count[b, i, h] += 1
    return out / (count + 1e-5).unsqueeze(-1)


@settings(deadline=None, max_examples=6)
@given(st.integers(2, 6), st.integers(1, 2), st.data())
def test_attention_inside_clusters_is_what_the_definition_says(length, clusters, data) -> None:
    size = data.draw(st.integers(1, length))
    shared, is_causal = data.draw(st.sampled_from([(True, False), (True, True), (False, False)]))
    (q, k, v), means = tokens(length), centroids(clusters)
    key = None if shared else k
    ours = routing_attention(q, key, v, means, size, is_causal=is_causal)
    torch.testing.assert_close(ours, by_the_definition(q, key, v, means, size, is_causal))


def test_one_cluster_of_everything_is_dense_attention() -> None:
    (q, k, v), means = tokens(4, 5), centroids(1)
    ours = routing_attention(q, k, v, means, cluster_size=99)
    torch.testing.assert_close(ours, dense(q, k, v, None) / (1 + 1e-5))


def test_heads_and_samples_do_not_mix() -> None:
    (q, _, v), means = tokens(4, 5), centroids(3)
    y = routing_attention(q, None, v, means, 7)
    torch.testing.assert_close(routing_attention(q.flip(0), None, v.flip(0), means, 7), y.flip(0))
    other = q.clone()
    other[..., 1, :] = torch.randn_like(other[..., 1, :])
    changed = routing_attention(other, None, v, means, 7)
    assert torch.equal(changed[..., 0, :], y[..., 0, :])
    assert not torch.equal(changed[..., 1, :], y[..., 1, :])


def test_a_position_gets_the_mean_of_its_clusters_and_nothing_from_none() -> None:
    members = torch.tensor([[[[0, 2], [2, 3]]]])
    x = torch.tensor([[[[[1.0], [2.0]], [[4.0], [8.0]]]]])
    y = scatter_members(x, members, (5,), eps=0.5).flatten()
    torch.testing.assert_close(y, torch.tensor([1 / 1.5, 0, 6 / 2.5, 8 / 1.5, 0]))
    torch.testing.assert_close(gather_members(y.view(1, 5, 1, 1), members).flatten(), y[[0, 2, 2, 3]])


def test_a_causal_output_owes_nothing_to_later_values() -> None:
    for shared in (True, False):
        (q, k, v), means = tokens(4, 5), centroids(3)
        memory = None if shared else tuple(torch.randn(2, 2, 3, 1, 6, dtype=torch.float64))
        v.requires_grad_()
        y = routing_attention(q, None if shared else k, v, means, 9, is_causal=True, memory=memory)
        for t in (0, 7, 19):
            (grad,) = torch.autograd.grad(y.flatten(1, 2)[:, t].sum(), v, retain_graph=True)
            assert (grad.flatten(1, 2)[:, t + 1 :] == 0).all()


def test_with_shared_keys_a_position_looks_at_itself_only_if_it_may_look_at_nothing_else() -> None:
    (q, _, _), means = tokens(6, heads=1), centroids(1, heads=1)
    one_hot = torch.eye(6, dtype=torch.float64).view(1, 6, 1, 6).expand(2, -1, -1, -1)
    weights = routing_attention(q, None, one_hot, means, 6).squeeze(2) * (1 + 1e-5)
    assert (weights.diagonal(dim1=1, dim2=2) == 0).all()
    causal = routing_attention(q, None, one_hot, means, 6, is_causal=True).squeeze(2) * (1 + 1e-5)
    torch.testing.assert_close(causal[:, 0], one_hot[:, 0, 0])
    assert (causal.diagonal(dim1=1, dim2=2)[:, 1:] == 0).all()


def test_masked_keys_have_no_influence_on_real_queries() -> None:
    (q, k, v), means = tokens(10), centroids(2)
    mask = torch.ones(2, 10, 1, dtype=torch.bool)
    mask[0, 6:] = False
    y = routing_attention(q, k, v, means, 10, query_mask=mask, key_mask=mask)
    moved = v.clone()
    moved[0, 6:] = 99.0
    other = routing_attention(q, k, moved, means, 10, query_mask=mask, key_mask=mask)
    assert torch.equal(other[:, :6], y[:, :6])
    torch.testing.assert_close(y[:1, :6], routing_attention(q[:1, :6], k[:1, :6], v[:1, :6], means, 6))


def test_the_paper_form_sees_directions_only() -> None:
    (q, _, v), means = tokens(12), centroids(3)
    y = routing_attention(q, None, v, means, 5, norm="layer_norm", is_causal=True)
    again = routing_attention(1e3 * q + 7.0, None, v, means, 5, norm="layer_norm", is_causal=True)
    torch.testing.assert_close(again, y, rtol=1e-4, atol=1e-4)


def test_relative_vectors_belong_to_places_inside_a_cluster() -> None:
    (q, k, v), means = tokens(6, heads=1), centroids(1, heads=1)
    tables = torch.randn(2, 5, 6, dtype=torch.float64)
    ours = routing_attention(q, k, v, means, 6, norm="layer_norm", relative=(tables[0], tables[1])) * 1.01
    place = torch.arange(6)
    offset = (place - place[:, None]).clamp(-2, 2) + 2
    queries, keys = (normalize_vectors(t.squeeze(2), "layer_norm") for t in (q, k))
    weights = (queries @ keys.mT + torch.einsum("bqd,qkd->bqk", queries, tables[0][offset])).softmax(-1)
    expected = weights @ v.squeeze(2) + torch.einsum("bqk,qkd->bqd", weights, tables[1][offset])
    torch.testing.assert_close(ours.squeeze(2), expected)


@given(st.integers(1, 12), st.integers(1, 4), st.data())
@settings(deadline=None, max_examples=15)
def test_members_are_the_most_similar_positions_in_ascending_order(length, clusters, data) -> None:
    size = data.draw(st.integers(1, length))
    similarity = torch.randn(2, 3, length, clusters)
    members = cluster_members(similarity, size)
    assert (members.diff(dim=-1) > 0).all()
    taken = torch.zeros(2, 3, clusters, length).scatter(-1, members, 1.0).bool()
    ranked = similarity.mT
    assert (ranked.masked_fill(~taken, 9).amin(-1) >= ranked.masked_fill(taken, -9).amax(-1)).all()


def test_a_kmeans_step_takes_the_direction_of_the_sum_and_keeps_empty_clusters() -> None:
    x = normalize_vectors(torch.randn(2, 9, 1, 4, dtype=torch.float64))
    means = torch.stack([x[0, 0, 0], -10 * x.mean((0, 1, 2)).abs(), x[1, 3, 0]])[None]
    means[0, 1] = 0
    nearest = nearest_centroid(x, means)
    step = kmeans_step(x, means)
    for c in range(3):
        chosen = x.flatten(0, 2)[nearest.flatten() == c]
        expected = chosen.sum(0) / chosen.sum(0).norm() if len(chosen) else means[0, c]
        torch.testing.assert_close(step[0, c], expected)


def test_the_commitment_loss_is_zero_at_the_centroids_and_pulls_vectors_towards_them() -> None:
    means = centroids(4)
    at_home = means.transpose(0, 1).unsqueeze(0)
    assert commitment_loss(at_home, means) < 1e-30
    x = tokens(7)[0].requires_grad_()
    means.requires_grad_()
    loss = commitment_loss(x, means)
    loss.backward()
    assert means.grad is None
    assert x.grad is not None
    assert commitment_loss(x.detach() - 0.1 * x.grad, means) < loss


def test_averaged_centroids_are_smoothed_quotients_and_leave_padding_out() -> None:
    x = tokens(8)[0]
    x[0, 5:] = 0
    means = centroids(3)
    sums = cluster_sums(x, means)
    assert sums.count.sum(-1).tolist() == [13.0, 13.0]
    torch.testing.assert_close(sums.total.sum(1), x.sum((0, 1)))
    first = average_step(torch.zeros(2, 3).double(), torch.zeros_like(means), sums, decay=0.9)
    torch.testing.assert_close(first.count, 0.1 * sums.count)
    filled = sums.count > 0
    expected = sums.total[filled] / sums.count[filled].unsqueeze(-1)
    torch.testing.assert_close(first.means[filled], expected, rtol=1e-4, atol=1e-4)


def test_similarities_are_products_with_the_centroids_of_the_own_head() -> None:
    (x, _, _), means = tokens(2, 3), centroids(5)
    expected = torch.einsum("bxyhd,hkd->bhxyk", x, means).flatten(2, 3)
    torch.testing.assert_close(centroid_similarity(x, means), expected)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 4)), min_size=1, max_size=2), st.booleans())
def test_a_block_sees_the_blocks_around_it_and_in_causal_form_no_later_position(sizes, is_causal) -> None:
    grid, window = zip(*sizes)
    q, k, v = tokens(*grid)
    at = torch.stack(torch.unravel_index(torch.arange(prod(grid)), grid))
    block = at // torch.tensor(window).unsqueeze(-1)
    allowed = ((block.unsqueeze(-1) - block.unsqueeze(-2)).abs() <= 1).all(0)
    if is_causal:
        allowed = allowed.tril()
    torch.testing.assert_close(block_attention(q, k, v, window, is_causal=is_causal), dense(q, k, v, allowed))


def test_a_masked_tail_changes_nothing_before_it_forward_and_backward() -> None:
    q, k, v = (t.requires_grad_() for t in tokens(11))
    mask = torch.arange(11).expand(2, -1) < 7
    y = block_attention(q, k, v, 4, mask=mask)[:, :7]
    short = block_attention(q[:, :7], k[:, :7], v[:, :7], 4)
    torch.testing.assert_close(y, short)
    for ours, expected in zip(torch.autograd.grad(y.sum(), (q, k, v)), torch.autograd.grad(short.sum(), (q, k, v))):
        torch.testing.assert_close(ours, expected)


def test_shapes_and_settings_that_do_not_fit_are_named() -> None:
    (q, k, v), means = tokens(4, 5), centroids(3)
    with pytest.raises(ValueError, match="cluster_size=0"):
        routing_attention(q, k, v, means, 0)
    with pytest.raises(ValueError, match="needs memory"):
        routing_attention(q, k, v, means, 4, is_causal=True)
    with pytest.raises(ValueError, match=r"means \(3, 3, 6\)"):
        routing_attention(q, k, v, centroids(3, heads=3), 4)
    with pytest.raises(ValueError, match="norm='max' is not known"):
        routing_attention(q, k, v, means, 4, norm="max")
    with pytest.raises(ValueError, match="window_size=0"):
        block_attention(q, k, v, 0)

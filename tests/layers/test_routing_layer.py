"""Facts of the layer of local and routing heads and of its centroids."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gridattn.layers import RoutingAttention
from gridattn.layers.kmeans import AveragedKMeans, OnlineKMeans
from gridattn.ops.centroids import kmeans_step, normalize_vectors


def layer(**options) -> RoutingAttention:
    torch.manual_seed(0)
    return RoutingAttention(16, 4, **{"grid": (6, 6)} | options).double().eval()


def sample(*grid: int) -> torch.Tensor:
    return torch.randn(2, *grid, 16, dtype=torch.float64)


OPTIONS = [
    {},
    {"is_causal": True},
    {"is_causal": True, "shared_qk": False},
    {"norm": "layer_norm", "bias": True},
    {"shared_qk": True, "num_memory": 2, "rotary": True},
    {"local_heads": 4},
    {"local_heads": 0, "head_dim": 6, "num_clusters": 3, "cluster_size": 5},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_form_runs_on_other_grids_is_deterministic_and_is_counted_right(options) -> None:
    attention = layer(**options)
    for grid in ((6, 6), (3, 9), (1, 1)):
        x = sample(*grid)
        assert torch.equal(attention(x), attention(x))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attention(sample(6, 6)[:1])
    assert abs(counter.get_total_flops() / 2 / attention.macs((6, 6)) - 1) < 0.02


@pytest.mark.parametrize("options", [{}, {"shared_qk": False}, {"norm": "layer_norm"}])
def test_causal_heads_pass_no_value_backwards(options) -> None:
    attention = layer(is_causal=True, **options)
    weights = attention.attention_map(sample(4, 6), (2, 1))
    assert (weights.flatten(2)[:, :, 2 * 6 + 2 :] == 0).all()
    assert (weights >= 0).all()


def test_evaluation_never_moves_the_centroids_and_training_does() -> None:
    attention, x = layer(), sample(6, 6)
    before = attention.kmeans.means.clone()
    attention(x)
    assert torch.equal(attention.kmeans.means, before)
    attention.train()(x)
    assert attention.kmeans.initted
    assert not torch.equal(attention.kmeans.means, before)


def test_deferred_centroids_wait_for_their_update() -> None:
    attention, x = layer(defer_update=True).train(), sample(6, 6)
    attention(x)
    placed = attention.kmeans.means.clone()
    attention(x)
    assert torch.equal(attention.kmeans.means, placed)
    attention.update_centroids()
    assert not torch.equal(attention.kmeans.means, placed)


def test_an_update_moves_by_one_minus_decay_towards_the_mean_of_the_steps() -> None:
    kmeans = OnlineKMeans(2, 5, 4, decay=0.9).double()
    old = kmeans.means.clone()
    batches = torch.randn(3, 2, 9, 2, 4, dtype=torch.float64)
    for x in batches:
        kmeans.accumulate(x)
    kmeans.update()
    steps = torch.stack([kmeans_step(normalize_vectors(x), old) for x in batches]).mean(0)
    torch.testing.assert_close(kmeans.means, 0.9 * old + 0.1 * steps)
    assert (kmeans.means.norm(dim=-1) <= 1 + 1e-12).all()
    kmeans.update()
    torch.testing.assert_close(kmeans.means, 0.9 * old + 0.1 * steps)


def test_centroids_find_clusters_that_are_there() -> None:
    truth = normalize_vectors(torch.randn(4, 8))
    x = truth[torch.randint(4, (2, 200))].unsqueeze(2) + 0.05 * torch.randn(2, 200, 1, 8)
    best = 0.0
    for _ in range(5):  # k-means keeps what a poor start gives it
        kmeans = OnlineKMeans(1, 4, 8)
        kmeans.initialize(x)
        best = max(best, (truth @ kmeans.means[0].T).amax(-1).min().item())
    assert best > 0.99


def test_a_checkpoint_keeps_the_centroids_from_being_placed_again() -> None:
    trained, fresh = layer().train(), layer().train()
    trained(sample(6, 6))
    fresh.load_state_dict(trained.state_dict())
    assert fresh.kmeans.started
    again = OnlineKMeans(2, 3, 4)
    again.load_state_dict({**again.state_dict(), "initted": torch.tensor(False)})
    assert not again.started


def test_averaged_centroids_follow_the_sums_of_accumulated_batches() -> None:
    whole, halves = AveragedKMeans(2, 3, 6).double(), AveragedKMeans(2, 3, 6).double()
    halves.load_state_dict(whole.state_dict())
    x = torch.randn(4, 9, 2, 6, dtype=torch.float64)
    whole.accumulate(x)
    for half in x.chunk(2):
        halves.accumulate(half)
    whole.update()
    halves.update()
    torch.testing.assert_close(halves.means, whole.means)
    torch.testing.assert_close(halves.ema_count, whole.ema_count)


def test_the_commitment_loss_reaches_queries_and_not_values() -> None:
    attention = layer(shared_qk=True)
    _, auxiliary = attention(sample(6, 6), return_auxiliary=True)
    auxiliary.backward()
    assert attention.to_q.weight.grad is not None
    assert attention.to_v.weight.grad is None
    assert auxiliary > 0


def test_masked_positions_do_not_reach_the_others() -> None:
    attention, x = layer(grid=(12,), num_clusters=1, cluster_size=12), sample(12)
    mask = torch.arange(12).expand(2, -1) < 8
    noisy = x.clone()
    noisy[:, 8:] = 5.0
    torch.testing.assert_close(attention(x, mask)[:, :8], attention(noisy, mask)[:, :8])


def test_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="local_heads=5 is not allowed"):
        layer(local_heads=5)
    with pytest.raises(ValueError, match="norm='max' is not known"):
        layer(norm="max")
    with pytest.raises(ValueError, match="bias=True is not allowed with memory"):
        layer(bias=True, num_memory=1)
    with pytest.raises(ValueError, match="head_dim=3 is odd"):
        layer(head_dim=3, rotary=True)

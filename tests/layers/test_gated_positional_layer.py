"""Facts about the gated positional attention layer: its initialisation and its limits."""

import math

import pytest
import torch
from torch import Tensor, nn

from gridattn.layers.gated_positional import (
    GatedPositionalAttention,
    attention_distances,
    convolution_taps,
    mean_attention,
)
from gridattn.layers.global_attention import GlobalAttention
from gridattn.ops.gated_positional import positional_weights


def test_nine_heads_begin_as_the_taps_of_a_3x3_convolution() -> None:
    layer = GatedPositionalAttention(36, 9)
    expected = [[2.0 * x, 2.0 * y, -1.0] for x in (-1, 0, 1) for y in (-1, 0, 1)]
    assert layer.pos_proj.weight.tolist() == expected
    assert torch.equal(layer.v.weight, torch.eye(36))
    assert (layer.gating_param == 1).all()
    assert (layer.pos_proj.bias == 0).all()


def test_heads_beyond_the_largest_square_stay_random_and_small() -> None:
    layer = GatedPositionalAttention(36, 6, locality_strength=0.5)
    torch.testing.assert_close(layer.pos_proj.weight[:4, -1], torch.full((4,), -0.5))
    assert 0 < layer.pos_proj.weight[4:].abs().max() < 0.03


def test_without_local_init_nothing_is_placed() -> None:
    layer = GatedPositionalAttention(36, 9, local_init=False)
    assert layer.pos_proj.weight.abs().max() < 0.1
    assert layer.v.weight.diagonal().mean() < 0.1


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_each_head_peaks_at_its_tap(rank: int) -> None:
    heads, grid = 3**rank, (7,) * rank
    layer = GatedPositionalAttention(heads, heads, grid=grid)
    centre = sum(3 * 7**a for a in range(rank))
    peak = positional_weights(grid, layer.pos_proj.weight)[:, centre].argmax(-1)
    offset = torch.stack(torch.unravel_index(peak, grid), -1) - 3
    assert torch.equal(offset.flip(-1), convolution_taps(heads, rank).long())


def test_the_mass_at_the_peak_grows_with_the_locality_strength_to_one() -> None:
    masses = []
    for strength in (1.0, 4.0, 20.0):
        layer = GatedPositionalAttention(9, 9, locality_strength=strength)
        masses.append(positional_weights((13, 13), layer.pos_proj.weight)[:, 6 * 13 + 6].amax(-1))
    total = sum(math.exp(-(n**2)) for n in range(-9, 10)) ** 2
    torch.testing.assert_close(masses[0], torch.full((9,), 1 / total), rtol=1e-5, atol=1e-6)
    assert masses[0][0].item() == pytest.approx(0.3182, abs=1e-4)
    assert (masses[2] > 1 - 1e-6).all()


def closed_gate(layer: GatedPositionalAttention, value: float) -> GatedPositionalAttention:
    nn.init.constant_(layer.gating_param, value)
    nn.init.eye_(layer.proj.weight)
    return layer


def test_sharp_positional_heads_are_a_convolution_with_one_shift_per_head() -> None:
    layer = closed_gate(GatedPositionalAttention(9, 9, locality_strength=50.0), 40.0)
    x = torch.randn(1, 8, 8, 9)
    out = layer(x)
    for head, (dx, dy) in enumerate(convolution_taps(9).long().tolist()):
        shifted = x.roll((-dy, -dx), (1, 2))
        torch.testing.assert_close(out[:, 1:-1, 1:-1, head], shifted[:, 1:-1, 1:-1, head], rtol=1e-4, atol=1e-5)


def test_a_closed_gate_is_plain_attention_and_an_open_one_ignores_content() -> None:
    layer = closed_gate(GatedPositionalAttention(12, 4), -40.0)
    x = torch.randn(2, 5, 6, 12)
    plain = GlobalAttention(12, 4, qkv_bias=False)
    nn.init.eye_(plain.proj.weight)
    nn.init.zeros_(plain.proj.bias)
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat([layer.qk.weight, layer.v.weight]))
    torch.testing.assert_close(layer(x), plain(x))

    closed_gate(layer, 40.0)
    before = layer(x)
    nn.init.normal_(layer.qk.weight)
    torch.testing.assert_close(layer(x), before)
    weights = layer.weights(x)
    torch.testing.assert_close(weights[0], weights[1])


def test_the_readings_recover_the_taps_the_spans_and_the_gates() -> None:
    reading = GatedPositionalAttention(36, 9, locality_strength=0.5).locality()
    torch.testing.assert_close(reading.centre, convolution_taps(9))
    torch.testing.assert_close(reading.span, torch.full((9,), 2.0))
    torch.testing.assert_close(reading.gate, torch.full((9,), 0.731059), rtol=1e-5, atol=0)
    torch.testing.assert_close(reading.distance, convolution_taps(9).norm(dim=-1))


def test_sharp_heads_attend_as_far_away_as_their_taps() -> None:
    layer = closed_gate(GatedPositionalAttention(9, 9, locality_strength=50.0), 40.0)
    distances = attention_distances(layer, torch.randn(2, 24, 24, 9))
    torch.testing.assert_close(distances, convolution_taps(9).norm(dim=-1), rtol=0, atol=0.1)


def test_the_mean_attention_agrees_with_the_maps_of_single_queries() -> None:
    x = torch.randn(2, 4, 5, 12)
    for layer in (GatedPositionalAttention(12, 4), GlobalAttention(12, 4)):
        expected: Tensor = layer.attention_map(x, (2, 3)).mean(0).flatten(1)
        torch.testing.assert_close(mean_attention(layer, x)[:, 2 * 5 + 3], expected)


def test_attention_dropout_acts_in_training_only() -> None:
    layer = GatedPositionalAttention(12, 4, attention_dropout=0.5)
    x = torch.randn(1, 4, 4, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))

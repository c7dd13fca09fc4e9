"""Facts about deformable attention along one axis."""

import pytest
import torch

from gridattn.layers.deformable_1d import DeformableAttention1d


def build(**options) -> DeformableAttention1d:
    torch.manual_seed(0)
    layer = DeformableAttention1d(16, 4, head_dim=8, **options).double().eval()
    torch.nn.init.normal_(layer.to_offsets[2].get_parameter("weight"))
    return layer


def rest(layer: DeformableAttention1d) -> DeformableAttention1d:
    torch.nn.init.zeros_(layer.to_offsets[2].get_parameter("weight"))
    return layer


@pytest.mark.parametrize("length", [4, 7, 8, 37, 640])
def test_without_offsets_key_j_rests_at_j(length: int) -> None:
    layer = rest(build())
    positions = layer.sample_positions(torch.randn(2, length, 16).double())
    count = (length - 4) // 4 + 1
    assert layer.num_keys(length) == count
    assert torch.equal(positions, torch.arange(count).double().expand(2, 4, -1))


def test_no_key_drifts_further_than_the_scale() -> None:
    layer = build(offset_scale=1.5)
    torch.nn.init.normal_(layer.to_offsets[2].get_parameter("weight"), std=100)
    positions = layer.sample_positions(torch.randn(2, 37, 16).double())
    drift = (positions - torch.arange(9)).abs()
    assert drift.max() <= 1.5
    assert drift.max() > 1.4


def test_keys_at_rest_span_the_sequence_from_border_to_border() -> None:
    """Key 0 lies half a position before the first, the last half a position behind the last: both read half."""
    layer, x = rest(build()), torch.ones(1, 37, 16).double()
    place = layer._normalise(layer.sample_positions(x))
    sampled = layer._sample(x, place)[0, :, 0]
    torch.testing.assert_close(sampled, torch.tensor([0.5, *[1.0] * 7, 0.5]).double())


def test_a_head_reads_its_own_channels_alone() -> None:
    layer, x = build(), torch.randn(1, 37, 16).double()
    other = x.clone()
    other[..., 4:8] += 1
    changed = (layer.sample_positions(x) != layer.sample_positions(other)).any(-1)[0]
    assert changed.tolist() == [False, True, False, False]


@pytest.mark.parametrize("length", [36, 37])
def test_the_legacy_grid_reads_every_key_at_the_middle(length: int) -> None:
    layer, x = build(legacy_grid=True), torch.randn(1, length, 16).double()
    place = layer._normalise(layer.sample_positions(x))
    other = torch.randn_like(x)
    middle = slice((length - 1) // 2, length // 2 + 1)
    other[:, middle] = x[:, middle]
    torch.testing.assert_close(layer._sample(other, place), layer._sample(x, place))
    expected = x[0, middle].mean(0).view(4, 1, 4) * (1 - place[0].abs() / 2).unsqueeze(-1)
    torch.testing.assert_close(layer._sample(x, place)[0].unflatten(-1, (4, 4)).transpose(0, 1), expected)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_map_holds_the_weights_of_the_output(legacy: bool) -> None:
    layer, x = build(legacy_grid=legacy), torch.randn(2, 37, 16).double()
    weights = layer.attention_map(x, (11,)).double()
    value = layer._project(layer.to_v, x)
    out = layer.to_out(torch.einsum("bhn,bhnd->bhd", weights, value).flatten(1))
    torch.testing.assert_close(out, layer(x)[:, 11], rtol=1e-5, atol=1e-6)


def test_the_bias_grows_with_nothing_but_the_signed_distance() -> None:
    layer = rest(build())
    place = torch.tensor([-0.5, 0.0, 0.5]).double().expand(1, 4, 3)
    bias = layer._bias(place, 5)[0, 0]  # queries at -1, -0.5, 0, 0.5, 1
    torch.testing.assert_close(bias[1, 0], bias[2, 1])
    torch.testing.assert_close(bias[2, 1], bias[3, 2])
    assert bias[1, 1] != bias[2, 0]


def test_a_sequence_shorter_than_the_window_has_one_key() -> None:
    layer = build()
    for length in (1, 2, 3):
        assert layer.sample_positions(torch.randn(2, length, 16).double()).shape == (2, 4, 1)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"kernel_size=5 is not allowed.*stride=4 plus an even number"):
        build(kernel_size=5)
    with pytest.raises(ValueError, match="kernel_size=2"):
        build(kernel_size=2)
    with pytest.raises(ValueError, match="stride=0"):
        build(stride=0)
    with pytest.raises(ValueError, match="1 is allowed"):
        DeformableAttention1d(16, 4, grid=(4, 4))

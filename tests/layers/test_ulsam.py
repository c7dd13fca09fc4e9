"""Facts about the ultra-lightweight subspace attention module."""

import pytest
import torch

from gridattn.layers.ulsam import UltraLightweightSubspaceAttention


def trained(dim: int = 12, num_subspaces: int = 4) -> UltraLightweightSubspaceAttention:
    """A layer in eval mode whose statistics are those of some data."""
    layer = UltraLightweightSubspaceAttention(dim, num_subspaces=num_subspaces).double()
    layer(torch.randn(4, 6, 6, dim, dtype=torch.float64))
    return layer.eval()


@pytest.mark.parametrize(("dim", "num_subspaces"), [(512, 4), (32, 1), (32, 32)])
def test_it_has_five_parameters_a_channel_and_three_a_subspace(dim: int, num_subspaces: int) -> None:
    layer = UltraLightweightSubspaceAttention(dim, num_subspaces=num_subspaces)
    assert sum(p.numel() for p in layer.parameters()) == 5 * dim + 3 * num_subspaces


def test_a_subspace_depends_on_its_own_channels_only() -> None:
    layer = trained()
    x = torch.randn(1, 5, 5, 12, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[..., 3:6].square().sum(), x)
    assert grad[..., 3:6].abs().sum() > 0
    assert not grad[..., :3].any()
    assert not grad[..., 6:].any()


def test_permuting_subspaces_with_their_parameters_permutes_the_output() -> None:
    layer, other, order = trained(), trained(), torch.tensor([2, 0, 3, 1])
    channels = torch.arange(12).view(4, 3)[order].flatten()
    index_of_length = {12: channels, 4: order}
    other.load_state_dict(
        {key: value[index_of_length[len(value)]] if value.ndim else value for key, value in layer.state_dict().items()}
    )
    x = torch.randn(2, 5, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(other(x[..., channels]), layer(x)[..., channels])


def test_folded_normalisations_change_nothing() -> None:
    layer = trained()
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    gain = 1 + layer.attention(x).repeat_interleave(3, dim=-1)
    torch.testing.assert_close(layer(x), x * gain)


def test_every_map_sums_to_one() -> None:
    maps = trained().attention(torch.randn(2, 5, 7, 12, dtype=torch.float64))
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2, 4, dtype=torch.float64))


def test_silent_scores_give_a_uniform_map() -> None:
    layer = trained()
    for parameter in (layer.weight, layer.bias, layer.score_norm.bias, layer.score_norm.running_mean):
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 5, 4, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x * (1 + 1 / 20))


def test_a_single_position_is_doubled() -> None:
    x = torch.randn(2, 1, 1, 12, dtype=torch.float64)
    torch.testing.assert_close(trained()(x), 2 * x)


def test_running_statistics_keep_a_tenth_of_the_past() -> None:
    layer = UltraLightweightSubspaceAttention(12)
    torch.nn.init.constant_(layer.channel_norm.running_mean, 5.0)
    x = torch.randn(4, 6, 6, 12)
    features = (layer.scale * x + layer.shift).flatten(0, 2)
    layer(x)
    torch.testing.assert_close(layer.channel_norm.running_mean, 0.5 + 0.9 * features.mean(0))
    torch.testing.assert_close(layer.channel_norm.running_var, 0.1 + 0.9 * features.var(0))


def test_a_split_that_does_not_divide_the_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="dim=32 is not divisible by num_subspaces=5"):
        UltraLightweightSubspaceAttention(32, num_subspaces=5)
    with pytest.raises(ValueError, match="num_subspaces=0 is not allowed"):
        UltraLightweightSubspaceAttention(32, num_subspaces=0)

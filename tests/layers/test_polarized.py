"""Facts about polarized self-attention."""

import pytest
import torch

from gridattn.layers import create_attention
from gridattn.layers.polarized import PolarizedSelfAttention

ALL = [
    (layout, variant)
    for layout in ("parallel", "sequential", "channel", "spatial")
    for variant in ("paper", "official")
]


def zeroed(layout: str, variant: str) -> PolarizedSelfAttention:
    layer = PolarizedSelfAttention(16, layout=layout, variant=variant)
    for name, parameter in layer.named_parameters():
        if not name.endswith("up.1.weight"):
            torch.nn.init.zeros_(parameter)
    return layer


def count(layer: torch.nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize(("layout", "variant"), ALL)
def test_permuting_the_positions_permutes_the_output(layout: str, variant: str) -> None:
    layer = PolarizedSelfAttention(16, layout=layout, variant=variant).double()
    x, order = torch.randn(2, 5, 4, 16, dtype=torch.float64), torch.randperm(20)
    permuted = x.flatten(1, 2)[:, order].view_as(x)
    torch.testing.assert_close(layer(permuted).flatten(1, 2), layer(x).flatten(1, 2)[:, order])


def test_with_weights_of_zero_the_parallel_layer_of_the_paper_is_the_identity() -> None:
    x = torch.randn(2, 5, 4, 16)
    torch.testing.assert_close(zeroed("parallel", "paper")(x), x)


def test_with_weights_of_zero_the_official_layers_scale_by_known_constants() -> None:
    x = torch.randn(2, 5, 4, 16)
    torch.testing.assert_close(zeroed("parallel", "official")(x), x * (torch.tensor(1 / 20).sigmoid() + 0.5))
    torch.testing.assert_close(zeroed("sequential", "official")(x), 0.25 * x)


@pytest.mark.parametrize(
    ("layout", "variant", "low", "high"),
    [
        ("parallel", "official", 0.5, 1.7311),
        ("sequential", "official", 0.0, 1.0),
        ("sequential", "paper", 0.0, 1.0),
        ("parallel", "paper", 0.0, 2.0),
        ("channel", "paper", 0.0, 1.0),
        ("spatial", "official", 0.5, 0.7311),
    ],
)
def test_the_gain_stays_in_its_range(layout: str, variant: str, low: float, high: float) -> None:
    x = 3 * torch.randn(4, 5, 4, 16, dtype=torch.float64)
    gain = PolarizedSelfAttention(16, layout=layout, variant=variant).double()(x) / x
    assert low <= gain.min() < gain.max() < high


def test_parameters_are_those_of_the_published_layers() -> None:
    assert count(PolarizedSelfAttention(48, layout="parallel", variant="official")) == 2 * 48**2 + 48 == 4_656
    inner = 24
    expected = 3 * 48**2 // 2 + 48 + inner * (inner // 4) + (inner // 4) * (3 + 48) + 48
    assert count(PolarizedSelfAttention(48, layout="sequential", variant="official")) == expected
    assert count(PolarizedSelfAttention(16, variant="paper")) == 601


def test_the_channel_branch_scales_whole_channels_and_the_spatial_branch_whole_positions() -> None:
    x = torch.randn(2, 5, 4, 16, dtype=torch.float64)
    channel, spatial = (create_attention(name, 16).double()(x) / x for name in ("psa_channel", "psa_spatial"))
    torch.testing.assert_close(channel, channel[:, :1, :1].expand_as(x))
    torch.testing.assert_close(spatial, spatial[..., :1].expand_as(x))


def test_sequential_is_the_channel_branch_followed_by_the_spatial_branch() -> None:
    both = PolarizedSelfAttention(16, layout="sequential")
    parts = [PolarizedSelfAttention(16, layout=layout) for layout in ("channel", "spatial")]
    for part in parts:
        part.load_state_dict({k: v for k, v in both.state_dict().items() if k in part.state_dict()})
    x = torch.randn(2, 5, 4, 16)
    torch.testing.assert_close(both(x), parts[1](parts[0](x)))


def test_one_exported_program_serves_every_grid() -> None:
    layer = PolarizedSelfAttention(16, layout="sequential", variant="official").eval()
    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(2, 14, 14, 16),), dynamic_shapes=({1: height, 2: width},))
    x = torch.randn(2, 9, 17, 16)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_too_few_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dim=6 is too small.*at least 8"):
        PolarizedSelfAttention(6, layout="sequential", variant="official")
    with pytest.raises(ValueError, match=r"dim=1 is too small.*at least 2"):
        PolarizedSelfAttention(1)

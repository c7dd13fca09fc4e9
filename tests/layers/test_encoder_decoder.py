"""Facts about encoder-decoder attention."""

import pytest
import torch

from gridattn.layers.encoder_decoder import EncoderDecoderAttention, EncoderDecoderMap, MapGain, load_official_map
from gridattn.ops.legacy_resize import legacy_bilinear_resize


def test_the_published_body_has_its_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in EncoderDecoderMap(1).parameters()) == 5_468_897


def test_a_head_has_fifty_parameters_a_channel() -> None:
    assert sum(p.numel() for p in MapGain(24).parameters()) == 50 * 24


def test_the_map_lies_between_zero_and_one_at_the_input_size() -> None:
    found = EncoderDecoderMap(3, width_divisor=16)(torch.randn(2, 3, 19, 37))
    assert found.shape == (2, 1, 19, 37)
    assert ((found > 0) & (found < 1)).all()


def test_a_zero_initialised_head_is_the_identity() -> None:
    x = torch.randn(2, 5, 6, 8)
    torch.testing.assert_close(EncoderDecoderAttention(8, zero_init=True)(x), x)


def test_a_head_of_kernel_zero_scales_by_one_plus_its_bias() -> None:
    head, x = MapGain(3, zero_init=True), torch.randn(2, 3, 5, 6)
    torch.nn.init.normal_(head.gain.bias)
    torch.testing.assert_close(head(x, torch.rand(2, 1, 9, 9)), x * (1 + head.gain.bias.view(1, 3, 1, 1)))


def test_each_head_alone_trains_the_first_convolution_of_the_body() -> None:
    body, image = EncoderDecoderMap(1, width_divisor=16), torch.randn(1, 1, 32, 32)
    for size in (32, 16, 8, 4):
        body.zero_grad()
        MapGain(4)(torch.randn(1, 4, size, size), body(image)).square().sum().backward()
        assert body.encoder[0][0][0].weight.grad.abs().sum() > 0


def test_resizing_to_the_same_size_or_a_constant_changes_nothing() -> None:
    x = torch.randn(2, 5, 7)
    assert torch.equal(legacy_bilinear_resize(x, (5, 7)), x)
    torch.testing.assert_close(legacy_bilinear_resize(torch.full((3, 4), 2.5), (7, 9)), torch.full((7, 9), 2.5))


def test_halving_takes_every_second_sample() -> None:
    x = torch.randn(2, 8, 6)
    assert torch.equal(legacy_bilinear_resize(x, (4, 3)), x[:, ::2, ::2])


def test_enlarging_reads_at_multiples_of_the_step_without_a_half_pixel_shift() -> None:
    found = legacy_bilinear_resize(torch.tensor([0.0, 1.0, 2.0]), (6,))
    assert found.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EncoderDecoderMap(0), "in_channels=0"),
        (lambda: EncoderDecoderAttention(8, grid=(4,)), "has 1 axes"),
        (lambda: legacy_bilinear_resize(torch.zeros(3), (0,)), "size=\\(0,\\)"),
        (lambda: load_official_map({"sem/99/bias": torch.zeros(1)}), "sem/99/bias"),
    ],
)
def test_wrong_settings_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

"""Facts about channel attention and the dual block as layers."""

import pytest
import torch
from torch import Tensor, nn

from gridattn.layers.channel import ChannelAttention
from gridattn.layers.dual import ConvPositionEncoding, DualAttention, DualAttentionBlock, PaddedWindowAttention
from gridattn.layers.window import WindowAttention


def without_position_encoding(block: DualAttentionBlock) -> DualAttentionBlock:
    for encoding in (block.cpe1, block.cpe2):
        nn.init.zeros_(encoding.proj.weight)
        nn.init.zeros_(encoding.proj.bias)
    return block


def shares(layer: ChannelAttention, x: Tensor) -> Tensor:
    """Logits up to a constant per row."""
    logits = layer.weights(x).log()
    return logits - logits.mean(-1, keepdim=True)


@pytest.mark.parametrize(("dynamic_scale", "factor"), [(False, 2.0), (True, 2**0.5)])
def test_every_token_twice_doubles_the_logits_or_with_dynamic_scale_times_root_2(dynamic_scale, factor) -> None:
    layer = ChannelAttention(8, 2, grid=(6,), dynamic_scale=dynamic_scale).double()
    x = 0.3 * torch.randn(1, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(shares(layer, torch.cat([x, x], 1)), factor * shares(layer, x))


@pytest.mark.parametrize("dynamic_scale", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_large_grids_use_another_form_of_the_same_function(dynamic_scale, qkv_bias, monkeypatch) -> None:
    layer = ChannelAttention(8, 2, qkv_bias=qkv_bias, dynamic_scale=dynamic_scale).double()
    x = torch.randn(1, 90, 92, 8, dtype=torch.float64)
    assert layer._by_gram_matrix(x)
    assert not layer._by_gram_matrix(x[:, :2, :2])
    assert not layer._by_gram_matrix(x.half())
    fast = layer(x)
    monkeypatch.setattr(layer, "_by_gram_matrix", lambda x: False)
    torch.testing.assert_close(fast, layer(x))


def test_the_thirds_of_the_projection_are_value_query_key() -> None:
    layer = ChannelAttention(8, 2, grid=(5,))
    with torch.no_grad():
        layer.qkv.weight[8:16].zero_()
        layer.qkv.bias[8:16].zero_()
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(layer.weights(x), torch.full((1, 2, 4, 4), 0.25))
    value = (x @ layer.qkv.weight[:8].T + layer.qkv.bias[:8]).unflatten(-1, (2, 4))
    expected = layer.proj(value.mean(-1, keepdim=True).expand_as(value).flatten(-2))
    torch.testing.assert_close(layer(x), expected)


def test_without_position_encoding_a_spatial_block_keeps_to_its_window() -> None:
    block = without_position_encoding(DualAttentionBlock(WindowAttention(8, 2, window_size=4, bias=False)))
    x = torch.randn(1, 8, 12, 8)
    changed = x.clone()
    changed[:, 4:, :4] += 1.0
    before, after = block(x), block(changed)
    different = (before != after).any(-1)[0]
    assert different[4:, :4].all()
    assert different.sum() == 16


def test_exchanging_windows_exchanges_their_outputs() -> None:
    block = without_position_encoding(DualAttentionBlock(WindowAttention(8, 2, window_size=4, bias=False)))
    x = torch.randn(1, 8, 4, 8)
    torch.testing.assert_close(block(x.roll(4, 1)), block(x).roll(4, 1))


def test_without_position_encoding_a_channel_block_does_not_know_positions() -> None:
    block = without_position_encoding(DualAttentionBlock(ChannelAttention(8, 2, grid=(30,))))
    x, order = torch.randn(1, 30, 8), torch.randperm(30)
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order])


def test_unmasked_padding_counts_as_zero_keys_and_values() -> None:
    attention = PaddedWindowAttention(8, 2, window_size=7, bias=False, qkv_bias=False)
    x = torch.randn(1, 3, 3, 8)
    q, k, v = attention.qkv(x.flatten(1, 2)).unflatten(-1, (3, 2, 4)).unbind(-3)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
    weights = torch.cat([logits, logits.new_zeros(1, 2, 9, 40)], -1).softmax(-1)[..., :9]
    expected = attention.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2)).view(x.shape)
    torch.testing.assert_close(attention(x), expected)


def test_padding_is_seen_only_where_asked_for() -> None:
    published = DualAttention(8, 2, window_size=4, mask_padding=False)
    masked = DualAttention(8, 2, window_size=4)
    masked.load_state_dict(published.state_dict())
    x = torch.randn(1, 6, 8, 8)
    assert not torch.allclose(published(x), masked(x))
    torch.testing.assert_close(published(x[:, :4]), masked(x[:, :4]))


def test_the_position_encoding_adds_a_convolution_to_its_input() -> None:
    encoding = ConvPositionEncoding(8)
    x = torch.randn(2, 6, 5, 8)
    torch.testing.assert_close(encoding(x), x + encoding.proj(x))
    assert set(encoding.state_dict()) == {"proj.weight", "proj.bias"}


def test_the_feed_forward_can_be_left_out_and_the_second_encoding_stays() -> None:
    layer = DualAttention(8, 2, mlp_ratio=0)
    names = {name.split(".")[1] for name, _ in layer.named_parameters()}
    assert names == {"cpe1", "norm1", "attn", "cpe2"}
    assert layer(torch.randn(1, 5, 5, 8)).shape == (1, 5, 5, 8)


def test_the_map_of_attention_that_sees_its_padding_leaves_the_paddings_share_out() -> None:
    layer = PaddedWindowAttention(8, 2, window_size=7, bias=False)
    nn.init.zeros_(layer.qkv.weight)
    weights = layer.attention_map(torch.randn(1, 5, 5, 8), (0, 0))
    torch.testing.assert_close(weights, torch.full((1, 2, 5, 5), 1 / 49))

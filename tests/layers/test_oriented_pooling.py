"""Facts about attention after oriented pooling."""

import pytest
import torch
import torch.nn.functional as F

from gridattn.layers.oriented_pooling import OrientedPoolingAttention


def test_it_is_multi_head_attention_among_the_means_along_the_pooled_axis() -> None:
    layer, x = OrientedPoolingAttention(8, num_heads=2, grid=(5, 7)), torch.randn(3, 5, 7, 8)
    tokens = x.mean(2).transpose(0, 1)
    expected, weights = F.multi_head_attention_forward(
        tokens, tokens, tokens, 8, 2, layer.qkv.weight, layer.qkv.bias, None, None, False, 0.0,
        layer.proj.weight, layer.proj.bias, average_attn_weights=False,
    )  # fmt: skip
    torch.testing.assert_close(layer(x), expected.transpose(0, 1)[:, :, None].expand_as(x))
    maps = layer.attention_map(x, (2, 4))
    torch.testing.assert_close(maps, weights[:, :, 2, :, None].expand(3, 2, 5, 7) / 7)


def test_the_output_does_not_change_along_the_pooled_axis_nor_with_the_order_of_its_input() -> None:
    layer, x = OrientedPoolingAttention(8, num_heads=2, grid=(4, 4, 4), pool_axis=0), torch.randn(1, 4, 5, 6, 8)
    y = layer(x)
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    torch.testing.assert_close(layer(x[:, torch.randperm(4)]), y)


def test_permuting_the_remaining_positions_permutes_the_output() -> None:
    layer, x, order = OrientedPoolingAttention(8, grid=(6, 9)), torch.randn(2, 6, 9, 8), torch.randperm(6)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_zero_attention_weights_make_the_output_independent_of_the_input() -> None:
    layer = OrientedPoolingAttention(8, grid=(6, 9))
    for parameter in (layer.qkv.weight, layer.proj.weight):
        torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(layer(torch.randn(1, 6, 9, 8)), layer(torch.randn(1, 6, 9, 8)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pool_axis": 2}, "pool_axis=2"), ({"grid": (5,)}, "has 1 axes"), ({"num_heads": 3}, "not divisible")],
)
def test_wrong_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OrientedPoolingAttention(**{"dim": 8, **options})

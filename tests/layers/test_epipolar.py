"""Facts about attention inside epipolar planes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.layers.epipolar import AlternatingFilter, EpipolarAttention, EpipolarTransformer
from gridattn.ops.epipolar import band_mask, epipolar_attention


@settings(max_examples=25, deadline=None)
@given(
    grid=st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple),
    fields=st.tuples(st.integers(2, 7), st.integers(2, 20)),
)
def test_it_is_attention_under_the_band_mask(grid: tuple[int, ...], fields: tuple[int, int]) -> None:
    field = fields[: len(grid)]
    q, k, v = (torch.randn(2, *grid, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = epipolar_attention(q, k, v, field)
    tokens = [t.flatten(1, -3).transpose(1, 2) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*tokens, attn_mask=band_mask(grid, field)).transpose(1, 2).view_as(out)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(o, (q, k, v), cotangent, allow_unused=True) for o in (out, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


def reach(layer: torch.nn.Module, x: torch.Tensor, query: tuple[int, ...]) -> torch.Tensor:
    x = x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[(0, *query)].sum(), x)
    return grad[0].abs().sum(-1) > 0


def test_a_query_sees_all_views_within_five_pixels() -> None:
    seen = reach(EpipolarTransformer(4, 8, 2, field=(10, 11)), torch.randn(1, 5, 20, 4), (2, 9))
    expected = torch.zeros(5, 20, dtype=torch.bool)
    expected[:, 4:15] = True
    assert torch.equal(seen, expected)


def test_on_a_light_field_a_query_sees_its_two_planes() -> None:
    seen = reach(EpipolarAttention(8, grid=(3, 3, 9, 9), band=3), torch.randn(1, 3, 4, 9, 8, 8), (1, 2, 4, 5))
    expected = torch.zeros(3, 4, 9, 8, dtype=torch.bool)
    expected[:, 2, 3:6, 5] = True
    expected[1, :, 4, 4:7] = True
    assert torch.equal(seen, expected)


def test_the_map_of_a_light_field_is_a_distribution() -> None:
    layer = EpipolarAttention(8, grid=(3, 3, 9, 9), band=3)
    weights = layer.attention_map(torch.randn(1, 3, 4, 9, 8, 8), (1, 2, 4, 5))
    torch.testing.assert_close(weights.flatten(2).sum(-1), torch.ones(1, 4))


@pytest.mark.parametrize("axis", [1, 2])
def test_reversing_a_plane_reverses_the_output(axis: int) -> None:
    layer, x = EpipolarTransformer(4, 8, 2, field=(10, 11)), torch.randn(2, 5, 13, 4)
    torch.testing.assert_close(layer(x.flip(axis)), layer(x).flip(axis))


def test_the_same_weights_run_at_any_angular_resolution() -> None:
    layer = AlternatingFilter(4, field=(18, 11), num_heads=2)
    for views in range(1, 5):
        assert layer(torch.randn(1, views, views, 6, 7, 4)).shape == (1, views, views, 6, 7, 4)


def test_exchanging_the_directions_does_not_commute_with_the_filter() -> None:
    layer, z = AlternatingFilter(4, field=(6, 11), num_heads=2), torch.randn(1, 3, 3, 7, 7, 4)
    exchanged = layer(z.permute(0, 2, 1, 4, 3, 5)).permute(0, 2, 1, 4, 3, 5)
    assert not torch.allclose(exchanged, layer(z), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"band": 1}, "band=1"), ({"grid": (3, 3, 3)}, "has 3 axes"), ({"num_heads": 5}, "not divisible")],
)
def test_wrong_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpipolarAttention(**{"dim": 8, **options})

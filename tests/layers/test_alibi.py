"""Facts about distance biases on grids."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.layers.alibi import AlibiAttention, AlibiEncoder, CrossAlibiAttention, load_official_encoder
from gridattn.ops.alibi import alibi_bias, alibi_slopes, grid_positions

grids = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


def test_slopes_of_sixteen_heads_are_powers_of_the_root_of_a_half() -> None:
    assert alibi_slopes(16) == pytest.approx([2 ** (-k / 2) for k in range(1, 17)])


def test_slopes_of_twelve_heads_interleave_those_of_sixteen() -> None:
    expected = [2.0**-k for k in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    assert alibi_slopes(12) == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(grids, st.integers(1, 6))
def test_bias_is_symmetric_not_positive_and_zero_at_home(grid: tuple[int, ...], heads: int) -> None:
    positions = grid_positions(grid)
    bias = alibi_bias(positions, positions, alibi_slopes(heads))
    assert torch.equal(bias, bias.mT)
    assert (bias <= 0).all()
    assert (bias.diagonal(dim1=-2, dim2=-1) == 0).all()
    expected = -torch.cdist(positions.double(), positions.double())[None] * torch.tensor(alibi_slopes(heads)).view(
        -1, 1, 1
    )
    torch.testing.assert_close(bias, expected.float(), rtol=1e-5, atol=1e-6)


def test_bias_depends_on_differences_only() -> None:
    small, large = grid_positions((3, 4)), grid_positions((6, 7))
    corner = [r * 7 + c for r in range(3) for c in range(4)]
    slopes = alibi_slopes(4)
    assert torch.equal(alibi_bias(small, small, slopes), alibi_bias(large, large, slopes)[:, corner][:, :, corner])
    assert torch.equal(alibi_bias(small + 5, small + 5, slopes), alibi_bias(small, small, slopes))


def test_bias_of_kept_positions_is_the_full_bias_indexed() -> None:
    positions, slopes = grid_positions((4, 5)), alibi_slopes(3)
    full = alibi_bias(positions, positions, slopes)
    q, k = (
        torch.stack([torch.randperm(20)[:7] for _ in range(2)]),
        torch.stack([torch.randperm(20)[:4] for _ in range(2)]),
    )
    kept = alibi_bias(positions[q], positions[k], slopes)
    assert torch.equal(kept[1], full[:, q[1]][:, :, k[1]])


def test_permuting_tokens_with_their_bias_permutes_the_encoding() -> None:
    encoder = AlibiEncoder(16, depth=2, num_heads=4).eval()
    positions, x = grid_positions((3, 4)), torch.randn(1, 12, 16)
    order = torch.randperm(12)
    slopes = alibi_slopes(4)
    plain = encoder(x, alibi_bias(positions, positions, slopes))
    permuted = encoder(x[:, order], alibi_bias(positions[order], positions[order], slopes))
    torch.testing.assert_close(permuted, plain[:, order], rtol=1e-5, atol=1e-5)


def test_the_layer_is_attention_with_that_bias() -> None:
    layer = AlibiAttention(16, num_heads=4).double().eval()
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    q, k, v = layer.qkv(x.flatten(1, 2)).view(2, 15, 3, 4, 4).permute(2, 0, 3, 1, 4)
    positions = grid_positions((3, 5)).double()
    weights = (q @ k.mT / 2 + alibi_bias(positions, positions, alibi_slopes(4))).softmax(-1)
    expected = layer.proj((weights @ v).transpose(1, 2).reshape(2, 15, 16)).view_as(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        layer.attention_map(x, (1, 2)), weights[:, :, 7].view(2, 4, 3, 5).float(), rtol=1e-4, atol=1e-6
    )


def test_no_weight_depends_on_the_grid() -> None:
    assert {k: v.shape for k, v in AlibiAttention(16, grid=(5, 5)).state_dict().items()} == {
        k: v.shape for k, v in AlibiAttention(16, grid=(50, 20)).state_dict().items()
    }


def test_grids_of_different_resolution_share_one_frame() -> None:
    coarse, fine = grid_positions((3, 3)), grid_positions((6, 6), extent=(3, 3))
    centre_of_four = fine.view(3, 2, 3, 2, 2).mean((1, 3)).view(9, 2)
    torch.testing.assert_close(centre_of_four, coarse)


def test_a_sharp_cross_bias_looks_at_the_same_place() -> None:
    bias = alibi_bias(grid_positions((4, 4)), grid_positions((4, 4)), [1e4])
    assert torch.equal(bias[0].argmax(-1), torch.arange(16))


def test_cross_attention_refuses_grids_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="context has shape"):
        CrossAlibiAttention(8)(torch.randn(1, 4, 4, 8), torch.randn(2, 4, 4, 8))
    with pytest.raises(ValueError, match="context and cross_bias are needed"):
        AlibiEncoder(8, 1, 4, cross=True)(torch.randn(1, 4, 8), torch.zeros(4, 4, 4))


def test_an_unknown_official_key_is_named() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.5\.bogus\.weight"):
        load_official_encoder({"layers.0.5.bogus.weight": torch.zeros(1)}, cross=True)


@pytest.mark.parametrize(
    ("arguments", "message"), [((32, 5), "not divisible"), ((0, 4), "dim=0"), ((32, 0), "num_heads=0")]
)
def test_wrong_sizes_are_named(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlibiAttention(*arguments)

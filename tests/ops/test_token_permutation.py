"""Token permutation: a bijection between a padded grid and sequences of tiles."""

from math import ceil, prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.ops.token_permutation import token_permute, token_unpermute


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]:
    rank = draw(st.integers(1, 3))
    sizes = [tuple(draw(st.integers(1, most)) for _ in range(rank)) for most in (9, 4, 3)]
    return sizes[0], sizes[1], sizes[2], draw(st.booleans())


@given(tilings(), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_unpermuting_restores_every_token_exactly(tiling: tuple, batch: int) -> None:
    grid, tile, dilation, flip = tiling
    x = torch.randn(batch, *grid, 2, 3)
    permuted, layout, padded = token_permute(x, tile, dilation, flip)
    assert layout == grid
    assert padded == tuple(ceil(ceil(size / t) / d) * t for size, t, d in zip(grid, tile, dilation))
    assert permuted.shape == (batch * prod(dilation), prod(padded), 2, 3)
    assert torch.equal(token_unpermute(permuted, layout, tile, dilation, flip), x)


@given(tilings())
@settings(deadline=None, max_examples=30)
def test_padding_is_zero_and_every_token_appears_once(tiling: tuple) -> None:
    grid, tile, dilation, flip = tiling
    numbers = torch.arange(1, prod(grid) + 1).view(1, *grid, 1, 1)
    permuted, _, padded = token_permute(numbers, tile, dilation, flip)
    values = permuted.flatten().sort().values
    assert values.tolist() == [0] * (prod(padded) * prod(dilation) - prod(grid)) + list(range(1, prod(grid) + 1))


def test_a_tile_is_contiguous_and_flipping_reverses_the_order_of_axes() -> None:
    numbers = torch.arange(24).view(1, 4, 6, 1, 1)
    by_row, _, _ = token_permute(numbers, (2, 3), flip_tiled_dims=False)
    by_column, _, _ = token_permute(numbers, (2, 3))
    assert by_row.flatten()[:12].tolist() == [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]
    assert by_column.flatten()[:12].tolist() == [0, 6, 1, 7, 2, 8, 12, 18, 13, 19, 14, 20]


def test_tokens_of_different_residues_never_share_a_row() -> None:
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(7), indexing="ij")
    residue = (rows % 2 * 3 + columns % 3 + 1).view(1, 5, 7, 1, 1)
    permuted, _, _ = token_permute(residue, (2, 2), (2, 3), flip_tiled_dims=False)
    for group, row in enumerate(permuted.flatten(1), start=1):
        assert set(row.tolist()) <= {0, group}


def test_samples_stay_outermost_in_the_batch() -> None:
    x = torch.arange(2).view(2, 1, 1, 1).expand(2, 6, 1, 1)
    permuted, _, _ = token_permute(x, (2,), 3)
    assert permuted[:, 0].flatten().tolist() == [0, 0, 0, 1, 1, 1]


def test_gradients_flow_back_to_their_tokens() -> None:
    x = torch.randn(1, 5, 4, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: token_permute(t, (2, 3), (2, 1))[0], x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_shape": (2,)}, "tensor has shape"),
        ({"tile_shape": (2, 0)}, "tile_shape"),
        ({"tile_shape": ()}, "tile_shape"),
        ({"tile_shape": (2, 2), "dilation": (1, 2, 3)}, "dilation"),
        ({"tile_shape": (2, 2), "dilation": 0}, "dilation"),
    ],
)
def test_tilings_that_do_not_fit_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_permute(torch.randn(1, 4, 6, 1, 2), **arguments)


@pytest.mark.parametrize("shape", [(1, 24, 1, 2), (2, 23, 1, 2), (2, 24, 2), (2, 4, 6, 1, 2)])
def test_sequences_of_another_tiling_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tensor has shape"):
        token_unpermute(torch.randn(shape), (8, 6), (2, 3), (2, 1))

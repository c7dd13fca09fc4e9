"""Attentions for sequences on grids of more axes."""

import pytest
import torch

from gridattn.layers import create_attention
from gridattn.layers.raster import RasterAttention, create_on_grid

SEQUENCES_ONLY = ["class_semantics", "deformable_1d"]


@pytest.mark.parametrize("name", SEQUENCES_ONLY)
@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 4)])
def test_a_grid_is_read_in_row_major_order(name, grid) -> None:
    torch.manual_seed(0)
    layer = create_on_grid(name, 16, 4, grid=grid).double().eval()
    x = torch.randn(2, *grid, 16, dtype=torch.float64)
    assert isinstance(layer, RasterAttention)
    torch.testing.assert_close(layer(x), layer.sequence_attention(x.reshape(2, -1, 16)).view(x.shape))
    query = tuple(size - 1 for size in grid)
    weights = layer.attention_map(x, query)
    assert weights.shape[2:] == grid
    torch.testing.assert_close(
        weights.flatten(2), layer.sequence_attention.attention_map(x.flatten(1, -2), (x[0, ..., 0].numel() - 1,))
    )
    assert layer.macs(grid) == layer.sequence_attention.macs((x[0, ..., 0].numel(),))


def test_others_are_made_as_they_are() -> None:
    assert not isinstance(create_on_grid("window", 16, 4, grid=(4, 4)), RasterAttention)
    assert not isinstance(create_on_grid("class_semantics", 16, 4, grid=(4,)), RasterAttention)


def test_a_layer_for_more_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="2 grid axes; one is allowed"):
        RasterAttention(create_attention("window", 16, 4, grid=(4, 4)), 2)

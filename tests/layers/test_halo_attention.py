"""Facts about the halo attention layer."""

import pytest
import torch

from gridattn.layers.halo import HaloAttention


@pytest.mark.parametrize(("block_size", "average_pool"), [(4, False), (4, True), (3, True), (3, False)])
def test_stride_2_halves_the_grid_upwards(block_size: int, average_pool: bool) -> None:
    layer = HaloAttention(16, 2, block_size=block_size, halo_size=1, stride=2, average_pool=average_pool)
    assert layer(torch.randn(2, 9, 12, 16)).shape == (2, 5, 6, 16)


def test_an_odd_block_averages_outputs_where_an_even_one_strides_its_queries() -> None:
    odd, even = (HaloAttention(16, 2, block_size=b, halo_size=1, stride=2) for b in (3, 4))
    assert (odd.pool, odd.query_stride) == (2, 1)
    assert (even.pool, even.query_stride) == (1, 2)
    full = HaloAttention(16, 2, block_size=3, halo_size=1)
    full.load_state_dict(odd.state_dict())
    x = torch.randn(1, 6, 6, 16)
    expected = torch.nn.functional.avg_pool2d(full(x).movedim(-1, 1), 2).movedim(1, -1)
    torch.testing.assert_close(odd(x), expected)


@pytest.mark.parametrize(
    ("dim_out", "num_heads", "qk_ratio", "head_dim"),
    [(64, 4, 1.0, 16), (24, 3, 1.0, 8), (12, 2, 1.0, 8), (96, 8, 0.33, 4), (256, 8, 0.5, 16)],
)
def test_query_channels_are_a_multiple_of_8_shared_by_the_heads(dim_out, num_heads, qk_ratio, head_dim) -> None:
    layer = HaloAttention(32, num_heads, dim_out=dim_out, qk_ratio=qk_ratio)
    assert layer.head_dim == head_dim
    assert layer(torch.randn(1, 5, 5, 32)).shape == (1, 5, 5, dim_out)


def test_the_map_of_a_query_covers_its_window_and_sums_to_one() -> None:
    layer = HaloAttention(16, 2, block_size=4, halo_size=2)
    weights = layer.attention_map(torch.randn(1, 12, 12, 16), (5, 1))
    torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(1, 2))
    assert (weights[..., 2:10, 0:6] > 0).all()
    assert weights[..., 10:, :].sum() + weights[..., :2, :].sum() + weights[..., 6:].sum() == 0


def test_the_relative_tables_and_projections_have_the_sizes_of_the_paper() -> None:
    layer = HaloAttention(64, 4, block_size=8, halo_size=3)
    assert sum(p.numel() for p in layer.parameters()) == 3 * 64 * 64 + 2 * (2 * 14 - 1) * 16


def test_exports_with_a_free_grid() -> None:
    layer = HaloAttention(16, 2, block_size=4, halo_size=1).eval()
    free = {"x": {1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}}
    program = torch.export.export(layer, (torch.randn(2, 14, 10, 16),), dynamic_shapes=free)
    x = torch.randn(2, 9, 23, 16)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="dim=30 is not divisible by num_heads=4"):
        HaloAttention(30, 4)
    with pytest.raises(ValueError, match="stride=3"):
        HaloAttention(32, 4, stride=3)
    with pytest.raises(ValueError, match="block_size=0"):
        HaloAttention(32, 4, block_size=0)

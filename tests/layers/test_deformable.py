"""Facts about multi-scale deformable attention as a layer."""

import pytest
import torch

from gridattn.layers.deformable import DeformableAttention, MultiScaleDeformableAttention, grid_centres
from gridattn.ops.deformable import deformable_weights

SHAPES = [(5, 7), (3, 4)]
POSITIONS = 5 * 7 + 3 * 4


def trained(*args, **options) -> MultiScaleDeformableAttention:
    """A layer whose offsets and weights depend on the query."""
    torch.manual_seed(0)
    layer = MultiScaleDeformableAttention(*args, **options).double()
    for linear in (layer.sampling_offsets, layer.attention_weights):
        torch.nn.init.normal_(linear.weight, std=0.3)
    return layer.eval()


def inputs(queries: int = 4) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(1)
    draw = [torch.randn(2, queries, 16), torch.rand(2, queries, 2, 2), torch.randn(2, POSITIONS, 16)]
    return tuple(torch.randn(t.shape, generator=random).double() if i != 1 else t.double() for i, t in enumerate(draw))


def test_padded_positions_of_the_memory_never_reach_the_output() -> None:
    layer, (query, reference, memory) = trained(16, 4, 2, 3), inputs()
    padding = torch.zeros(2, POSITIONS, dtype=torch.bool)
    padding[1, ::3] = True
    other = memory.masked_fill(padding.unsqueeze(-1), 1e3)
    assert torch.equal(
        layer(query, reference, memory, SHAPES, padding), layer(query, reference, other, SHAPES, padding)
    )
    assert not torch.equal(layer(query, reference, memory, SHAPES), layer(query, reference, other, SHAPES))


def test_without_offsets_one_point_interpolates_the_projected_memory() -> None:
    layer = MultiScaleDeformableAttention(16, 4, 1, 1).double()
    torch.nn.init.zeros_(layer.sampling_offsets.bias)
    query, reference, memory = inputs()
    reference, memory = reference[:, :, :1], memory[:, :35]
    locations = reference.unsqueeze(3).unsqueeze(2)
    weights = deformable_weights([(5, 7)], locations, torch.ones(locations.shape[:-1]).double()).squeeze(2)
    expected = layer.output_proj(weights @ layer.value_proj(memory))
    torch.testing.assert_close(layer(query, reference, memory, [(5, 7)]), expected)


def test_at_first_each_head_looks_along_its_own_direction_at_growing_steps() -> None:
    layer = MultiScaleDeformableAttention(16, 4, 2, 3)
    offsets = layer.sampling_offsets.bias.detach().view(4, 2, 3, 2)
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for step in range(3):
        torch.testing.assert_close(offsets[:, 0, step], directions * (step + 1), atol=1e-6, rtol=0)
    assert torch.equal(offsets[:, 0], offsets[:, 1])


def test_queries_do_not_see_each_other() -> None:
    layer, (query, reference, memory) = trained(16, 4, 2, 3), inputs()
    order = torch.tensor([2, 0, 3, 1])
    whole = layer(query, reference, memory, SHAPES)
    torch.testing.assert_close(layer(query[:, order], reference[:, order], memory, SHAPES), whole[:, order])
    torch.testing.assert_close(layer(query[:, :1], reference[:, :1], memory, SHAPES), whole[:, :1])


def test_an_offset_is_counted_in_positions_of_its_level() -> None:
    layer, (query, reference, _) = trained(16, 4, 2, 3), inputs()
    locations, _ = layer.points(query, reference, SHAPES)
    wide, _ = layer.points(query, reference, [(10, 14), (3, 4)])
    moved, halved = locations - reference[:, :, None, :, None], wide - reference[:, :, None, :, None]
    torch.testing.assert_close(halved[:, :, :, 0], moved[:, :, :, 0] / 2)
    torch.testing.assert_close(halved[:, :, :, 1], moved[:, :, :, 1])


def test_on_one_grid_every_position_is_its_own_reference() -> None:
    torch.manual_seed(0)
    layer, x = DeformableAttention(16, 4, num_points=2).double(), torch.randn(2, 5, 7, 16).double()
    centres = grid_centres((5, 7), x.dtype, x.device)
    assert centres[1 * 7 + 3].tolist() == [3.5 / 7, 1.5 / 5]
    tokens = x.flatten(1, 2)
    y = layer.attention(tokens, centres[None, :, None].expand(2, -1, -1, -1), tokens, [(5, 7)])
    torch.testing.assert_close(layer(x).flatten(1, 2), y)


def test_the_map_holds_the_weights_of_the_output() -> None:
    torch.manual_seed(0)
    layer, x = DeformableAttention(16, 4).double(), torch.randn(2, 6, 7, 16).double()
    torch.nn.init.normal_(layer.attention.sampling_offsets.weight)
    weights = layer.attention_map(x, (2, 5)).double()
    value = layer.attention.project(x.flatten(1, 2)).unflatten(1, (6, 7))
    out = layer.attention.output_proj(torch.einsum("bhyx,byxhd->bhd", weights, value).flatten(1))
    torch.testing.assert_close(out, layer(x)[:, 2, 5], rtol=1e-5, atol=1e-6)


def test_at_first_a_position_sees_only_the_points_of_the_star() -> None:
    layer = DeformableAttention(16, 4, num_points=3)
    weights = layer.attention_map(torch.randn(1, 9, 9, 16), (4, 4))[0]
    right = torch.zeros(9, 9)
    right[4, 5:8] = 1 / 3
    torch.testing.assert_close(weights[0], right, atol=1e-5, rtol=0)
    torch.testing.assert_close(weights[1], right.T, atol=1e-5, rtol=0)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="num_points=0"):
        MultiScaleDeformableAttention(16, 4, num_points=0)
    with pytest.raises(ValueError, match="num_levels=True"):
        MultiScaleDeformableAttention(16, 4, num_levels=True)
    with pytest.raises(ValueError, match="has 3 axes; 2 are allowed"):
        DeformableAttention(16, 4, grid=(4, 4, 4))
    query, reference, memory = inputs()
    with pytest.raises(ValueError, match="has 1 levels; 2 are allowed"):
        trained(16, 4, 2, 3)(query, reference, memory, [(5, 7)])

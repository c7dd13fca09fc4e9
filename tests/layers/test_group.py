"""Facts about within-group and across-group attention and the pose decoder layer."""

import pytest
import torch

from gridattn.layers.global_attention import GlobalAttention
from gridattn.layers.group import GroupAttention, GroupDecoderLayer

GROUPS, SLOTS, SHAPES = 4, 6, [(5, 7), (3, 4)]


def silence(attention: GlobalAttention) -> None:
    """Takes one attention out of the layer: what remains of its step is the residual and the norm."""
    torch.nn.init.zeros_(attention.proj.weight)
    torch.nn.init.zeros_(attention.proj.bias)


def changed(layer, x: torch.Tensor, group: int, slot: int) -> torch.Tensor:
    """(groups, slots) bool: where the output changes when one query is."""
    other = x.clone()
    other[:, group, slot] += 1
    return (layer(x) != layer(other)).any(-1).any(0)


@pytest.fixture
def decoder() -> GroupDecoderLayer:
    torch.manual_seed(0)
    layer = GroupDecoderLayer(16, 4, hidden=24, num_levels=2).double().eval()
    torch.nn.init.normal_(layer.cross_attn.sampling_offsets.weight, std=0.3)
    return layer


def decoder_inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "x": torch.randn(2, GROUPS, SLOTS, 16).double(),
        "code": torch.randn(2, GROUPS, SLOTS - 1, 16).double(),
        "reference": torch.rand(2, GROUPS, SLOTS, 2, 2).double(),
        "memory": torch.randn(2, 47, 16).double(),
    }


def test_without_across_attention_groups_do_not_meet() -> None:
    torch.manual_seed(0)
    layer, x = GroupAttention(16), torch.randn(2, GROUPS, SLOTS, 16)
    silence(layer.across)
    where = changed(layer, x, 1, 2)
    assert where[1].all()
    assert not where[[0, 2, 3]].any()


def test_without_within_attention_members_do_not_meet() -> None:
    torch.manual_seed(0)
    layer, x = GroupAttention(16), torch.randn(2, GROUPS, SLOTS, 16)
    silence(layer.within)
    where = changed(layer, x, 1, 2)
    assert where[:, 2].all()
    assert not where[:, [0, 1, 3, 4, 5]].any()


def test_together_everything_sees_everything() -> None:
    torch.manual_seed(0)
    layer, x = GroupAttention(16), torch.randn(2, GROUPS, SLOTS, 16)
    assert changed(layer, x, 1, 2).all()


def test_order_of_groups_and_of_members_does_not_matter() -> None:
    torch.manual_seed(0)
    layer, x = GroupAttention(16).double(), torch.randn(2, GROUPS, SLOTS, 16).double()
    groups, members = torch.randperm(GROUPS), torch.randperm(SLOTS)
    torch.testing.assert_close(layer(x[:, groups][:, :, members]), layer(x)[:, groups][:, :, members])


def test_it_costs_the_pairs_within_groups_and_across_them() -> None:
    layer = GroupAttention(32)
    projections = 2 * 4 * 32**2 * 100 * 18
    pairs = 100 * 18**2 + 18 * 100**2
    assert layer.macs((100, 18)) == projections + 2 * 32 * pairs


def test_permuted_groups_permute_the_output_of_the_decoder_layer(decoder: GroupDecoderLayer) -> None:
    inputs, order = decoder_inputs(), torch.tensor([2, 0, 3, 1])
    permuted = {key: t if key == "memory" else t[:, order] for key, t in inputs.items()}
    torch.testing.assert_close(decoder(**permuted, shapes=SHAPES), decoder(**inputs, shapes=SHAPES)[:, order])


def test_permuted_keypoints_permute_the_output_of_the_decoder_layer(decoder: GroupDecoderLayer) -> None:
    inputs, order = decoder_inputs(), torch.tensor([3, 0, 4, 1, 2])
    slots = torch.cat([torch.zeros(1, dtype=torch.long), 1 + order])
    permuted = {
        "x": inputs["x"][:, :, slots],
        "code": inputs["code"][:, :, order],
        "reference": inputs["reference"][:, :, slots],
        "memory": inputs["memory"],
    }
    torch.testing.assert_close(decoder(**permuted, shapes=SHAPES), decoder(**inputs, shapes=SHAPES)[:, :, slots])


def test_a_query_reads_the_image_at_its_own_reference_alone(decoder: GroupDecoderLayer) -> None:
    inputs = decoder_inputs()
    moved = inputs["reference"].clone()
    moved[:, 1, 2] += 0.2
    where = decoder(**inputs, shapes=SHAPES) != decoder(**inputs | {"reference": moved}, shapes=SHAPES)
    assert where.any(-1).any(0).nonzero().tolist() == [[1, 2]]


def test_the_code_is_part_of_the_stream_and_not_of_queries_and_keys_alone(decoder: GroupDecoderLayer) -> None:
    """With all attention silent a code in queries and keys alone would not show at all."""
    inputs = decoder_inputs()
    for attention in (decoder.group.within, decoder.group.across):
        silence(attention)
    decoder.cross_attn.output_proj.weight.data.zero_()
    plain = decoder(**inputs, shapes=SHAPES)
    other = decoder(**inputs | {"code": 2 * inputs["code"]}, shapes=SHAPES)
    assert torch.equal(plain[:, :, 0], other[:, :, 0])
    assert not torch.isclose(plain[:, :, 1:], other[:, :, 1:]).all(-1).any()


def test_a_grid_of_three_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="groups and members, are allowed"):
        GroupAttention(16, grid=(2, 3, 4))

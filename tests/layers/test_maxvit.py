"""Facts about multi-axis attention: what a block and a lattice see, and that padding stays out."""

import pytest
import torch
from torch import Tensor, nn

from gridattn.layers.global_attention import GlobalAttention
from gridattn.layers.maxvit import MultiAxisAttention, PartitionAttentionBlock, partition_state_from_official
from gridattn.layers.window import WindowAttention
from gridattn.ops.partition import Layout


def reach(layer: nn.Module, grid: tuple[int, int], query: tuple[int, int]) -> Tensor:
    """(*grid): which positions the output at `query` depends on."""
    x = torch.randn(1, *grid, 8, requires_grad=True)
    layer(x)[(0, *query)].square().sum().backward()
    assert x.grad is not None
    return x.grad[0].abs().sum(-1) > 0


def sub_layer(partition: Layout, window: int | tuple[int, ...], **options) -> PartitionAttentionBlock:
    return PartitionAttentionBlock(WindowAttention(8, 2, window_size=window, partition=partition, **options))


def test_a_block_sees_its_neighbours_and_a_lattice_its_residue_class() -> None:
    # On 6 x 6 with windows of 3, (4, 1) is in block (1, 0) and on the lattice of rows 0, 2, 4 and columns 1, 3, 5.
    block = torch.zeros(6, 6, dtype=torch.bool)
    block[3:, :3] = True
    assert torch.equal(reach(sub_layer("block", 3), (6, 6), (4, 1)), block)
    lattice = torch.zeros(6, 6, dtype=torch.bool)
    lattice[0::2, 1::2] = True
    assert torch.equal(reach(sub_layer("grid", 3), (6, 6), (4, 1)), lattice)


@pytest.mark.parametrize(("grid", "window"), [((12, 8), 4), ((9, 9), 3), ((7, 10), 4)])
def test_after_both_every_output_depends_on_every_input(grid: tuple[int, int], window: int) -> None:
    layer = MultiAxisAttention(8, 2, window_size=window)
    assert reach(layer, grid, (0, 0)).all()
    assert reach(layer, grid, (grid[0] - 1, grid[1] // 2)).all()


def test_windows_and_lattices_have_their_own_sizes() -> None:
    layer = MultiAxisAttention(8, 2, window_size=2, grid_size=(3, 4))
    assert reach(layer.block_attention, (6, 8), (0, 0)).sum() == 4
    assert reach(layer.grid_attention, (6, 8), (0, 0)).sum() == 12


@pytest.mark.parametrize("partition", ["block", "grid"])
def test_a_window_as_large_as_the_map_is_global_attention(partition: Layout) -> None:
    layer = WindowAttention(8, 2, window_size=(5, 6), partition=partition, bias=False)
    dense = GlobalAttention(8, 2)
    dense.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 6, 8)
    torch.testing.assert_close(layer(x), dense(x))


def test_grid_attention_is_block_attention_after_a_permutation_of_each_axis() -> None:
    lattice, block = sub_layer("grid", 3), sub_layer("block", 3)
    block.load_state_dict(lattice.state_dict())
    x = torch.randn(1, 6, 12, 8)
    permuted = x
    for axis, size in ((1, 6), (2, 12)):
        place = torch.tensor([i % (size // 3) * 3 + i // (size // 3) for i in range(size)])
        permuted = permuted.index_select(axis, place.argsort())
    back = block(permuted)
    for axis, size in ((1, 6), (2, 12)):
        place = torch.tensor([i % (size // 3) * 3 + i // (size // 3) for i in range(size)])
        back = back.index_select(axis, place)
    torch.testing.assert_close(lattice(x), back)


def test_without_position_bias_tokens_of_a_window_may_change_places() -> None:
    block = sub_layer("block", 4, bias=False)
    x, order = torch.randn(1, 4, 4, 8), torch.randperm(16)
    shuffled = x.flatten(1, 2)[:, order].view_as(x)
    torch.testing.assert_close(block(shuffled), block(x).flatten(1, 2)[:, order].view_as(x))
    biased = sub_layer("block", 4)
    nn.init.normal_(biased.get_parameter("attn.relative_position_bias"))
    assert not torch.allclose(biased(shuffled), biased(x).flatten(1, 2)[:, order].view_as(x))


@pytest.mark.parametrize("partition", ["block", "grid"])
@pytest.mark.parametrize("grid", [(5, 7), (4, 9), (2, 3)])
def test_padding_is_not_seen(partition: Layout, grid: tuple[int, int]) -> None:
    layer = WindowAttention(8, 2, window_size=4, partition=partition)
    nn.init.normal_(layer.qkv.bias, std=3.0)  # a padded key that were seen would weigh
    x = torch.randn(1, *grid, 8)
    weights = torch.stack([layer.attention_map(x, (i, j))[0] for i in range(grid[0]) for j in range(grid[1])])
    torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(len(weights), 2))


def test_the_two_published_layouts_are_the_same_function() -> None:
    # Query 2, 0 and key 0, 2 of a 3 x 3 window: entry (0, 4) of the one table, row 20 of the other.
    heads_last = torch.randn(25, 2)
    qkv = torch.randn(48, 16)
    state = {"attn.rel_pos.relative_position_bias_table": heads_last, "attn.qkv.weight": qkv}
    ours = partition_state_from_official(state, 2, (3, 3))
    assert torch.equal(ours["attn.relative_position_bias"][:, 0, 4], heads_last[20])
    by_head = qkv.view(2, 3, 8, 16)
    assert torch.equal(ours["attn.qkv.weight"].view(3, 2, 8, 16)[1, 1], by_head[1, 1])
    table = torch.randn(2, 5, 5)
    heads_first = {"attn.rel_pos.relative_position_bias_table": table, "attn.qkv.weight": qkv}
    same = partition_state_from_official(heads_first, 2, (3, 3))
    assert torch.equal(same["attn.relative_position_bias"], table)
    assert torch.equal(same["attn.qkv.weight"], qkv)


def test_the_feed_forwards_can_be_left_out() -> None:
    layer = MultiAxisAttention(8, 2, mlp_ratio=0)
    assert not any("mlp" in name or "norm2" in name for name, _ in layer.named_parameters())
    assert layer(torch.randn(1, 5, 5, 8)).shape == (1, 5, 5, 8)

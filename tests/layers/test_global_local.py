"""Facts about global-local and pair-wise cross-attention."""

import pytest
import torch

from gridattn.layers.global_attention import GlobalAttention
from gridattn.layers.global_local import DualCrossBlock, GlobalLocalAttention, select_tokens


def layer_and_input(ratio: float) -> tuple[GlobalLocalAttention, torch.Tensor]:
    torch.manual_seed(0)
    return GlobalLocalAttention(16, 4, ratio=ratio).double(), torch.randn(2, 5, 6, 16).double()


def blocks_and_tokens(count: int = 1) -> tuple[list[DualCrossBlock], torch.Tensor]:
    torch.manual_seed(0)
    return [DualCrossBlock(24, 3).double() for _ in range(count)], torch.randn(3, 11, 24).double()


def dense(layer: GlobalLocalAttention, x: torch.Tensor) -> torch.Tensor:
    attention = GlobalAttention(16, 4).double()
    attention.load_state_dict(layer.state_dict())
    return attention(x)


def test_with_all_positions_selected_it_is_dense_attention() -> None:
    layer, x = layer_and_input(1.0)
    torch.testing.assert_close(layer(x), dense(layer, x))


def test_selected_positions_attend_globally_and_the_others_share_one_answer() -> None:
    layer, x = layer_and_input(0.3)
    selected, y = layer.selection(x), layer(x).flatten(1, 2)
    assert selected.shape == (2, 9)
    full = dense(layer, x).flatten(1, 2)
    for sample in range(2):
        torch.testing.assert_close(y[sample, selected[sample]], full[sample, selected[sample]])
        rest = [i for i in range(30) if i not in selected[sample].tolist()]
        assert (y[sample, rest] == y[sample, rest[0]]).all()
        assert not torch.allclose(y[sample, rest], full[sample, rest])


def test_the_selection_holds_what_the_mean_query_attends_to_most() -> None:
    layer, x = layer_and_input(0.2)
    query, key, _ = layer._project(x)
    response = (query.mean(2, keepdim=True) @ key.mT / 2).softmax(-1).mean(1).squeeze(1)
    assert torch.equal(layer.selection(x), response.topk(6).indices)


def test_a_permuted_grid_permutes_the_output() -> None:
    layer, x = layer_and_input(0.3)
    order = torch.randperm(5)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_the_map_holds_the_weights_of_selected_and_other_positions() -> None:
    layer, x = layer_and_input(0.3)
    value = layer._project(x)[2]
    for flat in (int(layer.selection(x)[0, 0]), next(i for i in range(30) if i not in layer.selection(x)[0])):
        position = (flat // 6, flat % 6)
        weights = layer.attention_map(x, position).double().flatten(2)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4).double(), rtol=0, atol=1e-5)
        out = layer.proj(torch.einsum("bhn,bhnd->bhd", weights, value).flatten(1))
        torch.testing.assert_close(out, layer(x)[:, position[0], position[1]], rtol=1e-5, atol=1e-6)


def test_local_tokens_that_are_all_tokens_make_a_block_of_self_attention() -> None:
    (block,), x = blocks_and_tokens()
    torch.testing.assert_close(block(x, context=x), block(x))


def test_global_local_attention_is_rows_of_self_attention() -> None:
    (block,), x = blocks_and_tokens()
    local, index = select_tokens(x, [block.attention(x)], 0.3)
    rows = block(x).gather(1, index.unsqueeze(-1).expand(-1, -1, 24))
    torch.testing.assert_close(block(local, context=x), rows)


def test_the_class_token_of_the_branch_does_not_depend_on_the_selection() -> None:
    """Two blocks deep: keys come from the self-attention stream, so local tokens never meet."""
    (below, upper, first, second), x = blocks_and_tokens(4)
    streams = [below(x)]
    streams.append(upper(streams[0]))
    results = []
    for ratio in (0.1, 0.5, 1.0):
        local, _ = select_tokens(streams[0], [below.attention(x)], ratio)
        results.append(second(first(local, context=streams[0]), context=streams[1]))
    for other in results[1:]:
        torch.testing.assert_close(other[:, 0], results[0][:, 0])
        assert not torch.isclose(other.mean(1), results[0].mean(1)).all()


def test_the_mean_of_the_local_tokens_does_not_depend_on_their_order() -> None:
    (block,), x = blocks_and_tokens()
    local, _ = select_tokens(x, [block.attention(x)], 0.5)
    torch.testing.assert_close(block(local.flip(1), context=x).mean(1), block(local, context=x).mean(1))


def test_the_class_token_is_always_selected_and_first() -> None:
    (block,), x = blocks_and_tokens()
    tokens, index = select_tokens(x, [block.attention(x)], 0.3)
    assert index.shape == (3, 4)
    assert not index[:, 0].any()
    assert (index[:, 1:] > 0).all()
    torch.testing.assert_close(tokens[:, 0], x[:, 0])


def test_a_sample_paired_with_itself_is_self_attention_in_both_readings() -> None:
    stack, x = blocks_and_tokens(3)
    alone = stream = figure = x
    for block in stack:
        figure = block(alone, partner=figure)
        stream = block(stream, partner=alone)
        alone = block(alone)
    torch.testing.assert_close(stream, alone)
    torch.testing.assert_close(figure, alone)


def test_a_partner_changes_the_output_and_adds_no_parameters() -> None:
    (block,), x = blocks_and_tokens()
    assert not torch.allclose(block(x, partner=x.roll(1, 0)), block(x))
    assert sum(p.numel() for p in block.parameters()) == 12 * 24**2 + 13 * 24


def test_a_global_local_block_with_its_norm_has_the_parameters_of_the_paper() -> None:
    for dim, heads, count in ((192, 3, 445_248), (384, 6, 1_775_232), (768, 12, 7_089_408)):
        with torch.device("meta"):
            block = DualCrossBlock(dim, heads)
        assert sum(p.numel() for p in block.parameters()) + 2 * dim == count


def test_attention_of_a_block_is_what_it_mixes_its_values_with() -> None:
    (block,), x = blocks_and_tokens()
    value = block._project(x)[2]
    mixed = torch.einsum("bhij,bjhd->bihd", block.attention(x), value).flatten(-2)
    y = x + block.attn.proj(mixed)
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)))


def test_a_wrong_ratio_is_named() -> None:
    with pytest.raises(ValueError, match=r"ratio=1.5"):
        GlobalLocalAttention(16, ratio=1.5)

"""Facts about attention rollout and the selection by response."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.ops.rollout import attention_rollout, count_of, rollout_row, share_of, top_responses

HAND = [
    [[0.5, 0.3, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.1, 0.1, 0.2, 0.6]],
    [[0.4, 0.1, 0.2, 0.3], [0.3, 0.3, 0.2, 0.2], [0.1, 0.2, 0.6, 0.1], [0.2, 0.2, 0.2, 0.4]],
]


def layers(count: int, tokens: int, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, tokens, tokens, generator=random).double().softmax(-1) for _ in range(count)]


def test_rows_of_a_rollout_sum_to_one() -> None:
    torch.testing.assert_close(attention_rollout(layers(4, 6)).sum(-1), torch.ones(2, 6).double())


def test_layers_that_attend_to_themselves_alone_roll_out_to_the_identity() -> None:
    eye = torch.eye(5).expand(2, 3, 5, 5)
    assert torch.equal(attention_rollout([eye] * 3), torch.eye(5).expand(2, 5, 5))


def test_one_layer_rolls_out_to_the_mean_of_its_attention_and_the_identity() -> None:
    (attention,) = layers(1, 5)
    expected = 0.5 * attention.mean(1) + 0.5 * torch.eye(5)
    torch.testing.assert_close(attention_rollout([attention]), expected)


def test_later_layers_multiply_from_the_left() -> None:
    attentions = [torch.tensor(rows, dtype=torch.float64)[None, None] for rows in HAND]
    expected = torch.tensor([0.55, 0.165, 0.115, 0.17], dtype=torch.float64)
    torch.testing.assert_close(attention_rollout(attentions)[0, 0], expected)
    order = 1 + top_responses(rollout_row(attentions)[:, 1:], share_of(1.0))
    assert order.tolist() == [[3, 1, 2]]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 7), st.data())
def test_a_row_by_vector_products_is_the_row_of_the_full_product(count: int, tokens: int, data) -> None:
    attentions = layers(count, tokens, seed=tokens)
    row = data.draw(st.integers(0, tokens - 1))
    torch.testing.assert_close(rollout_row(attentions, row), attention_rollout(attentions)[:, row])


def test_a_share_is_rounded_down_in_decimals_and_selects_at_least_one() -> None:
    assert [count_of(784, share_of(0.1)), count_of(128, share_of(0.3)), count_of(256, share_of(0.3))] == [78, 38, 76]
    assert count_of(100, share_of(0.29)) == 29
    assert count_of(9, share_of(1 / 3)) == 3
    assert count_of(3, share_of(0.1)) == 1


def test_equal_responses_are_selected_by_index() -> None:
    response = torch.full((1, 50), 0.02)
    assert top_responses(response, share_of(0.2)).tolist() == [list(range(10))]


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, True, "half"])
def test_a_wrong_ratio_is_named(ratio) -> None:
    with pytest.raises(ValueError, match="ratio="):
        share_of(ratio)


def test_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="attentions is empty"):
        attention_rollout([])

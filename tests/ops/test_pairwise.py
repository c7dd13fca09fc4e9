"""Facts about pair-wise cross-attention."""

import torch
import torch.nn.functional as F

from gridattn.ops.pairwise import pairwise_attention


def draw(*lengths: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, 3, 4, generator=random).double() for n in lengths]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def test_a_sample_paired_with_itself_attends_as_it_does_alone() -> None:
    query, key, value = draw(5, 6, 6)
    torch.testing.assert_close(pairwise_attention(query, key, value, key, value), attend(query, key, value))


def test_a_partner_without_score_leaves_self_attention() -> None:
    query, key, value, partner = draw(5, 6, 6, 7)
    away = -1e4 * query.mean(1, keepdim=True).expand(-1, 7, -1, -1)
    query = query.mean(1, keepdim=True)
    torch.testing.assert_close(pairwise_attention(query, key, value, away, partner), attend(query, key, value))


def test_the_output_is_a_convex_mix_of_the_values_of_both() -> None:
    query, key, partner_key = draw(5, 6, 7)
    ones = torch.ones_like
    torch.testing.assert_close(
        pairwise_attention(query, key, ones(key), partner_key, ones(partner_key)), torch.ones_like(query)
    )
    mixed = pairwise_attention(query, key, 0 * key, partner_key, ones(partner_key))
    assert ((mixed > 0) & (mixed < 1)).all()


def test_the_case_worked_by_hand() -> None:
    def rows(*values: tuple[float, float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 2)

    out = pairwise_attention(
        rows((1, 0.5)), rows((1, 0), (0, 1)), rows((1, 2), (3, 4)), rows((2, 0), (0, -1)), rows((10, 0), (0, 10))
    )
    torch.testing.assert_close(out, rows((5.737162, 2.028937)), atol=1e-6, rtol=0)

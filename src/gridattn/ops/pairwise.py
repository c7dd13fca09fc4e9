"""Pair-wise cross-attention: a sample attends to itself and to another one at once."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise_attention(
    query: Tensor, key: Tensor, value: Tensor, partner_key: Tensor, partner_value: Tensor, *, scale: float | None = None
) -> Tensor:
    """softmax(Q [K; K']^T scale) [V; V']: one softmax over the keys of a sample and of its partner.

    Args:
        query: (B, n, heads, head_dim).
        key: (B, m, heads, head_dim), of the sample.
        value: (B, m, heads, head_dim).
        partner_key: (B, m', heads, head_dim), of the partner.
        partner_value: (B, m', heads, head_dim).
        scale: factor of the logits; head_dim ** -0.5 when None.

    Returns:
        (B, n, heads, head_dim).

    Source: Zhu et al., Dual Cross-Attention Learning, CVPR 2022, arXiv 2205.02151.

    Example:
        >>> q, k, v = torch.randn(3, 2, 5, 4, 8).unbind(0)
        >>> pairwise_attention(q, k, v, k.roll(1, 0), v.roll(1, 0)).shape
        torch.Size([2, 5, 4, 8])
    """
    keys, values = torch.cat([key, partner_key], dim=1), torch.cat([value, partner_value], dim=1)
    query, keys, values = (t.transpose(1, 2) for t in (query, keys, values))
    return F.scaled_dot_product_attention(query, keys, values, scale=scale).transpose(1, 2)

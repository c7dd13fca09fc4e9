"""Attention with learned vectors for the distance between the places of query and key, in keys and in values."""

import torch
from torch import Tensor


def relative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: tuple[Tensor, Tensor],
    *,
    visible: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Dense attention of short lists of vectors, with relative positions by place in the list.

        A_ij = softmax_j(scale q_i . k_j + q_i . P[j - i]);   out_i = sum_j A_ij (v_j + R[j - i])

    where j - i is clipped to -M ... M and P, R are the tables. The last query stands at the place of the last key, so
    that fewer queries than keys belong to the end of the list.

    Args:
        query: (..., n, d).
        key: (..., m, d), m >= n.
        value: (..., m, value_dim).
        tables: for keys (2 M + 1, d) and for values (2 M + 1, value_dim); row 0 is the distance -M.
        visible: bool, broadcastable to (..., n, m); True where a query may see a key. No row may be empty.
        scale: factor of q . k.

    Returns:
        (..., n, value_dim).

    Source: Shaw et al., Self-Attention with Relative Position Representations, arXiv 1803.02155.

    Example:
        >>> q, k = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
        >>> relative_attention(q, k, k, (torch.zeros(9, 8), torch.zeros(9, 8))).shape
        torch.Size([2, 3, 8])
    """
    key_table, value_table = tables
    reach = key_table.shape[0] // 2
    n, m = query.shape[-2], key.shape[-2]
    place = torch.arange(m, device=query.device)
    offset = (place - place[m - n :].unsqueeze(-1)).clamp(-reach, reach) + reach
    offset = offset.expand(*query.shape[:-1], m)
    logits = scale * query @ key.transpose(-1, -2) + (query @ key_table.T).gather(-1, offset)
    weights = (logits if visible is None else logits.masked_fill(~visible, -torch.inf)).softmax(-1)
    by_offset = torch.zeros_like(weights[..., :1]).expand(*weights.shape[:-1], len(value_table))
    by_offset = by_offset.scatter_add(-1, offset, weights)
    return weights.to(value.dtype) @ value + by_offset.to(value.dtype) @ value_table.to(value.dtype)

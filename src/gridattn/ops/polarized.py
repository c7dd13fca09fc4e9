"""The two branches of polarized self-attention: what the grid holds per channel, and where on the grid it is."""

import torch.nn.functional as F
from torch import Tensor

from gridattn.ops.common import check_choice

BACKENDS = ("auto", "reference")
SOFTMAXES = ("query", "score", "value")


def channel_context(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Context of the channel branch: values averaged over the grid with one softmax map of weights.

    c = sum_p a_p (W_v x_p + b_v), a = softmax over positions of (w_q . x_p + b_q).

    Args:
        x: (B, *grid, C).
        query_weight: (1, C).
        query_bias: (1) or None.
        value_weight: (I, C).
        value_bias: (I) or None.
        backend: "reference" projects every position, then averages. "auto" averages first and projects once, which is
            the same because the weights sum to one, and costs C I instead of C I per position.

    Returns:
        (B, I).

    Source: Polarized Self-Attention, arXiv 2107.00782.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 7, 9, 8)
        >>> channel_context(x, torch.randn(1, 8), None, torch.randn(4, 8), None).shape
        torch.Size([2, 4])
    """
    check_choice("backend", backend, BACKENDS)
    x = x.flatten(1, -2)
    weights = F.linear(x, query_weight, query_bias).softmax(1)
    if backend == "reference":
        return (weights * F.linear(x, value_weight, value_bias)).sum(1)
    return F.linear((weights.transpose(1, 2) @ x).squeeze(1), value_weight, value_bias)


def spatial_score(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
    *,
    softmax: str = "query",
    backend: str = "auto",
) -> Tensor:
    """Score of every position in the spatial branch: its values against a query that is pooled from the whole grid.

    s_p = q . v_p with q = mean over positions of (W_q x + b_q) and v_p = W_v x_p + b_v, and one softmax.

    Args:
        x: (B, *grid, C).
        query_weight: (I, C).
        query_bias: (I) or None.
        value_weight: (I, C).
        value_bias: (I) or None.
        softmax: where it acts. "query": on q, over its I channels (the paper). "score": on s, over the positions
            (released code, parallel layout). "value": on each channel of v, over the positions (released code,
            sequential layout).
        backend: "reference" projects every position. "auto" pools before it projects the query and, unless the values
            have a softmax, scores x_p against W_v^T q, so that nothing of size I per position is made.

    Returns:
        (B, *grid).

    Source: Polarized Self-Attention, arXiv 2107.00782.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 7, 9, 8)
        >>> spatial_score(x, torch.randn(4, 8), None, torch.randn(4, 8), None).shape
        torch.Size([2, 7, 9])
    """
    check_choice("softmax", softmax, SOFTMAXES)
    check_choice("backend", backend, BACKENDS)
    shape, x = x.shape[:-1], x.flatten(1, -2)
    if backend == "reference":
        query = F.linear(x, query_weight, query_bias).mean(1)
    else:
        query = F.linear(x.mean(1), query_weight, query_bias)
    if softmax == "query":
        query = query.softmax(-1)
    if softmax == "value" or backend == "reference":
        value = F.linear(x, value_weight, value_bias)
        score = (value.softmax(1) if softmax == "value" else value) @ query.unsqueeze(-1)
    else:
        score = x @ (query @ value_weight).unsqueeze(-1)
        if value_bias is not None:
            score = score + (query @ value_bias)[:, None, None]
    if softmax == "score":
        score = score.softmax(1)
    return score.reshape(shape)

"""Attention under a polyline path mask: over all pairs of positions, decomposed into lines, or with linear cost."""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from gridattn.ops.common import check_choice, check_same_kind
from gridattn.ops.path_mask import axis_log_masks, mix_lines, path_log_mask, path_mask_product

ORDERS = ("both", "forward", "reverse")
MASKINGS = ("added", "multiplied")


def path_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    *,
    order: str = "both",
    masking: str = "added",
    scale: float | None = None,
) -> Tensor:
    """Attention over all positions of a grid under a polyline path mask.

    With M the `path_log_mask` and Z = scale * Q K^T,

        added:      y = (softmax(Z + M) + softmax(Z + M^T)) / 2 V       rows sum to one; the published weights
        multiplied: y = softmax(Z) * (exp(M) + exp(M^T)) V              as the paper writes it

    Args:
        query: (B, *grid, heads, head_dim), any number of axes.
        key: like `query`.
        value: (B, *grid, heads, value_dim).
        log_decay: (B, *grid, heads, rank) or with a batch of one, not positive; None for attention without a mask.
        order: "forward" takes M only (first axis first), "reverse" M^T only.
        masking: "added" or "multiplied".
        scale: factor of the logits; head_dim ** -0.5 when None.

    Returns:
        (B, *grid, heads, value_dim).

    Raises:
        ValueError: shapes that do not fit together, an unknown order or masking.

    Source: Polyline Path Masked Attention for Vision Transformer, arXiv 2506.15940.

    Example:
        >>> q, k, v = torch.randn(3, 1, 4, 5, 2, 8).unbind(0)
        >>> path_attention(q, k, v, -torch.rand(1, 4, 5, 2, 2)).shape
        torch.Size([1, 4, 5, 2, 8])
    """
    _check(query, key, value, log_decay, order, masking)
    q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
    if log_decay is None:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.transpose(1, 2).reshape(value.shape)
    mask = path_log_mask(log_decay)
    masks = _in_order(order, [mask, mask.transpose(-1, -2)])
    if masking == "added":
        # Fused attention computes the logits once per mask; that costs less than to write them out and read them back.
        outs = [F.scaled_dot_product_attention(q, k, v, attn_mask=m.to(q.dtype), scale=scale) for m in masks]
        out = reduce(torch.add, outs) / len(outs)
    else:
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        weights = ((factor * q) @ k.transpose(-1, -2)).softmax(-1) * reduce(torch.add, [m.exp() for m in masks])
        out = weights.to(v.dtype) @ v
    return out.transpose(1, 2).reshape(value.shape)


def criss_cross_path_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    *,
    order: str = "both",
    masking: str = "added",
    scale: float | None = None,
) -> Tensor:
    """Attention inside the lines of one axis after the other, under the mask of those lines: O(N * sum(grid)).

    With P_a the attention inside the lines along axis a, P_a = softmax(Z_a + S_a) (added) or softmax(Z_a) * exp(S_a)
    (multiplied), S_a of `axis_log_masks`,

        y = (P_last ... P_0 V + P_0 ... P_last V) / 2      (multiplied: the sum, without the half).

    Each matrix is normalised by itself: this is another operator than `path_attention`, whose mask it shares.

    Args, returns and raises as in `path_attention`; "forward" takes the first product only (axis 0 acts first).

    Example:
        >>> q, k, v = torch.randn(3, 1, 4, 5, 2, 8).unbind(0)
        >>> criss_cross_path_attention(q, k, v, -torch.rand(1, 4, 5, 2, 2)).shape
        torch.Size([1, 4, 5, 2, 8])
    """
    _check(query, key, value, log_decay, order, masking)
    weights = line_weights(query, key, log_decay, masking=masking, scale=scale)
    weights = [w.to(value.dtype) for w in weights]
    axes = range(value.ndim - 3)
    orders = [mix_lines(weights, value, path) for path in _in_order(order, [axes, axes[::-1]])]
    total = reduce(torch.add, orders)
    return total / len(orders) if masking == "added" else total


def line_weights(
    query: Tensor, key: Tensor, log_decay: Tensor | None = None, *, masking: str = "added", scale: float | None = None
) -> list[Tensor]:
    """The matrices P_a of `criss_cross_path_attention`: per axis, (B, *grid without the axis, heads, S, S)."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    masks = None if log_decay is None else axis_log_masks(log_decay)
    weights = []
    for axis in range(query.ndim - 3):
        q, k = (t.movedim(axis + 1, -2) for t in (query, key))
        logits = (factor * q) @ k.transpose(-1, -2)
        if masks is None:
            weights.append(logits.softmax(-1))
        elif masking == "multiplied":
            weights.append(logits.softmax(-1) * masks[axis].exp())
        else:
            weights.append((logits + masks[axis]).softmax(-1))
    return weights


def linear_path_attention(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, *, order: str = "both"
) -> Tensor:
    """Linear attention under the mask, y = ((Q K^T) * (L + L^T)) V, in O(N * head_dim * value_dim).

    For every feature m of the head, Q[:, m] * L(K[:, m] * V), summed over m; L acts by `path_mask_product`. Apply the
    feature map of the linear attention to `query` and `key` before.

    Args and returns as in `path_attention`.

    Example:
        >>> q, k, v = torch.rand(3, 1, 4, 5, 2, 8).unbind(0)
        >>> linear_path_attention(q, k, v, -torch.rand(1, 4, 5, 2, 2)).shape
        torch.Size([1, 4, 5, 2, 8])
    """
    _check(query, key, value, log_decay, order, "multiplied")
    log_decay = log_decay.expand(len(query), *log_decay.shape[1:])
    outer = (key.unsqueeze(-1) * value.unsqueeze(-2)).flatten(-2)
    total = torch.zeros_like(value)
    for transposed in _in_order(order, [False, True]):
        seen = path_mask_product(log_decay, outer, transposed=transposed).unflatten(-1, (key.shape[-1], -1))
        total = total + (query.unsqueeze(-2) @ seen).squeeze(-2)
    return total


def _in_order(order: str, both: Sequence) -> list:
    return list(both) if order == "both" else [both[ORDERS.index(order) - 1]]


def _check(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, order: str, masking: str) -> None:
    check_same_kind(query=query, key=key, value=value)
    check_choice("order", order, ORDERS)
    check_choice("masking", masking, MASKINGS)
    if query.shape != key.shape or query.shape[:-1] != value.shape[:-1] or query.ndim < 4:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} must be "
            "(B, *grid, heads, channels), equal but for the channels of value"
        )
    expected = (*query.shape[1:-1], query.ndim - 3)
    if log_decay is not None and (log_decay.shape[1:] != expected or log_decay.shape[0] not in (1, query.shape[0])):
        raise ValueError(
            f"log_decay has shape {tuple(log_decay.shape)}; (B, *grid, heads, rank) = {(query.shape[0], *expected)} is "
            "allowed"
        )

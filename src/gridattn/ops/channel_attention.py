"""Attention among channels: every channel of a group is a token whose features are its values at all grid positions."""

from contextlib import nullcontext

import torch
from torch import Tensor

from gridattn.ops.common import autocast_enabled, check_same_kind


def channel_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
    """Softmax attention among the channels of each group, out = V softmax(scale * Q^T K)^T.

    With N positions and e channels per group, A[i, j] = softmax over j of (scale * sum_n query[n, i] key[n, j]) and
    out[n, i] = sum_j A[i, j] value[n, j]. The cost is linear in N.

    Args:
        query: (B, *grid, groups, e).
        key: like `query`.
        value: like `query`.
        scale: factor of the logits; e ** -0.5 when None.

    Returns:
        (B, *grid, groups, e).

    Raises:
        ValueError: unequal shapes, dtypes or devices.

    Source: DaViT: Dual Attention Vision Transformers, arXiv 2204.03645.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 2, 7, 9, 4, 8).unbind(0)
        >>> channel_attention(q, k, v).shape
        torch.Size([2, 7, 9, 4, 8])
    """
    check_same_kind(query=query, key=key, value=value)
    if query.ndim < 4 or query.shape != key.shape or query.shape != value.shape:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} must all be "
            "(B, *grid, groups, channels)"
        )
    weights = channel_weights(query, key, scale=scale)
    out = weights @ value.flatten(1, -3).permute(0, 2, 3, 1)
    return out.permute(0, 3, 1, 2).reshape(value.shape)


def channel_weights(query: Tensor, key: Tensor, *, scale: float | None = None) -> Tensor:
    """The weights of `channel_attention`.

    Args:
        query: (B, *grid, groups, e).
        key: like `query`.
        scale: factor of the logits; e ** -0.5 when None.

    Returns:
        (B, groups, e, e), rows summing to one. Logits grow with the number of positions, so that float16 inputs are
        multiplied in float32.
    """
    q = query.flatten(1, -3).permute(0, 2, 3, 1)  # (B, groups, e, N)
    k = key.flatten(1, -3).transpose(1, 2)  # (B, groups, N, e)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    half = query.dtype == torch.float16
    kind = query.device.type
    with torch.autocast(kind, enabled=False) if half and autocast_enabled(kind) else nullcontext():
        if half:
            q, k = q.float(), k.float()
        logits = (q * factor) @ k
    return logits.softmax(-1).to(query.dtype)


def channel_self_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    num_groups: int,
    scale: float,
) -> Tensor:
    """Channel attention of x with itself, with its projections, from the Gram matrix of x.

    A channel's query and key enter only through sums over positions, and the output is linear in the value. With
    q = W_q x + b_q and so on, G = sum_n x_n x_n^T and s = sum_n x_n,

        Q^T K = W_q G W_k^T + (W_q s) b_k^T + b_q (W_k s)^T + N b_q b_k^T,
        out = x (W_v^T A^T W_o^T) + (b_v A^T W_o^T + b_o),

    so that two products with all N positions replace the four projections and the two products of attention. The
    numbers are those of `channel_attention` between the two projections, up to rounding.

    Args:
        x: (B, *grid, C).
        qkv_weight: (3C, C), rows query, key, value, each split into groups.
        qkv_bias: (3C,) or None.
        proj_weight: (C, C).
        proj_bias: (C,) or None.
        num_groups: groups of C / num_groups channels.
        scale: factor of the logits.

    Returns:
        (B, *grid, C).

    Example:
        >>> import torch
        >>> x, qkv, proj = torch.randn(2, 20, 20, 8), torch.randn(24, 8), torch.randn(8, 8)
        >>> channel_self_attention(x, qkv, None, proj, None, num_groups=2, scale=0.1).shape
        torch.Size([2, 20, 20, 8])
    """
    dim, tokens = x.shape[-1], x.flatten(1, -2)
    bias = qkv_weight.new_zeros(3 * dim) if qkv_bias is None else qkv_bias
    # With a constant channel beside those of x, whose weights are the biases, the terms with a bias need no care.
    affine = torch.cat([qkv_weight, bias[:, None]], -1).view(3, num_groups, dim // num_groups, dim + 1)
    total = tokens.sum(1).unsqueeze(-1)
    count = total.new_full((), tokens.shape[1]).expand(len(total), 1, 1)
    gram = torch.cat([tokens.transpose(1, 2) @ tokens, total], -1)
    gram = torch.cat([gram, torch.cat([total.mT, count], -1)], 1)
    w_query, w_key, w_value = affine.unbind(0)
    logits = scale * torch.einsum("hic,bcd,hjd->bhij", w_query, gram, w_key)
    w_out = proj_weight.unflatten(1, (num_groups, -1))
    combined = torch.einsum("ohi,bhij,hjc->bco", w_out, logits.softmax(-1), w_value)  # (B, C + 1, C)
    constant = combined[:, -1:] if proj_bias is None else combined[:, -1:] + proj_bias
    return torch.baddbmm(constant, tokens, combined[:, :-1]).view(x.shape)

"""Joins attentions over disjoint sets of keys into the attention over their union."""

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint key sets, from the attention over each.

    lse = ln(sum_i exp lse_i),  out = sum_i exp(lse_i - lse) out_i, both in float32 at least. The order does not matter,
    and merging merged results is the same as merging all at once. A part without keys has lse -inf and does not count.

    Args:
        outputs: one (..., Dv) a part, all alike.
        lses: one (...) a part: natural logarithm of the sum of the exponentials of its logits.

    Returns:
        out (..., Dv) in the dtype of the outputs, lse (...) in float32, or in float64 for float64. 0 and -inf where
        no part has a key.

    Raises:
        ValueError: no parts, not as many lses as outputs, or shapes that differ.

    Source: arXiv 2403.04690 (FNA), arXiv 2205.14135 (FlashAttention).

    Example:
        >>> out, lse = merge_attentions([torch.ones(1, 2), torch.zeros(1, 2)], [torch.zeros(1), torch.zeros(1)])
        >>> out.tolist(), round(lse.item(), 4)
        ([[0.5, 0.5]], 0.6931)
    """
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"{len(outputs)} outputs and {len(lses)} lses given; as many of one as of the other, at least one"
        )
    for i, (out, lse) in enumerate(zip(outputs, lses)):
        if out.shape != outputs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"outputs[{i}] is {tuple(out.shape)} with lses[{i}] {tuple(lse.shape)}; "
                f"{tuple(outputs[0].shape)} and {tuple(outputs[0].shape[:-1])} are allowed, like the first output"
            )
    dtype = outputs[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    stacked = torch.stack([lse.to(wide) for lse in lses])
    top = stacked.detach().amax(dim=0)
    top = top.masked_fill(top == -torch.inf, 0.0)
    share = (stacked - top).exp()
    total = share.sum(dim=0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + total.log()).masked_fill(empty, -torch.inf)
    out = sum(
        ((part / total).unsqueeze(-1) * out.to(wide) for part, out in zip(share, outputs)),
        start=torch.zeros_like(lse)[..., None],
    )
    return out.to(dtype), lse

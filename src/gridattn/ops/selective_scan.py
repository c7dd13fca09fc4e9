"""Selective state space scan (S6): a linear recurrence whose decay, input and output maps depend on the content."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from gridattn.ops.linear_scan import linear_scan


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The scan of a diagonal state space model with N states per channel, from the state h_0 = 0:

        dt_t = softplus(delta_t + delta_bias)
        h_t[n] = exp(dt_t A[n]) h_{t-1}[n] + dt_t B_t[n] u_t
        y_t = sum_n C_t[n] h_t[n] + D u_t

    Channels come in G groups that share B and C. Everything is computed in float32 or wider and exact for any length,
    see `linear_scan`; no compiled extension is needed.

    Args:
        u: (b, G * d, L), channels in the order (group, channel).
        delta: like `u`, the step sizes before softplus.
        A: (G * d, N), negative.
        B: (b, G, N, L).
        C: like `B`.
        D: (G * d), the direct path from u to y; none when None.
        delta_bias: (G * d), or None.
        chunk: steps per chunk of the scan; about sqrt(L / 2) when None.
        backend: "reference" loops over t, "auto" scans by chunks.

    Returns:
        y, like `u`, in float32 or wider.

    Raises:
        ValueError: shapes that do not fit together, and what `linear_scan` refuses.

    Sources: Mamba, arXiv 2312.00752; LaMamba-Diff, arXiv 2408.02615.

    Example:
        >>> u, delta = torch.randn(2, 1, 6, 10).unbind(0)
        >>> B, C = torch.randn(2, 1, 2, 4, 10).unbind(0)
        >>> selective_scan(u, delta, -torch.rand(6, 4), B, C).shape
        torch.Size([1, 6, 10])
    """
    _check(u, delta, A, B, C, D, delta_bias)
    group = {"g": B.shape[1]}
    step = delta if delta_bias is None else delta + delta_bias.unsqueeze(-1)
    y = scan_tokens(
        rearrange(u, "b (g d) l -> l b g d", **group).contiguous(),
        F.softplus(rearrange(step, "b (g d) l -> l b g d", **group).contiguous()),
        rearrange(A, "(g d) n -> g d n", **group),
        rearrange(B, "b g n l -> l b g n").contiguous(),
        rearrange(C, "b g n l -> l b g n").contiguous(),
        chunk=chunk,
        backend=backend,
    )
    y = rearrange(y, "l b g d -> b (g d) l")
    return y if D is None else y + D.unsqueeze(-1) * u


def scan_tokens(
    u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk: int | None = None, backend: str = "auto"
) -> Tensor:
    """The scan of `selective_scan` along the first axis, in the layout that it works in, without bias, softplus and D.

    Args:
        u: (L, ..., d).
        step: (L, ..., d), the step sizes dt, positive.
        A: (..., d, N), broadcast against the axes of `u` after the first.
        B: (L, ..., N).
        C: (L, ..., N).
        chunk: steps per chunk; about sqrt(L / 2) when None.
        backend: "reference" or "auto".

    Returns:
        y, (L, ..., d), float32 or wider.

    Example:
        >>> u, step = torch.rand(2, 10, 3, 6).unbind(0)
        >>> B, C = torch.randn(2, 10, 3, 4).unbind(0)
        >>> scan_tokens(u, step, -torch.rand(6, 4), B, C).shape
        torch.Size([10, 3, 6])
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    u, step, A, B, C = (t.to(wide) for t in (u, step, A, B, C))
    log_decay = step.unsqueeze(-1) * A
    added = (step * u).unsqueeze(-1) * B.unsqueeze(-2)
    states = linear_scan(log_decay, added, chunk=chunk, backend=backend)
    return (states * C.unsqueeze(-2)).sum(-1)


def _check(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> None:
    if u.ndim != 3 or delta.shape != u.shape:
        raise ValueError(f"u {tuple(u.shape)} and delta {tuple(delta.shape)} must be (batch, channels, length)")
    batch, channels, length = u.shape
    if A.ndim != 2 or A.shape[0] != channels:
        raise ValueError(f"A has shape {tuple(A.shape)}; ({channels}, states) is allowed")
    for name, t in (("B", B), ("C", C)):
        if t.ndim != 4 or t.shape != (batch, B.shape[1], A.shape[1], length) or channels % max(1, B.shape[1]):
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; ({batch}, groups, {A.shape[1]}, {length}) is allowed, with a "
                f"number of groups that divides {channels}"
            )
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"{name} has shape {tuple(vector.shape)}; ({channels},) is allowed")

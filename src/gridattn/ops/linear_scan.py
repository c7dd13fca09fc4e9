"""First-order linear recurrences along an axis, in about two square roots of its length steps instead of its length."""

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from gridattn.ops.common import check_choice
from gridattn.ops.constants import constant_in_traces


def linear_scan(log_decay: Tensor, x: Tensor, *, chunk: int | None = None, backend: str = "auto") -> Tensor:
    """The recurrence h_t = exp(log_decay_t) h_{t-1} + x_t from h_{-1} = 0 along the first axis.

    Exact for any length. The axis is cut into chunks. All chunks at once run the recurrence from a zero state, which
    gives what each adds; the states at their beginnings follow one from another; then all chunks at once run it again
    from these states. No exponential has a positive argument and nothing is divided, so nothing overflows. The backward
    pass is the same scan from the end, g_t = dh_t + exp(log_decay_{t+1}) g_{t+1}, and can be differentiated again.

    Args:
        log_decay: (L, ...), not positive.
        x: (L, ...), of the same shape.
        chunk: steps per chunk; about sqrt(L / 2) when None.
        backend: "reference" is the loop over t, "auto" the scan by chunks.

    Returns:
        h, like `x`.

    Raises:
        ValueError: two shapes that differ, an unknown backend, a chunk below 1.

    Source: LaMamba-Diff, arXiv 2408.02615; Mamba, arXiv 2312.00752.

    Example:
        >>> half = torch.full((5,), 0.5).log()
        >>> linear_scan(half, torch.ones(5)).tolist()
        [1.0, 1.5, 1.75, 1.875, 1.9375]
    """
    check_choice("backend", backend, ("auto", "reference"))
    if log_decay.shape != x.shape:
        raise ValueError(f"log_decay has shape {tuple(log_decay.shape)} and x {tuple(x.shape)}; one shape is allowed")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} is not allowed; it must be at least 1")
    if backend == "reference":
        return _scan_step_by_step(log_decay, x)
    return _LinearScan.apply(log_decay.exp(), x, chunk or _default_chunk(x.shape[0]), False)


@constant_in_traces
def _default_chunk(length: int) -> int:
    """Steps per chunk for the fewest steps in all, 2 * chunk + length / chunk; no padding where a divisor is near."""
    best = max(1, isqrt(length // 2))
    return next((size for size in range(2 * best, best // 2, -1) if length % size == 0), best)


def _scan_step_by_step(log_decay: Tensor, x: Tensor) -> Tensor:
    h = torch.zeros_like(x[0])
    states = []
    for decay, increment in zip(log_decay.exp().unbind(0), x.unbind(0)):
        h = decay * h + increment
        states.append(h)
    return torch.stack(states)


class _LinearScan(torch.autograd.Function):
    """h_t = decay_t h_{t-1} + x_t, or from the end, h_t = decay_t h_{t+1} + x_t."""

    @staticmethod
    def forward(decay: Tensor, x: Tensor, chunk: int, from_end: bool) -> Tensor:
        return _scan_by_chunks(decay, x, chunk, from_end)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        decay, _, ctx.chunk, ctx.from_end = inputs
        ctx.save_for_backward(decay, output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        decay, h = ctx.saved_tensors
        grad_x = _LinearScan.apply(_next(decay, ctx.from_end), grad_outputs[0], ctx.chunk, not ctx.from_end)
        return grad_x * _next(h, not ctx.from_end), grad_x, None, None


def _next(t: Tensor, from_end: bool) -> Tensor:
    """Entry t + 1 at place t (t - 1 from the end), zero where there is none."""
    zero = torch.zeros_like(t[:1])
    return torch.cat([zero, t[:-1]] if from_end else [t[1:], zero])


def _scan_by_chunks(decay: Tensor, x: Tensor, chunk: int, from_end: bool) -> Tensor:
    length, turn = x.shape[0], -1 if from_end else 1
    steps = [_cut(t, chunk).unbind(1)[::turn] for t in (decay, x)]  # of all chunks, (chunks, ...) each

    added, kept = steps[1][0], steps[0][0]
    for a, increment in zip(steps[0][1:], steps[1][1:]):
        added, kept = torch.addcmul(increment, a, added), kept * a
    state, starts = torch.zeros_like(x[0]), []
    for a, increment in zip(kept.unbind(0)[::turn], added.unbind(0)[::turn]):
        starts.append(state)
        state = torch.addcmul(increment, a, state)

    h, states = torch.stack(starts[::turn]), []
    for a, increment in zip(*steps):
        h = torch.addcmul(increment, a, h)
        states.append(h)
    return torch.stack(states[::turn], 1).flatten(0, 1)[:length]


def _cut(t: Tensor, chunk: int) -> Tensor:
    """(L, ...) -> (chunks, chunk, ...), filled with zeros at the end."""
    missing = -t.shape[0] % chunk
    if missing:
        t = torch.cat([t, t.new_zeros(missing, *t.shape[1:])])
    return t.unflatten(0, (-1, chunk))

"""First-order linear recurrences along an axis, in about two square roots of its length steps instead of its length."""

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from gridattn.ops.common import check_choice


def linear_scan(log_decay: Tensor, x: Tensor, *, chunk: int | None = None, backend: str = "auto") -> Tensor:
    """The recurrence h_t = exp(log_decay_t) h_{t-1} + x_t from h_{-1} = 0 along the first axis.

    Exact for any length. The axis is cut into chunks; inside all chunks at once the recurrence runs from a zero state,
    then the state at the end of each chunk is carried over the later ones:

        h = h_local + exp(P) h_carried, with P the sums of log_decay since the beginning of the chunk.

    No exponential has a positive argument, so nothing overflows. The backward pass is the same scan in the other
    direction, g_t = dh_t + exp(log_decay_{t+1}) g_{t+1}; it keeps `log_decay` and h and nothing of what lies between.

    Args:
        log_decay: (L, ...), not positive.
        x: (L, ...), of the same shape.
        chunk: steps per chunk; about sqrt(L) when None.
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
    return _LinearScan.apply(log_decay, x, chunk or max(1, isqrt(x.shape[0])))


def _scan_step_by_step(log_decay: Tensor, x: Tensor) -> Tensor:
    h = torch.zeros_like(x[0])
    states = []
    for decay, increment in zip(log_decay.exp().unbind(0), x.unbind(0)):
        h = decay * h + increment
        states.append(h)
    return torch.stack(states)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(log_decay: Tensor, x: Tensor, chunk: int) -> Tensor:
        return _scan_by_chunks(log_decay, x, chunk)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        log_decay, _, ctx.chunk = inputs
        ctx.save_for_backward(log_decay, output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grad_outputs
        log_decay, h = ctx.saved_tensors
        after = torch.cat([log_decay[1:], torch.zeros_like(log_decay[:1])])
        grad_x = _LinearScan.apply(after.flip(0), grad.flip(0), ctx.chunk).flip(0)
        before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
        return grad_x * log_decay.exp() * before, grad_x, None


def _scan_by_chunks(log_decay: Tensor, x: Tensor, chunk: int) -> Tensor:
    length = x.shape[0]
    count = -(-length // chunk)
    log_decay, x = (_cut(t, count, chunk) for t in (log_decay, x))  # (chunk, count, ...)
    decays, h = log_decay.exp(), torch.zeros_like(x[0])
    local = []
    for decay, increment in zip(decays.unbind(0), x.unbind(0)):
        h = torch.addcmul(increment, decay, h)
        local.append(h)
    since_start = log_decay.cumsum(0).exp()

    carry, carried = torch.zeros_like(h[0]), []
    for decay, last in zip(since_start[-1].unbind(0), h.unbind(0)):
        carried.append(carry)
        carry = torch.addcmul(last, decay, carry)
    h = torch.addcmul(torch.stack(local), since_start, torch.stack(carried))
    return h.transpose(0, 1).flatten(0, 1)[:length]


def _cut(t: Tensor, count: int, chunk: int) -> Tensor:
    """(L, ...) -> (chunk, count, ...), filled with zeros at the end."""
    missing = count * chunk - t.shape[0]
    if missing:
        t = torch.cat([t, t.new_zeros(missing, *t.shape[1:])])
    return t.unflatten(0, (count, chunk)).transpose(0, 1)

"""Drawn neighborhood attention problems, and a comparison of two backends on them, forward and backward."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from gridattn.ops import neighborhood_attention
from gridattn.ops.neighborhood import available_backends, make_plan
from gridattn.ops.neighborhood.checks import count_visible_keys


def installed_backends() -> list[str]:
    """Backends other than the reference that run on this machine's cpu, with gradients."""
    x = torch.zeros(1, 4, 1, 4, requires_grad=True)
    return [name for name in available_backends(x, x, x, make_plan((4,), 2)) if name != "reference"]


@dataclass
class Problem:
    """Tensors and settings of one call, in float64."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    key_mask: Tensor | None = None

    def run(self, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Output, lse and the gradients of a function of both."""
        options = {**self.settings, "key_mask": self.key_mask, "backend": backend}
        leaves = {name: t.to(dtype).requires_grad_() for name, t in self.tensors.items()}
        out, lse = neighborhood_attention(**leaves, **options, return_lse=True)
        alone = neighborhood_attention(**leaves, **options)
        loss = sum((t.double() * _ramp(t)).sum() for t in (out, lse, alone))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {"out": out, "lse": lse, "alone": alone, **{f"grad {n}": g for n, g in zip(leaves, grads)}}


def _ramp(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Small problems of rank 1 to 3 over every option of the operator."""
    rank = draw(st.integers(1, 3))
    grid, kernel, stride, dilation, causal = [], [], [], [], []
    for _ in range(rank):
        grid.append(draw(st.integers(2, {1: 24, 2: 9, 3: 5}[rank])))
        kernel.append(draw(st.integers(2, grid[-1])))
        stride.append(draw(st.integers(1, kernel[-1])))
        dilation.append(draw(st.integers(1, grid[-1] // kernel[-1])))
        causal.append(draw(st.booleans()))
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    head_dim, value_dim = draw(st.sampled_from([(4, 4), (8, 8), (3, 5), (8, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {
        "query": randn(batch, *grid, kv_heads * group, head_dim),
        "key": randn(batch, *grid, kv_heads, head_dim),
        "value": randn(batch, *grid, kv_heads, value_dim),
    }
    if draw(st.booleans()):
        tensors["bias"] = randn(kv_heads * group, *(2 * k - 1 for k in kernel))
    if draw(st.booleans()):
        extra = draw(st.integers(1, 3))
        tensors["additional_keys"] = randn(batch, extra, kv_heads, head_dim)
        tensors["additional_values"] = randn(batch, extra, kv_heads, value_dim)
    key_mask = None
    if "additional_keys" in tensors and draw(st.booleans()):
        key_mask = torch.rand(batch, *grid, generator=generator) > 0.7  # also leaves windows without a key
    elif draw(st.booleans()):
        key_mask = torch.rand(batch, *grid, generator=generator) > 0.3
        plan = make_plan(grid, kernel, stride, dilation, causal)
        key_mask |= count_visible_keys(key_mask, plan) == 0  # a query sees itself, so opening it gives its window a key
    scale = draw(st.sampled_from([None, 0.7]))
    options = {"kernel_size": kernel, "stride": stride, "dilation": dilation, "is_causal": causal, "scale": scale}
    return Problem(tensors, options, key_mask)

"""Linear layers, in inference on a CPU by oneDNN, which takes an activation that follows into the same pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.ops.common import autocast_enabled, is_plain

ONEDNN_MACS = {("none", ""): 2**24, ("gelu", "none"): 2**22, ("gelu", "tanh"): 2**20, ("swish", ""): 2**23}
"""For each activation the multiply-accumulates from which oneDNN's call, which takes longer to begin, is faster."""

_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def apply_linear(linear: nn.Module, x: Tensor, activation: nn.Module | None = None) -> Tensor:
    """activation(linear(x)), or linear(x) where no activation is given.

    PyTorch makes the output of a linear layer whole before the activation reads it; where no gradient is wanted, a
    float32 layer on a CPU takes both at once. Everything else, such as a layer that was replaced or has hooks, is
    called as it is.

    Args:
        linear: (..., dim) -> (..., out), such as `torch.nn.Linear`.
        x: (..., dim).
        activation: a module for single numbers; GELU and SiLU are those that are taken into the pass.

    Returns:
        (..., out).

    Example:
        >>> linear, x = nn.Linear(8, 16), torch.randn(2, 5, 8)
        >>> with torch.no_grad():
        ...     torch.allclose(apply_linear(linear, x, nn.GELU()), nn.GELU()(linear(x)), atol=1e-6)
        True
    """
    if type(linear) is nn.Linear and not (linear._forward_hooks or linear._forward_pre_hooks):
        return linear_activation(x, linear.weight, linear.bias, activation)
    out = linear(x)
    return out if activation is None else activation(out)


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: nn.Module | None = None) -> Tensor:
    """`apply_linear` with the weight, (out, dim), and the bias, (out) or None, of a layer.

    Example:
        >>> linear_activation(torch.ones(2, 3), torch.ones(1, 3), None, nn.SiLU()).shape
        torch.Size([2, 1])
    """
    names = _in_onednn(activation)
    if names is not None and _runs_on_onednn(x, weight, bias, ONEDNN_MACS[names]):
        return _ONEDNN(x, weight, bias, names[0], [], names[1])
    out = F.linear(x, weight, bias)
    return out if activation is None else activation(out)


def _in_onednn(activation: nn.Module | None) -> tuple[str, str] | None:
    """An activation and its algorithm as oneDNN names them; None for one that it lacks."""
    if activation is None:
        return "none", ""
    if type(activation) is nn.GELU:
        return "gelu", activation.approximate
    return ("swish", "") if type(activation) is nn.SiLU else None


def _runs_on_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, least_macs: int) -> bool:
    return (
        _ONEDNN is not None
        and not torch.compiler.is_compiling()  # comparing a size that a trace leaves open would bind it
        and x.numel() * weight.shape[0] >= least_macs
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[-1] == weight.shape[-1]
        and is_plain([x, weight] if bias is None else [x, weight, bias])
        and not autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )

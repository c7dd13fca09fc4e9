"""The public operator: checks its arguments, plans the windows, chooses a backend."""

import contextlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, overload

import torch
from einops import rearrange
from torch import Tensor

from gridattn.ops.common import autocast_enabled, check_choice
from gridattn.ops.constants import constant_in_traces
from gridattn.ops.neighborhood import cpu, flex, reference, tiled, triton_ops
from gridattn.ops.neighborhood.checks import check_additional, check_bias, check_key_mask, check_tensors
from gridattn.ops.neighborhood.gpu_choice import preferred_backends
from gridattn.ops.neighborhood.merge import merge_attentions
from gridattn.ops.neighborhood.plan import Plan, make_plan

_HAS_NUMBA = find_spec("numba") is not None


def _supports_any(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> str | None:
    return None


def _supports_cpu(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> str | None:
    if not _HAS_NUMBA:
        return "the package numba is not installed (pip install numba)"
    return cpu.supports(query, key, value, plan)


class Backend(NamedTuple):
    """An implementation.

    `attend(query, key, value, plan, scale, bias, key_mask, need_lse)` gives (out, lse), where lse may be None unless
    needed; `supports(query, key, value, plan)` says why it cannot run a problem, or None; `lacks` names options that it
    does not take.
    """

    attend: Callable[..., tuple[Tensor, Any]]
    supports: Callable[[Tensor, Tensor, Tensor, Plan], str | None] = _supports_any
    lacks: tuple[str, ...] = ()


BACKENDS = {
    "reference": Backend(reference.attend),
    "tiled": Backend(tiled.attend),
    "cpu": Backend(cpu.attend, _supports_cpu),
    "flex": Backend(flex.attend, flex.supports),
    "triton": Backend(triton_ops.attend, triton_ops.supports, lacks=("bias",)),
}


_make_plan = constant_in_traces(make_plan)


@overload
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Generalized neighborhood attention: softmax attention of every position over a window of keys.

    out[i] = sum_j P[i, j] v[j],  P[i] = softmax over the visible keys j of scale * <q[i], k[j]> + bias[p(j) - p(i) +
    k - 1].

    Per axis, a window holds exactly k keys: it is centred on its query (an even k reaches one further back) and
    pushed back inside at the borders; `stride` neighbouring queries share the window of their leader; a dilated
    window takes every d-th position; a causal one ends at the query. The visible set of a position is the product of
    its axes' sets, p is the position within its dilation group. Query head h reads key head h // (Hq / Hkv). Under
    autocast the op runs in the autocast dtype.

    Args:
        query: (B, *grid, Hq, D) on a grid of 1, 2 or 3 axes.
        key: (B, *grid, Hkv, D); Hq must be a multiple of Hkv.
        value: (B, *grid, Hkv, Dv).
        kernel_size: window size per axis, at least 2; kernel_size * dilation must not exceed the grid.
        stride: queries that share a window, 1 to kernel_size.
        dilation: step between the keys of a window.
        is_causal: axes along which a query sees no later key.
        scale: factor of the products; D ** -0.5 when None.
        bias: (Hq, 2k - 1 per axis), relative position bias, added after scaling; entry k - 1 is the query itself.
        key_mask: (B, *grid) bool; only keys with True may be seen.
        additional_keys: (B, N, Hkv, D), tokens visible to every query; `key_mask` and `bias` do not concern them.
        additional_values: (B, N, Hkv, Dv).
        return_lse: also return ln(sum_j exp(logit)) over the visible keys; gradients flow through it.
        backend: "auto", "reference" (the definition), "tiled" (any device, exportable), "cpu" (numba), "flex"
            (FlexAttention; on the CPU without gradients) or "triton" (GPU kernels, without `bias`).

    Returns:
        (B, *grid, Hq, Dv) in the dtype of the query; with `return_lse` also (B, *grid, Hq) in float32, or in float64
        for float64.

    Raises:
        ValueError: settings that do not fit the grid; shapes, dtypes or devices that do not fit each other; an
            unknown backend or one that cannot run the problem; a query left without any key by `key_mask` (not
            checked inside torch.compile and torch.export: such a query gets 0 and lse -inf).
        NotImplementedError: sparse or nested tensors.

    Source: arXiv 2504.16922 (GNA), 2403.04690 (FNA), 2204.07143 (NAT), 2209.15001 (DiNAT).

    Example:
        >>> q, k, v = torch.randn(3, 2, 12, 9, 4, 16)
        >>> neighborhood_attention(q, k, v, kernel_size=(7, 3), dilation=(1, 2), is_causal=(True, False)).shape
        torch.Size([2, 12, 9, 4, 16])
    """
    check_choice("backend", backend, ("auto", *BACKENDS))
    if autocast_enabled(query.device.type):
        query, key, value = map(to_autocast_dtype, (query, key, value))
        additional_keys, additional_values = (
            t if t is None else to_autocast_dtype(t) for t in (additional_keys, additional_values)
        )
    check_tensors(query, key, value)
    check_additional(key, value, additional_keys, additional_values)
    plan = _make_plan(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    check_bias(bias, query, plan)
    check_key_mask(key_mask, query, plan, spare=additional_keys is not None and additional_keys.shape[1] > 0)
    extra = (additional_keys, additional_values)
    out, lse = attend_planned(query, key, value, plan, scale, bias, key_mask, extra, return_lse, backend)
    return (out, lse) if return_lse else out


def attend_planned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    scale: float | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    additional: tuple[Tensor | None, Tensor | None],
    need_lse: bool,
    backend: str,
) -> tuple[Tensor, Any]:
    """`neighborhood_attention` on arguments that have been checked, where the mask may leave queries without a key.

    Args:
        additional: the additional keys and values.

    Returns:
        out, and lse, which may be None unless needed.
    """
    additional_keys, additional_values = additional
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    options = [name for name, given in (("bias", bias), ("key_mask", key_mask)) if given is not None]
    name = _choose(backend, query, key, value, plan, options)
    with _no_autocast(query.device.type):
        attend = BACKENDS[name].attend
        problem = (query, key, value, plan, factor, bias, key_mask)
        if additional_keys is None or additional_values is None:
            return attend(*problem, need_lse=need_lse)
        if name == "reference":
            return attend(*problem, additional_keys=additional_keys, additional_values=additional_values)
        window = attend(*problem, need_lse=True)
        extra = _attend_everywhere(query, additional_keys, additional_values, factor)
        return merge_attentions(*zip(window, extra))


def available_backends(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> list[str]:
    """Names of the backends that can run a problem."""
    return [name for name, backend in BACKENDS.items() if backend.supports(query, key, value, plan) is None]


def _choose(backend: str, query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: Sequence[str] = ()) -> str:
    """Name of the backend asked for, or for "auto" of the first fitting one, the fastest first.

    Args:
        options: names of the options that are given.
    """
    if torch.compiler.is_exporting() and backend != "reference":
        return "tiled"  # an exported graph must not need this package
    if backend == "auto":
        for name in ("cpu",) if query.device.type == "cpu" else preferred_backends(query.device):
            if _refusal(name, query, key, value, plan, options) is None:
                return name
        return "tiled"
    reason = _refusal(backend, query, key, value, plan, options)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot run this problem: {reason}")
    return backend


def _refusal(name: str, query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: Sequence[str]) -> str | None:
    """Why a backend cannot run a problem with some options, or None."""
    for option in options:
        if option in BACKENDS[name].lacks:
            return f"it does not take {option}"
    return BACKENDS[name].supports(query, key, value, plan)


def _attend_everywhere(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every query over the same few tokens, with its lse; shapes as in `neighborhood_attention`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q = rearrange(query.to(wide), "b ... (h group) d -> b h (... group) d", h=key.shape[-2])
    k, v = (rearrange(t.to(wide), "b n h d -> b h n d") for t in (key, value))
    logits = scale * q @ k.mT
    lse = logits.logsumexp(dim=-1, keepdim=True)
    out = (logits - lse).exp() @ v
    out, lse = (
        rearrange(t, "b h (i group) d -> b i (h group) d", group=query.shape[-2] // key.shape[-2]) for t in (out, lse)
    )
    return out.reshape(*query.shape[:-1], value.shape[-1]).to(query.dtype), lse.reshape(query.shape[:-1])


def to_autocast_dtype(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of the autocast region around the call; float64 stays, as in PyTorch's own ops."""
    kind = tensor.device.type
    if not autocast_enabled(kind) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Keeps the backends' own float32 products in float32."""
    if autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()

"""Neighborhood attention on a GPU: the Triton kernels as PyTorch operators with gradients.

The operators are `gridattn::neighborhood_triton` and `gridattn::neighborhood_triton_backward`. Half precision is
multiplied as it is and added up in float32; all results are deterministic.
"""

import contextlib
from importlib.util import find_spec
from math import e, log2
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gridattn.ops.neighborhood.plan import Plan, make_plan
from gridattn.ops.neighborhood.triton_tables import Tables, make_tables, three_axes
from gridattn.ops.neighborhood.triton_tuning import (
    FORWARD,
    KEY_GRADIENT,
    QUERY_GRADIENT,
    Block,
    interpreted,
    run_fastest,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256
"""Channels of a head at most, so that a block fits into a multiprocessor's memory."""
LOG2_E = log2(e)
_HAS_TRITON = find_spec("triton") is not None


def supports(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> str | None:
    """Why the Triton kernels cannot take a problem, or None if they can."""
    if not _HAS_TRITON:
        return "the package triton is not installed (pip install triton)"
    device = query.device.type
    if device not in ("cuda", "xpu") and not (device == "cpu" and interpreted()):
        return f"the tensors are on {query.device}, not on a GPU"
    if query.dtype not in DTYPES:
        return f"{query.dtype} is not one of {', '.join(map(str, DTYPES))}"
    if max(query.shape[-1], value.shape[-1]) > WIDEST:
        return f"a head has {max(query.shape[-1], value.shape[-1])} channels; at most {WIDEST} are possible"
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    scale: float,
    bias: None = None,
    key_mask: Tensor | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of every query over its window; arguments and results as in `cpu.attend`, without bias."""
    of = plan.axes  # torch.compile reads the fields of a plan, not its properties
    geometry = [[a.kernel for a in of], [a.stride for a in of], [a.dilation for a in of], [a.causal for a in of]]
    return torch.ops.gridattn.neighborhood_triton(query, key, value, key_mask, *geometry, scale)


@torch.library.custom_op("gridattn::neighborhood_triton", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None,
    kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[bool], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _empty_results(query, value)
    if out.numel() == 0:
        return out, lse
    plan = make_plan(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    query, key, value = map(_stored, (query, key, value))
    heads, group = query.shape[-2], query.shape[-2] // key.shape[-2]
    strides = (*map(_strides, (query, key, value, out)), _strides(lse[..., None]))
    kept = query if key_mask is None else key_mask.view(torch.uint8)

    def run(block: Block) -> None:
        tables = make_tables(plan, block.queries, block.keys, query.device)
        tensors = (query, key, value, out, lse)
        lists = _lists((tables.starts, tables.partials, tables.columns), key_mask)
        _kernels().forward[_programs(tables.starts, query, heads)](
            *tensors, tables.first, tables.stop, *lists, kept, *strides, _mask_strides(key_mask),
            *_geometry(plan, tables), heads, group, scale * LOG2_E, **_constants(query, value, key_mask, tables, block),
        )  # fmt: skip

    with _on_device(query):
        run_fastest("forward", FORWARD, _problem(plan, query, key, value, key_mask), run)
    return out, lse


@_forward.register_fake
def _(query, key, value, key_mask, kernel_size, stride, dilation, is_causal, scale):
    return _empty_results(query, value)


@torch.library.custom_op("gridattn::neighborhood_triton_backward", mutates_args=())
def _backward(
    d_out: Tensor, d_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None,
    out: Tensor, lse: Tensor,
    kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[bool], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_query, d_key, d_value = _empty_gradients(query, key, value)
    if out.numel() == 0:
        return d_query, d_key.zero_(), d_value.zero_()
    plan = make_plan(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    delta = ((d_out.float() * out.float()).sum(dim=-1) - d_lse).contiguous()
    query, key, value, d_out = map(_stored, (query, key, value, d_out))
    heads, kv_heads = query.shape[-2], key.shape[-2]
    group, factors = heads // kv_heads, (scale * LOG2_E, scale)
    inputs, problem = (query, key, value, d_out, lse, delta), _problem(plan, query, key, value, key_mask)
    strides = (*map(_strides, (query, key, value, d_out)), _strides(lse[..., None]))
    kept = query if key_mask is None else key_mask.view(torch.uint8)

    def run_queries(block: Block) -> None:
        tables = make_tables(plan, block.queries, block.keys, query.device)
        lists = _lists((tables.starts, tables.partials, tables.columns), key_mask)
        _kernels().query_gradient[_programs(tables.starts, query, heads)](
            *inputs, d_query, tables.first, tables.stop, *lists, kept, *strides, _strides(d_query),
            _mask_strides(key_mask), *_geometry(plan, tables), heads, group, *factors,
            **_constants(query, value, key_mask, tables, block),
        )  # fmt: skip

    def run_keys(block: Block) -> None:
        tables = make_tables(plan, block.queries, block.keys, query.device)
        _kernels().key_gradient[_programs(tables.by_key[0], query, kv_heads)](
            *inputs, d_key, d_value, tables.first, tables.stop, *_lists(tables.by_key, key_mask), kept, *strides,
            _strides(d_key), _strides(d_value), _mask_strides(key_mask), *_geometry(plan, tables),
            kv_heads, group, *factors, **_constants(query, value, key_mask, tables, block),
        )  # fmt: skip

    with _on_device(query):
        run_fastest("query gradient", QUERY_GRADIENT, problem, run_queries)
        run_fastest("key gradient", KEY_GRADIENT, problem, run_keys)
    return d_query, d_key, d_value


@_backward.register_fake
def _(d_out, d_lse, query, key, value, key_mask, out, lse, kernel_size, stride, dilation, is_causal, scale):
    return _empty_gradients(query, key, value)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, key_mask, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, key_mask, *output)


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(d_out, d_lse, *ctx.saved_tensors, *ctx.settings), *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_save)


def _pairs(query: torch.Size, *settings: Any) -> int:
    return query[0] * query[-2] * make_plan(query[1:-2], *settings).num_visible


@register_flop_formula(torch.ops.gridattn.neighborhood_triton)
def _forward_flops(query, key, value, key_mask, kernel_size, stride, dilation, is_causal, *_, **__) -> int:
    return 2 * (query[-1] + value[-1]) * _pairs(query, kernel_size, stride, dilation, is_causal)


@register_flop_formula(torch.ops.gridattn.neighborhood_triton_backward)
def _backward_flops(
    d_out, d_lse, query, key, value, key_mask, out, lse, kernel_size, stride, dilation, is_causal, *_, **__
) -> int:
    return 2 * (3 * query[-1] + 2 * value[-1]) * _pairs(query, kernel_size, stride, dilation, is_causal)


def _kernels() -> Any:
    """The module of kernels; Triton is imported by the first call."""
    from gridattn.ops.neighborhood import triton_kernels

    return triton_kernels


def _empty_results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


def _empty_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_query, d_key, d_value = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return d_query, d_key, d_value


def _stored(tensor: Tensor) -> Tensor:
    """A tensor whose rows of channels are in one piece."""
    if interpreted() and tensor.dtype == torch.bfloat16:
        tensor = tensor.float()  # the interpreter multiplies the bits of bfloat16 as integers
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of (B, *grid, heads, channels) along the batch, three axes (0 where there are fewer) and the heads."""
    batch, *axes, heads, _ = tensor.stride()
    return batch, *[0] * (3 - len(axes)), *axes, heads


def _mask_strides(key_mask: Tensor | None) -> tuple[int, ...]:
    return (0,) * 5 if key_mask is None else _strides(key_mask[..., None, None])


def _lists(lists: tuple[Tensor, Tensor, Tensor], key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Which tiles visit which; with a key mask, all of them with one."""
    starts, partials, columns = lists
    return starts, partials if key_mask is None else starts, columns


def _geometry(plan: Plan, tables: Tables) -> tuple[tuple[int, ...], ...]:
    axes = three_axes(plan)
    shape, dilation = tuple(axis.length for axis in axes), tuple(axis.dilation for axis in axes)
    return shape, dilation, tables.q_tiles, tables.q_per_group, tables.k_tiles, tables.k_per_group


def _programs(starts: Tensor, query: Tensor, heads: int) -> tuple[int]:
    return ((len(starts) - 1) * len(query) * heads,)


def _constants(query: Tensor, value: Tensor, key_mask: Tensor | None, tables: Tables, block: Block) -> dict[str, Any]:
    depth, width = query.shape[-1], value.shape[-1]
    exact = query.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {
        "DEPTH": depth,
        "WIDTH": width,
        "BLOCK_D": _power_of_two(depth),
        "BLOCK_W": _power_of_two(width),
        "Q_TILE": tables.q_tile,
        "K_TILE": tables.k_tile,
        "PRECISION": "ieee" if exact else "tf32",
        "KEPT": key_mask is not None,
        "num_warps": block.warps,
        "num_stages": block.stages,
    }


def _power_of_two(channels: int) -> int:
    """The next power of two that a matrix product takes."""
    return max(16, 1 << (channels - 1).bit_length())


def _problem(plan: Plan, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> tuple:
    shapes = (len(query), query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1])
    return (
        *((a.length, a.kernel, a.stride, a.dilation, a.causal) for a in plan.axes),
        *shapes,
        str(query.dtype),
        key_mask is not None,
    )


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()

"""Neighborhood attention on the CPU: tiled kernels compiled by numba, as PyTorch operators with gradients.

The operators are `gridattn::neighborhood_cpu` and `gridattn::neighborhood_cpu_backward`. Half precision tensors are
computed with in float32. All results are deterministic and do not depend on the number of threads.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from math import e, log2, prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gridattn.ops.common import is_plain
from gridattn.ops.neighborhood.cpu_row_blocks import make_row_blocks
from gridattn.ops.neighborhood.cpu_rows import ROW_LANES, fits_rows, make_rows
from gridattn.ops.neighborhood.cpu_threads import Kernel, run_on_threads
from gridattn.ops.neighborhood.cpu_tiles import LANES, MIN_ITEMS, Tiling, make_tiling
from gridattn.ops.neighborhood.plan import Plan, make_plan

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHORTEST_ROW = 14  # queries of a dilation group's row from which on the backward row kernel is the faster one, measured
DEEPEST_ROW = {1: 24, 2: 1024, 3: 16}  # likewise the most numbers of a key, by the grid's rank
WIDEST_ROW = 4000  # likewise of all keys of a window
LONGEST_ROW = 16  # keys of a window on a line up to which the row kernel is the faster one, measured
_SERIAL_WORK = 2_000_000  # multiply-adds below which waking another thread costs more than it brings
LOG2_E = log2(e)
_NO_TENSOR = np.empty(0, dtype=np.bool_)


def supports(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> str | None:
    """Why the CPU kernels cannot take a problem, or None if they can."""
    if query.device.type != "cpu":
        return f"the tensors are on {query.device}, not on the CPU"
    if query.dtype not in DTYPES:
        return f"{query.dtype} is not one of {', '.join(map(str, DTYPES))}"
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    scale: float,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Neighborhood attention by tiles of neighbouring queries; arguments and results as in `reference.attend`.

    Args:
        query: (B, *grid, Hq, D).
        key: (B, *grid, Hkv, D).
        value: (B, *grid, Hkv, Dv).
        plan: the problem.
        scale: factor of the logits.
        bias: (Hq, *(2k - 1)) relative position bias.
        key_mask: (B, *grid) bool, True where a key may be seen.
        need_lse: whether the caller reads the second result; here it costs nothing.

    Returns:
        (B, *grid, Hq, Dv) in the type of `query`, and the log-sum-exp of the logits (B, *grid, Hq) in float32 or
        float64; both are differentiable. A query that sees no key gives 0 and -inf.
    """
    tensors = [t for t in (query, key, value, bias, key_mask) if t is not None]
    if is_plain(tensors):
        return _compute(query, key, value, bias, key_mask, plan, scale)
    of = plan.axes  # torch.compile reads the fields of a plan, not its properties
    geometry = [[a.kernel for a in of], [a.stride for a in of], [a.dilation for a in of], [a.causal for a in of]]
    return torch.ops.gridattn.neighborhood_cpu(query, key, value, bias, key_mask, *geometry, scale)


@torch.library.custom_op("gridattn::neighborhood_cpu", mutates_args=(), device_types="cpu")
def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, key_mask: Tensor | None,
    kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[bool], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    plan = make_plan(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    return _compute(query, key, value, bias, key_mask, plan, scale)


@_forward.register_fake
def _(query, key, value, bias, key_mask, kernel_size, stride, dilation, is_causal, scale):
    return _empty_results(query, value)


def _compute(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, key_mask: Tensor | None, plan: Plan, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_results(query, value)
    if out.numel() == 0:
        return out, lse
    query, key, value, result = map(_stored, (query, key, value, out))
    if key_mask is None and lse.dtype == torch.float32 and rows_are_faster(plan):
        _forward_rows(query, key, value, bias, plan, scale, result, lse)
    else:
        _forward_tiles(query, key, value, bias, key_mask, plan, scale, result, lse)
    return out if result is out else out.copy_(result), lse


def rows_are_faster(plan: Plan) -> bool:
    """Whether the row kernel can take a problem and, as measured, takes less time: it can share no key on a line."""
    return (plan.rank > 1 or plan.axes[0].kernel <= LONGEST_ROW) and fits_rows(plan)


def _forward_tiles(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, key_mask: Tensor | None, plan: Plan, scale: float,
    out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fills `out` and `lse` by the kernel whose lanes are the queries of a tile."""
    from gridattn.ops.neighborhood.cpu_kernels import SOURCES, forward

    tiling = _tiling(plan, key, value, lse)
    tensors = (query, key, value, key_mask, out, lse)
    arrays = (*map(_flat, (query, key, value)), _bias_tables(bias, lse), *map(_flat, (key_mask, out, lse)))
    problem = (*arrays, _strides(tensors, plan.rank), _sizes(query, key, value), scale, *tiling.tables, tiling.items)
    items = len(tiling.items) * key.shape[0] * key.shape[-2]
    _launch(forward, problem, SOURCES, items, _work(query, value, plan))


def _forward_rows(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, plan: Plan, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Fills `out` and `lse` by the kernel whose lanes are the queries of a row."""
    from gridattn.ops.neighborhood.cpu_row_kernel import SOURCES, forward_rows

    tables, bias_size = _row_bias(bias, plan)
    pairs = key.shape[0] * key.shape[-2]
    rows = make_rows(plan, (key.shape[-1] + value.shape[-1]) * lse.element_size(), pairs, MIN_ITEMS // 2)
    tensors = (query, key, value, out, lse)
    q, k, v, *results = map(_flat, tensors)
    problem = (q, k, v, tables, *results, _strides(tensors, plan.rank), _sizes(query, key, value), scale, bias_size)
    _launch(forward_rows, (*problem, *rows.tables), SOURCES, len(rows.items) * pairs, _work(query, value, plan))


def _row_bias(bias: Tensor | None, plan: Plan) -> tuple[np.ndarray, int]:
    """One flat table per head in base 2 and its size; without a bias one of zeros for all heads, and 0."""
    if bias is None:
        return _zeros(prod(2 * k - 1 for k in plan.kernel_size) + ROW_LANES), 0
    table = bias.detach().float().flatten(1) * LOG2_E
    # A vector of bias entries may reach past the last one.
    return F.pad(table.flatten(), (0, ROW_LANES)).numpy(), table.shape[1]


@cache
def _zeros(count: int) -> np.ndarray:
    return np.zeros(count, np.float32)


@torch.library.custom_op("gridattn::neighborhood_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    d_out: Tensor, d_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
    key_mask: Tensor | None, out: Tensor, lse: Tensor,
    kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[bool], scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = _empty_gradients(query, key, value, bias)
    if out.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    plan = make_plan(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    has_rows = lse.dtype == torch.float32 and key_mask is None and query.shape == key.shape
    if has_rows and gradient_rows_are_faster(plan, (key.shape[-1] + value.shape[-1]) // 2):
        _backward_rows(query, key, value, bias, out, lse, d_out, d_lse.contiguous(), plan, scale, gradients)
    else:
        saved = query, key, value, bias, key_mask, out, lse
        _backward_tiles(*saved, d_out, d_lse.contiguous(), plan, scale, gradients)
    return gradients


def gradient_rows_are_faster(plan: Plan, depth: int) -> bool:
    """Whether the backward row kernel can take a problem and, as measured, takes less time.

    Keys and values hold `depth` numbers on average. Short rows leave lanes idle, and large windows leave its caches.
    """
    if max(plan.stride) > 1 or not rows_are_faster(plan):
        return False
    work, row = depth * prod(plan.kernel_size), plan.grid[-1] // plan.dilation[-1]
    return row >= SHORTEST_ROW and depth <= DEEPEST_ROW[plan.rank] and work <= WIDEST_ROW


def _backward_tiles(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, key_mask: Tensor | None, out: Tensor, lse: Tensor,
    d_out: Tensor, d_lse: Tensor, plan: Plan, scale: float, gradients: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fills the gradients by the kernel whose lanes are the queries of a tile."""
    from gridattn.ops.neighborhood.cpu_kernels import SOURCES, backward

    d_query, d_key, d_value, d_bias = gradients
    tiling = _tiling(plan, key, value, lse)
    query, key, value, out, d_out, query_result = map(_stored, (query, key, value, out, d_out, d_query))
    key_sum, value_sum = d_key.to(lse.dtype).zero_(), d_value.to(lse.dtype).zero_()
    tensors = (query, key, value, key_mask, out, lse, d_out, d_lse, query_result, key_sum, value_sum)
    q, k, v, mask, *others = map(_flat, tensors)
    arrays = (q, k, v, _bias_tables(bias, lse), mask, *others)
    strides, sizes = _strides(tensors, plan.rank), _sizes(query, key, value)
    d_bias.zero_()
    for blocks in tiling.phases:
        items = len(blocks) * key.shape[0] * key.shape[-2]
        d_tables = lse.new_zeros((key.shape[0], key.shape[-2], len(blocks), d_bias.numel() // key.shape[-2]))
        problem = (*arrays, d_tables.view(-1).numpy(), strides, sizes, scale, *tiling.tables, blocks)
        _launch(backward, problem, SOURCES, items, 3 * _work(query, value, plan) // len(tiling.phases))
        d_bias += d_tables.sum(dim=(0, 2)).view_as(d_bias)
    _copy_results((d_query, d_key, d_value), (query_result, key_sum, value_sum))


def _backward_rows(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, d_out: Tensor,
    d_lse: Tensor, plan: Plan, scale: float, gradients: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fills the gradients by the kernel whose lanes are the queries, and then the keys, of a row."""
    from gridattn.ops.neighborhood.cpu_row_backward import SOURCES, backward_rows

    *wanted, d_bias = gradients
    given = map(_stored, (query, key, value, out, lse, d_out, d_lse))
    tensors = (*given, *(t.new_empty(t.shape, dtype=torch.float32) if t.dtype == torch.float16 else t for t in wanted))
    q, k, v, *others = map(_flat, tensors)
    table, bias_size = _row_bias(bias, plan)
    pairs = key.shape[0] * key.shape[-2]
    blocks = make_row_blocks(plan, key.shape[-1] + value.shape[-1], pairs)
    d_tables = lse.new_zeros((key.shape[0], key.shape[-2], len(blocks.items), d_bias.numel() // key.shape[-2]))
    arrays = (q, k, v, table, *others, d_tables.view(-1).numpy())
    problem = (*arrays, _strides(tensors, plan.rank), _sizes(query, key, value), scale, bias_size, *blocks.tables)
    _launch(backward_rows, problem, SOURCES, len(blocks.items) * pairs, 3 * _work(query, value, plan))
    d_bias.copy_(d_tables.sum(dim=(0, 2)).view_as(d_bias))
    _copy_results(wanted, tensors[-3:])


@_backward.register_fake
def _(d_out, d_lse, query, key, value, bias, key_mask, out, lse, kernel_size, stride, dilation, is_causal, scale):
    return _empty_gradients(query, key, value, bias)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, key_mask, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, bias, key_mask, *output)


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward(d_out, d_lse, *ctx.saved_tensors, *ctx.settings)
    return *gradients[:3], gradients[3] if ctx.needs_input_grad[3] else None, *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_save)


def _pairs(
    query: torch.Size, kernel_size: list[int], stride: list[int], dilation: list[int], is_causal: list[bool]
) -> int:
    return query[0] * query[-2] * make_plan(query[1:-2], kernel_size, stride, dilation, is_causal).num_visible


@register_flop_formula(torch.ops.gridattn.neighborhood_cpu)
def _forward_flops(query, key, value, bias, key_mask, kernel_size, stride, dilation, is_causal, *_, **__) -> int:
    return 2 * (query[-1] + value[-1]) * _pairs(query, kernel_size, stride, dilation, is_causal)


@register_flop_formula(torch.ops.gridattn.neighborhood_cpu_backward)
def _backward_flops(
    d_out, d_lse, query, key, value, bias, key_mask, out, lse, kernel_size, stride, dilation, is_causal, *_, **__
) -> int:
    return 2 * (3 * query[-1] + 2 * value[-1]) * _pairs(query, kernel_size, stride, dilation, is_causal)


def _empty_results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return out, query.new_empty(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))


def _empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_query, d_key, d_value = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return d_query, d_key, d_value, query.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _copy_results(gradients: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Rounds what the kernels wrote to the type of the gradients, where that is another one."""
    for gradient, result in zip(gradients, results):
        if result is not gradient:
            gradient.copy_(result)


def _stored(tensor: Tensor) -> Tensor:
    """A tensor that the kernels can read: not float16, and with rows in one piece."""
    tensor = tensor.float() if tensor.dtype == torch.float16 else tensor
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _flat(tensor: Tensor | None) -> np.ndarray:
    """A tensor's memory from its first to its last number, without a copy; bfloat16 as 16-bit integers."""
    if tensor is None:
        return _NO_TENSOR
    tensor = tensor.detach() if tensor.requires_grad else tensor
    tensor = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    if tensor.is_contiguous():
        return tensor.view(-1).numpy()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.as_strided((span,), (1,)).numpy()


def _strides(tensors: tuple[Tensor | None, ...], rank: int) -> np.ndarray:
    """(tensors, 5): strides along batch, three axes (0 where the grid has fewer) and heads (0 where there are none)."""
    return _stride_table(tuple(() if tensor is None else tensor.stride() for tensor in tensors), rank)


@lru_cache(maxsize=1024)
def _stride_table(strides: tuple[tuple[int, ...], ...], rank: int) -> np.ndarray:
    table = np.zeros((len(strides), 5), dtype=np.int64)
    for row, (batch, *others) in zip(table, (of or (0,) for of in strides)):
        row[0], row[4 - rank : 4] = batch, others[:rank] or 0
        row[4] = others[rank] if len(others) > rank else 0
    return table


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> np.ndarray:
    return np.array([query.shape[0], query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1]])


def _bias_tables(bias: Tensor | None, lse: Tensor) -> np.ndarray:
    """One flat table per head in the type that the kernels compute in; empty without a bias."""
    return lse.new_empty(0).numpy() if bias is None else bias.detach().to(lse.dtype).reshape(-1).numpy()


def _tiling(plan: Plan, key: Tensor, value: Tensor, lse: Tensor) -> Tiling:
    row = sum(-(-tensor.shape[-1] // LANES) * LANES for tensor in (key, value))
    return make_tiling(plan, row * lse.element_size(), key.shape[0] * key.shape[-2])


def _work(query: Tensor, value: Tensor, plan: Plan) -> int:
    """Multiply-adds of the forward pass."""
    return query.shape[0] * query.shape[-2] * plan.num_visible * (query.shape[-1] + value.shape[-1])


def _launch(kernel: Kernel, problem: tuple, sources: np.ndarray, items: int, work: int) -> None:
    """Runs a kernel on as many threads as PyTorch uses."""
    counter = np.zeros(1, dtype=np.int64)
    threads = 1 if work < _SERIAL_WORK else min(torch.get_num_threads(), items)
    run_on_threads(kernel, (*problem, counter, sources), threads)

"""The CPU kernels: same results as the definition however the problem is cut, stored and threaded."""

import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gridattn.ops.neighborhood import (
    cpu,
    cpu_row_blocks,
    cpu_row_products,
    cpu_rows,
    cpu_threads,
    cpu_tiles,
    reference,
)
from gridattn.ops.neighborhood.cpu_team import run_team
from gridattn.ops.neighborhood.plan import Plan, make_plan


def draw_tensors(plan: Plan, heads: int = 2, key_heads: int = 2, depth: int = 8, value_depth: int = 8, **kind) -> dict:
    shapes = {"query": (heads, depth), "key": (key_heads, depth), "value": (key_heads, value_depth)}
    return {name: torch.randn(2, *plan.grid, *shape, **kind).requires_grad_() for name, shape in shapes.items()}


def draw_bias(plan: Plan, heads: int = 2) -> Tensor:
    return torch.randn(heads, *(2 * k - 1 for k in plan.kernel_size)).requires_grad_()


def results(attend, plan: Plan, tensors: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Output, log-sum-exp and the gradients of a function of both."""
    bias = options.get("bias")
    leaves = [*tensors.values(), *([] if bias is None else [bias])]
    out, lse = attend(*tensors.values(), plan, 0.3, **options)
    loss = (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    loss = loss + lse[lse.isfinite()].cos().sum()
    gradients = torch.autograd.grad(loss, leaves)
    return {"out": out, "lse": lse, **{f"grad {i}": gradient for i, gradient in enumerate(gradients)}}


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Problems of several tiles, whose windows may be wider or narrower than a tile."""
    rank = draw(st.integers(1, 3))
    grid = [draw(st.integers(2, {1: 90, 2: 24, 3: 9}[rank])) for _ in range(rank)]
    kernel = [draw(st.integers(2, min(size, 9))) for size in grid]
    stride = [draw(st.integers(1, k)) for k in kernel]
    dilation = [draw(st.integers(1, size // k)) for size, k in zip(grid, kernel)]
    return make_plan(grid, kernel, stride, dilation, [draw(st.booleans()) for _ in range(rank)])


@settings(deadline=None, max_examples=40)
@given(plan=plans(), has_bias=st.booleans(), has_mask=st.booleans(), one_block=st.booleans(), depths=st.data())
def test_agrees_with_the_definition_however_the_grid_is_cut(plan, has_bias, has_mask, one_block, depths) -> None:
    depth, value_depth = depths.draw(st.sampled_from([(8, 8), (5, 37), (33, 16)]))
    heads, key_heads = depths.draw(st.sampled_from([(2, 2), (4, 2), (2, 1)]))
    tensors = draw_tensors(plan, heads, key_heads, depth, value_depth)
    options = {
        "bias": draw_bias(plan, heads) if has_bias else None,
        "key_mask": torch.rand(2, *plan.grid) > 0.4 if has_mask else None,
    }
    cpu_tiles.make_tiling.cache_clear()
    with mock.patch.object(cpu_tiles, "BLOCK_BYTES", 2**30 if one_block else 2**14):
        got = results(cpu.attend, plan, tensors, **options)
    cpu_tiles.make_tiling.cache_clear()
    for name, expected in results(reference.attend, plan, tensors, **options).items():
        torch.testing.assert_close(got[name], expected, rtol=2e-4, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")


@settings(deadline=None, max_examples=40)
@given(plan=plans(), has_bias=st.booleans(), one_block=st.booleans(), depths=st.data())
def test_rows_agree_with_the_definition_wherever_they_fit(plan, has_bias, one_block, depths) -> None:
    plan = make_plan(plan.grid, plan.kernel_size, (*plan.stride[:-1], 1), plan.dilation)
    depth, value_depth = depths.draw(st.sampled_from([(8, 8), (5, 37), (33, 16)]))
    heads, key_heads = depths.draw(st.sampled_from([(2, 2), (4, 2), (2, 1)]))
    dtype = depths.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    tensors = [t.detach() for t in draw_tensors(plan, heads, key_heads, depth, value_depth, dtype=dtype).values()]
    bias = draw_bias(plan, heads).detach() if has_bias else None
    assert cpu_rows.fits_rows(plan) == cpu_row_products.HAS_PERMUTE
    cpu_rows.make_rows.cache_clear()
    with (
        mock.patch.object(cpu_tiles, "BLOCK_BYTES", 2**30 if one_block else 2**14),
        mock.patch.object(cpu, "_forward_tiles", cpu._forward_tiles if not cpu_row_products.HAS_PERMUTE else None),
        mock.patch.object(cpu, "LONGEST_ROW", 99),
    ):
        got = cpu.attend(*tensors, plan, 0.3, bias)
    cpu_rows.make_rows.cache_clear()
    wide = [t.float() for t in tensors]
    for found, expected in zip(got, reference.attend(*wide, plan, 0.3, bias)):
        rounding = 1e-2 if found.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(found.float(), expected, rtol=rounding, atol=rounding)


needs_rows = pytest.mark.skipif(not cpu_row_products.HAS_PERMUTE, reason="the row kernel needs AVX2")


@contextmanager
def gradients_by_rows(small_blocks: bool = False) -> Iterator[None]:
    """Sends every gradient to the row kernel, and lets it cut a grid into as many blocks as it can."""
    cuts = {"MIN_ITEMS": 64, "LEAST_CUT": 1, "LEAST_ROW": 2, "BAND_BYTES": 2**12, "SCRATCH_BYTES": 2**15}
    cpu_row_blocks.make_row_blocks.cache_clear()
    with (
        mock.patch.object(cpu, "gradient_rows_are_faster", return_value=True),
        mock.patch.object(cpu, "_backward_tiles", None),
        mock.patch.multiple(cpu_row_blocks, **cuts if small_blocks else {"MIN_ITEMS": 1}),
    ):
        yield
    cpu_row_blocks.make_row_blocks.cache_clear()


def assert_near(got: Tensor, expected: Tensor, rounding: float = 1e-4) -> None:
    """Equal up to a fraction of the largest number."""
    assert (got.float() - expected.float()).abs().max() <= rounding * expected.abs().max()


@needs_rows
@settings(deadline=None, max_examples=60)
@given(plan=plans(), has_bias=st.booleans(), small_blocks=st.booleans(), data=st.data())
def test_gradients_by_rows_agree_with_the_definition(plan, has_bias, small_blocks, data) -> None:
    plan = make_plan(plan.grid, plan.kernel_size, 1, plan.dilation)
    depth, value_depth = data.draw(st.sampled_from([(8, 8), (5, 37), (33, 16)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    tensors = draw_tensors(plan, 2, 2, depth, value_depth, dtype=dtype)
    wide = {name: tensor.detach().float().requires_grad_() for name, tensor in tensors.items()}
    options = {"bias": draw_bias(plan) if has_bias else None}
    with gradients_by_rows(small_blocks):
        got = results(cpu.attend, plan, tensors, **options)
    for name, expected in results(reference.attend, plan, wide, **options).items():
        assert_near(got[name], expected, 1e-4 if dtype == torch.float32 else 2e-2)


@needs_rows
@pytest.mark.parametrize("grid", [(7, 9), (26, 8), (31, 33), (12, 70)])
@pytest.mark.parametrize("kernel", [(2, 5), (4, 7), (7, 6)])
def test_blocks_give_what_one_block_gives(grid: tuple[int, int], kernel: tuple[int, int]) -> None:
    plan = make_plan(grid, kernel)
    tensors, bias = draw_tensors(plan, depth=12, value_depth=20), draw_bias(plan)
    with gradients_by_rows():
        whole = results(cpu.attend, plan, tensors, bias=bias)
    with gradients_by_rows(small_blocks=True):
        cut = results(cpu.attend, plan, tensors, bias=bias)
        assert len(cpu_row_blocks.make_row_blocks(plan, 32, 4).items) > 1
    for name, expected in whole.items():
        assert_near(cut[name], expected, 1e-5)


@needs_rows
def test_gradients_by_rows_read_slices_and_expanded_tensors_in_place() -> None:
    plan = make_plan((11, 17), 5)
    qkv = torch.randn(2, 11, 17, 3, 2, 8, requires_grad=True)
    d_out = torch.randn(1, 1, 1, 2, 8).expand(2, 11, 17, 2, 8)
    gradients = []
    for attend in (cpu.attend, reference.attend):
        with gradients_by_rows():
            out, _ = attend(*qkv.unbind(dim=-3), plan, 0.3)
            gradients += torch.autograd.grad(out, qkv, d_out)
    assert_near(*gradients)


@needs_rows
@pytest.mark.parametrize("dilation", [1, (1, 2)])
def test_a_nan_in_one_sample_or_head_does_not_reach_another(dilation) -> None:
    plan = make_plan((12, 19), 5, dilation=dilation)
    tensors, bias = draw_tensors(plan), draw_bias(plan)
    with gradients_by_rows():
        clean = results(cpu.attend, plan, tensors, bias=bias)
        for tensor in tensors.values():
            tensor.data[0, :, :, 0] = torch.nan
        spoilt = results(cpu.attend, plan, tensors, bias=bias)
    for name in ("grad 0", "grad 1", "grad 2"):
        assert spoilt[name][0, :, :, 0].isnan().all()
        assert torch.equal(spoilt[name][0, :, :, 1], clean[name][0, :, :, 1])
        assert torch.equal(spoilt[name][1], clean[name][1])
    assert torch.equal(spoilt["grad 3"][1], clean["grad 3"][1])


@needs_rows
def test_gradients_by_rows_are_the_same_bits_for_every_number_of_threads() -> None:
    plan = make_plan((40, 36), 7)
    tensors, bias = draw_tensors(plan, depth=32, value_depth=32), draw_bias(plan)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with gradients_by_rows(small_blocks=True):
                runs.append(results(cpu.attend, plan, tensors, bias=bias))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(runs[1][name], tensor) for name, tensor in runs[0].items())


@settings(deadline=None, max_examples=60)
@given(plan=plans(), small_blocks=st.booleans())
def test_blocks_of_rows_own_every_position_once(plan: Plan, small_blocks: bool) -> None:
    plan = make_plan(plan.grid, plan.kernel_size, 1, plan.dilation)
    with gradients_by_rows(small_blocks):
        blocks = cpu_row_blocks.make_row_blocks(plan, 16, 1)
    axes = [1] * (3 - plan.rank) + list(plan.grid)
    rows = [(plane, row) for plane, a, b in blocks.key_pairs[:, :3] for row in (a, b) if row >= 0]
    assert sorted(rows) == [(plane, row) for plane in range(axes[0]) for row in range(axes[1])]
    step = blocks.step[2]
    keys = {int(first + i * step) for first, count in blocks.key_vectors[:, :2] for i in range(count)}
    queries = {int(v[0] + i * step) for v in blocks.vectors for i in range(v[5], v[6])}
    assert keys == queries == set(range(axes[2]))
    assert sum(int((kind >= 0).sum()) for kind in blocks.kinds[blocks.vectors[:, 7]]) == axes[2]


def test_rows_give_gradients_where_that_takes_less_time() -> None:
    has_rows = cpu_row_products.HAS_PERMUTE
    assert cpu.gradient_rows_are_faster(make_plan((56, 56), 7), 32) == has_rows
    assert not cpu.gradient_rows_are_faster(make_plan((56, 56), 7, stride=2), 32)
    assert not cpu.gradient_rows_are_faster(make_plan((56, 56), 7, is_causal=(True, False)), 32)
    assert not cpu.gradient_rows_are_faster(make_plan((56, 56), 7, dilation=8), 32)
    assert not cpu.gradient_rows_are_faster(make_plan((64, 64), 13), 64)
    assert not cpu.gradient_rows_are_faster(make_plan((2048,), 7), 32)


def test_rows_need_windows_that_begin_within_one_vector_of_keys() -> None:
    assert not cpu_rows.fits_rows(make_plan((40, 40), 9, is_causal=(False, True)))
    assert not cpu_rows.fits_rows(make_plan((40, 40), 12, stride=(1, 12)))
    assert cpu_rows.fits_rows(make_plan((40, 40), 12, stride=(12, 1), dilation=(1, 3))) == cpu_row_products.HAS_PERMUTE


def test_a_query_with_a_nan_does_not_reach_its_neighbours() -> None:
    plan = make_plan((9, 20), 5)
    query, key, value = (torch.randn(1, 9, 20, 2, 8) for _ in range(3))
    query[0, 4, 7, 1] = torch.nan
    out, lse = cpu.attend(query, key, value, plan, 1.0)
    spoilt = torch.zeros(1, 9, 20, 2, dtype=torch.bool)
    spoilt[0, 4, 7, 1] = True
    assert torch.equal(out.isnan().any(-1), spoilt)
    assert torch.equal(lse.isnan(), spoilt)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_calls_that_nothing_follows_give_what_the_operator_gives(context) -> None:
    plan = make_plan((9, 20), 5)
    tensors = [torch.randn(1, 9, 20, 2, 8, requires_grad=True) for _ in range(3)]
    out, lse = cpu.attend(*tensors, plan, 1.0)
    assert out.grad_fn is not None
    with context():
        again, lse_again = cpu.attend(*tensors, plan, 1.0)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)


def positions(table: np.ndarray, axis: int, plan: Plan, columns: tuple[int, int]) -> set[int]:
    first, count = (int(table[i]) for i in columns)
    return set(range(first, first + count * plan.dilation[axis - 3 + plan.rank], plan.dilation[axis - 3 + plan.rank]))


@settings(deadline=None, max_examples=60)
@given(plan=plans(), min_blocks=st.integers(1, 40))
def test_tiles_cover_each_query_once_and_blocks_of_one_phase_share_no_key(plan: Plan, min_blocks: int) -> None:
    with mock.patch.object(cpu_tiles, "MIN_ITEMS", min_blocks):
        tiling = cpu_tiles.make_tiling.__wrapped__(plan, 64, 1)
    assert np.prod(tiling.shape) <= cpu_tiles.LANES
    for axis in range(3 - plan.rank, 3):
        queries, tiles = [], {tuple(b) for b in tiling.items[:, axis : axis + 1]}
        for (block,) in tiles:
            first_run, last_run, *_ = tiling.blocks[axis, block]
            for first_tile, last_tile, _ in tiling.runs[axis, first_run:last_run]:
                for tile in tiling.tiles[axis, first_tile:last_tile]:
                    queries += positions(tile, axis, plan, (0, 1))
        assert sorted(queries) == list(range(plan.grid[axis - 3 + plan.rank]))
    for phase in tiling.phases:
        seen: set[tuple] = set()
        for block in phase:
            keys = [positions(tiling.blocks[axis, block[axis]], axis, plan, (2, 3)) for axis in range(3 - plan.rank, 3)]
            corner_free = {tuple(key) for key in np.array(np.meshgrid(*map(list, keys))).reshape(plan.rank, -1).T}
            assert not seen & corner_free
            seen |= corner_free


def test_results_are_the_same_bits_in_every_run_and_for_every_number_of_threads() -> None:
    plan = make_plan((40, 36), 7)
    tensors, bias = draw_tensors(plan, depth=32, value_depth=32), draw_bias(plan)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 1, 3, 3):
            torch.set_num_threads(count)
            runs.append(results(cpu.attend, plan, tensors, bias=bias))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in runs[0].items())


def test_slices_of_one_projection_are_read_in_place() -> None:
    plan = make_plan((11, 13), 5)
    qkv = torch.randn(2, 11, 13, 3, 2, 8)
    slices = qkv.unbind(dim=-3)
    assert all(cpu._stored(part) is part and np.shares_memory(cpu._flat(part), qkv.numpy()) for part in slices)
    got = cpu.attend(*slices, plan, 0.3)
    expected = cpu.attend(*(part.contiguous() for part in slices), plan, 0.3)
    assert torch.equal(got[0], expected[0])
    flipped = [part.flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2) for part in slices]
    expected = reference.attend(*flipped, plan, 0.3)
    torch.testing.assert_close(cpu.attend(*flipped, plan, 0.3)[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_only_rounds_the_result(dtype: torch.dtype) -> None:
    plan = make_plan((12, 15), 5)
    half = draw_tensors(plan, depth=24, dtype=dtype)
    single = {name: tensor.detach().float().requires_grad_() for name, tensor in half.items()}
    out, lse = cpu.attend(*half.values(), plan, 0.3)
    exact, exact_lse = cpu.attend(*single.values(), plan, 0.3)
    assert torch.equal(out, exact.to(dtype))
    assert torch.equal(lse, exact_lse)
    gradients = torch.autograd.grad(out.sum(), half.values())
    for gradient, expected in zip(gradients, torch.autograd.grad(exact.sum(), single.values())):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.float(), expected, rtol=2e-2, atol=2e-2)


def test_whatever_masked_keys_hold_does_not_matter() -> None:
    plan = make_plan((9, 9), 3)
    tensors = draw_tensors(plan)
    key_mask = torch.rand(2, 9, 9) > 0.5
    clean = results(cpu.attend, plan, tensors, key_mask=key_mask)
    for name in ("key", "value"):
        tensors[name].data[~key_mask] = torch.nan
    dirty = results(cpu.attend, plan, tensors, key_mask=key_mask)
    assert all(torch.equal(dirty[name], tensor) for name, tensor in clean.items())


def test_a_query_without_keys_gets_zero_and_passes_no_gradient() -> None:
    plan = make_plan((8,), 2)
    tensors = draw_tensors(plan)
    key_mask = torch.ones(2, 8, dtype=torch.bool)
    key_mask[:, :3] = False
    got = results(cpu.attend, plan, tensors, key_mask=key_mask)
    assert torch.equal(got["out"][:, :2], torch.zeros(2, 2, 2, 8))
    assert torch.equal(got["lse"][:, :2], torch.full((2, 2, 2), -torch.inf))
    assert torch.equal(got["grad 0"][:, :2], torch.zeros(2, 2, 2, 8))
    assert all(gradient.isfinite().all() for name, gradient in got.items() if name.startswith("grad"))


def test_a_nan_in_a_visible_key_reaches_its_queries() -> None:
    plan = make_plan((40,), 3)
    tensors = draw_tensors(plan)
    tensors["key"].data[:, 20] = torch.nan
    assert cpu.attend(*tensors.values(), plan, 0.3)[0][:, 19:22].isnan().all()


def test_an_empty_batch_gives_empty_results() -> None:
    plan = make_plan((6, 6), 3)
    tensors = {name: tensor.detach()[:0].requires_grad_() for name, tensor in draw_tensors(plan).items()}
    got = results(cpu.attend, plan, tensors)
    assert got["out"].shape == (0, 6, 6, 2, 8)
    assert got["grad 1"].shape == (0, 6, 6, 2, 8)


def test_many_threads_may_call_at_once() -> None:
    plan = make_plan((24, 24), 7)
    tensors = draw_tensors(plan, depth=32, value_depth=32)
    expected, found = results(cpu.attend, plan, tensors), []
    threads = [threading.Thread(target=lambda: found.append(results(cpu.attend, plan, tensors))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(torch.equal(got[name], tensor) for got in found for name, tensor in expected.items())


def test_without_an_openmp_runtime_a_pool_of_threads_gives_the_same() -> None:
    plan = make_plan((24, 24), 7)
    tensors = draw_tensors(plan, depth=32, value_depth=32)
    expected = results(cpu.attend, plan, tensors)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with mock.patch.object(cpu_threads, "_openmp", return_value=None):
            got = results(cpu.attend, plan, tensors)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@njit(nogil=True)
def _fail() -> None:
    raise ArithmeticError("from a thread")


@njit(nogil=True)
def _fail_on_team(start_region, threads):
    return run_team(_fail, (), start_region, threads)


def test_an_error_on_any_thread_reaches_the_caller() -> None:
    kernel = cpu_threads.Kernel(_fail, _fail_on_team)
    with mock.patch.object(cpu_threads, "_openmp", return_value=None), pytest.raises(ArithmeticError):
        cpu_threads.run_on_threads(kernel, (), 2)
    with mock.patch.object(cpu_threads, "_pool_until", 0), pytest.raises(MemoryError, match="one of its threads"):
        cpu_threads.run_on_threads(kernel, (), 2)


def _attend_in_child(queue: multiprocessing.Queue, tensors: list[Tensor]) -> None:
    torch.set_num_threads(2)
    queue.put(cpu.attend(*tensors, make_plan((24, 24), 7), 0.3)[0].numpy())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_attends_on_threads_of_its_own() -> None:
    plan = make_plan((24, 24), 7)
    tensors = [tensor.detach() for tensor in draw_tensors(plan, depth=32, value_depth=32).values()]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = cpu.attend(*tensors, plan, 0.3)[0]
    finally:
        torch.set_num_threads(threads)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_attend_in_child, args=(queue, tensors))
    child.start()
    try:
        assert np.array_equal(queue.get(timeout=60), expected.numpy())
        child.join(timeout=60)
        assert child.exitcode == 0
    finally:
        child.kill()


def test_compiles_into_one_graph_with_gradients() -> None:
    plan = make_plan((9, 10), 3, dilation=(1, 3))
    tensors, bias = draw_tensors(plan), draw_bias(plan)

    def step(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        out, lse = cpu.attend(2 * query, key, value, plan, 0.3, bias)
        return out.sin().sum() + lse.cos().sum()

    expected = torch.autograd.grad(step(*tensors.values(), bias), [*tensors.values(), bias])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*tensors.values(), bias), [*tensors.values(), bias])
    torch.testing.assert_close(got, expected)


def test_is_a_well_formed_operator() -> None:
    plan = make_plan((5, 6), 3)
    tensors, bias = draw_tensors(plan, heads=4), draw_bias(plan, heads=4)
    geometry = ([3, 3], [1, 1], [1, 1], [False, True])
    key_mask = torch.ones(2, 5, 6, dtype=torch.bool)
    torch.library.opcheck(
        torch.ops.gridattn.neighborhood_cpu.default, (*tensors.values(), bias, key_mask, *geometry, 0.3)
    )
    torch.library.opcheck(torch.ops.gridattn.neighborhood_cpu.default, (*tensors.values(), None, None, *geometry, 0.3))


def test_counts_the_operations_of_visible_pairs_only() -> None:
    plan = make_plan((9, 10), (3, 5), is_causal=(True, False))
    tensors = draw_tensors(plan, heads=4, depth=8, value_depth=12)
    with FlopCounterMode(display=False) as counter:
        out, _ = cpu.attend(*tensors.values(), plan, 0.3)
    pairs = 2 * 4 * plan.num_visible
    assert counter.get_total_flops() == 2 * pairs * (8 + 12)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (3 * 8 + 2 * 12)


def test_says_which_problems_it_does_not_take() -> None:
    plan = make_plan((4,), 2)
    here = torch.zeros(1, 4, 1, 4)
    assert cpu.supports(here, here, here, plan) is None
    assert "int32" in str(cpu.supports(*[here.int()] * 3, plan))
    assert "meta" in str(cpu.supports(*[here.to("meta")] * 3, plan))

"""Neighborhood attention, its modules and token permutation through the NATTEN interface."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gridattn.compat.natten as natten
from gridattn.ops.neighborhood import make_plan


@st.composite
def windows(draw: st.DrawFn, most: tuple[int, ...] = (12, 7, 5)) -> tuple[tuple[int, ...], dict[str, Any]]:
    """A grid and settings that fit it."""
    rank = draw(st.integers(1, 3))
    grid = tuple(draw(st.integers(2, most[rank - 1])) for _ in range(rank))
    kernel = tuple(draw(st.integers(2, size)) for size in grid)
    return grid, {
        "kernel_size": kernel,
        "stride": tuple(draw(st.integers(1, k)) for k in kernel),
        "dilation": tuple(draw(st.integers(1, size // k)) for size, k in zip(grid, kernel)),
        "is_causal": tuple(draw(st.booleans()) for _ in grid),
    }


def leaves_on(
    grid: tuple[int, ...], heads: int = 4, kv_heads: int = 2, dim: int = 3, value_dim: int = 5, extra: int = 0
) -> list[Tensor]:
    """Query, key, value and, with `extra`, additional keys and values that collect gradients."""
    shapes = [(*grid, heads, dim), (*grid, kv_heads, dim), (*grid, kv_heads, value_dim)]
    shapes += [(extra, kv_heads, dim), (extra, kv_heads, value_dim)] if extra else []
    return [torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def masked_dense(grid: tuple[int, ...], settings: dict[str, Any], leaves: list[Tensor]) -> Tensor:
    """Softmax over window keys and additional keys together: dense attention with the windows as a mask."""
    query, key, value = (t.flatten(1, -3) for t in leaves[:3])
    mask = np.ones((1, 1), dtype=bool)
    for axis in make_plan(grid, **settings).axes:
        mask = np.kron(mask, axis.mask)
    visible = torch.from_numpy(mask)
    if len(leaves) > 3:
        key, value = torch.cat([key, leaves[3]], 1), torch.cat([value, leaves[4]], 1)
        visible = F.pad(visible, (0, leaves[3].shape[1]), value=True)
    repeats = query.shape[2] // key.shape[2]
    key, value = (t.repeat_interleave(repeats, 2) for t in (key, value))
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)), attn_mask=visible)
    return out.transpose(1, 2).unflatten(1, grid)


@given(windows(), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_window_keys_and_additional_keys_share_one_softmax(window: tuple, extra: int) -> None:
    grid, options = window
    leaves = leaves_on(grid, extra=extra)
    additional = dict(zip(("additional_keys", "additional_values"), leaves[3:]))
    ours = natten.functional.neighborhood_attention_generic(*leaves[:3], **options, **additional)
    theirs = masked_dense(grid, options, leaves)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(theirs)
    torch.testing.assert_close(*(torch.autograd.grad(out, leaves, direction) for out in (ours, theirs)))


@given(windows(most=(6, 4, 3)))
@settings(deadline=None, max_examples=10)
def test_gradients_of_output_and_lse_pass_gradcheck(window: tuple) -> None:
    grid, options = window

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, extra_k, extra_v = tensors
        additional = {"additional_keys": extra_k, "additional_values": extra_v}
        return natten.na2d(q, k, v, **options, **additional, return_lse=True)

    leaves = leaves_on(grid, heads=2, kv_heads=1, dim=2, value_dim=3, extra=2)
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


@given(windows(), st.sampled_from([(1, 2), (2, 2), (1, 4), (3, 1)]))
@settings(deadline=None, max_examples=10)
def test_grouped_heads_equal_repeated_heads(window: tuple, heads: tuple[int, int]) -> None:
    grid, options = window
    kv_heads, repeats = heads
    q, k, v = leaves_on(grid, heads=kv_heads * repeats, kv_heads=kv_heads)
    grouped = natten.na1d(q, k, v, **options)
    torch.testing.assert_close(
        grouped, natten.na1d(q, k.repeat_interleave(repeats, -2), v.repeat_interleave(repeats, -2), **options)
    )


HAND = {
    "k3": (
        {"kernel_size": 3},
        "1.724388 2.000000 2.889789 3.912452 3.464658",
        ".962936 1.620621 1.701169 1.224270 1.760516",
    ),
    "k3 s2": (
        {"kernel_size": 3, "stride": 2},
        "1.724388 2.000000 3.680840 3.912452 3.464658",
        ".962936 1.620621 1.424173 1.224270 1.760516",
    ),
    "k2 d2 causal": (
        {"kernel_size": 2, "dilation": 2, "is_causal": True},
        "1 2 2.339523 3.088159 3.391141",
        ".353553 0 1.107940 1.138990 1.631835",
    ),
}


@pytest.mark.parametrize("backend", [None, "reference", "tiled", "cpu"])
@pytest.mark.parametrize("case", HAND)
def test_numbers_worked_by_hand(case: str, backend: str | None) -> None:
    options, expected_out, expected_lse = HAND[case]
    q = torch.tensor([[0.5, -1.0], [1.0, 0.0], [0.0, 1.0], [-0.5, 0.5], [1.0, 1.0]]).view(1, 5, 1, 2)
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.5], [0.5, -0.5]]).view(1, 5, 1, 2)
    v = torch.arange(1.0, 6.0).view(1, 5, 1, 1)
    out, lse = natten.na1d(q, k, v, **options, backend=backend, return_lse=True)
    torch.testing.assert_close(out.flatten(), torch.tensor([float(x) for x in expected_out.split()]), atol=2e-6, rtol=0)
    torch.testing.assert_close(lse.flatten(), torch.tensor([float(x) for x in expected_lse.split()]), atol=2e-6, rtol=0)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_rank_is_read_from_the_tensor_whatever_the_name(rank: int) -> None:
    q, k, v = leaves_on((4, 5, 6)[:rank])
    results = [function(q, k, v, 3) for function in (natten.na1d, natten.na2d, natten.na3d)]
    assert results[0].shape == (2, *(4, 5, 6)[:rank], 4, 5)
    assert all(torch.equal(result, results[0]) for result in results)


def test_one_value_stands_for_all_axes_and_lists_are_taken() -> None:
    q, k, v = leaves_on((8, 9))
    one = natten.na2d(q, k, v, 3, 2, 2, True)
    assert torch.equal(natten.na2d(q, k, v, (3, 3), (2, 2), (2, 2), (True, True)), one)
    assert torch.equal(natten.na2d(q, k, v, [3, 3], [2, 2], [2, 2], [True, True]), one)


def test_none_means_stride_1_dilation_1_not_causal_and_a_scale_of_zero_the_default() -> None:
    q, k, v = leaves_on((8, 9))
    assert torch.equal(natten.na2d(q, k, v, 3, None, None, None, 0.0), natten.na2d(q, k, v, 3))


@pytest.mark.parametrize("backend", ["cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna", "auto"])
def test_nattens_backends_and_tuning_arguments_change_nothing(backend: str) -> None:
    q, k, v = leaves_on((8, 9))
    tuned = natten.na2d(
        q,
        k,
        v,
        3,
        attention_kwargs={"backend": "cutlass-fmha", "q_tile_size": 64, "run_persistent_kernel": False},
        backend=backend,
        q_tile_shape=(8, 8),
        kv_tile_shape=[8, 16],
        backward_q_tile_shape=(8, 8),
        backward_kv_tile_shape=(4, 8),
        backward_kv_splits=(2, 1),
        backward_use_pt_reduction=True,
        run_persistent_kernel=False,
        kernel_schedule="pp",
        torch_compile=True,
    )
    assert torch.equal(tuned, natten.na2d(q, k, v, 3))


@pytest.mark.parametrize("extra", [0, 3])
def test_a_window_as_large_as_the_grid_is_dense_attention(extra: int) -> None:
    q, k, v, *additional = leaves_on((4, 5), extra=extra)
    tokens = [torch.cat([t.flatten(1, 2), *more], 1) for t, *more in ((k, *additional[:1]), (v, *additional[1:]))]
    expected = natten.attention(q.flatten(1, 2), *tokens).unflatten(1, (4, 5))
    named = dict(zip(("additional_keys", "additional_values"), additional))
    torch.testing.assert_close(natten.na2d(q, k, v, (4, 5), stride=(2, 3), **named), expected)


def test_a_causal_window_as_long_as_the_sequence_is_causal_attention() -> None:
    q, k, v = leaves_on((9,))
    torch.testing.assert_close(natten.na1d(q, k, v, 9, is_causal=True), natten.attention(q, k, v, is_causal=True))


def test_merging_windows_with_text_tokens_equals_additional_keys() -> None:
    q, k, v, text_k, text_v = leaves_on((5, 6), extra=4)
    window, window_lse = natten.na2d(q, k, v, 3, return_lse=True)
    text, text_lse = natten.attention(q.flatten(1, 2), text_k, text_v, return_lse=True)
    merged, _ = natten.merge_attentions([window.flatten(1, 2), text], [window_lse.flatten(1, 2), text_lse])
    joint = natten.na2d(q, k, v, 3, additional_keys=text_k, additional_values=text_v)
    torch.testing.assert_close(merged.unflatten(1, (5, 6)), joint)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_point_dtype_trains(dtype: torch.dtype) -> None:
    exact = leaves_on((5, 6))
    leaves = [t.detach().to(dtype).requires_grad_() for t in exact]
    out, lse = natten.na2d(*leaves, 3, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 5e-2 if dtype.itemsize == 2 else 1e-5
    expected = natten.na2d(*exact, 3)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), exact)):
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)


def test_operators_compile_as_one_graph() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window, lse = natten.na2d(q, k, v, 3, dilation=2, backend="tiled", return_lse=True)
        whole, whole_lse = natten.attention(*(t.flatten(1, 2) for t in (q, k, v)), return_lse=True)
        return natten.merge_attentions([window.flatten(1, 2), whole], [lse.flatten(1, 2), whole_lse])[0]

    q, k, v = (t.detach() for t in leaves_on((7, 8)))
    compiled = torch.compile(both, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), both(q, k, v))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_module_projects_attends_and_projects(rank: int) -> None:
    grid, layer = (6, 5, 4)[:rank], getattr(natten, f"NeighborhoodAttention{rank}D")
    module = layer(12, 3, kernel_size=3, stride=2, is_causal=True, qk_scale=0.7).double()
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == {
        "qkv.weight": (36, 12),
        "qkv.bias": (36,),
        "proj.weight": (12, 12),
        "proj.bias": (12,),
    }
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    blocks = zip(module.qkv.weight.chunk(3), module.qkv.bias.chunk(3))
    q, k, v = (F.linear(x, weight, bias).unflatten(-1, (3, 4)) for weight, bias in blocks)
    out = natten.na3d(q, k, v, 3, 2, is_causal=True, scale=0.7)
    torch.testing.assert_close(module(x), F.linear(out.flatten(-2), module.proj.weight, module.proj.bias))


def test_a_module_without_qkv_bias_keeps_the_bias_of_its_output() -> None:
    module = natten.NeighborhoodAttention1D(8, 2, 3, qkv_bias=False, proj_drop=0.5)
    assert set(module.state_dict()) == {"qkv.weight", "proj.weight", "proj.bias"}
    x = torch.randn(1, 7, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize(("flip", "dilation"), [*product([True, False], [None, (2, 3)])])
def test_attention_on_permuted_tokens_is_a_batch_of_undilated_problems(flip: bool, dilation: Any) -> None:
    permute, unpermute = natten.token_permute.token_permute_operation, natten.token_permute.token_unpermute_operation
    q, k, v = leaves_on((8, 12))
    tile = (4, 4) if dilation is None else (4, 2)
    (pq, grid, padded), (pk, _, _), (pv, _, _) = (permute(t, tile, dilation, flip) for t in (q, k, v))
    assert (grid, padded) == ((8, 12), (8, 12) if dilation is None else (4, 4))
    whole_groups = natten.attention(pq, pk, pv)
    expected = natten.na2d(q, k, v, padded, dilation=dilation)
    torch.testing.assert_close(unpermute(whole_groups, grid, tile, dilation, flip), expected)

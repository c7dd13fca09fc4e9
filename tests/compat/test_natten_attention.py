"""Dense attention, packed sequences and merging through the NATTEN interface."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gridattn.compat.natten as natten
from gridattn.compat.natten.utils.varlen import generate_varlen_parameters


def dense(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """PyTorch's attention on heads-last tensors, key heads repeated in place."""
    repeats = query.shape[2] // key.shape[2]
    key, value = (t.repeat_interleave(repeats, dim=2) for t in (key, value))
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)), **options)
    return out.transpose(1, 2)


def problem(
    tokens_q: int = 7, tokens_kv: int = 7, heads: int = 4, kv_heads: int = 4, dim: int = 8, value_dim: int = 8
) -> tuple[Tensor, ...]:
    shapes = (tokens_q, heads, dim), (tokens_kv, kv_heads, dim), (tokens_kv, kv_heads, value_dim)
    return tuple(torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def agree(ours: Tensor, theirs: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(theirs)
    grads = [torch.autograd.grad(out, leaves, direction, retain_graph=True) for out in (ours, theirs)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"tokens_q": 3}, {"tokens_kv": 4}, {"kv_heads": 2}, {"kv_heads": 1, "value_dim": 5}, {"dim": 3}],
    ids=str,
)
def test_attention_is_pytorchs(sizes: dict[str, int], is_causal: bool, return_lse: bool) -> None:
    q, k, v = problem(**sizes)
    ours = natten.attention(q, k, v, is_causal=is_causal, scale=0.3, return_lse=return_lse)
    agree(ours[0] if return_lse else ours, dense(q, k, v, is_causal=is_causal, scale=0.3), (q, k, v))


@pytest.mark.parametrize("return_lse", [False, True])
def test_a_causal_query_sees_keys_up_to_its_own_index_also_where_lengths_differ(return_lse: bool) -> None:
    q, k, v = problem(tokens_q=3, tokens_kv=6)
    out = natten.attention(q, k, v, is_causal=True, return_lse=return_lse)
    out = out[0] if return_lse else out
    for i in range(3):
        torch.testing.assert_close(out[:, i : i + 1], natten.attention(q[:, i : i + 1], k[:, : i + 1], v[:, : i + 1]))


def test_lse_is_the_log_of_the_summed_exponentials_of_the_scaled_logits() -> None:
    q, k, v = problem(kv_heads=2)
    _, lse = natten.attention(q, k, v, scale=0.3, return_lse=True)
    logits = 0.3 * torch.einsum("bihd,bjhd->bihj", q, k.repeat_interleave(2, dim=2))
    agree(lse, logits.logsumexp(-1), (q, k))


def test_a_scale_of_zero_means_the_default() -> None:
    q, k, v = problem()
    assert torch.equal(natten.attention(q, k, v, scale=0.0), natten.attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_stay_and_their_lse_is_float32(dtype: torch.dtype) -> None:
    q, k, v = (t.detach().to(dtype) for t in problem())
    out, lse = natten.attention(q, k, v, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), dense(q.double(), k.double(), v.double()), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("return_lse", [False, True])
def test_autocast_decides_the_dtype(return_lse: bool) -> None:
    q, k, v = (t.detach().float() for t in problem())
    with torch.autocast("cpu", torch.bfloat16):
        out = natten.attention(q, k, v, return_lse=return_lse)
    assert (out[0] if return_lse else out).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["cutlass-fmha", "hopper-fmha", "blackwell-fmha", "flex-fmha"])
def test_nattens_backends_and_tuning_arguments_change_nothing(backend: str) -> None:
    q, k, v = problem()
    tuned = natten.attention(
        q,
        k,
        v,
        backend=backend,
        q_tile_size=64,
        kv_tile_size=128,
        backward_q_tile_size=64,
        backward_kv_tile_size=64,
        backward_kv_splits=2,
        backward_use_pt_reduction=True,
        run_persistent_kernel=False,
        kernel_schedule="coop",
        torch_compile=True,
    )
    assert torch.equal(tuned, natten.attention(q, k, v))


lengths_of_sequences = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6)


@given(lengths_of_sequences, st.booleans(), st.booleans())
@settings(deadline=None, max_examples=30)
def test_packed_sequences_do_not_see_each_other(
    lengths: list[tuple[int, int]], is_causal: bool, return_lse: bool
) -> None:
    lengths_q, lengths_kv = zip(*lengths)
    shapes = (sum(lengths_q), 4, 8), (sum(lengths_kv), 2, 8), (sum(lengths_kv), 2, 5)
    q, k, v = leaves = tuple(torch.randn(1, *s, dtype=torch.float64, requires_grad=True) for s in shapes)
    seqlens = {
        "seqlens_Q": torch.tensor(lengths_q, dtype=torch.int32),
        "seqlens_KV": torch.tensor(lengths_kv, dtype=torch.int32),
    }
    packed = natten.attention(*leaves, is_causal=is_causal, **seqlens, return_lse=return_lse)
    pieces = zip(q.split(lengths_q, 1), k.split(lengths_kv, 1), v.split(lengths_kv, 1))
    alone = [natten.attention(*piece, is_causal=is_causal, return_lse=True) for piece in pieces]
    agree(packed[0] if return_lse else packed, torch.cat([out for out, _ in alone], dim=1), leaves)
    if return_lse:
        agree(packed[1], torch.cat([lse for _, lse in alone], dim=1), (q, k))


def test_lengths_and_their_running_sums_describe_the_same_packing() -> None:
    q, k, v = torch.randn(1, 9, 2, 8), torch.randn(1, 8, 2, 8), torch.randn(1, 8, 2, 8)
    lengths = torch.tensor([4, 5], dtype=torch.int32), torch.tensor([6, 2], dtype=torch.int32)
    sum_q, sum_kv, longest_q, longest_kv = generate_varlen_parameters(q, k, v, *lengths)
    assert (sum_q.tolist(), sum_kv.tolist(), longest_q, longest_kv) == ([0, 4, 9], [0, 6, 8], 5, 6)
    assert sum_q.dtype == sum_kv.dtype == torch.int32
    by_sum = natten.attention(
        q,
        k,
        v,
        cumulative_seqlen_Q=sum_q,
        cumulative_seqlen_KV=sum_kv,
        max_seqlen_Q=longest_q,
        max_seqlen_KV=longest_kv,
    )
    assert torch.equal(by_sum, natten.attention(q, k, v, seqlens_Q=lengths[0], seqlens_KV=lengths[1]))


def test_a_sequence_without_keys_gives_zero_and_minus_infinity() -> None:
    q, kv = torch.randn(1, 5, 2, 8, requires_grad=True), torch.randn(1, 3, 2, 8, requires_grad=True)
    lengths = {"seqlens_Q": torch.tensor([2, 3]), "seqlens_KV": torch.tensor([0, 3])}
    out, lse = natten.attention(q, kv, kv, **lengths, return_lse=True)
    assert (out[:, :2] == 0).all()
    assert (lse[:, :2] == -torch.inf).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, kv)))
    torch.testing.assert_close(natten.attention(q, kv, kv, **lengths), out)


@pytest.mark.parametrize("parts", range(1, 9))
def test_merging_parts_of_the_keys_equals_attention_over_all_with_its_gradient(parts: int) -> None:
    q, k, v = leaves = problem(tokens_kv=9, kv_heads=2, value_dim=5)
    results = [
        natten.attention(q, key, value, return_lse=True)
        for key, value in zip(k.tensor_split(parts, 1), v.tensor_split(parts, 1))
    ]
    out, lse = natten.merge_attentions(*zip(*results))
    whole, whole_lse = natten.attention(q, k, v, return_lse=True)
    agree(out, whole, leaves)
    agree(lse, whole_lse, (q, k))


def test_merging_is_associative_and_does_not_depend_on_the_order() -> None:
    outputs = [torch.randn(1, 5, 2, 8) for _ in range(3)]
    lses = [10 * torch.randn(1, 5, 2) for _ in range(3)]
    together = natten.merge_attentions(outputs, lses)
    first = natten.merge_attentions(outputs[:2], lses[:2])
    torch.testing.assert_close(natten.merge_attentions([first[0], outputs[2]], [first[1], lses[2]]), together)
    torch.testing.assert_close(natten.merge_attentions(outputs[::-1], lses[::-1]), together)


def test_two_parts_merge_by_the_sigmoid_of_their_lse_difference() -> None:
    (out0, out1), (lse0, lse1) = torch.randn(2, 1, 5, 2, 8), torch.randn(2, 1, 5, 2)
    out, lse = natten.merge_attentions([out0, out1], [lse0, lse1], torch_compile=False, use_autograd_fix=False)
    torch.testing.assert_close(out, out0 - (lse1 - lse0).sigmoid().unsqueeze(-1) * (out0 - out1))
    torch.testing.assert_close(lse, lse0 - F.logsigmoid(lse0 - lse1))


def test_merging_half_types_keeps_the_lse_in_float32() -> None:
    outputs, lses = torch.randn(2, 1, 5, 2, 8).bfloat16(), 100 * torch.randn(2, 1, 5, 2)
    out, lse = natten.merge_attentions(list(outputs), list(lses))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert out.isfinite().all()

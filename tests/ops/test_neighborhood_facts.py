"""What neighborhood attention is equal to, and what the operator refuses."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from neighborhood_problems import installed_backends
from torch import Tensor

from gridattn.ops import merge_attentions, neighborhood_attention
from gridattn.ops.neighborhood import make_plan
from gridattn.ops.neighborhood.checks import count_visible_keys

BACKENDS = ["reference", *installed_backends()]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def qkv(*grid: int, heads: int = 2, kv_heads: int = 2, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, *grid, heads, dim), torch.randn(2, *grid, kv_heads, dim), torch.randn(2, *grid, kv_heads, dim)


def dense(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    flat = [rearrange(t, "b ... h d -> b h (...) d") for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*flat, is_causal=is_causal)
    return rearrange(out, "b h i d -> b i h d").reshape(q.shape)


@every_backend
@pytest.mark.parametrize("return_lse", [False, True])
def test_a_window_as_large_as_the_grid_is_dense_attention(backend: str, return_lse: bool) -> None:
    q, k, v = qkv(5, 6)
    got = neighborhood_attention(q, k, v, (5, 6), stride=(2, 1), backend=backend, return_lse=return_lse)
    torch.testing.assert_close(got[0] if return_lse else got, dense(q, k, v), atol=1e-6, rtol=1e-5)


@every_backend
def test_a_causal_window_as_long_as_the_line_is_causal_attention(backend: str) -> None:
    q, k, v = qkv(17)
    got = neighborhood_attention(q, k, v, 17, is_causal=True, backend=backend)
    torch.testing.assert_close(got, dense(q, k, v, is_causal=True), atol=1e-6, rtol=1e-5)


@every_backend
def test_stride_equal_to_the_kernel_is_attention_inside_blocks(backend: str) -> None:
    tensors = qkv(8, 9)
    blocks = [rearrange(t, "b (y i) (x j) h d -> (b y x) i j h d", i=4, j=3) for t in tensors]
    expected = rearrange(dense(*blocks), "(b y x) i j h d -> b (y i) (x j) h d", y=2, x=3)
    got = neighborhood_attention(*tensors, (4, 3), stride=(4, 3), backend=backend)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@every_backend
def test_block_plus_two_halos_is_halo_attention_away_from_the_border(backend: str) -> None:
    q, k, v = qkv(20)
    got = neighborhood_attention(q, k, v, 8, stride=4, backend=backend)
    for first in (4, 8, 12):
        block, halo = slice(first, first + 4), slice(first - 2, first + 6)
        torch.testing.assert_close(
            got[:, block], dense_cross(q[:, block], k[:, halo], v[:, halo]), atol=1e-6, rtol=1e-5
        )


def dense_cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


@every_backend
def test_dilation_runs_each_residue_class_on_its_own(backend: str) -> None:
    q, k, v = qkv(17)
    got = neighborhood_attention(q, k, v, 4, stride=2, dilation=3, backend=backend)
    for g in range(3):
        alone = neighborhood_attention(q[:, g::3], k[:, g::3], v[:, g::3], 4, stride=2, backend=backend)
        torch.testing.assert_close(got[:, g::3], alone, atol=1e-6, rtol=1e-5)


@every_backend
def test_shared_key_heads_equal_repeated_ones(backend: str) -> None:
    q, k, v = qkv(7, 9, heads=6, kv_heads=2)
    got = neighborhood_attention(q, k, v, 3, backend=backend)
    repeated = (t.repeat_interleave(3, dim=-2) for t in (k, v))
    torch.testing.assert_close(got, neighborhood_attention(q, *repeated, 3, backend=backend), atol=1e-6, rtol=1e-5)


@every_backend
def test_additional_tokens_equal_more_keys_in_every_window(backend: str) -> None:
    q, k, v = qkv(9)
    extra_k, extra_v = torch.randn(2, 2, 3, 2, 8)
    got = neighborhood_attention(q, k, v, 3, additional_keys=extra_k, additional_values=extra_v, backend=backend)
    for i, axis in [(i, make_plan((9,), 3).axes[0]) for i in range(9)]:
        window = axis.visible(i)
        keys, values = torch.cat([k[:, window], extra_k], 1), torch.cat([v[:, window], extra_v], 1)
        torch.testing.assert_close(got[:, i : i + 1], dense_cross(q[:, i : i + 1], keys, values), atol=1e-6, rtol=1e-5)


@every_backend
def test_a_hidden_key_has_no_influence(backend: str) -> None:
    q, k, v = qkv(8, 8)
    mask = torch.rand(2, 8, 8) > 0.4
    mask[:, ::3, ::3] = True
    other_k, other_v = (torch.where(mask[..., None, None], t, 1e3) for t in (k, v))
    got = [neighborhood_attention(q, *kv, 3, key_mask=mask, backend=backend) for kv in ((k, v), (other_k, other_v))]
    assert torch.equal(got[0], got[1])


@every_backend
def test_a_scale_of_zero_averages_the_window(backend: str) -> None:
    q, k, v = qkv(9)
    got = neighborhood_attention(q, k, v, 3, scale=0.0, backend=backend)
    torch.testing.assert_close(got[:, 4], v[:, 3:6].mean(dim=1))


def test_merging_equals_attention_over_the_union_in_any_order() -> None:
    q, k, v = torch.randn(3, 7, 5, 4, dtype=torch.float64)

    def part(keys: slice) -> tuple[Tensor, Tensor]:
        logits = q @ k[:, keys].mT
        return logits.softmax(-1) @ v[:, keys], logits.logsumexp(-1)

    parts = [part(slice(0, 2)), part(slice(2, 3)), part(slice(3, 5))]
    whole = part(slice(0, 5))
    left = merge_attentions(*zip(merge_attentions(*zip(*parts[:2])), parts[2]))
    right = merge_attentions(*zip(parts[0], merge_attentions(*zip(*parts[:0:-1]))))
    for merged in (merge_attentions(*zip(*parts)), left, right):
        torch.testing.assert_close(merged, whole)


def test_merging_ignores_a_part_without_keys_and_its_gradient_is_finite() -> None:
    outs = [torch.randn(3, 4, requires_grad=True) for _ in range(2)]
    lses = [
        torch.tensor([0.3, -torch.inf, -torch.inf], requires_grad=True),
        torch.tensor([-torch.inf, 2.0, -torch.inf]),
    ]
    out, lse = merge_attentions(outs, lses)
    torch.testing.assert_close(out, torch.stack([outs[0][0], outs[1][1], torch.zeros(4)]))
    assert lse.tolist() == pytest.approx([0.3, 2.0, -torch.inf])
    grads = torch.autograd.grad(out.sum() + lse[:2].sum(), [*outs, lses[0]])
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize(
    "window",
    [{"kernel_size": (3, 4)}, {"kernel_size": (2, 3), "stride": 2, "dilation": (3, 2), "is_causal": (True, False)}],
)
def test_visible_keys_are_counted_as_the_masks_of_the_axes_say(window: dict) -> None:
    plan = make_plan((7, 8), **window)
    key_mask = torch.rand(2, 7, 8) > 0.5
    rows, columns = (torch.from_numpy(axis.mask).int() for axis in plan.axes)
    expected = torch.einsum("byx,iy,jx->bij", key_mask.int(), rows, columns)
    assert torch.equal(count_visible_keys(key_mask, plan).long(), expected.long())


def _with(name: str, change) -> dict:
    """A valid problem with one argument changed."""
    q = torch.randn(2, 6, 7, 4, 8)
    problem = {"query": q, "key": q[..., :2, :].clone(), "value": q[..., :2, :].clone(), "kernel_size": 3}
    return problem | {name: change(problem) if callable(change) else change}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("kernel_size", 1, r"kernel_size=1 .* at least 2"),
        ("kernel_size", 2.5, r"kernel_size=2.5"),
        ("kernel_size", "3", r"kernel_size='3'"),
        ("kernel_size", (3, 3, 3), r"kernel_size=\(3, 3, 3\) has 3 entries"),
        ("kernel_size", (7, 7), r"kernel_size=\(7, 7\) .* exceeds the grid \(6, 7\) on axis 0"),
        ("dilation", 3, r"dilation=\(3, 3\) spans 9"),
        ("dilation", 0, r"dilation=0"),
        ("stride", 4, r"stride=\(4, 4\) exceeds kernel_size=\(3, 3\)"),
        ("stride", 0, r"stride=0"),
        ("is_causal", 1, r"is_causal=1 .* bool"),
        ("is_causal", (True,), r"is_causal=\(True,\) has 1 entries"),
        ("backend", "cutlass", r"backend='cutlass' .* 'auto', 'reference', 'tiled', 'cpu'"),
        ("query", torch.randn(2, 4, 8), r"query has shape \(2, 4, 8\); .*1 to 3 grid axes"),
        ("query", torch.ones(2, 6, 7, 4, 8, dtype=torch.int64), r"query is torch.int64; a floating"),
        ("query", torch.randn(2, 6, 7, 3, 8), r"query has 3 heads; a multiple of the 2"),
        ("key", torch.randn(2, 6, 7, 2, 4), r"key has head_dim 4 but query has 8"),
        ("key", torch.randn(2, 6, 2, 8), r"key has batch and grid \(2, 6\) but query has \(2, 6, 7\)"),
        ("key", torch.randn(1, 6, 7, 2, 8), r"key has batch and grid \(1, 6, 7\)"),
        ("key", torch.randn(2, 6, 7, 2, 8).half(), r"key is torch.float16 but query is torch.float32"),
        ("key", torch.randn(2, 6, 7, 2, 8, device="meta"), r"key is on meta but query is on cpu"),
        ("value", torch.randn(2, 6, 7, 4, 8), r"value has 4 heads but key has 2"),
        ("value", torch.randn(2, 7, 6, 2, 8), r"value has batch and grid"),
        ("bias", torch.randn(2, 5, 5), r"bias has shape \(2, 5, 5\); .* = \(4, 5, 5\)"),
        ("bias", torch.ones(4, 5, 5, dtype=torch.int32), r"bias is torch.int32"),
        ("bias", torch.ones(4, 5, 5, device="meta"), r"bias is on meta"),
        ("key_mask", torch.ones(2, 6, 7), r"key_mask is torch.float32; torch.bool"),
        ("key_mask", torch.ones(2, 7, 6, dtype=torch.bool), r"key_mask has shape \(2, 7, 6\); .* \(2, 6, 7\)"),
        ("key_mask", torch.ones(2, 6, 7, dtype=torch.bool, device="meta"), r"key_mask is on meta"),
        ("additional_keys", torch.randn(2, 1, 2, 8), r"additional_values is None"),
        ("additional_values", torch.randn(2, 1, 2, 8), r"additional_keys is None"),
    ],
)
def test_bad_arguments_are_named(name: str, change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**_with(name, change))


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ((1, 3, 2, 8), (2, 3, 2, 8), r"additional_keys has shape \(1, 3, 2, 8\)"),
        ((2, 3, 4, 8), (2, 3, 4, 8), r"additional_keys has shape .* \(2, 3, 2, 8\)"),
        ((2, 3, 2, 4), (2, 3, 2, 8), r"additional_keys has shape"),
        ((2, 3, 2, 8), (2, 4, 2, 8), r"additional_values has shape \(2, 4, 2, 8\)"),
        ((2, 3, 2, 8), (2, 3, 2, 6), r"additional_values has shape"),
        ((2, 3, 2, 1, 8), (2, 3, 2, 8), r"additional_keys has shape"),
    ],
)
def test_additional_tokens_must_fit(keys: tuple, values: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**_with("additional_keys", torch.randn(keys)), additional_values=torch.randn(values))


@every_backend
def test_a_mask_that_leaves_queries_without_keys_is_refused_unless_there_are_additional_ones(backend: str) -> None:
    q, k, v = qkv(8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 3:7] = False
    with pytest.raises(
        ValueError, match=r"key_mask leaves 2 queries without a key, the first at position \(4,\) of sample 1"
    ):
        neighborhood_attention(q, k, v, 3, key_mask=mask, backend=backend)
    extra = torch.randn(2, 1, 2, 8)
    out = neighborhood_attention(
        q, k, v, 3, key_mask=mask, additional_keys=extra, additional_values=extra, backend=backend
    )
    torch.testing.assert_close(out[1, 4], extra[1, 0])


def test_sparse_tensors_are_not_implemented() -> None:
    with pytest.raises(NotImplementedError, match="query is a nested or sparse tensor"):
        neighborhood_attention(**_with("query", torch.randn(2, 6, 7, 4, 8).to_sparse()))


def test_the_cpu_backend_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gridattn.ops.neighborhood.api._HAS_NUMBA", False)
    q, k, v = qkv(6)
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run this problem: the package numba is not installed"):
        neighborhood_attention(q, k, v, 3, backend="cpu")
    torch.testing.assert_close(
        neighborhood_attention(q, k, v, 3), neighborhood_attention(q, k, v, 3, backend="reference")
    )

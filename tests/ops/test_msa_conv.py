"""Facts about attention in the manner of a convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.ops.msa_conv import (
    inter_pool,
    msa_conv,
    multi_directional_shift,
    window_logits,
    window_reach,
    window_sum,
)


def reference(query, key, value, kernel, dilation, scale, border) -> torch.Tensor:
    """The equation, by unfolding all windows of an image at once."""
    batch, height, width, heads, depth = query.shape
    reach = window_reach(kernel, dilation, 2)

    def unfold(x: torch.Tensor) -> torch.Tensor:
        columns = F.unfold(x.flatten(-2).movedim(-1, 1), kernel, dilation=dilation, padding=reach)
        return columns.view(batch, heads, depth, -1, height, width).permute(0, 4, 5, 1, 3, 2)

    logits = scale * (unfold(key) @ query.unsqueeze(-1)).squeeze(-1)
    if border == "mask":
        inside = unfold(torch.ones_like(key))[..., 0] > 0
        logits = logits.masked_fill(~inside, -torch.inf)
    return (logits.softmax(-1).unsqueeze(-2) @ unfold(value)).squeeze(-2)


AXES = st.tuples(st.integers(1, 6), st.sampled_from([(1, 1), (3, 1), (3, 2), (5, 1), (2, 2)]))


@settings(deadline=None, max_examples=25)
@given(AXES, AXES, st.sampled_from([(1, 4), (2, 3), (4, 1)]), st.sampled_from(["zero", "mask"]))
def test_shifted_copies_equal_unfolded_windows_and_so_do_their_gradients(rows, columns, heads, border: str) -> None:
    (height, (k1, d1)), (width, (k2, d2)) = rows, columns
    if border == "mask" and 2 in (k1, k2):
        border = "zero"  # a masked even window can be empty, where the equation has no value
    leaves = [torch.randn(2, height, width, *heads, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ours = msa_conv(*leaves, (k1, k2), (d1, d2), scale=0.7, border=border, backend="offsets")
    theirs = reference(*leaves, (k1, k2), (d1, d2), 0.7, border)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, leaves, cotangent), torch.autograd.grad(theirs, leaves, cotangent)):
        torch.testing.assert_close(a, b)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from([3, 5]), st.integers(1, 2)), min_size=1, max_size=3),
    st.sampled_from([(1, 8), (2, 4)]),
)
def test_neighborhood_attention_on_a_grid_filled_up_with_zeros_is_the_same(axes, heads) -> None:
    grid, kernel, dilation = zip(*axes)
    leaves = [torch.randn(2, *grid, *heads, requires_grad=True) for _ in range(3)]
    offsets, filled = (msa_conv(*leaves, kernel, dilation, backend=b) for b in ("offsets", "neighborhood"))
    torch.testing.assert_close(filled, offsets, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn_like(offsets)
    for a, b in zip(torch.autograd.grad(filled, leaves, cotangent), torch.autograd.grad(offsets, leaves, cotangent)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_beyond_the_border_logits_are_zero_and_take_part_in_the_softmax() -> None:
    query, key, value = (torch.randn(1, 4, 4, 1, 8) for _ in range(3))
    logits = window_logits(query, key)[0, 0, 0, 0]
    assert (logits[[0, 1, 2, 3, 6]] == 0).all()
    assert (logits[[4, 5, 7, 8]] != 0).all()
    ones = msa_conv(query, key, torch.ones_like(value))
    assert ones[0, 0, 0].max() < 1
    torch.testing.assert_close(ones[0, 1, 1], torch.ones(1, 8))
    torch.testing.assert_close(msa_conv(query, key, torch.ones_like(value), border="mask"), torch.ones_like(value))


def test_a_window_of_one_returns_the_values() -> None:
    query, key, value = (torch.randn(2, 4, 5, 2, 3) for _ in range(3))
    assert torch.equal(msa_conv(query, key, value, kernel_size=1), value)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_a_silent_query_takes_the_mean_of_its_window(kernel_size: int) -> None:
    key, value = torch.randn(2, 6, 7, 1, 4), torch.randn(2, 6, 7, 1, 4)
    box = F.avg_pool2d(value.squeeze(3).movedim(-1, 1), kernel_size, 1, kernel_size // 2).movedim(1, -1)
    torch.testing.assert_close(msa_conv(torch.zeros_like(key), key, value, kernel_size).squeeze(3), box)


def test_weights_of_a_column_window_can_be_applied_along_a_row() -> None:
    q, k, v = (torch.rand(2, 12, 12, 1, 6, requires_grad=True) for _ in range(3))

    def unfold(x: torch.Tensor, kernel: tuple[int, int], padding: tuple[int, int]) -> torch.Tensor:
        columns = F.unfold(x.squeeze(3).movedim(-1, 1), kernel, dilation=2, padding=padding)
        return columns.view(2, 6, 5, 12, 12).permute(0, 3, 4, 2, 1)

    ours = window_sum(window_logits(q, k, (5, 1), 2).softmax(-1), v, (1, 5), 2)
    weights = (unfold(k, (5, 1), (4, 0)) @ q.squeeze(3).unsqueeze(-1)).softmax(-2)
    theirs = (weights * unfold(v, (1, 5), (0, 4))).sum(-2).unsqueeze(3)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours.sum(), (q, k, v)), torch.autograd.grad(theirs.sum(), (q, k, v))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_with_a_head_per_channel_permuting_the_channels_permutes_the_output() -> None:
    q, k, v = (torch.randn(2, 5, 6, 8, 1) for _ in range(3))
    order = torch.randperm(8)
    permuted = msa_conv(*(t[..., order, :] for t in (q, k, v)), scale=1.0)
    torch.testing.assert_close(permuted, msa_conv(q, k, v, scale=1.0)[..., order, :])


def test_the_directions_of_the_shift_take_turns() -> None:
    shifts = [multi_directional_shift(block, (1, 2)) for block in range(5)]
    assert shifts == [(1, 2), (-1, 2), (1, -2), (-1, -2), (1, 2)]


def test_a_pooled_cell_at_the_border_averages_only_the_positions_it_has() -> None:
    x = (5.0 * torch.arange(5)[:, None] + torch.arange(7)).view(1, 5, 7, 1)
    expected = [[3, 5, 7, 8.5], [13, 15, 17, 18.5], [20.5, 22.5, 24.5, 26]]
    torch.testing.assert_close(inter_pool(x)[0, ..., 0], torch.tensor(expected))


def test_wrong_arguments_are_named() -> None:
    x = torch.randn(1, 5, 5, 2, 4)
    with pytest.raises(ValueError, match=r"kernel_size=\(2, 2\) with dilation=\(1, 1\) has no centre"):
        msa_conv(x, x, x, kernel_size=2)
    assert msa_conv(x, x, x, kernel_size=2, dilation=2).shape == x.shape
    with pytest.raises(ValueError, match="border='wrap' is not known; allowed: 'zero', 'mask'"):
        msa_conv(x, x, x, border="wrap")
    with pytest.raises(ValueError, match=r"key has shape \(1, 4, 5, 2, 4\) but query has \(1, 5, 5, 2, 4\)"):
        msa_conv(x, x[:, 1:], x)
    with pytest.raises(ValueError, match="backend='neighborhood' cannot run this problem: border='mask' is not 'zero'"):
        msa_conv(x, x, x, border="mask", backend="neighborhood")
    with pytest.raises(ValueError, match=r"weights has shape .*\(1, 5, 5, 2, 9\) is allowed"):
        window_sum(torch.randn(1, 5, 5, 2, 8), x)

"""Facts of polyline path masks and of attention under them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.ops.linear_scan import linear_scan
from gridattn.ops.path_attention import (
    criss_cross_path_attention,
    line_weights,
    linear_path_attention,
    path_attention,
)
from gridattn.ops.path_mask import axis_log_masks, path_log_mask, path_mask_product, path_mask_reference

GRIDS = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


def decays(*grid: int, batch: int = 1, heads: int = 1) -> torch.Tensor:
    """Random log decays (batch, *grid, heads, rank)."""
    return (0.05 + 0.95 * torch.rand(batch, *grid, heads, len(grid), dtype=torch.float64)).log()


def tokens(*grid: int, heads: int = 1, channels: int = 4) -> list[torch.Tensor]:
    return list(torch.randn(3, 2, *grid, heads, channels, dtype=torch.float64).unbind(0))


def test_the_worked_example_of_two_rows_and_three_columns() -> None:
    alpha = torch.tensor([[0.9, 0.5, 0.8], [0.7, 0.6, 0.4]], dtype=torch.float64)
    beta = torch.tensor([[1, 1, 1], [0.3, 0.2, 0.5]], dtype=torch.float64)
    expected = torch.tensor(
        [
            [1, 0.5, 0.4, 0.3, 0.1, 0.2],
            [0.5, 1, 0.8, 0.15, 0.2, 0.4],
            [0.4, 0.8, 1, 0.12, 0.16, 0.5],
            [0.3, 0.12, 0.12, 1, 0.6, 0.24],
            [0.18, 0.2, 0.2, 0.6, 1, 0.4],
            [0.072, 0.08, 0.5, 0.24, 0.4, 1],
        ],
        dtype=torch.float64,
    )
    decay = torch.stack([beta, alpha], -1)
    torch.testing.assert_close(path_mask_reference(decay), expected)
    log_decay = decay.log()[None, :, :, None]
    torch.testing.assert_close(path_log_mask(log_decay).exp()[0, 0], expected)
    x = torch.arange(1.0, 7.0, dtype=torch.float64).view(1, 2, 3, 1, 1)
    answer = torch.tensor([6.1, 8.9, 9.28, 9.34, 10.98, 10.692], dtype=torch.float64)
    torch.testing.assert_close(path_mask_product(log_decay, x).flatten(), answer)


@settings(deadline=None, max_examples=20)
@given(GRIDS)
def test_the_sum_of_line_masks_is_the_product_along_every_path(grid) -> None:
    log_decay = decays(*grid)
    torch.testing.assert_close(path_log_mask(log_decay).exp()[0, 0], path_mask_reference(log_decay.exp()[0, ..., 0, :]))


def test_masks_lie_in_zero_to_one_with_ones_on_the_diagonal_and_lines_are_symmetric() -> None:
    log_decay = decays(4, 6, batch=2, heads=3)
    for mask in (*axis_log_masks(log_decay), path_log_mask(log_decay)):
        assert ((mask.exp() > 0) & (mask <= 0)).all()
        assert (mask.diagonal(dim1=-2, dim2=-1) == 0).all()
    for mask in axis_log_masks(log_decay):
        assert torch.equal(mask, mask.transpose(-1, -2))


def test_constant_decays_give_a_power_of_the_manhattan_distance() -> None:
    log_decay = torch.full((1, 4, 5, 1, 2), 0.7, dtype=torch.float64).log()
    i, j = (t.flatten() for t in torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij"))
    distance = (i[:, None] - i).abs() + (j[:, None] - j).abs()
    torch.testing.assert_close(path_log_mask(log_decay)[0, 0].exp(), 0.7 ** distance.double())


def test_transposing_the_grid_and_swapping_the_decays_reverses_the_path() -> None:
    log_decay = decays(4, 6, heads=2)
    turned = path_log_mask(log_decay.transpose(1, 2).flip(-1)).view(1, 2, 6, 4, 6, 4)
    mask = path_log_mask(log_decay).transpose(-1, -2).reshape(1, 2, 4, 6, 4, 6)
    torch.testing.assert_close(turned, mask.permute(0, 1, 3, 2, 5, 4))


@settings(deadline=None, max_examples=20)
@given(GRIDS, st.booleans())
def test_products_by_lines_and_by_scans_equal_the_dense_product_forward_and_backward(grid, transposed) -> None:
    log_decay, x = decays(*grid, batch=2, heads=2), tokens(*grid, heads=2)[0]
    weight, results = torch.randn_like(x), []
    for backend in ("reference", "lines", "scan"):
        leaves = [t.clone().requires_grad_() for t in (log_decay, x)]
        y = path_mask_product(*leaves, transposed=transposed, backend=backend)
        results.append([y, *torch.autograd.grad((weight * y).sum(), leaves)])
    for result in results[1:]:
        for ours, expected in zip(result, results[0]):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=15)
@given(GRIDS, st.sampled_from(["both", "forward", "reverse"]), st.sampled_from(["added", "multiplied"]))
def test_attention_is_the_softmax_under_the_mask(grid, order, masking) -> None:
    log_decay, (q, k, v) = decays(*grid, batch=2, heads=2), tokens(*grid, heads=2)
    mask = path_log_mask(log_decay)
    masks = {"both": [mask, mask.mT], "forward": [mask], "reverse": [mask.mT]}[order]
    logits = torch.einsum("bqhc,bkhc->bhqk", q.flatten(1, -3), k.flatten(1, -3)) / 2
    if masking == "added":
        weights = torch.stack([(logits + m).softmax(-1) for m in masks]).mean(0)
    else:
        weights = logits.softmax(-1) * torch.stack(masks).exp().sum(0)
    expected = torch.einsum("bhqk,bkhc->bqhc", weights, v.flatten(1, -3)).view_as(v)
    torch.testing.assert_close(path_attention(q, k, v, log_decay, order=order, masking=masking), expected)


def test_criss_cross_attention_is_a_product_of_attentions_inside_rows_and_columns() -> None:
    log_decay, (q, k, v) = decays(4, 5, batch=2, heads=2), tokens(4, 5, heads=2)
    columns, rows = line_weights(q, k, log_decay)
    for weights in (columns, rows):
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    inside_rows = torch.zeros(2, 2, 4, 5, 4, 5, dtype=torch.float64)
    inside_columns = torch.zeros_like(inside_rows)
    for i in range(4):
        inside_rows[:, :, i, :, i] = rows[:, i]
    for j in range(5):
        inside_columns[:, :, :, j, :, j] = columns[:, j]
    a, b = (t.flatten(4).flatten(2, 3) for t in (inside_rows, inside_columns))
    expected = torch.einsum("bhqk,bkhc->bqhc", (a @ b + b @ a) / 2, v.flatten(1, 2)).view_as(v)
    torch.testing.assert_close(criss_cross_path_attention(q, k, v, log_decay), expected)


def test_multiplied_masks_of_lines_are_the_mask_of_the_product_of_lines() -> None:
    log_decay, (q, k, v) = decays(4, 5, batch=2), tokens(4, 5)
    unmasked = criss_cross_weights(q, k)
    expected = torch.einsum("bqk,bkhc->bqhc", unmasked * path_log_mask(log_decay)[:, 0].exp(), v.flatten(1, 2))
    ours = criss_cross_path_attention(q, k, v, log_decay, order="forward", masking="multiplied")
    torch.testing.assert_close(ours, expected.view_as(v))


def criss_cross_weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The (B, N, N) matrix of one head that attends inside columns, then inside rows."""
    one_hot = torch.eye(20, dtype=q.dtype).view(1, 4, 5, 1, 20).expand(len(q), -1, -1, -1, -1)
    return criss_cross_path_attention(q, k, one_hot, order="forward").flatten(1, 2).squeeze(-2)


@settings(deadline=None, max_examples=10)
@given(GRIDS, st.sampled_from(["both", "forward", "reverse"]))
def test_linear_attention_equals_the_masked_product_of_queries_and_keys(grid, order) -> None:
    log_decay, (q, k, v) = decays(*grid, batch=2, heads=2), tokens(*grid, heads=2)
    mask = path_log_mask(log_decay).exp()
    mask = {"both": mask + mask.mT, "forward": mask, "reverse": mask.mT}[order]
    logits = torch.einsum("bqhc,bkhc->bhqk", q.flatten(1, -3), k.flatten(1, -3))
    expected = torch.einsum("bhqk,bkhc->bqhc", logits * mask, v.flatten(1, -3)).view_as(v)
    torch.testing.assert_close(linear_path_attention(q, k, v, log_decay, order=order), expected)


@pytest.mark.parametrize("attend", [path_attention, criss_cross_path_attention])
def test_without_decay_the_mask_vanishes(attend) -> None:
    q, k, v = tokens(4, 5)
    torch.testing.assert_close(attend(q, k, v, torch.zeros(2, 4, 5, 1, 2).double()), attend(q, k, v))


@pytest.mark.parametrize("attend", [path_attention, criss_cross_path_attention])
def test_a_wall_is_not_crossed_and_changes_nothing_on_its_near_side(attend) -> None:
    q, k, v = tokens(5, 6)
    walled = decays(5, 6).clone()
    walled[:, :, 3] = -1e4
    v_far = v.clone()
    v_far[:, :, 3:] += 1.0
    walled_out = attend(q, k, v, walled)[:, :, :3]
    torch.testing.assert_close(attend(q, k, v_far, walled)[:, :, :3], walled_out)
    # What is left of the wall equals a grid that ends there.
    near = [t[:, :, :3] for t in (q, k, v, walled)]
    torch.testing.assert_close(walled_out, attend(*near))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 30), st.one_of(st.none(), st.integers(1, 40)))
def test_a_scan_by_chunks_equals_the_recurrence_forward_and_backward(length, chunk) -> None:
    inputs = [-3 * torch.rand(length, 2, 3, dtype=torch.float64), torch.randn(length, 2, 3, dtype=torch.float64)]
    weight, results = torch.randn_like(inputs[1]), []
    for options in ({"backend": "reference"}, {"chunk": chunk}):
        leaves = [t.clone().requires_grad_() for t in inputs]
        h = linear_scan(*leaves, **options)
        results.append([h, *torch.autograd.grad((weight * h).sum(), leaves)])
    for ours, expected in zip(results[1], results[0]):
        torch.testing.assert_close(ours, expected)


def test_second_derivatives_of_a_scan_are_right() -> None:
    log_decay = -torch.rand(7, 2, dtype=torch.float64)
    x = torch.randn(7, 2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(linear_scan, (log_decay.requires_grad_(), x.requires_grad_()))


def test_a_scan_of_strong_decays_neither_overflows_nor_loses_the_present() -> None:
    x = torch.randn(100, 3)
    assert torch.equal(linear_scan(torch.full((100, 3), -1e4), x), x)


def test_shapes_and_settings_that_do_not_fit_are_named() -> None:
    q, k, v = tokens(4, 5)
    with pytest.raises(ValueError, match=r"log_decay has shape \(2, 4, 5, 1, 1\)"):
        path_attention(q, k, v, torch.zeros(2, 4, 5, 1, 1))
    with pytest.raises(ValueError, match="order='sideways' is not known"):
        path_attention(q, k, v, order="sideways")
    with pytest.raises(ValueError, match="masking='divided' is not known"):
        criss_cross_path_attention(q, k, v, masking="divided")
    with pytest.raises(ValueError, match="log_decay has shape"):
        linear_scan(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="chunk=0"):
        linear_scan(torch.zeros(3), torch.zeros(3), chunk=0)

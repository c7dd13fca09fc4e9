"""Facts about halo attention: what a block sees, the relative index, the border, equalities with other mechanisms."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gridattn.ops import halo
from gridattn.ops.halo import halo_attention, relative_rows
from gridattn.ops.neighborhood.plan import make_plan


def draw(*grid: int, heads: int = 2, channels: int = 4, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, batch, *grid, heads, channels, dtype=torch.float64).unbind(0)
    return query, key, value


def draw_tables(block: int, halo_size: int, rank: int = 2, channels: int = 4) -> list[Tensor]:
    return [torch.randn(2 * (block + 2 * halo_size) - 1, channels, dtype=torch.float64) for _ in range(rank)]


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    tokens = [x.flatten(1, -3).transpose(1, 2) for x in (query, key, value)]
    return F.scaled_dot_product_attention(*tokens, attn_mask=mask).transpose(1, 2).reshape(query.shape)


def visible(size: int, block: int, halo_size: int) -> Tensor:
    """(size, size): whether a query of one axis sees a key."""
    first = torch.arange(size)[:, None] // block * block
    key = torch.arange(size)
    return (key >= first - halo_size) & (key < first + block + halo_size)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_both_fast_forms_equal_the_definition_forward_and_backward(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3), label="rank")
    per_axis = st.tuples(*[st.integers(1, (12, 7, 4)[rank - 1])] * rank)
    grid, block = data.draw(per_axis, label="grid"), data.draw(per_axis, label="block")
    halo_size = data.draw(st.tuples(*[st.integers(0, 3)] * rank), label="halo")
    stride = tuple(data.draw(st.sampled_from([s for s in (1, 2) if b % s == 0])) for b in block)
    masked, with_tables, small = (data.draw(st.booleans(), label=name) for name in ("masked", "tables", "small"))
    _, key, value = draw(*grid)
    query = torch.randn(1, *(-(-size // s) for size, s in zip(grid, stride)), 2, 4, dtype=torch.float64)
    tables = [torch.randn(2 * (b + 2 * h) - 1, 4, dtype=torch.float64) for b, h in zip(block, halo_size)]
    leaves = [x.requires_grad_() for x in (query, key, value, *(tables if with_tables else ()))]
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halo, "_tabulates", lambda *_: small)
        patch.setattr(halo, "CHUNK_OF_LOGITS", data.draw(st.sampled_from([1, 200, 2**19]), label="chunk"))
        for backend in ("auto", "reference"):
            out = halo_attention(
                *(query, key, value, block, halo_size),
                stride=stride,
                relative=tables if with_tables else None,
                mask_padding=masked,
                backend=backend,
            )
            weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
            results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)


def test_the_fused_form_equals_the_direct_form_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (x.float() for x in draw(13, 18))
    tables = [table.float() for table in draw_tables(4, 2)]
    results = []
    for small in (True, False):
        monkeypatch.setattr(halo, "_tabulates", lambda *_, small=small: small)
        results.append(halo_attention(query, key, value, 4, 2, relative=tables))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6 * float(results[0].abs().max()))


def test_a_block_sees_itself_and_its_halo_and_nothing_outside_the_map() -> None:
    query, key, value = draw(10, 7)
    rows, columns = visible(10, 4, 2), visible(7, 4, 2)
    mask = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(70, 70)
    torch.testing.assert_close(halo_attention(query, key, value, 4, 2), dense(query, key, value, mask))


def test_without_halo_it_is_block_attention() -> None:
    query, key, value = draw(8, 12)
    out = halo_attention(query, key, value, 4, 0)
    for i, j in product(range(2), range(3)):
        part = (slice(None), slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4))
        expected = dense(query[part], key[part], value[part], torch.ones(16, 16, dtype=torch.bool))
        torch.testing.assert_close(out[part], expected)


def test_one_block_as_large_as_the_map_without_halo_is_global_attention() -> None:
    query, key, value = draw(6, 5)
    expected = dense(query, key, value, torch.ones(30, 30, dtype=torch.bool))
    torch.testing.assert_close(halo_attention(query, key, value, (6, 5), 0), expected)


@pytest.mark.parametrize(("block", "halo_size"), [(2, 1), (4, 1), (3, 2), (4, 4)])
def test_interior_blocks_equal_neighborhood_attention_with_kernel_b_plus_2h_and_stride_b(block, halo_size) -> None:
    size = 5 * block
    query, key, value = draw(size, size)
    plan = make_plan((size, size), block + 2 * halo_size, stride=block)
    rows, columns = (torch.from_numpy(axis.mask) for axis in plan.axes)
    mask = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(size**2, size**2)
    interior = (slice(None), slice(block, -block), slice(block, -block))
    ours, theirs = halo_attention(query, key, value, block, halo_size), dense(query, key, value, mask)
    assert (ours - theirs)[interior].abs().max() < 1e-14


def test_unmasked_padding_takes_mass_as_zero_keys_and_values() -> None:
    query, key, value = draw(6, 6)
    masked = halo_attention(query, key, value, 3, 2)
    unmasked = halo_attention(query, key, value, 3, 2, mask_padding=False)
    # Values of one give the mass that the positions inside the map keep; those outside have the logit 0.
    inside = halo_attention(query, key, torch.ones_like(value), 3, 2, mask_padding=False)
    torch.testing.assert_close(unmasked, masked * inside)
    logits = 0.5 * torch.einsum("hd,khd->hk", query[0, 0, 0], key[0, :5, :5].flatten(0, 1))
    mass = logits.exp().sum(-1) / (logits.exp().sum(-1) + 49 - 25)
    torch.testing.assert_close(inside[0, 0, 0, :, 0], mass)


def test_the_relative_index_is_the_place_of_the_key_in_its_window_minus_that_of_the_query_in_its_block() -> None:
    # Blocks of 2 with a halo of 1: windows of 4, tables of 7. Query place (0, 1), key place (3, 0): entries 6 and 2.
    query, key, value = torch.ones(1, 8, 8, 1, 1), torch.zeros(1, 8, 8, 1, 1), torch.zeros(1, 8, 8, 1, 1)
    tables = [torch.zeros(7, 1), torch.zeros(7, 1)]
    tables[0][6], tables[1][2] = 50.0, 50.0
    value[0, 4, 1] = 1.0  # block (1, 1) begins its window at (1, 1)
    out = halo_attention(query, key, value, 2, 1, relative=tables)[0, :, :, 0, 0]
    assert out[2, 3] > 0.999
    assert (out > 0.999).sum() == 1


def test_strided_queries_count_one_step_as_one_step_between_keys() -> None:
    rows = relative_rows(torch.arange(15.0)[:, None], num_queries=2, window=8)[..., 0]
    assert rows[0].tolist() == list(range(7, 15))
    assert rows[1].tolist() == list(range(6, 14))


def test_a_pixel_beyond_the_halo_does_not_change_a_block() -> None:
    query, key, value = draw(12, 12)
    before = halo_attention(query, key, value, 4, 2)
    key[:, 6], value[:, 6] = 9.0, 9.0
    after = halo_attention(query, key, value, 4, 2)
    assert torch.equal(before[:, :4], after[:, :4])
    key[:, 5], value[:, 5] = 9.0, 9.0
    assert not torch.equal(before[:, :4], halo_attention(query, key, value, 4, 2)[:, :4])


@pytest.mark.parametrize("stride", [1, 2])
def test_a_shift_by_one_block_shifts_the_interior(stride: int) -> None:
    block = 4
    _, key, value = draw(24, 8)
    query = torch.randn(1, 24, 8, 2, 4, dtype=torch.float64)
    tables = draw_tables(block, 2)

    def run(*tensors: Tensor) -> Tensor:
        q, k, v = tensors
        return halo_attention(q[:, ::stride, ::stride], k, v, block, 2, stride=stride, relative=tables)

    plain, shifted = run(query, key, value), run(*(x.roll(block, 1) for x in (query, key, value)))
    step = block // stride
    torch.testing.assert_close(shifted[:, 2 * step : -step], plain[:, step : -2 * step])


def test_the_first_2h_relative_vectors_are_never_used() -> None:
    query, key, value = draw(8, 8)
    tables = [table.requires_grad_() for table in draw_tables(4, 2)]
    halo_attention(query, key, value, 4, 2, relative=tables, mask_padding=False).square().sum().backward()
    for table in tables:
        assert table.grad is not None
        assert (table.grad[:4] == 0).all()
        assert (table.grad[4:] != 0).any(1).all()


def test_settings_that_do_not_fit_are_named() -> None:
    query, key, value = draw(8, 8)
    with pytest.raises(ValueError, match="stride=3 does not divide block_size"):
        halo_attention(query, key, value, 4, 1, stride=3)
    with pytest.raises(ValueError, match=r"query has shape .* stride=2"):
        halo_attention(query, key, value, 4, 1, stride=2)
    with pytest.raises(ValueError, match=r"relative has the shapes .*\(11, 4\)"):
        halo_attention(query, key, value, 4, 1, relative=draw_tables(4, 2))
    with pytest.raises(ValueError, match="halo_size=-1"):
        halo_attention(query, key, value, 4, -1)

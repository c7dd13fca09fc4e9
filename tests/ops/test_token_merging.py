"""Facts about merging similar tokens and copying them back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.ops.token_merging import TokenMatching, choose_destinations, match_tokens


def matched(grid=(6, 8), cell=2, batch=2) -> tuple[torch.Tensor, TokenMatching]:
    x = torch.randn(batch, grid[0] * grid[1], 5, dtype=torch.float64)
    return x, match_tokens(x, choose_destinations(grid, cell))


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 2), st.floats(0, 1))
def test_unmerging_returns_kept_tokens_unchanged_and_merged_ones_as_their_destination(
    height, width, cell, share
) -> None:
    x, matching = matched((height, width), cell)
    count = int(share * matching.sources.shape[1])
    merged = matching.merge(x, count)
    assert merged.shape[1] == height * width - count
    back = matching.unmerge(merged, count)
    for sample in range(2):
        for rank, (source, target) in enumerate(zip(matching.sources[sample], matching.targets[sample])):
            expected = back[sample, matching.destinations[target]] if rank < count else x[sample, source]
            assert torch.equal(back[sample, source], expected)


def test_a_destination_becomes_the_plain_mean_of_itself_and_what_is_merged_into_it() -> None:
    x, matching = matched()
    count = 20
    merged = matching.merge(x, count)[:, -len(matching.destinations) :]
    for sample in range(2):
        for i, destination in enumerate(matching.destinations):
            members = matching.sources[sample, :count][matching.targets[sample, :count] == i]
            expected = x[sample, [int(destination), *members.tolist()]].mean(0)
            torch.testing.assert_close(merged[sample, i], expected)


def test_every_source_takes_its_most_similar_destination_and_the_most_similar_come_first() -> None:
    x, matching = matched()
    direction = torch.nn.functional.normalize(x, dim=-1)
    for sample in range(2):
        similarity = direction[sample, matching.sources[sample]] @ direction[sample, matching.destinations].T
        best = similarity.max(-1)
        assert torch.equal(best.indices, matching.targets[sample])
        assert (best.values.diff() <= 0).all()


def test_length_does_not_count_in_a_match_and_a_zero_token_is_no_error() -> None:
    x, matching = matched()
    scaled = match_tokens(x * torch.rand(2, 48, 1).double().add(0.1), matching.destinations)
    assert torch.equal(scaled.sources, matching.sources)
    x[:, 3] = 0
    assert torch.isfinite(match_tokens(x, matching.destinations).merge(x, 30)).all()


def test_without_sources_merged_nothing_is_lost() -> None:
    x, matching = matched()
    assert torch.equal(matching.unmerge(matching.merge(x, 0), 0), x)


def test_gradients_flow_through_the_tokens_but_not_through_the_match() -> None:
    x, matching = matched()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(matching.unmerge(matching.merge(x, 36), 36).sum(), x)
    sizes = 1 + torch.stack([torch.bincount(t, minlength=12) for t in matching.targets]).double()
    torch.testing.assert_close(grad[:, matching.destinations].sum(-1), 5 * torch.ones_like(sizes))
    assert not match_tokens(x, matching.destinations).targets.requires_grad


@pytest.mark.parametrize(("grid", "cell"), [((6, 8), 2), ((7, 9), (3, 2)), ((11,), 4), ((4, 4, 6), (2, 4, 3))])
def test_every_full_cell_has_one_destination(grid, cell) -> None:
    sizes = (cell,) * len(grid) if isinstance(cell, int) else cell
    first = choose_destinations(grid, cell)
    drawn = choose_destinations(grid, cell, random=True, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, choose_destinations(grid, cell, random=True, generator=torch.Generator().manual_seed(3)))
    assert (drawn.diff() > 0).all()

    def cells(positions: torch.Tensor) -> set[tuple[int, ...]]:
        index = torch.unravel_index(positions, grid)
        return {tuple(int(i) // c for i, c in zip(at, sizes)) for at in zip(*index)}

    full = {
        tuple(at)
        for at in torch.cartesian_prod(*(torch.arange(n // c) for n, c in zip(grid, sizes)))
        .view(-1, len(grid))
        .tolist()
    }
    assert cells(drawn) == cells(first) == full
    assert len(drawn) == len(first) == len(full)
    assert not torch.equal(drawn, first)


def test_arguments_that_do_not_fit_are_named() -> None:
    x, matching = matched()
    with pytest.raises(ValueError, match=r"cell=\(4, 9\) exceeds the grid \(6, 8\)"):
        choose_destinations((6, 8), (4, 9))
    with pytest.raises(ValueError, match="count=37 is not allowed; 0 to 36"):
        matching.merge(x, 37)
    with pytest.raises(ValueError, match="count=-1"):
        matching.unmerge(x, -1)

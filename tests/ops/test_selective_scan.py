"""Facts of selective scans and of the paths that they follow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.ops.scan_paths import inverse_paths, scan_paths
from gridattn.ops.selective_scan import selective_scan

GRIDS = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


def inputs(length: int = 11, groups: int = 2, dim: int = 3, states: int = 2) -> dict[str, torch.Tensor]:
    channels = groups * dim
    return {
        "u": torch.randn(2, channels, length, dtype=torch.float64),
        "delta": torch.randn(2, channels, length, dtype=torch.float64),
        "A": -torch.rand(channels, states, dtype=torch.float64) - 0.1,
        "B": torch.randn(2, groups, states, length, dtype=torch.float64),
        "C": torch.randn(2, groups, states, length, dtype=torch.float64),
        "D": torch.randn(channels, dtype=torch.float64),
        "delta_bias": torch.randn(channels, dtype=torch.float64),
    }


def by_the_equation(u, delta, A, B, C, D, delta_bias) -> torch.Tensor:
    share = u.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(share, 1) for t in (B, C))  # (b, channels, N, L)
    step = torch.nn.functional.softplus(delta + delta_bias[:, None])
    h, outputs = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype), []
    for t in range(u.shape[2]):
        dt, now = step[:, :, t, None], u[:, :, t, None]
        h = (dt * A).exp() * h + dt * B[..., t] * now
        outputs.append((C[..., t] * h).sum(-1) + D * u[:, :, t])
    return torch.stack(outputs, -1)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.sampled_from([None, 1, 7, 40, 64]))
def test_every_chunk_size_gives_the_recurrence_forward_and_backward(length, groups, states, chunk) -> None:
    case = inputs(length, groups, states=states)
    weight, results = torch.randn_like(case["u"]), []
    for scan in (by_the_equation, lambda **t: selective_scan(**t, chunk=chunk)):
        leaves = {name: t.clone().requires_grad_() for name, t in case.items()}
        y = scan(**leaves)
        results.append([y, *torch.autograd.grad((weight * y).sum(), list(leaves.values()))])
    for ours, expected in zip(results[1], results[0]):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ["B", "C"])
def test_without_a_way_in_or_out_of_the_state_only_the_direct_path_is_left(name) -> None:
    case = inputs()
    case[name].zero_()
    torch.testing.assert_close(selective_scan(**case), case["D"][:, None] * case["u"])


def test_a_state_that_forgets_at_once_sees_the_present_only() -> None:
    case = inputs(groups=1)
    case["A"].fill_(-1e6)
    step = torch.nn.functional.softplus(case["delta"] + case["delta_bias"][:, None])
    expected = ((case["B"] * case["C"]).sum(2) * step + case["D"][:, None]) * case["u"]
    torch.testing.assert_close(selective_scan(**case), expected)


def test_an_output_does_not_depend_on_what_comes_later_in_the_scan() -> None:
    case = inputs()
    u = case["u"].requires_grad_()
    selective_scan(**case)[:, :, 4].sum().backward()
    assert u.grad is not None
    assert (u.grad[:, :, 5:] == 0).all()
    assert (u.grad[:, :, :5] != 0).all()


def test_large_steps_stay_finite_in_float32() -> None:
    case = {name: t.float() for name, t in inputs(200).items()}
    case["delta"] = 60 * case["delta"]
    torch.testing.assert_close(selective_scan(**case), by_the_equation(**case), rtol=1e-4, atol=1e-3)


@settings(deadline=None, max_examples=30)
@given(GRIDS, st.sampled_from(["continuous", "cross"]))
def test_every_path_visits_every_position_once_and_is_undone_by_its_inverse(grid, kind) -> None:
    paths = scan_paths(grid, kind)
    home = torch.arange(paths.shape[1]).expand_as(paths)
    assert paths.shape[0] == 2 * len(grid)
    assert torch.equal(paths.sort(-1).values, home)
    assert torch.equal(inverse_paths(paths).gather(-1, paths), home)


@settings(deadline=None, max_examples=30)
@given(GRIDS)
def test_successive_positions_of_a_snake_are_neighbours_on_the_grid(grid) -> None:
    for path in scan_paths(grid):
        steps = torch.stack(torch.unravel_index(path, grid)).diff(dim=1).abs().sum(0)
        assert (steps == 1).all()


def test_snakes_start_where_they_should() -> None:
    paths = scan_paths((3, 4))
    assert paths[0].tolist() == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]
    assert paths[1].tolist() == [8, 9, 10, 11, 7, 6, 5, 4, 0, 1, 2, 3]
    assert paths[2].tolist() == [8, 4, 0, 1, 5, 9, 10, 6, 2, 3, 7, 11]
    assert paths[3].tolist() == [11, 7, 3, 2, 6, 10, 9, 5, 1, 0, 4, 8]


def test_on_an_even_number_of_lines_two_snakes_are_walked_both_ways() -> None:
    paths = scan_paths((4, 6))
    assert torch.equal(paths[1], paths[0].flip(0))
    assert torch.equal(paths[3], paths[2].flip(0))
    odd = scan_paths((5, 5))
    assert not torch.equal(odd[1], odd[0].flip(0))


def test_shapes_and_settings_that_do_not_fit_are_named() -> None:
    case = inputs()
    with pytest.raises(ValueError, match=r"A has shape \(5, 2\)"):
        selective_scan(**case | {"A": case["A"][:5]})
    with pytest.raises(ValueError, match=r"C has shape"):
        selective_scan(**case | {"C": case["C"][..., :3]})
    with pytest.raises(ValueError, match=r"D has shape \(2,\); \(6,\) is allowed"):
        selective_scan(**case | {"D": case["D"][:2]})
    with pytest.raises(ValueError, match="kind='zigzag' is not known"):
        scan_paths((4, 4), "zigzag")

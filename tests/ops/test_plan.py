"""Windows along one axis: hand-worked tables and the facts that hold for every setting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.ops.neighborhood import AxisPlan, make_plan


def spans(**axis) -> str:
    """First and last key of every query, as `first-last`."""
    plan = AxisPlan(**axis)
    keys = [plan.visible(i) for i in range(plan.length)]
    return " ".join(f"{k[0]}-{k[-1]}" for k in keys)


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ({"kernel": 4}, "0-3 0-3 0-3 1-4 2-5 3-6 4-7 5-8 6-9 6-9"),
        ({"kernel": 5, "stride": 3}, "0-4 0-4 0-4 2-6 2-6 2-6 5-9 5-9 5-9 5-9"),
        ({"kernel": 4, "stride": 4}, "0-3 0-3 0-3 0-3 4-7 4-7 4-7 4-7 6-9 6-9"),
        ({"kernel": 6, "stride": 4}, "0-5 0-5 0-5 0-5 3-8 3-8 3-8 3-8 4-9 4-9"),
        ({"kernel": 4, "stride": 3, "causal": True}, "0-0 0-1 0-2 2-3 2-4 2-5 5-6 5-7 5-8 6-9"),
    ],
)
def test_windows_of_ten_positions(axis: dict, expected: str) -> None:
    assert spans(length=10, **axis) == expected


def test_dilated_windows_stay_in_their_residue_class() -> None:
    plan = AxisPlan(10, 3, dilation=3)
    expected = ["0 3 6", "1 4 7", "2 5 8", "0 3 6", "1 4 7", "2 5 8", "3 6 9", "1 4 7", "2 5 8", "3 6 9"]
    assert [" ".join(map(str, plan.visible(i))) for i in range(10)] == expected


def test_dilated_causal_windows_with_stride() -> None:
    plan = AxisPlan(11, 3, stride=2, dilation=2, causal=True)
    expected = ["0", "1", "0 2", "1 3", "2 4", "3 5", "2 4 6", "3 5 7", "6 8", "5 7 9", "6 8 10"]
    assert [" ".join(map(str, plan.visible(i))) for i in range(11)] == expected


@st.composite
def axes(draw: st.DrawFn) -> AxisPlan:
    length = draw(st.integers(2, 40))
    kernel = draw(st.integers(2, length))
    stride = draw(st.integers(1, kernel))
    return AxisPlan(length, kernel, stride, draw(st.integers(1, length // kernel)), draw(st.booleans()))


@settings(deadline=None, max_examples=200)
@given(axes())
def test_a_query_sees_exactly_k_keys_of_its_own_residue_class_and_no_later_one_if_causal(axis: AxisPlan) -> None:
    for query in range(axis.length):
        keys = axis.visible(query)
        assert query in keys
        assert keys.min() >= 0
        assert keys.max() < axis.length
        assert np.all(keys % axis.dilation == query % axis.dilation)
        if axis.causal:
            assert 1 <= len(keys) <= axis.kernel
            assert keys.max() == query
        else:
            assert len(keys) == axis.kernel


@settings(deadline=None, max_examples=200)
@given(axes())
def test_queries_of_one_stride_run_share_their_window_unless_causal(axis: AxisPlan) -> None:
    runs: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    for query in range(axis.length):
        keys = (
            axis.visible(query) if not axis.causal else axis.visible(query)[:1]
        )  # a causal run shares where it starts
        runs.setdefault((query % axis.dilation, query // axis.dilation // axis.stride), set()).add(tuple(keys))
    assert all(len(windows) == 1 for windows in runs.values())


@settings(deadline=None, max_examples=200)
@given(axes())
def test_mask_and_bias_entries_say_the_same_as_the_windows(axis: AxisPlan) -> None:
    for query in range(axis.length):
        keys = axis.visible(query)
        np.testing.assert_array_equal(axis.mask[query].nonzero()[0], keys)
        relative = keys // axis.dilation - query // axis.dilation + axis.kernel - 1
        np.testing.assert_array_equal(axis.bias_start[query] + np.arange(len(keys)), relative)
        assert relative.min() >= 0
        assert relative.max() <= 2 * axis.kernel - 2


def test_num_visible_is_the_product_over_axes() -> None:
    plan = make_plan((6, 5), (3, 2), is_causal=(True, False))
    assert plan.num_visible == (1 + 2 + 3 * 4) * (5 * 2)


def test_a_window_as_large_as_the_grid_is_dense_unless_causal() -> None:
    assert make_plan((4, 6), (4, 6), stride=(2, 3)).is_dense
    assert not make_plan((4, 6), (4, 6), is_causal=(False, True)).is_dense
    assert not make_plan((4, 6), (4, 5)).is_dense

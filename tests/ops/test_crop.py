"""Parts of a grid: the crop of some queries gives them the windows that they have in the whole."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.ops.neighborhood import AxisPlan
from gridattn.ops.neighborhood.crop import AxisCrop


@st.composite
def crops(draw: st.DrawFn) -> AxisCrop:
    length = draw(st.integers(2, 60))
    kernel = draw(st.integers(2, min(length, draw(st.sampled_from([4, 60])))))
    stride, dilation = draw(st.integers(1, kernel)), draw(st.integers(1, length // kernel))
    first = draw(st.integers(0, length - 1))
    axis = AxisPlan(length, kernel, stride, dilation, draw(st.booleans()))
    return AxisCrop(axis, first, draw(st.integers(first + 1, length)))


@settings(deadline=None, max_examples=500)
@given(crops())
def test_a_crop_gives_its_queries_the_windows_of_the_whole(crop: AxisCrop) -> None:
    (low, high), whole, part = crop.span, crop.axis, crop.plan
    assert 0 <= low <= crop.need[0] <= crop.first < crop.last <= crop.need[1] <= high <= whole.length
    assert part.length >= part.kernel * part.dilation
    for query in range(crop.first, crop.last):
        np.testing.assert_array_equal(part.visible(query - low) + low, whole.visible(query))
        assert part.bias_start[query - low] == whole.bias_start[query]


@settings(deadline=None, max_examples=300)
@given(crops())
def test_the_keys_of_a_crop_are_those_that_its_queries_see(crop: AxisCrop) -> None:
    seen = {int(key) for query in range(crop.first, crop.last) for key in crop.axis.visible(query)}
    assert crop.keys.tolist() == sorted(seen)
    assert crop.need == (min(seen), max(seen) + 1)


def test_plain_windows_need_no_more_than_their_halo() -> None:
    crop = AxisCrop(AxisPlan(100, kernel=7), first=40, last=50)
    assert crop.span == crop.need == (37, 53)
    assert AxisCrop(AxisPlan(100, kernel=7), first=0, last=50).span == (0, 53)


def test_a_huge_axis_makes_no_tables() -> None:
    crop = AxisCrop(AxisPlan(2**40, kernel=5, stride=2, dilation=3), first=2**39, last=2**39 + 4)
    assert crop.plan.length < 60

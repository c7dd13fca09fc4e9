"""The flex backend: block lists made from the plan, and the same results as the definition.

On the CPU, FlexAttention is eager here unless compiled, and refuses gradients; a patch lets its own formulas of the
backward pass run, which is what a GPU's are compiled from.
"""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neighborhood_problems import Problem, problems
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import flex_attention as torch_flex

from gridattn.ops import TileLayout, neighborhood_attention, neighborhood_attention_in_layout
from gridattn.ops.neighborhood import BACKENDS, flex, gpu_choice
from gridattn.ops.neighborhood.api import Backend, _choose
from gridattn.ops.neighborhood.plan import make_plan
from gridattn.ops.neighborhood.tables import axis_keys

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
uncompiled = mock.patch.object(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def attend(problem: Problem, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    tensors = {name: t.to(dtype) for name, t in problem.tensors.items()}
    return neighborhood_attention(
        **tensors, **problem.settings, key_mask=problem.key_mask, backend=backend, return_lse=True
    )


@settings(deadline=None, max_examples=20)
@given(problem=problems())
@uncompiled
def test_agrees_with_the_definition(problem: Problem) -> None:
    got, expected = attend(problem, torch.float32, "flex"), attend(problem, torch.float64, "reference")
    for own, other in zip(got, expected):
        torch.testing.assert_close(own.double(), other, rtol=2e-4, atol=2e-5)


@settings(deadline=None, max_examples=5)
@given(problem=problems())
def test_gradients_are_those_of_the_definition(problem: Problem) -> None:
    torch.compiler.reset()
    with mock.patch.object(torch_flex, "_validate_device"), mock.patch.dict(BACKENDS, flex=Backend(flex.attend)):
        got = problem.run("flex", torch.float32)
    for name, expected in problem.run("reference", torch.float64).items():
        torch.testing.assert_close(
            got[name].double(), expected, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@settings(deadline=None, max_examples=10)
@given(problem=problems(), grouped=st.booleans())
@uncompiled
def test_tokens_in_tile_order_stay_where_they_are(problem: Problem, grouped: bool) -> None:
    grid = problem.tensors["query"].shape[1:-2]
    layout = TileLayout(grid, (128, 1, 1)[: len(grid)], problem.settings["dilation"] if grouped else 1)
    tensors = {name: t.float() for name, t in problem.tensors.items()}
    for name in ("query", "key", "value"):
        tensors[name] = layout.to_tiles(tensors[name])
    mask = None if problem.key_mask is None else layout.to_tiles(problem.key_mask)
    options = {**problem.settings, "key_mask": mask, "return_lse": True, "backend": "flex"}
    got = neighborhood_attention_in_layout(**tensors, layout=layout, **options)
    for own, other in zip(got, attend(problem, torch.float64, "reference")):
        torch.testing.assert_close(layout.to_grid(own).double(), other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("grid", "options"),
    [((300,), {"kernel_size": 280, "stride": 140}), ((40, 70), {"kernel_size": (30, 33), "dilation": (1, 2)})],
)
def test_block_lists_hold_every_visible_pair_once(grid: tuple[int, ...], options: dict) -> None:
    plan = make_plan(grid, **options)
    layout = TileLayout(grid, flex._best_tile(axis_keys(plan)), plan.dilation)
    places = layout.to_tiles(torch.arange(np.prod(grid)).reshape(1, *grid) + 1)[0] - 1  # -1 is padding
    seen = torch.ones(1, 1, dtype=torch.bool)
    for axis in plan.axes:
        seen = torch.kron(seen, torch.from_numpy(axis.mask))
    seen = seen[places][:, places] & (places >= 0)
    tiles = len(places) // flex.BLOCK
    seen = seen.reshape(tiles, flex.BLOCK, tiles, flex.BLOCK)
    queries = (places >= 0).reshape(tiles, flex.BLOCK, 1, 1)

    blocks = flex._build_blocks(axis_keys(plan), layout.tile, layout.dilation, False)
    by_query, by_key = [marks(*blocks[n : n + 2]) for n in (0, 4)], [marks(*blocks[n : n + 2]).T for n in (2, 6)]
    for own, other in zip(by_query, by_key):
        assert np.array_equal(own, other)
    partial, full = by_query
    assert full.any()
    assert not (partial & full).any()
    assert np.array_equal(partial | full, (seen & queries).any(3).any(1).numpy())
    assert (seen | ~queries).all(3).all(1).numpy()[full].all()


def marks(count: np.ndarray, lists: np.ndarray) -> np.ndarray:
    result = np.zeros(lists.shape[2:], dtype=bool)
    for i, row in enumerate(lists[0, 0]):
        result[i, row[: count[0, 0, i]]] = True
    return result


def test_compiled_it_goes_through_the_block_lists() -> None:
    q, k, v = torch.randn(1, 40, 33, 4, 16), torch.randn(1, 40, 33, 2, 16), torch.randn(1, 40, 33, 2, 16)
    bias = torch.randn(4, 41, 11)
    options = {"kernel_size": (21, 6), "dilation": (1, 3), "bias": bias}

    def run(*tensors: Tensor) -> Tensor:
        return neighborhood_attention(*tensors, **options, backend="flex")

    with torch.no_grad():
        got = torch.compile(run, fullgraph=True)(q, k, v)
    torch.testing.assert_close(got, neighborhood_attention(q, k, v, **options), rtol=1e-4, atol=1e-5)


def test_says_what_it_does_not_take() -> None:
    q = torch.randn(1, 6, 2, 8, requires_grad=True)
    with pytest.raises(ValueError, match="FlexAttention has no gradient on the CPU"):
        neighborhood_attention(q, q, q, 3, backend="flex")
    with torch.no_grad():
        assert neighborhood_attention(q, q, q, 3, backend="flex").shape == q.shape
        with pytest.raises(ValueError, match=r"torch.float64 is not one of"):
            neighborhood_attention(*[q.double()] * 3, 3, backend="flex")
        with pytest.raises(ValueError, match="FlexAttention does not run on meta"):
            neighborhood_attention(*[q.to("meta")] * 3, 3, backend="flex")
    layout = TileLayout((256,), 128, 2)
    with pytest.raises(ValueError, match=r"the layout has dilation \(2,\); 1 or that of the attention, \(3,\)"):
        neighborhood_attention_in_layout(*torch.randn(3, 1, layout.tokens, 1, 8), layout, 3, dilation=3, backend="flex")


@pytest.mark.parametrize(
    ("measured", "options", "dtype", "channels", "expected"),
    [
        ({}, (), torch.float16, 32, "triton"),
        ({}, ("bias",), torch.float16, 32, "flex"),
        ({}, ("key_mask",), torch.float16, 256, "triton"),
        ({}, ("key_mask",), torch.float16, 512, "flex"),
        ({}, ("bias",), torch.float16, 8, "tiled"),
        ({}, (), torch.float64, 32, "tiled"),
        ({"Some GPU": "flex"}, (), torch.float16, 32, "flex"),
        ({"Some GPU": "tiled"}, (), torch.float16, 32, "tiled"),
        ({"Some GPU": "triton"}, ("bias",), torch.float16, 32, "flex"),
        ({"Another GPU": "tiled"}, (), torch.float16, 32, "triton"),
    ],
)
def test_auto_on_a_gpu_takes_what_was_measured_and_else_the_first_that_fits(
    measured: dict[str, str], options: tuple[str, ...], dtype: torch.dtype, channels: int, expected: str
) -> None:
    pytest.importorskip("triton")
    with FakeTensorMode():
        q = torch.empty(1, 6, 2, channels, dtype=dtype, device="cuda")
    with (
        mock.patch("torch.cuda.get_device_name", return_value="Some GPU"),
        mock.patch.object(gpu_choice, "measured", return_value=measured),
    ):
        assert _choose("auto", q, q, q, make_plan((6,), 3), options) == expected


def test_what_was_measured_names_backends() -> None:
    assert set(gpu_choice.measured().values()) <= set(gpu_choice.ORDER)

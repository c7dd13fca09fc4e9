"""Tokens in tile order: what treats every token alike does not notice, and attention gives what it gives on a grid."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neighborhood_problems import Problem, problems
from torch import Tensor, nn

from gridattn.layers import NeighborhoodAttention
from gridattn.models import NAT
from gridattn.ops import TileLayout, neighborhood_attention_in_layout
from gridattn.ops.neighborhood.plan import AxisPlan
from gridattn.ops.neighborhood.slots import AxisSlots, AxisView, flat_slots, spread, visits

TOKENS = ("query", "key", "value")


@st.composite
def layouts(draw: st.DrawFn, grid: tuple[int, ...] | None = None) -> TileLayout:
    """Tiles that may or may not divide the grid, or be larger than it."""
    grid = grid or tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    tile = [draw(st.integers(1, size + 2)) for size in grid]
    return TileLayout(grid, tile, [draw(st.integers(1, size)) for size in grid])


@settings(deadline=None, max_examples=30)
@given(layout=layouts())
def test_pointwise_work_is_indifferent_to_the_order(layout: TileLayout) -> None:
    x = torch.randn(2, *layout.grid, 4)
    work = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3), nn.GELU())
    in_tiles = layout.to_tiles(x)
    assert in_tiles.shape == (2, layout.tokens, 4)
    assert torch.equal(layout.to_grid(in_tiles), x)
    torch.testing.assert_close(layout.to_grid(work(in_tiles)), work(x))


@settings(deadline=None, max_examples=20)
@given(layout=layouts())
def test_the_tables_say_where_tokens_stand(layout: TileLayout) -> None:
    marks = torch.arange(1, np.prod(layout.grid) + 1).reshape(1, *layout.grid)
    in_tiles = layout.to_tiles(marks)[0].numpy()
    on_grid = np.ravel_multi_index(spread(layout.slots, [axis.index for axis in layout.slots]), layout.grid)
    holds = np.logical_and.reduce(spread(layout.slots, [axis.holds for axis in layout.slots]))
    assert np.array_equal(in_tiles, np.where(holds, on_grid + 1, 0))
    terms = flat_slots(layout.slots, [axis.slot for axis in layout.slots])
    slots = sum(np.ix_(*terms))
    assert np.array_equal(in_tiles[slots], marks[0].numpy())


@st.composite
def views(draw: st.DrawFn) -> AxisView:
    """Axes in tiles of queries and tiles of keys, the keys in order or by dilation group."""
    length = draw(st.integers(2, 30))
    kernel = draw(st.integers(2, length))
    dilation = draw(st.integers(1, length // kernel))
    axis = AxisPlan(length, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans()))
    groups = draw(st.sampled_from([1, dilation]))
    slots = [AxisSlots(length, draw(st.integers(1, 9)), groups) for _ in range(2)]
    return AxisView(axis, *slots)


@settings(deadline=None, max_examples=50)
@given(axes=st.lists(views(), min_size=1, max_size=2))
def test_every_visible_pair_is_in_a_visited_tile_and_full_tiles_hold_nothing_else(axes: list[AxisView]) -> None:
    seen = np.ones((1, 1, 1, 1), dtype=bool)
    for view in axes:  # (tiles of queries, queries of a tile, tiles of keys, keys of a tile)
        of_axis = view.axis.mask[np.ix_(view.queries.index, view.keys.index)] & view.keys.holds
        of_axis = of_axis.reshape(view.queries.tiles, view.queries.tile, view.keys.tiles, view.keys.tile)
        both = seen[:, None, :, None, :, None, :, None] & of_axis[None, :, None, :, None, :, None, :]
        seen = both.reshape([a * b for a, b in zip(seen.shape, of_axis.shape)])
    pairs = visits(tuple(axes))
    visited = np.zeros((pairs.rows, pairs.columns), dtype=bool)
    full = visited.copy()
    visited[pairs.row, pairs.column] = True
    full[pairs.row, pairs.column] = pairs.full
    assert visited.sum() == len(pairs.row)
    assert not (seen.any(axis=(1, 3)) & ~visited).any()
    assert np.array_equal(full, seen.all(axis=(1, 3)) if all(view.step == 1 for view in axes) else full)
    assert not (full & ~seen.all(axis=(1, 3))).any()
    if all(view.step == 1 for view in axes):  # windows of neighbouring queries touch: no tile is visited in vain
        assert np.array_equal(visited, seen.any(axis=(1, 3)))
    for lists in (pairs, pairs.transposed):
        for i in range(lists.rows):
            marks = lists.full[lists.start[i] : lists.start[i + 1]]
            assert marks[: lists.partial_start[i] - lists.start[i]].all()
            assert not marks[lists.partial_start[i] - lists.start[i] :].any()


def results(layout: TileLayout, problem: Problem, backend: str) -> dict[str, Tensor]:
    """What `Problem.run` gives, by way of the layout; padded tokens hold numbers that must not count."""
    leaves = {name: t.clone().requires_grad_() for name, t in problem.tensors.items()}
    padding = layout.to_tiles(torch.ones(1, *layout.grid))[0] == 0
    in_tiles = {}
    for name, leaf in leaves.items():
        fill = 7.0 if name != "key" else 100.0
        in_tiles[name] = layout.to_tiles(leaf).masked_fill(padding[:, None, None], fill) if name in TOKENS else leaf
    kept = None if problem.key_mask is None else layout.to_tiles(problem.key_mask) | padding
    options = {**problem.settings, "key_mask": kept, "backend": backend}
    out, lse = neighborhood_attention_in_layout(**in_tiles, layout=layout, **options, return_lse=True)
    alone = neighborhood_attention_in_layout(**in_tiles, layout=layout, **options)
    assert out[:, padding].eq(0).all()
    assert lse[:, padding].eq(-torch.inf).all()
    outputs = [layout.to_grid(t) for t in (out, lse, alone)]
    loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape)).sum() for t in outputs)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(("out", "lse", "alone", *(f"grad {name}" for name in leaves)), (*outputs, *grads)))


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@settings(deadline=None, max_examples=25)
@given(problem=problems(), data=st.data())
def test_attention_in_tile_order_is_that_of_the_grid(backend: str, problem: Problem, data: st.DataObject) -> None:
    layout = data.draw(layouts(problem.tensors["query"].shape[1:-2]))
    torch.testing.assert_close(results(layout, problem, backend), problem.run("reference", torch.float64))


@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_compiles_as_one_graph_and_exports(backend: str) -> None:
    layout = TileLayout((9, 7), (4, 4))
    tensors = [layout.to_tiles(t) for t in torch.randn(3, 2, 9, 7, 2, 8)]

    def run(*tensors: Tensor) -> Tensor:
        return neighborhood_attention_in_layout(*tensors, layout, 3, dilation=2, backend=backend)

    expected = layout.to_grid(run(*tensors))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(layout.to_grid(compiled(*tensors)), expected)

    class Attend(nn.Module):
        def forward(self, *grids: Tensor) -> Tensor:
            own = TileLayout(grids[0].shape[1:-2], (4, 4))
            return own.to_grid(run(*(own.to_tiles(t) for t in grids)))

    grids = tuple(layout.to_grid(t) for t in tensors)
    program = torch.export.export(Attend(), grids)
    assert not [n for n in program.graph.nodes if n.op == "call_function" and "gridattn" in str(n.target)]
    torch.testing.assert_close(program.module()(*grids), expected)


def test_an_empty_batch_gives_empty_results() -> None:
    layout = TileLayout((6, 5), (8, 16))
    q = torch.randn(0, layout.tokens, 2, 4)
    for backend in ("tiled", "flex", "auto"):
        with torch.no_grad():
            assert neighborhood_attention_in_layout(q, q, q, layout, 3, backend=backend).shape == q.shape


def test_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"grid=\(1, 2, 3, 4\) is not allowed; 1 to 3"):
        TileLayout((1, 2, 3, 4), 2)
    with pytest.raises(ValueError, match=r"tile=0 is not allowed"):
        TileLayout((4, 4), 0)
    with pytest.raises(ValueError, match=r"dilation=\(5, 5\) exceeds the grid \(4, 4\)"):
        TileLayout((4, 4), 2, 5)
    layout = TileLayout((5, 4), 2)
    x = torch.randn(2, 24, 1, 4)
    with pytest.raises(ValueError, match=r"x has shape \(2, 24, 1, 4\); \(batch, \*grid, ...\) with the grid \(5, 4\)"):
        layout.to_tiles(x)
    with pytest.raises(ValueError, match=r"value has shape \(2, 23, 1, 4\); the grid \(5, 4\) in tiles of \(2, 2\)"):
        neighborhood_attention_in_layout(x, x, x[:, 1:], layout, 3)
    with pytest.raises(ValueError, match=r"key_mask has shape \(2, 5, 4\); \(batch, tokens\) = \(2, 24\)"):
        neighborhood_attention_in_layout(x, x, x, layout, 3, key_mask=torch.ones(2, 5, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="leaves 40 queries without a key"):
        neighborhood_attention_in_layout(x, x, x, layout, 3, key_mask=torch.zeros(2, 24, dtype=torch.bool))
    with pytest.raises(ValueError, match="backend='flex' cannot run this problem: its tiles of"):
        neighborhood_attention_in_layout(x, x, x, layout, 3, backend="flex")
    with pytest.raises(ValueError, match="kernel_size"):
        neighborhood_attention_in_layout(x, x, x, layout, 5)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((9, 7), {"kernel_size": 3, "dilation": 2, "is_causal": (True, False)}),
        ((9, 7), {"kernel_size": (5, 4), "stride": 2, "bias": False}),
        ((4, 7), {"kernel_size": 3, "dilation": 2, "small_grid": "pad"}),
        ((2, 7), {"kernel_size": 3, "small_grid": "shrink"}),
        ((1, 7), {"kernel_size": 3}),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_the_layer_gives_the_same_in_tile_order(grid: tuple[int, int], options: dict, backend: str) -> None:
    layer = NeighborhoodAttention(8, 2, backend=backend, **options).double()
    if layer.relative_position_bias is not None:
        nn.init.normal_(layer.relative_position_bias)
    layout, x = TileLayout(grid, (4, 2)), torch.randn(2, *grid, 8, dtype=torch.float64, requires_grad=True)
    expected, got = layer(x), layout.to_grid(layer(layout.to_tiles(x), layout=layout))
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(out.sin().sum(), (x, *layer.parameters())) for out in (got, expected)]
    torch.testing.assert_close(*gradients)


def test_the_layer_says_what_does_not_go_with_a_layout() -> None:
    layer, layout = NeighborhoodAttention(8, 2, kernel_size=3), TileLayout((4, 4), 2)
    x = torch.randn(1, 16, 8)
    with pytest.raises(ValueError, match="layout is given together with positions or choice"):
        layer(x, layout=layout, positions=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"layout has the grid \(16,\)"):
        layer(x, layout=TileLayout((16,), 4))
    with pytest.raises(ValueError, match=r"x has shape \(1, 4, 4, 8\)"):
        layer(x.view(1, 4, 4, 8), layout=layout)
    with pytest.raises(ValueError, match=r"x has shape \(1, 16, 6\); \(batch, tokens, 8 channels\)"):
        layer(x[..., :6], layout=layout)


@pytest.mark.parametrize("tile", [4, (2, 8)])
def test_a_backbone_in_tile_order_gives_the_same_maps_and_gradients(tile: int | tuple[int, int]) -> None:
    settings = {"depths": (2, 1), "num_heads": (1, 2), "kernel_size": 3, "dilations": ((1, 3), (2,)), "num_classes": 5}
    plain = NAT(16, **settings).double().eval()
    tiled = NAT(16, **settings, tile=tile).double().eval()
    tiled.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 45, 37, dtype=torch.float64)
    torch.testing.assert_close(tiled.forward_maps(images), plain.forward_maps(images))
    for model in (plain, tiled):
        model(images).sin().sum().backward()
    for expected, got in zip(plain.parameters(), tiled.parameters()):
        torch.testing.assert_close(got.grad, expected.grad)
    tiled.set_grad_checkpointing()
    torch.testing.assert_close(tiled(images), plain(images))
    for own, other in zip(tiled.attention_inputs(images), plain.attention_inputs(images)):
        torch.testing.assert_close(own.x, other.x)

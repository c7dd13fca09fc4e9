"""Exported attentions and backbones equal the eager ones; what cannot be exported is declared, and fails."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gridattn.lab import export
from gridattn.lab.export import eager, export_model, onnx_runner, relative_error, to_onnx, to_program
from gridattn.lab.export_limits import LIMITS, Form, export_limit, limits_table
from gridattn.layers import NeighborhoodAttention, attention_info, create_attention, list_attentions

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TOLERANCE = 1e-4
# No axis has the length of a window or a block: a trace would take a size like that for a case of its own.
GRIDS = {
    1: [(29,), (16,)],
    2: [(14, 14), (9, 13)],
    3: [(9, 10, 12), (10, 9, 11)],
    4: [(3, 2, 6, 5), (2, 3, 4, 7)],
}
QUICK = ("global", "neighborhood", "shifted_window")
"""What the normal suite exports, on two axes; everything takes minutes."""
CASES = [
    pytest.param(name, rank, id=f"{name}-{rank}", marks=() if name in QUICK and rank == 2 else pytest.mark.slow)
    for name in list_attentions()
    for rank in attention_info(name).ranks
]


def build(name: str, rank: int) -> nn.Module:
    return create_attention(name, dim=32, num_heads=4, grid=GRIDS[rank][0]).eval()


def differs(layer: nn.Module, rank: int, form: Form) -> str | None:
    """None where a layer in a form equals the eager one on all grids of the form; else what is wrong."""
    axes = tuple(range(1, rank + 1)) if form.endswith("any grid") else ()
    inputs = [torch.randn(2, *grid, 32) for grid in GRIDS[rank][: 2 if axes else 1]]
    try:
        if form.startswith("ONNX"):
            run = onnx_runner(to_onnx(layer, inputs[0], axes))
        else:
            module = to_program(layer, inputs[0], axes).module()
            run = lambda x: eager(module, x)  # noqa: E731
        errors = [relative_error(run(x), eager(layer, x)) for x in inputs]
    except Exception as error:  # torch and onnxruntime have kinds of their own
        return str(error)
    return None if max(errors) < TOLERANCE else f"relative errors {errors}"


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_an_attention_has_every_form_but_those_declared(name: str, rank: int) -> None:
    layer = build(name, rank)
    for form in Form.__args__:
        declared = export_limit(name, rank, form)
        found = differs(layer, rank, form)
        assert (found is None) == (declared is None), f"{form}: declared {declared}, found {found}"


def test_the_page_lists_the_declared_limits() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "limits.md"
    assert limits_table() in page.read_text()
    for limit in LIMITS:
        assert set(limit.ranks) <= set(attention_info(limit.attention).ranks)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_neighborhood_attention_is_exported_without_our_own_operator(backend: str) -> None:
    layer = NeighborhoodAttention(32, 4, grid=(9, 10), kernel_size=3, backend=backend).eval()
    x = torch.randn(1, 9, 10, 32)
    program = to_program(layer, x)
    assert not [node for node in program.graph.nodes if "gridattn" in str(node.target)]
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("format", "suffix"), [("onnx", ".onnx"), ("torch-export", ".pt2")])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_backbone_is_written_once_it_agrees(format: str, suffix: str, dynamic: bool, tmp_path: Path) -> None:
    path = tmp_path / "net" / f"vit{suffix}"
    done = export_model("grid_vit_micro", format, path, img_size=(24, 40), dynamic=dynamic)
    assert list(done.errors) == [(1, 3, 24, 40), (2, 3, 31, 51)][: 2 if dynamic else 1]
    assert max(done.errors.values()) < TOLERANCE
    x = torch.randn(1, 3, 24, 40)
    if format == "onnx":
        (found,) = onnx_runner(path.read_bytes())(x)
    else:
        found = torch.export.load(path).module()(x)
    assert found.shape == (1, 1000)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_mistakes_are_named_and_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="format='tflite' is not known"):
        export_model("tic_mini", "tflite", tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"format='onnx' needs a file \*\.onnx"):
        export_model("tic_mini", "onnx", tmp_path / "x.pt2")
    monkeypatch.setitem(export.EXPORTERS, "onnx", lambda *_: (b"", lambda x: [torch.zeros(1, 1000)]))
    with pytest.raises(ValueError, match=r"'tic_mini' as onnx differs from the network: relative error 1\.0e\+00"):
        export_model("tic_mini", "onnx", tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())

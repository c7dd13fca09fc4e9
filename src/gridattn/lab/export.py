"""Networks as ONNX files or torch.export programs, checked against the network itself."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from gridattn.models import create_model
from gridattn.ops.common import check_choice, per_axis
from gridattn.systems.output import atomic

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
TOLERANCE = 1e-4
"""Largest relative error of an exported network that is written."""

Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Export:
    """An exported network and how far it is from the network itself.

    Attributes:
        path: the file.
        errors: by input shape, largest absolute difference of any output over the largest absolute value of that
            output.
    """

    path: Path
    errors: dict[tuple[int, ...], float]


def export_model(
    name: str,
    format: str,
    output: str | Path,
    *,
    checkpoint: str | Path | None = None,
    img_size: int | Sequence[int] | None = None,
    dynamic: bool = False,
) -> Export:
    """Exports a backbone and writes it if it agrees with the backbone on random images.

    Args:
        name: one of `list_models()`.
        format: "onnx", checked in onnxruntime, or "torch-export", a program that `torch.export.load` reads.
        output: file to write, `*.onnx` or `*.pt2`.
        checkpoint: weights; random ones without.
        img_size: height and width of the images; the variant's own if None.
        dynamic: one file for images of any size and number, checked at two sizes. Without it, the size is fixed and
            the batch is one.

    Returns:
        The file and the errors.

    Raises:
        ValueError: an unknown name or format, another suffix, a checkpoint that does not fit, a network that cannot be
            exported so, or one that differs by more than `TOLERANCE` afterwards. Nothing is written then.
        ModuleNotFoundError: "onnx" without the packages of the extra `onnx`.
    """
    path = Path(output)
    check_choice("format", format, tuple(FORMATS))
    if path.suffix != FORMATS[format]:
        raise ValueError(f"output={str(path)!r} is not allowed; format={format!r} needs a file *{FORMATS[format]}")
    model = create_model(name, img_size=img_size, checkpoint=checkpoint).eval()
    size = per_axis(model.default_cfg["input_size"][1:], model.rank, "img_size")
    shapes = [(1, *size)]
    if dynamic:
        shapes.append((2, *(side + side // 4 + 1 for side in size)))
    inputs = [torch.randn(shape[0], model.in_chans, *shape[1:]) for shape in shapes]
    # An example with a batch of one would fix the batch, which a program may read as a size to broadcast from.
    example = inputs[0].expand(2, *inputs[0].shape[1:]).contiguous() if dynamic else inputs[0]
    axes = (0, *range(2, 2 + model.rank)) if dynamic else ()
    content, run = EXPORTERS[format](model, example, axes)
    try:
        errors = {tuple(x.shape): relative_error(run(x), eager(model, x)) for x in inputs}
    except Exception as error:  # onnxruntime and torch have kinds of their own
        raise ValueError(f"{name!r} as {format} does not run once exported: {_reason(error)}") from error
    if not max(errors.values()) <= TOLERANCE:
        raise ValueError(f"{name!r} as {format} differs from the network: relative error {max(errors.values()):.1e}")
    with atomic(path) as temporary:
        temporary.write_bytes(content)
    return Export(path, errors)


def to_program(module: nn.Module, example: Tensor, dynamic_axes: Sequence[int] = ()) -> ExportedProgram:
    """`torch.export` of a module of one input.

    Args:
        module: in eval mode.
        example: an input.
        dynamic_axes: its axes whose size may change.

    Raises:
        ValueError: a module that cannot be traced so; the message is torch's first line.
    """
    shapes = (dict.fromkeys(dynamic_axes, Dim.DYNAMIC),) if dynamic_axes else None
    with _quiet(), torch.no_grad():
        try:
            # A copy, for tracing leaves marks on its example that the next trace would obey.
            return torch.export.export(module, (example.clone(),), dynamic_shapes=shapes)
        except Exception as error:  # torch has dozens of kinds here
            raise ValueError(f"{type(module).__name__} cannot be traced: {_reason(error)}") from error


def to_onnx(module: nn.Module, example: Tensor, dynamic_axes: Sequence[int] = ()) -> bytes:
    """The ONNX file of a module of one input; arguments and errors as in `to_program`.

    Raises:
        ModuleNotFoundError: the packages of the extra `onnx` are missing.
    """
    _import_onnx()
    program = to_program(module, example, dynamic_axes)
    _free_layouts(program)
    with _quiet():
        try:
            converted = torch.onnx.export(program, dynamo=True, verbose=False)
        except Exception as error:  # as above
            raise ValueError(f"{type(module).__name__} has no ONNX form: {_reason(error)}") from error
    assert converted is not None
    return converted.model_proto.SerializeToString()


def onnx_runner(content: bytes) -> Run:
    """Runs an ONNX file in onnxruntime on the CPU.

    Raises:
        ModuleNotFoundError: the packages of the extra `onnx` are missing.
    """
    runtime = _import_onnx()
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # a failure is an exception here, and not a line on stderr as well
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (name,) = [entry.name for entry in session.get_inputs()]
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})]


def eager(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of a module, as a list."""
    with torch.no_grad():
        y = module(x)
    return [y] if isinstance(y, Tensor) else list(y)


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest absolute difference of any output over its largest absolute value; infinite for other shapes."""
    if [y.shape for y in found] != [y.shape for y in expected]:
        return float("inf")
    return max(
        (float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in zip(found, expected) if b.numel()),
        default=0.0,
    )


def _as_onnx(module: nn.Module, example: Tensor, axes: Sequence[int]) -> tuple[bytes, Run]:
    content = to_onnx(module, example, axes)
    return content, onnx_runner(content)


def _as_program(module: nn.Module, example: Tensor, axes: Sequence[int]) -> tuple[bytes, Run]:
    buffer = io.BytesIO()
    torch.export.save(to_program(module, example, axes), buffer)
    content = buffer.getvalue()
    return content, lambda x: eager(torch.export.load(io.BytesIO(content)).module(), x)


EXPORTERS = {"onnx": _as_onnx, "torch-export": _as_program}


def _free_layouts(program: ExportedProgram) -> None:
    """Lets every view of a trace copy where it must.

    A trace holds views that are possible in the memory layout that the fused attention of this machine gave; written
    out for ONNX, attention gives another. So its result is made contiguous, and views become reshapes.
    """
    aten, graph = torch.ops.aten, program.graph
    for node in list(graph.nodes):
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        elif node.target is aten.scaled_dot_product_attention.default:
            with graph.inserting_after(node):
                copy = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
            copy.meta = dict(node.meta)
            node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
    program.graph_module.recompile()


def _import_onnx() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it, and says so less plainly)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is missing; pip install 'gridattn[onnx]' brings it") from None
    return onnxruntime


def _reason(error: BaseException) -> str:
    """The first line of what began a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's progress reports and warnings about itself away from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

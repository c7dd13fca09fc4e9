"""What cannot be exported of the registered attentions, and why; the page docs/limits.md lists the same."""

from dataclasses import dataclass
from typing import Literal

Form = Literal["program for any grid", "ONNX", "ONNX for any grid"]
"""A torch.export program with dynamic sizes, an ONNX file of a fixed size, an ONNX file with dynamic sizes."""


@dataclass(frozen=True)
class ExportLimit:
    """A form that an attention does not have on grids of some numbers of axes, and why.

    `alone` says that the forms which usually fail with it work all the same.
    """

    attention: str
    ranks: tuple[int, ...]
    form: Form
    reason: str
    alone: bool = False


WINDOWS = "which keys a tile of queries needs is worked out for the grid of the trace and held as constant tables"

CASES = "sizes derived from the grid are compared with each other, and the trace keeps the outcome"
SCAN = "the parallel scan halves the sequence until one step is left, so a trace holds the halvings of its own length"
SORT = "PyTorch has no ONNX form of the stable sort that picks its tokens"

LIMITS = (
    ExportLimit("dilated_neighborhood", (1, 2, 3), "program for any grid", WINDOWS),
    ExportLimit("epipolar", (2, 4), "program for any grid", WINDOWS),
    ExportLimit("neighborhood", (1, 2, 3), "program for any grid", WINDOWS),
    ExportLimit(
        "class_semantics", (1,), "program for any grid", "its kernels are resampled to the number of steps of the trace"
    ),
    ExportLimit("global_local", (1,), "program for any grid", CASES),
    ExportLimit("global_local", (1, 2, 3), "ONNX", SORT),
    ExportLimit("routing", (1, 3), "program for any grid", CASES, alone=True),
    ExportLimit("scan_window", (1, 2, 3), "program for any grid", SCAN),
    ExportLimit("selective_scan", (1, 2, 3), "program for any grid", SCAN),
    ExportLimit("selective_scan_cross", (1, 2, 3), "program for any grid", SCAN),
    ExportLimit("self_guided", (1, 2, 3), "ONNX", SORT),
    ExportLimit("ulsam", (1,), "program for any grid", CASES),
)

WIDER: dict[Form, tuple[Form, ...]] = {
    "program for any grid": ("program for any grid",),
    "ONNX": ("ONNX",),
    "ONNX for any grid": ("program for any grid", "ONNX", "ONNX for any grid"),
}


def export_limit(attention: str, rank: int, form: Form) -> str | None:
    """Why an attention does not have a form on grids of `rank` axes; None where it has.

    Example:
        >>> export_limit("window", 2, "ONNX") is None
        True
        >>> export_limit("neighborhood", 2, "ONNX for any grid")
        'which keys a tile of queries needs is worked out for the grid of the trace and held as constant tables'
    """
    own = (x for x in LIMITS if x.attention == attention and rank in x.ranks)
    found = (x for x in own if x.form == form or (x.form in WIDER[form] and not x.alone))
    return next((limit.reason for limit in found), None)


def limits_table() -> str:
    """The declared limits as the table of docs/limits.md."""
    rows = [f"| `{x.attention}` | {', '.join(map(str, x.ranks))} | {x.form} | {x.reason} |" for x in LIMITS]
    return "\n".join(["| attention | grid axes | not exported as | why |", "|---|---|---|---|", *rows])

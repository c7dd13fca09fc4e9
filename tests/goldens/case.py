"""A golden case: the official inputs, weights and outputs of one module, read from a safetensors file."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class GoldenCase:
    """Contents of one file. `inputs`, `state`, `outputs` and `grads` are keyed without their prefix (`in.x` -> `x`)."""

    path: Path
    name: str
    cls: str
    config: dict[str, Any]
    meta: dict[str, Any]
    inputs: dict[str, Tensor]
    state: dict[str, Tensor]
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]

    def leaf(self, name: str) -> Tensor:
        """The input `name` as a fresh leaf that collects a gradient."""
        return self.inputs[name].clone().requires_grad_()


Result = Mapping[str, Tensor]
Adapter = Callable[[GoldenCase], Result]
"""Runs a case and returns our tensors under the file's own full names: `out.y`, `grad.x`, ...; every `out.*` and
`grad.*` of the file must be among them."""


def read_case(path: Path) -> GoldenCase:
    """Reads one golden file."""
    groups: dict[str, dict[str, Tensor]] = {"in": {}, "state": {}, "out": {}, "grad": {}}
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["case"])
        for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            prefix, _, name = key.partition(".")
            groups[prefix][name] = file.get_tensor(key)
    return GoldenCase(
        path,
        meta["case"],
        meta["class"],
        meta.get("config", {}),
        meta,
        groups["in"],
        groups["state"],
        groups["out"],
        groups["grad"],
    )


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of the golden tensor (1e-12 at least)."""
    if ours.shape != theirs.shape:
        raise AssertionError(f"shape {tuple(ours.shape)} differs from the golden {tuple(theirs.shape)}")
    if theirs.numel() == 0:
        return 0.0
    ours, theirs = ours.detach().to(torch.float64), theirs.to(torch.float64)
    finite = torch.isfinite(theirs)
    if not torch.equal(ours[~finite].nan_to_num(7.0), theirs[~finite].nan_to_num(7.0)):
        raise AssertionError("infinite or missing entries differ from the golden's")
    if not finite.any():
        return 0.0
    scale = theirs[finite].abs().max().clamp_min(1e-12)
    return float((ours[finite] - theirs[finite]).abs().max() / scale)

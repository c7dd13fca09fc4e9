"""Checks of the arguments that choose or tune NATTEN's kernels and change nothing in a result."""

from collections.abc import Mapping
from typing import Any

from gridattn.ops.common import check_choice, per_axis
from gridattn.ops.neighborhood import BACKENDS

FNA_BACKENDS = ("blackwell-fna", "hopper-fna", "cutlass-fna", "flex-fna")
FMHA_BACKENDS = ("blackwell-fmha", "hopper-fmha", "cutlass-fmha", "flex-fmha")
KERNEL_SCHEDULES = ("non", "coop", "pp")

SIZE_KNOBS = ("q_tile_size", "kv_tile_size", "backward_q_tile_size", "backward_kv_tile_size", "backward_kv_splits")
ATTENTION_KNOBS = (
    "backend",
    *SIZE_KNOBS,
    "backward_use_pt_reduction",
    "run_persistent_kernel",
    "kernel_schedule",
    "torch_compile",
)
"""Arguments of `attention` that may stand in `attention_kwargs`: all that change nothing in a result."""


def neighborhood_backend(backend: str | None) -> str:
    """The gridattn backend for a name: NATTEN's names mean the automatic choice, gridattn's own mean themselves.

    Raises:
        NotImplementedError: another name.
    """
    if backend is None or backend in FNA_BACKENDS:
        return "auto"
    if backend not in ("auto", *BACKENDS):
        raise NotImplementedError(
            f"backend={backend!r} is not known; allowed: {', '.join((*FNA_BACKENDS, 'auto', *BACKENDS))}"
        )
    return backend


def check_attention_knobs(knobs: Mapping[str, Any]) -> None:
    """Checks tuning arguments of dense attention.

    Raises:
        ValueError: a name that is none of them, a size that is no positive int, an unknown kernel schedule.
        NotImplementedError: an unknown backend.
    """
    for name in knobs:
        check_choice("attention_kwargs key", name, ATTENTION_KNOBS)
    backend = knobs.get("backend")
    if backend is not None and backend not in FMHA_BACKENDS:
        raise NotImplementedError(f"backend={backend!r} is not known; allowed: {', '.join(FMHA_BACKENDS)}")
    check_tiles(1, {name: knobs.get(name) for name in SIZE_KNOBS})
    check_kernel_schedule(knobs.get("kernel_schedule"))


def check_tiles(rank: int, shapes: Mapping[str, Any]) -> None:
    """Raises ValueError unless every shape is None or has one positive int per axis."""
    for name, shape in shapes.items():
        if shape is not None:
            per_axis(shape, rank, name)


def check_kernel_schedule(kernel_schedule: str | None) -> None:
    """Raises ValueError for a kernel schedule that NATTEN does not know."""
    if kernel_schedule is not None:
        check_choice("kernel_schedule", kernel_schedule, KERNEL_SCHEDULES)

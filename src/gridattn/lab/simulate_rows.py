"""Tables of the command `gridattn simulate`."""

from collections.abc import Mapping
from typing import Any

from gridattn.lab.presets import PRESETS, Preset
from gridattn.lab.simulate import KeyTiling, Simulation, end_to_end, simulate, sweep_strides

Row = dict[str, Any]


def parse_sizes(name: str, text: str) -> tuple[int, ...] | int:
    """Reads "30x48x80" as (30, 48, 80) and "7" as 7, which serves every axis (a grid is always a tuple).

    Raises:
        ValueError: anything else.

    Example:
        >>> parse_sizes("kernel", "18x24"), parse_sizes("kernel", "7"), parse_sizes("grid", "64")
        ((18, 24), 7, (64,))
    """
    parts = text.lower().split("x")
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--{name} {text!r} is not allowed; numbers with an x between, such as 16x64x64, are")
    if len(parts) == 1 and name != "grid":
        return int(parts[0])
    return tuple(int(part) for part in parts)


def setting_rows(
    sizes: Mapping[str, tuple[int, ...] | int], key_tiling: KeyTiling, sweep: bool, attention_share: float
) -> list[Row]:
    """One row for the stride given, or one for every stride worth trying."""
    grid, causal = sizes["grid"], sizes["causal"]
    is_causal = tuple(map(bool, causal)) if isinstance(causal, tuple) else bool(causal)
    assert isinstance(grid, tuple)
    tiles = {"query_tile": sizes["tile-q"], "key_tile": sizes["tile-kv"], "key_tiling": key_tiling}
    if not sweep:
        found = simulate(grid, sizes["kernel"], sizes["stride"], sizes["dilation"], is_causal, **tiles)
        return [_row(sizes["stride"], found, attention_share)]
    choices = sweep_strides(grid, sizes["kernel"], sizes["dilation"], is_causal, **tiles)
    return [_row(choice.stride, choice.simulation, attention_share) for choice in choices]


def preset_rows(name: str) -> list[Row]:
    """The published figures of one preset, or of all, beside ours.

    Raises:
        ValueError: an unknown preset.
    """
    names = [preset.name for preset in PRESETS]
    if name != "all" and name not in names:
        raise ValueError(f"preset={name!r} is not known; allowed: all, {', '.join(names)}")
    return [row for preset in PRESETS if name in ("all", preset.name) for row in _published(preset)]


def _published(preset: Preset) -> list[Row]:
    rows = []
    for stride, (all_steps, some_steps) in preset.published.items():
        found = simulate(
            preset.grid, preset.kernel_size, stride, query_tile=preset.query_tile, key_tile=preset.key_tile
        )
        ours = [end_to_end(found.speedup, preset.attention_share, share) for share in (1.0, preset.step_fraction)]
        rows.append(
            {
                "preset": preset.name,
                "stride": _sizes(stride),
                "tiles": f"{found.max_visited} of {found.dense_tiles}",
                "block_sparse": found.fully_block_sparse,
                "all_steps_published": f"{all_steps:.2f}",
                "all_steps_ours": f"{ours[0]:.2f}",
                "some_steps_published": "-" if some_steps is None else f"{some_steps:.2f}",
                "some_steps_ours": f"{ours[1]:.2f}",
            }
        )
    return rows


def _row(stride: tuple[int, ...] | int, found: Simulation, attention_share: float) -> Row:
    return {
        "stride": _sizes(stride),
        "worst_tiles": f"{found.max_visited} of {found.dense_tiles}",
        "block_sparse": found.fully_block_sparse,
        "speedup": f"{float(found.speedup):.2f}",
        "balanced_speedup": f"{float(found.mean_speedup):.2f}",
        "flop_speedup": f"{float(found.flop_speedup):.2f}",
        "model_speedup": f"{end_to_end(found.speedup, attention_share):.2f}",
    }


def _sizes(sizes: tuple[int, ...] | int) -> str:
    return "x".join(map(str, sizes)) if isinstance(sizes, tuple) else str(sizes)

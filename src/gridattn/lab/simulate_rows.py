"""What the command `gridattn simulate` prints and writes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gridattn.lab.presets import PRESETS, Preset
from gridattn.lab.simulate import KeyTiling, Simulation, end_to_end, simulate
from gridattn.lab.simulate_sweep import (
    AxisTable,
    StrideChoice,
    WindowChoice,
    axis_tables,
    default_windows,
    sweep_strides,
    sweep_windows,
)
from gridattn.lab.simulate_tiles import TilePair, tile_pairs
from gridattn.ops.common import per_axis
from gridattn.systems.output import atomic, write_csv, write_json

Row = dict[str, Any]
PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Setting:
    """A problem and the kernels to simulate.

    Attributes:
        grid, dilation, is_causal: see `simulate`.
        kernel_size: None for a sweep over windows.
        stride: of a single simulation; a sweep looks at all.
        tiles: pairs of tile shapes.
        key_tiling: see `simulate`.
        attention_share: see `end_to_end`.
    """

    grid: tuple[int, ...]
    kernel_size: tuple[int, ...] | int | None
    stride: tuple[int, ...] | int
    dilation: tuple[int, ...] | int
    is_causal: tuple[bool, ...] | bool
    tiles: list[TilePair]
    key_tiling: KeyTiling
    attention_share: float

    @property
    def geometry(self) -> tuple[Any, Any]:
        """Dilation and causality, in the order in which the functions of the simulator take them."""
        return self.dilation, self.is_causal

    @property
    def tile_options(self) -> dict[str, Any]:
        """Keywords of those functions for the first pair of tiles."""
        return {"query_tile": self.tiles[0].query, "key_tile": self.tiles[0].key, "key_tiling": self.key_tiling}


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


def read_setting(
    sizes: Mapping[str, str | None], kernels: str | None, *, dynamic: bool, sweep: bool, attention_share: float
) -> Setting:
    """Reads the options of the command.

    Args:
        sizes: grid, kernel, tile-q, tile-kv, stride, dilation and causal, as `parse_sizes` reads them.
        kernels: name of a family of kernels, in place of tile-q and tile-kv.
        dynamic: whether key tiles start at the first key needed.
        sweep: whether the kernel may be missing.
        attention_share: share of the run time that is self-attention.

    Raises:
        ValueError: an option that is missing, not a size, or at odds with another.
    """
    tile_options = ("tile-q", "tile-kv")
    if kernels is not None and any(sizes[name] is not None for name in tile_options):
        raise ValueError(f"--tiles {kernels!r} stands for --tile-q and --tile-kv; give one or the other")
    needed = ["grid", *([] if sweep else ["kernel"]), *([] if kernels is not None else tile_options)]
    missing = [name for name in needed if sizes[name] is None]
    if missing:
        raise ValueError(
            f"--{missing[0]} is missing; needed are {', '.join(f'--{name}' for name in needed)}, and --tiles may stand "
            "for --tile-q and --tile-kv"
        )
    parsed = {name: parse_sizes(name, text) for name, text in sizes.items() if text is not None}
    grid, causal = parsed["grid"], parsed["causal"]
    assert isinstance(grid, tuple)
    if kernels is None:
        tiles = [TilePair(*(per_axis(parsed[name], len(grid), name) for name in tile_options))]
    else:
        tiles = tile_pairs(kernels, len(grid))
        if not tiles:
            raise ValueError(f"--tiles {kernels!r} has no tiles for a grid of {len(grid)} axes; 1 to 3 are allowed")
    return Setting(
        grid,
        parsed.get("kernel"),
        parsed["stride"],
        parsed["dilation"],
        tuple(map(bool, causal)) if isinstance(causal, tuple) else bool(causal),
        tiles,
        "dynamic" if dynamic else "static",
        attention_share,
    )


def setting_rows(setting: Setting) -> list[Row]:
    """One row for each pair of tiles."""
    rows = []
    for pair in setting.tiles:
        options = replace(setting, tiles=[pair]).tile_options
        found = simulate(setting.grid, setting.kernel_size, setting.stride, *setting.geometry, **options)
        tiles = {} if len(setting.tiles) == 1 else {"tiles": _pair_text(pair)}
        numbers = _numbers(found, setting.attention_share)
        rows.append(_printed({**tiles, "stride": sizes_text(setting.stride), **numbers}))
    return rows


def sweep_rows(setting: Setting, out: Path | None = None) -> list[Row]:
    """The strides worth trying for the window of the setting; where it has none, the windows on the front of speed-up
    against visible tokens, each with its fastest stride.

    Args:
        setting: with one pair of tiles.
        out: file of a picture; everything that was looked at is written beside it as CSV and JSON.

    Raises:
        ValueError: several pairs of tiles, or a file that is not a picture's.
    """
    if len(setting.tiles) != 1:
        pairs = "; ".join(_pair_text(pair) for pair in setting.tiles)
        raise ValueError(f"--sweep takes one pair of tiles; choose --tile-q and --tile-kv from {pairs}")
    if out is not None and out.suffix.lower() not in PICTURES:
        raise ValueError(f"--out {str(out)!r} is not a picture; files that end in {', '.join(PICTURES)} are allowed")
    share = setting.attention_share
    if setting.kernel_size is None:
        choices = sweep_windows(setting.grid, *setting.geometry, **setting.tile_options)
        rows = [_window_row(choice, share) for choice in choices]
        shown = [{k: v for k, v in row.items() if k != "on_front"} for row in rows if row["on_front"]]
    else:
        choices = sweep_strides(setting.grid, setting.kernel_size, *setting.geometry, **setting.tile_options)
        rows = shown = [{"stride": sizes_text(c.stride), **_numbers(c.simulation, share)} for c in choices]
    if out is not None:
        _write_sweep(setting, choices, rows, out)
    return [_printed(row) for row in shown]


def _write_sweep(
    setting: Setting, choices: list[WindowChoice] | list[StrideChoice], rows: list[Row], out: Path
) -> None:
    from gridattn.lab.simulate_pictures import draw_sweep

    kernel_size, windows = None, None
    if setting.kernel_size is not None:  # its row belongs in the picture, whether or not it is a whole number of tiles
        kernel_size = per_axis(setting.kernel_size, len(setting.grid), "kernel_size")
        steps = per_axis(setting.dilation, len(setting.grid), "dilation")
        axes = zip(setting.grid, steps, setting.tiles[0].key, kernel_size)
        windows = [sorted({*default_windows(n // step, tile), size}) for n, step, tile, size in axes]
    tables = axis_tables(setting.grid, *setting.geometry, **setting.tile_options, windows=windows)
    figure = draw_sweep(tables, choices, kernel_size)
    with atomic(out) as temporary:
        figure.savefig(temporary)
    write_csv(out.with_suffix(".csv"), rows)
    write_json(out.with_suffix(".json"), {**asdict(setting), "rows": rows, "axes": [_table_record(t) for t in tables]})


def _table_record(table: AxisTable) -> dict[str, Any]:
    speedup = [[None if np.isnan(value) else float(value) for value in row] for row in table.speedup]
    return {**asdict(table), "speedup": speedup, "block_sparse": table.block_sparse.tolist()}


def _window_row(choice: WindowChoice, attention_share: float) -> Row:
    return {
        "kernel": sizes_text(choice.kernel_size),
        "visible": choice.visible,
        "stride": sizes_text(choice.stride),
        **_numbers(choice.simulation, attention_share),
        "speedup_at_stride_1": float(choice.unstrided.speedup),
        "on_front": choice.on_front,
    }


def _numbers(found: Simulation, attention_share: float) -> Row:
    return {
        "worst_tiles": found.max_visited,
        "dense_tiles": found.dense_tiles,
        "block_sparse": found.fully_block_sparse,
        "speedup": float(found.speedup),
        "balanced_speedup": float(found.mean_speedup),
        "flop_speedup": float(found.flop_speedup),
        "model_speedup": end_to_end(found.speedup, attention_share),
    }


def _printed(row: Row) -> Row:
    """A row for the terminal: two digits, and the tiles visited beside those of dense attention."""
    text = {key: f"{value:.2f}" if isinstance(value, float) else value for key, value in row.items()}
    return {
        key: f"{value} of {text['dense_tiles']}" if key == "worst_tiles" else value
        for key, value in text.items()
        if key != "dense_tiles"
    }


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
                "stride": sizes_text(stride),
                "tiles": f"{found.max_visited} of {found.dense_tiles}",
                "block_sparse": found.fully_block_sparse,
                "all_steps_published": f"{all_steps:.2f}",
                "all_steps_ours": f"{ours[0]:.2f}",
                "some_steps_published": "-" if some_steps is None else f"{some_steps:.2f}",
                "some_steps_ours": f"{ours[1]:.2f}",
            }
        )
    return rows


def _pair_text(pair: TilePair) -> str:
    return f"{sizes_text(pair.query)} and {sizes_text(pair.key)}"


def sizes_text(sizes: tuple[int, ...] | int) -> str:
    """The inverse of `parse_sizes`.

    Example:
        >>> sizes_text((18, 24)), sizes_text(7)
        ('18x24', '7')
    """
    return "x".join(map(str, sizes)) if isinstance(sizes, tuple) else str(sizes)

"""Published settings of generalized neighborhood attention in three generators, with the paper's end-to-end figures
on B200.

Source: arXiv 2504.16922, tables 1 to 4. Tile shapes are those of the paper's figure 3 where it states them and
inferred from the published
speed-ups elsewhere.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One generator and window with its published strides.

    Attributes:
        name: short name, `<model>-<sparsity in percent>`.
        grid, kernel_size, query_tile, key_tile: the problem and the kernel's tiles.
        attention_share: share of the run time that is self-attention.
        step_fraction: share of the diffusion steps that use the sparse attention in the paper's second setting.
        published: stride -> (end-to-end speed-up simulated for all steps, for `step_fraction` of them or None).
    """

    name: str
    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]
    attention_share: float
    step_fraction: float
    published: dict[tuple[int, ...], tuple[float, float | None]]


PRESETS = (
    Preset(
        "flux-90",
        (256, 256),
        (80, 80),
        (16, 16),
        (16, 8),
        0.518,
        19 / 28,
        {(1, 1): (1.76, 1.42), (16, 1): (1.84, 1.45), (16, 16): (1.88, 1.46)},
    ),
    Preset(
        "cosmos-56",
        (16, 44, 80),
        (16, 32, 48),
        (8, 4, 8),
        (4, 4, 8),
        0.587,
        23 / 35,
        {(1, 1, 1): (1.35, 1.21), (1, 8, 1): (1.42, 1.24), (1, 1, 16): (1.42, 1.24), (1, 8, 16): (1.50, 1.28)},
    ),
    Preset(
        "cosmos-89",
        (16, 44, 80),
        (16, 24, 16),
        (8, 4, 8),
        (4, 4, 8),
        0.587,
        23 / 35,
        {(1, 1, 1): (1.90, 1.45), (1, 8, 1): (1.96, 1.48), (1, 1, 16): (2.05, 1.51), (1, 8, 16): (2.10, 1.52)},
    ),
    Preset(
        "hunyuan-58",
        (30, 48, 80),
        (30, 40, 40),
        (2, 16, 8),
        (2, 8, 8),
        0.607,
        35 / 50,
        {(1, 1, 1): (1.21, 1.14), (1, 1, 8): (1.44, 1.27), (1, 32, 8): (1.55, 1.33), (30, 40, 40): (1.44, None)},
    ),
    Preset(
        "hunyuan-91",
        (30, 48, 80),
        (18, 24, 24),
        (4, 8, 8),
        (2, 8, 8),
        0.607,
        35 / 50,
        {
            (1, 1, 1): (1.73, 1.42),
            (2, 1, 1): (1.78, 1.44),
            (1, 1, 8): (1.99, 1.53),
            (2, 1, 8): (2.02, 1.55),
            (1, 8, 8): (2.17, 1.61),
            (2, 8, 8): (2.20, 1.62),
            (16, 8, 8): (2.23, 1.63),
            (18, 24, 24): (2.06, None),
        },
    ),
)

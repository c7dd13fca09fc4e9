"""Published variants of HaloNet: the paper's H0 to H7, and ResNet hybrids with halo attention in some of their blocks.

Sources: arXiv 2103.12731, and the configurations of timm for the hybrids.
"""

from typing import Any


def _paper(
    block: int, halo: int, value_ratio: float, output_ratio: float, depth: int, final: int | None, last: int = 3
):
    """Keywords from the columns of the paper's table: b, h, r_v, r_b, blocks of the third level, final width."""
    return {
        "depths": (3, 3, depth, 3),
        "widths": tuple(int(output_ratio * width) for width in (64, 128, 256, 512)),
        "bottleneck_ratio": 1 / output_ratio,
        "value_ratio": value_ratio,
        "block_size": block,
        "halo_size": halo,
        "final_width": final,
    }


PAPER_VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "halonet_h0": (256, _paper(8, 3, 1, 0.5, 7, None)),
    "halonet_h1": (256, _paper(8, 3, 1, 1, 10, None)),
    "halonet_h2": (256, _paper(8, 3, 1, 1.25, 11, None)),
    "halonet_h3": (320, _paper(10, 3, 1, 1.5, 12, 1024)),
    "halonet_h4": (384, _paper(12, 2, 1, 3, 12, 1280)),
    "halonet_h5": (448, _paper(14, 2, 2.5, 2, 23, 1536)),
    "halonet_h6": (512, _paper(8, 4, 3, 2.75, 24, 1536)),
    "halonet_h7": (600, _paper(10, 3, 4, 3.5, 26, 2048)),
}
"""Registry name -> image size and keywords."""

HYBRID: dict[str, Any] = {
    "widths": (256, 512, 1024, 2048),
    "bottleneck_ratio": 0.25,
    "num_heads": 8,
    "stem": "tiered",
}
RESNET_26 = HYBRID | {"depths": (2, 2, 2, 2), "halo_blocks": ((), (), (1,), (0, 1)), "halo_size": 2}

HYBRID_VARIANTS: dict[str, dict[str, Any]] = {
    "timm_halonet_h1": PAPER_VARIANTS["halonet_h1"][1] | {"num_heads": 8},
    "timm_halonet26t": RESNET_26,
    # The last level attends to its whole map, which has 8 x 8 positions at 256 pixels.
    "timm_halo2botnet50ts_256": HYBRID
    | {
        "depths": (3, 4, 6, 3),
        "halo_blocks": ((), (1, 3), (1, 3, 5), (1,)),
        "num_heads": (8, 8, 8, 4),
        "halo_size": (3, 3, 3, 0),
        "stem_pool": False,
        "activation": "silu",
    },
}
HYBRID_94_VARIANTS: dict[str, dict[str, Any]] = {
    "timm_halonet50ts": HYBRID
    | {
        "depths": (3, 4, 6, 3),
        "halo_blocks": ((), (3,), (1, 3, 5), (1,)),
        "num_heads": (8, 4, 8, 8),
        "activation": "silu",
    },
    "timm_sehalonet33ts": HYBRID
    | {
        "depths": (2, 3, 3, 2),
        "widths": (256, 512, 1024, 1536),
        "bottleneck_ratio": (0.25, 0.25, 0.25, 0.333),
        "halo_blocks": ((), (2,), (2,), (0, 1)),
        "stem_pool": False,
        "activation": "silu",
        "channel_attention": "se",
        "final_width": 1280,
    },
    "timm_eca_halonext26ts": RESNET_26
    | {"head_dim": 16, "group_width": 16, "activation": "silu", "channel_attention": "eca"},
}
REGNETZ_VARIANTS: dict[str, dict[str, Any]] = {
    "timm_haloregnetz_b": {
        "depths": (2, 6, 12, 2),
        "widths": (48, 96, 192, 288),
        "strides": (2, 2, 2, 2),
        "halo_blocks": ((), (), (3, 7, 11), (0, 1)),
        "bottleneck_ratio": 3.0,
        "inverted": True,
        "num_heads": 8,
        "block_size": 7,
        "halo_size": 2,
        "qk_ratio": 0.33,
        "stem": "3x3",
        "stem_width": 32,
        "stem_pool": False,
        "activation": "silu",
        "group_width": 16,
        "channel_attention": "se",
        "squeeze_ratio": 0.25,
        "final_width": 1536,
    }
}

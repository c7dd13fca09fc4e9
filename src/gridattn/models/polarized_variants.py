"""Variants of ResNet and HRNet with polarized self-attention, parallel (`psa_p`) or sequential (`psa_s`).

The pose networks are listed without attention too. Sources: arXiv 2107.00782, arXiv 1804.06208, arXiv 1902.09212.
"""

from typing import Any

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
WIDTHS = (32, 48)
LAYOUTS = {"_psa_p": "parallel", "_psa_s": "sequential"}
POSE_LAYOUTS: dict[str, str | None] = {"": None} | LAYOUTS
JOINTS = {"num_classes": 17}

RESNET_VARIANTS: dict[str, dict[str, Any]] = {
    f"resnet{size}{suffix}": {"depths": depths, "layout": layout}
    for size, depths in DEPTHS.items()
    for suffix, layout in LAYOUTS.items()
}
POSE_RESNET_VARIANTS: dict[str, dict[str, Any]] = {
    f"pose_simplebaseline_r{size}{suffix}": JOINTS | {"depths": depths, "layout": layout}
    for size, depths in DEPTHS.items()
    for suffix, layout in POSE_LAYOUTS.items()
}

HRNET_VARIANTS: dict[str, dict[str, Any]] = {
    f"hrnet_w{width}{suffix}": {"width": width, "layout": layout}
    for width in WIDTHS
    for suffix, layout in LAYOUTS.items()
}
POSE_HRNET_VARIANTS: dict[tuple[int, int], dict[str, dict[str, Any]]] = {
    size: {
        f"pose_hrnet_w{width}{suffix}_{size[0]}x{size[1]}": JOINTS | {"width": width, "layout": layout}
        for width in WIDTHS
        for suffix, layout in POSE_LAYOUTS.items()
    }
    for size in ((256, 192), (384, 288))
}
"""By image size."""

POSE_HRNET_VARIANTS[256, 192] |= {
    f"pose_hrnet_w{width}{suffix}_allblocks_256x192": JOINTS
    | {"width": width, "layout": layout, "bottleneck_attention": True}
    for width in WIDTHS
    for suffix, layout in LAYOUTS.items()
}

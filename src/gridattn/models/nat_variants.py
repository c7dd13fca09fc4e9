"""Published variants of NAT, DiNAT, DiNAT_s and their isotropic forms, and dilations for dense prediction.

Dilations are cycles: a level repeats its own over its blocks. Sources: arXiv 2204.07143 (NAT), 2209.15001 (DiNAT).
"""

from typing import Any

CLASSIFICATION_224 = ((1, 8, 1), (1, 4, 1, 4), (1, 2), (1,))
CLASSIFICATION_384 = ((1, 13, 1), (1, 6, 1, 6), (1, 3), (1,))
SHIFTED_224 = ((1, 8), (1, 4), (1, 2), (1,))
SHIFTED_384 = ((1, 13), (1, 6), (1, 3), (1,))

DENSE_DILATIONS: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
    "nat": {
        "coco": ((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3, 1, 3, 1)),
        "ade20k": ((1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2, 1, 2, 1)),
        "ade20k_640": (
            (1, 20, 1),
            (1, 5, 1, 10),
            (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5),
            (1, 2, 1, 2, 1),
        ),
        "mask2former": (
            (1, 14, 1),
            (1, 4, 1, 7),
            (1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3),
            (1,),
        ),
    },
    "dinat_s": {
        "coco": ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
        "ade20k": ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
    },
}
"""By family and task: COCO detection, ADE20K segmentation at 512 and 640, Mask2Former (with windows of 11)."""

MINI = {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0, "drop_path_rate": 0.2}
TINY = MINI | {"depths": (3, 4, 18, 5)}
SMALL = TINY | {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0, "drop_path_rate": 0.3}
BASE = SMALL | {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5, "layer_scale": 1e-5}
LARGE = SMALL | {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}

NAT_VARIANTS: dict[str, dict[str, Any]] = {
    "nat_mini": MINI,
    "nat_tiny": TINY,
    "nat_small": SMALL | {"layer_scale": 1e-5},
    "nat_base": BASE,
    "dinat_mini": MINI | {"dilations": CLASSIFICATION_224},
    "dinat_tiny": TINY | {"dilations": CLASSIFICATION_224},
    "dinat_small": SMALL | {"dilations": CLASSIFICATION_224},
    "dinat_base": BASE | {"dilations": CLASSIFICATION_224},
    "dinat_large": LARGE | {"dilations": CLASSIFICATION_224},
}
NAT_384_VARIANTS: dict[str, dict[str, Any]] = {
    "dinat_large_384": LARGE | {"dilations": CLASSIFICATION_384},
    "dinat_large_384_11x11": LARGE | {"dilations": CLASSIFICATION_224, "kernel_size": 11},
}

SHIFTED_TINY = {
    "embed_dim": 96,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "mlp_ratio": 4.0,
    "dilations": SHIFTED_224,
    "drop_path_rate": 0.2,
}
SHIFTED_SMALL = SHIFTED_TINY | {"depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
SHIFTED_LARGE = SHIFTED_SMALL | {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}

DINAT_S_VARIANTS: dict[str, dict[str, Any]] = {
    "dinat_s_tiny": SHIFTED_TINY,
    "dinat_s_small": SHIFTED_SMALL,
    "dinat_s_base": SHIFTED_SMALL | {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5},
    "dinat_s_large": SHIFTED_LARGE,
}
DINAT_S_384_VARIANTS: dict[str, dict[str, Any]] = {"dinat_s_large_384": SHIFTED_LARGE | {"dilations": SHIFTED_384}}

ISOTROPIC_SMALL = {"embed_dim": 384, "num_heads": 12, "drop_path_rate": 0.1}
ISOTROPIC_BASE = {"embed_dim": 768, "num_heads": 24, "drop_path_rate": 0.4}
ISOTROPIC_VARIANTS: dict[str, dict[str, Any]] = {
    f"{name}_{size}": config | options
    for size, config in (("small", ISOTROPIC_SMALL), ("base", ISOTROPIC_BASE))
    for name, options in (
        ("nat_isotropic", {}),
        ("dinat_isotropic", {"dilation": 2}),
        ("vitrpb", {"kernel_size": None}),
    )
}

"""Published variants of MaxViT: the paper's T to XL, and later ones with other stems, tables and heads.

Sources: arXiv 2204.01697, and the configurations of timm for the `rw`, `rmlp` and `pm` forms.
"""

from typing import Any

TINY = {"embed_dim": (64, 128, 256, 512), "depths": (2, 2, 5, 2), "stem_width": 64, "head_hidden_size": 512}
SMALL = TINY | {"embed_dim": (96, 192, 384, 768), "head_hidden_size": 768}
BASE = SMALL | {"depths": (2, 6, 14, 2)}
LARGE = BASE | {"embed_dim": (128, 256, 512, 1024), "stem_width": 128, "head_hidden_size": 1024}
XLARGE = BASE | {"embed_dim": (192, 384, 768, 1536), "stem_width": 192, "head_hidden_size": 1536}

DROP_PATH_RATES = {"tiny": 0.2, "small": 0.3, "base": 0.4, "large": 0.6}
PAPER = {
    name: config | {"drop_path_rate": DROP_PATH_RATES[name]}
    for name, config in (("tiny", TINY), ("small", SMALL), ("base", BASE), ("large", LARGE))
}

TF_224_VARIANTS: dict[str, dict[str, Any]] = {f"maxvit_{name}_tf_224": config for name, config in PAPER.items()}
XLARGE_224_VARIANTS: dict[str, dict[str, Any]] = {
    "maxvit_xlarge_tf_224": XLARGE | {"drop_path_rate": 0.6, "num_classes": 21_843}
}
TF_FINE_TUNED_VARIANTS: dict[str, dict[str, Any]] = {
    f"maxvit_{name}_tf_{size}": config | {"img_size": size}
    for name, config in (PAPER | {"xlarge": XLARGE | {"drop_path_rate": 0.9}}).items()
    for size in (384, 512)
}

RW = {"variant": "rw", "head_hidden_size": None}
RW_PICO = RW | {"embed_dim": (32, 64, 128, 256), "depths": (2, 2, 5, 2), "stem_width": (24, 32)}
RW_NANO = RW | {"embed_dim": (64, 128, 256, 512), "depths": (1, 2, 3, 1), "stem_width": (32, 64)}
RW_TINY = RW_NANO | {"depths": (2, 2, 5, 2)}
RW_SMALL = RW_TINY | {"embed_dim": (96, 192, 384, 768), "position": "mlp", "layer_scale": 1e-6}
RW_BASE = RW | SMALL | {"variant": "rw", "depths": (2, 6, 14, 2), "stem_width": (32, 64), "position": "mlp"}

RW_VARIANTS: dict[str, dict[str, Any]] = {
    "maxvit_pico_rw_256": RW_PICO | {"img_size": 256},
    "maxvit_nano_rw_256": RW_NANO | {"img_size": 256},
    "maxvit_tiny_rw_224": RW_TINY,
    "maxvit_tiny_rw_256": RW_TINY | {"img_size": 256},
    "maxvit_rmlp_pico_rw_256": RW_PICO | {"position": "mlp", "img_size": 256},
    "maxvit_rmlp_nano_rw_256": RW_NANO | {"position": "mlp", "img_size": 256},
    "maxvit_rmlp_tiny_rw_256": RW_TINY | {"position": "mlp", "img_size": 256},
    "maxvit_rmlp_small_rw_256": RW_SMALL | {"img_size": 256},
    "maxvit_rmlp_base_rw_224": RW_BASE,
    "maxvit_tiny_pm_256": RW_TINY | {"parallel": True, "img_size": 256},
}
RW_SMALL_224_VARIANTS: dict[str, dict[str, Any]] = {"maxvit_rmlp_small_rw_224": RW_SMALL}
RW_384_VARIANTS: dict[str, dict[str, Any]] = {"maxvit_rmlp_base_rw_384": RW_BASE | {"img_size": 384}}

"""Settings of a training of about a second, one entry a system."""

from typing import Any

TINY: dict[str, dict[str, Any]] = {
    "classify": {
        "data": "textures",
        "image_size": 16,
        "attention": "global",
        "model_options": {"dims": [16], "depths": [1], "num_heads": [2], "patch_size": 4},
        "batch_size": 32,
        "epochs": 2,
        "lr": 1e-2,
    },
    "segment": {
        "data": "photographs",
        "crop_size": 32,
        "model_options": {"dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
        "attention": "global",
        "head": "upernet",
        "head_options": {"channels": 16, "norm": "layer", "dropout": 0.0},
        "aux_channels": 8,
        "batch_size": 8,
        "epochs": 2,
        "lr": 1e-2,
    },
    "detect": {
        "data": "scenes",
        "detector": "mask_rcnn",
        "model_options": {"dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
        "attention": "neighborhood",
        "image_size": 32,
        "finest": 8,
        "levels": 3,
        "channels": 8,
        "head_dim": 16,
        "batch_size": 4,
        "epochs": 2,
        "lr": 1e-2,
    },
}

"""Every family of backbones learns to classify, as one command trains it; each takes less than two minutes."""

from pathlib import Path
from typing import Any

import pytest

from gridattn.models import model_info
from gridattn.systems.classify import ClassifySettings, train_classifier
from tests.models.families import small_options, small_variants

POSE_FAMILIES = ("PoseHRNet", "PoseResNet")  # these give heat maps, not classes
FAMILIES = {family: name for family, name in small_variants().items() if family not in POSE_FAMILIES}
NARROW: dict[str, dict[str, Any]] = {
    "AgentCSWin": {"embed_dim": 32},
    "AgentDeiT": {"embed_dim": 96, "patch_size": 8},
    "AgentPVT": {"embed_dims": (32, 64, 96, 128), "num_heads": (1, 2, 3, 4)},
    "AgentSwin": {"embed_dim": 24, "num_heads": (1, 2, 4, 8)},
    "ConViT": {"embed_dim": 96, "patch_size": 8},
    "DaViT": {"embed_dims": (24, 48, 96, 192), "num_heads": (1, 2, 4, 8)},
    "DiNATs": {"embed_dim": 24, "num_heads": (1, 2, 4, 8)},
    "GridViT": {"depths": 3},
    "IsotropicNAT": {"embed_dim": 96, "num_heads": 3, "patch_size": 8},
    "NAT": {"embed_dim": 24, "num_heads": (1, 2, 4, 8)},
    "PPMA": {"embed_dims": (32, 64, 96, 128), "num_heads": (2, 2, 4, 8)},
    "SGFormer": {"embed_dims": (32, 64, 96, 128), "num_heads": (2, 4, 4, 8)},
}
"""Widths with which a family's small variant trains in time on two cores."""
TRAINING: dict[str, dict[str, Any]] = {
    "AgentDeiT": {"epochs": 25, "lr": 2e-3},
    "ConViT": {"epochs": 25, "lr": 2e-3},
    "GridViT": {"epochs": 20, "lr": 3e-3},
    "IsotropicNAT": {"epochs": 60, "lr": 2e-3},
    "SubspaceMobileNetV1": {"epochs": 20, "lr": 4e-3},
    "SubspaceMobileNetV2": {"epochs": 30, "lr": 4e-3},
    "TiC": {"epochs": 24, "lr": 6e-3},
}
"""Longer and faster training for networks of one resolution, and for very narrow ones."""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_variant_of_each_family_reaches_95_percent_on_digits(family: str, tmp_path: Path) -> None:
    options = small_options(FAMILIES[family]) | NARROW.get(family, {})
    options.pop("img_size", None)  # the image size of the settings is given to the model
    training = {"epochs": 12, "lr": 1e-3} | TRAINING.get(family, {})
    result = train_classifier(
        ClassifySettings(
            data="digits",
            model=FAMILIES[family],
            model_options=options,
            image_size=32,
            batch_size=32,
            weight_decay=0.05,
            warmup_epochs=1,
            clip_grad=1.0,
            drop_path_rate=0.0 if "drop_path_rate" in model_info(FAMILIES[family]).options else None,
            output=str(tmp_path / "run"),
            trainer={"accelerator": "cpu", "enable_progress_bar": False},
            **training,
        )
    )
    assert result["val_accuracy"] >= 0.95

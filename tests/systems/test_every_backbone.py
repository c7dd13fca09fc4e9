"""Every family of backbones learns to classify, as one command trains it; each takes less than two minutes."""

from pathlib import Path

import pytest

from gridattn.systems.classify import ClassifySettings, train_classifier
from tests.models.families import small_options, small_variants

IMAGE_SIZE = 32
POSE_FAMILIES = ("PoseHRNet", "PoseResNet")  # these give heat maps, not classes
FAMILIES = {family: name for family, name in small_variants().items() if family not in POSE_FAMILIES}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_variant_of_each_family_reaches_95_percent_on_digits(family: str, tmp_path: Path) -> None:
    options = small_options(FAMILIES[family])
    options |= {"img_size": IMAGE_SIZE} if "img_size" in options else {}
    result = train_classifier(
        ClassifySettings(
            data="digits",
            model=FAMILIES[family],
            model_options=options,
            image_size=IMAGE_SIZE,
            epochs=12,
            batch_size=64,
            lr=1e-3,
            weight_decay=0.05,
            warmup_epochs=1,
            clip_grad=1.0,
            drop_path_rate=0.0,
            output=str(tmp_path / "run"),
            trainer={"accelerator": "cpu", "enable_progress_bar": False},
        )
    )
    assert result["val_accuracy"] >= 0.95

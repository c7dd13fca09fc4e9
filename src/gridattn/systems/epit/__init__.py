"""EPIT: spatial super-resolution of light fields."""

from gridattn.systems.base import Demo, System
from gridattn.systems.epit.convert import convert_official
from gridattn.systems.epit.data import LightFields, list_light_fields, load_light_fields
from gridattn.systems.epit.evaluate import evaluate_epit, load_epit
from gridattn.systems.epit.files import read_light_field
from gridattn.systems.epit.metrics import scene_scores, view_psnr, view_ssim
from gridattn.systems.epit.model import EPIT, build_epit
from gridattn.systems.epit.predict import predict_views
from gridattn.systems.epit.task import EpitSettings, EpitTask
from gridattn.systems.epit.tiles import super_resolve
from gridattn.systems.epit.train import train_epit

SYSTEM = System(
    slug="epit",
    summary="light-field super-resolution with transformers on epipolar planes (EPIT)",
    settings=EpitSettings,
    train=train_epit,
    evaluate=evaluate_epit,
    predict=predict_views,
    demo=Demo(
        "val_psnr",
        threshold=30.0,
        baseline="29.27 dB, bicubic upsampling of the validation scenes",
        ablation={"epipolar": False},
        margin=0.7,
    ),
)

__all__ = [
    "EPIT",
    "SYSTEM",
    "EpitSettings",
    "EpitTask",
    "LightFields",
    "build_epit",
    "convert_official",
    "evaluate_epit",
    "list_light_fields",
    "load_epit",
    "load_light_fields",
    "predict_views",
    "read_light_field",
    "scene_scores",
    "super_resolve",
    "train_epit",
    "view_psnr",
    "view_ssim",
]

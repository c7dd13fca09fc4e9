"""Image classification with any backbone of the library."""

from gridattn.systems.base import Demo, System
from gridattn.systems.classify.evaluate import evaluate_classifier
from gridattn.systems.classify.export import Classifier, load_classifier, save_classifier
from gridattn.systems.classify.predict import predict_classes
from gridattn.systems.classify.task import ClassifySettings, ClassifyTask
from gridattn.systems.classify.train import train_classifier

SYSTEM = System(
    slug="classify",
    summary="image classification with any backbone and any attention",
    settings=ClassifySettings,
    train=train_classifier,
    evaluate=evaluate_classifier,
    predict=predict_classes,
    demo=Demo("val_accuracy", threshold=0.9, baseline="1/3, one of three textures by chance"),
)

__all__ = [
    "SYSTEM",
    "Classifier",
    "ClassifySettings",
    "ClassifyTask",
    "evaluate_classifier",
    "load_classifier",
    "predict_classes",
    "save_classifier",
    "train_classifier",
]

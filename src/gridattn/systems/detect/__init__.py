"""Object detection and instance segmentation with any backbone of the library."""

from gridattn.systems.base import Demo, System
from gridattn.systems.detect.data import load_detection_data
from gridattn.systems.detect.model import Detector, build_detector
from gridattn.systems.detect.predict import predict_objects
from gridattn.systems.detect.run import evaluate_detector, load_detector, train_detector
from gridattn.systems.detect.task import DetectSettings, DetectTask

SYSTEM = System(
    slug="detect",
    summary="RetinaNet, Faster R-CNN and Mask R-CNN on any backbone",
    settings=DetectSettings,
    train=train_detector,
    evaluate=evaluate_detector,
    predict=predict_objects,
    demo=Demo(
        "val_box_ap50",
        threshold=0.35,
        baseline="0.007, by 100 boxes an image that are drawn, with their classes, from training scenes",
    ),
)

__all__ = [
    "SYSTEM",
    "DetectSettings",
    "DetectTask",
    "Detector",
    "build_detector",
    "evaluate_detector",
    "load_detection_data",
    "load_detector",
    "predict_objects",
    "train_detector",
]

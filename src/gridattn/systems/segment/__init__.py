"""Semantic segmentation with any backbone of the library."""

from gridattn.systems.base import Demo, System
from gridattn.systems.segment.data import list_segmentation_data, load_segmentation
from gridattn.systems.segment.evaluate import evaluate_segmenter, load_segmenter
from gridattn.systems.segment.heads import FCNHead, SemanticFPNHead, UPerHead
from gridattn.systems.segment.inference import View, class_probabilities
from gridattn.systems.segment.model import Segmenter, build_segmenter
from gridattn.systems.segment.predict import predict_masks
from gridattn.systems.segment.task import SegmentSettings, SegmentTask
from gridattn.systems.segment.train import train_segmenter

SYSTEM = System(
    slug="segment",
    summary="semantic segmentation with any backbone, UPerNet or Semantic FPN",
    settings=SegmentSettings,
    train=train_segmenter,
    evaluate=evaluate_segmenter,
    predict=predict_masks,
    demo=Demo(
        "val_miou",
        threshold=0.55,
        baseline="0.048, the most frequent class (24 % of the validation pixels) everywhere",
    ),
)

__all__ = [
    "SYSTEM",
    "FCNHead",
    "SegmentSettings",
    "SegmentTask",
    "Segmenter",
    "SemanticFPNHead",
    "UPerHead",
    "View",
    "build_segmenter",
    "class_probabilities",
    "evaluate_segmenter",
    "list_segmentation_data",
    "load_segmentation",
    "load_segmenter",
    "predict_masks",
    "train_segmenter",
]

"""DCAL: fine-grained sorts and re-identification by global-local and pair-wise cross-attention."""

from gridattn.systems.base import Demo, System
from gridattn.systems.dcal.convert import backbone_state, google_state, start_from
from gridattn.systems.dcal.data import IdentityData, SortData, load_data
from gridattn.systems.dcal.evaluate import evaluate_dcal, load_network
from gridattn.systems.dcal.losses import batch_hard_triplet, dynamic_total
from gridattn.systems.dcal.metrics import Retrieval, ranked_queries, retrieval_report
from gridattn.systems.dcal.model import DCAL, VARIANTS, build_dcal
from gridattn.systems.dcal.predict import predict_dcal
from gridattn.systems.dcal.task import DualSettings, IdentityTask, SortTask
from gridattn.systems.dcal.train import train_dcal

SYSTEM = System(
    slug="dcal",
    summary="fine-grained sorts and re-identification by global-local and pair-wise cross-attention",
    settings=DualSettings,
    train=train_dcal,
    evaluate=evaluate_dcal,
    predict=predict_dcal,
    demo=Demo(
        "val_accuracy",
        threshold=0.55,
        baseline="0.0625, one of 16 sorts by chance",
        ablation={"branches": "sa"},
        margin=0.03,
    ),
)

__all__ = [
    "DCAL",
    "SYSTEM",
    "VARIANTS",
    "DualSettings",
    "IdentityData",
    "IdentityTask",
    "Retrieval",
    "SortData",
    "SortTask",
    "backbone_state",
    "batch_hard_triplet",
    "build_dcal",
    "dynamic_total",
    "evaluate_dcal",
    "google_state",
    "load_data",
    "load_network",
    "predict_dcal",
    "ranked_queries",
    "retrieval_report",
    "start_from",
    "train_dcal",
]

"""Routing Transformer: language models and image generators with heads that attend among similar positions."""

from gridattn.systems.base import Demo, System
from gridattn.systems.routing_transformer.predict import predict
from gridattn.systems.routing_transformer.run import evaluate, train
from gridattn.systems.routing_transformer.task import RoutingTransformerSettings

SYSTEM = System(
    slug="routing-transformer",
    summary="language model and image generator with attention inside clusters of similar positions",
    settings=RoutingTransformerSettings,
    train=train,
    evaluate=evaluate,
    predict=predict,
    demo=Demo(
        "val_accuracy",
        threshold=0.75,
        baseline="1/6, one of six attributes by chance",
        ablation={"routing": False},
        margin=0.25,
    ),
)

__all__ = ["SYSTEM"]

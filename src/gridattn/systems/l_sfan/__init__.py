"""L-SFAN: behaviour from body-worn sensors by attention among the sensors."""

from gridattn.systems.base import Demo, System
from gridattn.systems.l_sfan.convert import convert_checkpoint, convert_state
from gridattn.systems.l_sfan.data import SensorData, load_sensors
from gridattn.systems.l_sfan.evaluate import evaluate_sensors, load_network
from gridattn.systems.l_sfan.model import LSFAN, build_lsfan, relevance, sensor_weights
from gridattn.systems.l_sfan.predict import behaviour_of, predict_behaviour
from gridattn.systems.l_sfan.task import SensorSettings, SensorTask
from gridattn.systems.l_sfan.train import train_sensors
from gridattn.systems.l_sfan.windows import Recording, Standardise, Windows

SYSTEM = System(
    slug="l-sfan",
    summary="behaviour from body-worn sensors over time, by attention among the sensors",
    settings=SensorSettings,
    train=train_sensors,
    evaluate=evaluate_sensors,
    predict=predict_behaviour,
    demo=Demo(
        "val_accuracy",
        threshold=0.95,
        baseline="0.547, the more frequent class (164 of the 300 validation windows)",
        ablation={"num_heads": 0},
        margin=0.3,
    ),
)

__all__ = [
    "LSFAN",
    "SYSTEM",
    "Recording",
    "SensorData",
    "SensorSettings",
    "SensorTask",
    "Standardise",
    "Windows",
    "behaviour_of",
    "build_lsfan",
    "convert_checkpoint",
    "convert_state",
    "evaluate_sensors",
    "load_network",
    "load_sensors",
    "predict_behaviour",
    "relevance",
    "sensor_weights",
    "train_sensors",
]

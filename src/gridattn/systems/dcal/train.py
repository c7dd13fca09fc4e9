"""Training of DCAL, from settings to exported network."""

from typing import Any

from gridattn.data.sampling import Draws
from gridattn.systems.base import start_run
from gridattn.systems.dcal.convert import start_from
from gridattn.systems.dcal.data import IdentityData, IdentitySamples, SightingSamples, load_data
from gridattn.systems.dcal.model import build_dcal
from gridattn.systems.dcal.task import DualSettings, IdentityTask, SortTask
from gridattn.systems.trained import train_and_export, trained_exporter

SAME = (
    *("data", "seed", "batch_size", "model", "model_options", "branches", "ratio", "glca_depth", "pwca_depth", "pair"),
    *("readout", "image_size", "resize", "flip", "pad", "erase", "instances"),
)
"""Settings that a resumed run shares with its checkpoint: they shape the weights or the samples."""


def train_dcal(settings: DualSettings) -> dict[str, Any]:
    """Trains a network and exports the best and the last epoch's weights.

    The run folder then holds what `RunFolder` lists. The best epoch is the one with the highest val_accuracy on the
    test pictures, or the highest val_map on queries and gallery: the datasets come without a part for this choice.

    Args:
        settings: what to train, on what, and how.

    Returns:
        Metrics of the best epoch: val_accuracy (mean of softmax over SA and GLCA), val_accuracy_sa, val_accuracy_glca
        and val_loss, or val_map, val_minp and val_cmc1; train_accuracy and so on; `parameters`, the size of the
        network; `model`, the folder of the exported network. An empty dict in all processes but the first.

    Raises:
        ValueError: settings that are not allowed, or a dataset, weights or run folder that cannot be used.
    """
    data = load_data(settings.data)
    folder = start_run(settings, SAME)
    views = settings.views()
    drawn = views.drawn(settings.flip, settings.pad, settings.erase)
    by_identity = isinstance(data, IdentityData)
    network = settings.network(data.identities if by_identity else len(data.classes), neck=by_identity)
    model = build_dcal(**network)
    if settings.weights is not None:
        start_from(model, settings.weights)
    about = {
        "data": settings.data,
        "classes": None if by_identity else list(data.classes),
        "views": views.plain(),
    }
    if by_identity:
        task = IdentityTask(model, settings)
        train = IdentitySamples(data, drawn, settings.instances, settings.seed)
        val = SightingSamples(data.query, data.gallery, views.fixed())
    else:
        task = SortTask(model, settings)
        train, val = Draws(data.train, drawn, settings.seed), Draws(data.val, views.fixed())
    export = trained_exporter(task, network, about)
    monitor = "val_map" if by_identity else "val_accuracy"
    return train_and_export(task, train, val, folder, export, monitor=monitor)

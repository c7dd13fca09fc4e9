"""Training of a super-resolution network for light fields, from settings to exported model."""

from typing import Any

from gridattn.systems.base import start_run
from gridattn.systems.epit.convert import start_from
from gridattn.systems.epit.data import Patches, WholeScenes, load_light_fields
from gridattn.systems.epit.model import build_epit
from gridattn.systems.epit.task import EpitSettings, EpitTask
from gridattn.systems.trained import train_and_export, trained_exporter

NETWORK = ("scale", "channels", "blocks", "num_heads", "epipolar")
SAME = (*NETWORK, "data", "seed", "batch_size", "ang_res", "patch", "augment", "flicker", "noise")
"""Settings that a resumed run shares with its checkpoint: they shape the weights or the samples."""


def train_epit(settings: EpitSettings) -> dict[str, Any]:
    """Trains a network and exports the best and the last epoch's weights.

    The run folder then holds what `RunFolder` lists. In a run of several processes every one of them calls this.

    Args:
        settings: what to train, on what, and how.

    Returns:
        Metrics of the best epoch: epoch, val_psnr (dB), val_ssim, val_ssim_range1, val_centre_psnr, train_loss and so
        on; `parameters`, the size of the network; `model`, the folder of the exported network. An empty dict in all
        processes but the first.

    Raises:
        ValueError: settings that are not allowed, or a dataset, weights or run folder that cannot be used.
    """
    folder = start_run(settings, SAME)
    data = load_light_fields(settings.data, ang_res=settings.ang_res, scale=settings.scale, side=settings.patch)
    keywords = {name: getattr(settings, name) for name in NETWORK}
    model = build_epit(**keywords)
    if settings.weights is not None:
        start_from(model, settings.weights)
    task = EpitTask(model, settings, len(data.groups))
    about = {name: getattr(settings, name) for name in ("data", "ang_res", "flicker", "noise", "tile", "stride")}
    degrade = settings.degradation
    train = Patches(data, degrade, settings.patch, settings.augment, settings.seed)
    export = trained_exporter(task, keywords, about)
    return train_and_export(task, train, WholeScenes(data, degrade), folder, export, monitor="val_psnr")

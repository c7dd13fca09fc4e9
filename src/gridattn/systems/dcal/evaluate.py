"""Measuring a trained network on test pictures, or on queries and a gallery."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gridattn.data.sampling import Draws
from gridattn.systems.base import pick_device
from gridattn.systems.classify.task import classification_report
from gridattn.systems.dcal.data import IdentityData, SightingSamples, SortData, load_data
from gridattn.systems.dcal.metrics import Retrieval
from gridattn.systems.dcal.model import DCAL, build_dcal
from gridattn.systems.dcal.task import TINY
from gridattn.systems.dcal.transforms import Views
from gridattn.systems.output import write_json
from gridattn.systems.settings import check_least
from gridattn.systems.trained import load_trained


@dataclass(frozen=True)
class TrainedDual:
    """A trained network with its preprocessing and names; `classes` is None for one that tells identities."""

    network: DCAL
    data: str
    classes: tuple[str, ...] | None
    views: Views


def load_network(checkpoint: str) -> TrainedDual:
    """Loads a run folder or an exported network.

    Raises:
        ValueError: a path without a trained DCAL, or damaged files.
    """
    trained = load_trained(checkpoint, "dcal", build_dcal)
    try:
        data, classes = str(trained.about["data"]), trained.about["classes"]
        views = Views.of(trained.about["views"])
        names = None if classes is None else tuple(map(str, classes))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint={checkpoint!r} is damaged: {type(error).__name__} {error}") from None
    network: Any = trained.model
    return TrainedDual(network, data, names, views)


def evaluate_dcal(
    checkpoint: str,
    data: str | None = None,
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: str | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Accuracy of a trained network by sort, or how well it finds identities in a gallery.

    Args:
        checkpoint: run folder, or folder of an exported network.
        data: dataset, as `load_data` takes it; None takes the one it was trained on. Sorts are matched by name.
        batch_size: pictures per step.
        workers: processes that load data.
        device: such as "cpu" or "cuda:0"; None takes the accelerator where there is one.
        output: file for the metrics, JSON; None writes none.

    Returns:
        By sort: what `classification_report` gives of the mean of softmax over SA and GLCA, and accuracy_sa and
        accuracy_glca. By identity: what `retrieval_report` gives. Both with the `data` measured.

    Raises:
        ValueError: a checkpoint or dataset that cannot be used, or a sort that the network does not know.
    """
    check_least("batch_size", batch_size, 1)
    check_least("workers", workers, 0)
    loaded = load_network(checkpoint)
    where = pick_device(device)
    found = load_data(data or loaded.data)
    loaded.network.to(where)
    if isinstance(found, IdentityData):
        report = _by_identity(loaded, found, batch_size, workers, where)
    else:
        report = _by_sort(loaded, found, batch_size, workers, where)
    report = {"data": found.spec, **report}
    if output is not None:
        write_json(output, report)
    return report


def _by_sort(loaded: TrainedDual, data: SortData, batch: int, workers: int, device: torch.device) -> dict[str, Any]:
    if loaded.classes is None:
        raise ValueError(f"data={data.spec!r} is by sort; the network tells identities")
    unknown = sorted(set(data.classes) - set(loaded.classes))
    if unknown:
        raise ValueError(f"data={data.spec!r} has the sort {unknown[0]!r}, which the network does not know")
    label = torch.tensor([loaded.classes.index(name) for name in data.classes])
    each: dict[str, list[Tensor]] = {}
    targets: list[Tensor] = []
    with torch.inference_mode():
        for images, target in DataLoader(Draws(data.val, loaded.views.fixed()), batch, num_workers=workers):
            for name, logits in loaded.network(images.to(device)).logits.items():
                each.setdefault(name, []).append(logits.float().softmax(1).cpu())
            targets.append(label[target])
    truth = torch.cat(targets)
    branches = {name: torch.cat(parts) for name, parts in each.items()}
    joint = torch.stack(list(branches.values())).mean(0)
    alone = {f"accuracy_{name}": float((p.argmax(1) == truth).float().mean()) for name, p in branches.items()}
    return {**alone, **classification_report(joint.clamp_min(TINY).log(), truth, loaded.classes)}


def _by_identity(
    loaded: TrainedDual, data: IdentityData, batch: int, workers: int, device: torch.device
) -> dict[str, Any]:
    if loaded.classes is not None:
        raise ValueError(f"data={data.spec!r} is by identity; the network tells the sorts {', '.join(loaded.classes)}")
    samples, metric = SightingSamples(data.query, data.gallery, loaded.views.fixed()), Retrieval()
    with torch.inference_mode():
        for images, *labels in DataLoader(samples, batch, num_workers=workers):
            metric.update(loaded.network.embedding(images.to(device)).cpu(), *labels)
    return metric.compute()

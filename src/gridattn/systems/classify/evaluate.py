"""Measuring a trained classifier on labelled images."""

from typing import Any

import torch
from torch.utils.data import DataLoader

from gridattn.data import Draws, ImageDataset, load_dataset
from gridattn.data.datasets import Pictures
from gridattn.ops.common import check_choice
from gridattn.systems.base import pick_device
from gridattn.systems.classify.export import load_classifier
from gridattn.systems.classify.task import classification_report
from gridattn.systems.output import write_json
from gridattn.systems.settings import check_least


def evaluate_classifier(
    checkpoint: str,
    data: str | None = None,
    *,
    split: str = "val",
    batch_size: int = 64,
    workers: int = 0,
    device: str | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Accuracy of a trained classifier, per class and in all.

    Args:
        checkpoint: run folder, or folder of an exported classifier.
        data: dataset, as `load_dataset` takes it; None takes the one it was trained on. Classes are matched by name.
        split: "val", the part that training does not see, or "all", for a folder of further images.
        batch_size: images per step.
        workers: processes that load data.
        device: such as "cpu" or "cuda:0"; None takes the accelerator where there is one.
        output: file for the metrics, JSON; None writes none.

    Returns:
        What `classification_report` gives, with the `data` and `split` measured.

    Raises:
        ValueError: a checkpoint or dataset that cannot be used, or a class that the classifier does not know.
    """
    check_choice("split", split, ("val", "all"))
    check_least("batch_size", batch_size, 1)
    classifier = load_classifier(checkpoint)
    where = pick_device(device)
    dataset = load_dataset(data or classifier.data, classifier.preprocess.image_size, seed=classifier.seed)
    unknown = sorted(set(dataset.classes) - set(classifier.classes))
    if unknown:
        raise ValueError(
            f"data={dataset.spec!r} has the class {unknown[0]!r}; the classifier knows {', '.join(classifier.classes)}"
        )
    label = torch.tensor([classifier.classes.index(name) for name in dataset.classes])
    pictures = Draws(_pictures(dataset, split), classifier.preprocess.transform())
    model = classifier.model.to(where)
    logits: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    with torch.inference_mode():
        for images, target in DataLoader(pictures, batch_size, num_workers=workers):
            logits.append(model(images.to(where)).float().cpu())
            targets.append(label[target])
    report = classification_report(torch.cat(logits), torch.cat(targets), classifier.classes)
    report = {"data": dataset.spec, "split": split, **report}
    if output is not None:
        write_json(output, report)
    return report


def _pictures(dataset: ImageDataset, split: str) -> Pictures:
    val, train = dataset.val.source, dataset.train.source
    if split == "val":
        return val
    if not dataset.spec.startswith("folder:"):
        raise ValueError(f"split='all' is for folders of images; data={dataset.spec!r} allows 'val'")
    return Pictures([*train.pictures, *val.pictures], [*train.labels, *val.labels], val.read)

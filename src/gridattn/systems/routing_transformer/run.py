"""Training and measuring a density model of sequences."""

from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from gridattn.systems.base import pick_device, start_run
from gridattn.systems.output import write_json
from gridattn.systems.routing_transformer.data import SequenceData, load_data
from gridattn.systems.routing_transformer.generate import stepwise_logits
from gridattn.systems.routing_transformer.model import build_model, shift_right
from gridattn.systems.routing_transformer.task import RoutingTransformerSettings, SequenceTask, measure, summary
from gridattn.systems.routing_transformer.text import stored_codec
from gridattn.systems.routing_transformer.variants import VARIANTS
from gridattn.systems.settings import check_least
from gridattn.systems.trained import Trained, load_trained, train_and_export, trained_exporter

SLUG = "routing-transformer"
_NETWORK = ("flavour", "dim", "depth", "num_heads", "window_size", "num_clusters", "dropout", "decay")
SAME = (
    *_NETWORK,
    *("data", "length", "routing", "variant", "local_heads", "cluster_size", "network", "seed", "batch_size"),
)
"""Settings that a resumed run shares with its checkpoint: they shape the weights or the order of the samples."""


def train(settings: RoutingTransformerSettings) -> dict[str, Any]:
    """Trains a language model or an image generator and exports the networks of the best and of the last epoch.

    Args:
        settings: what to train, on what, and how.

    Returns:
        Metrics of the best epoch: val_loss, val_perplexity, val_bits, val_accuracy and so on; `parameters` and `model`.
        An empty dict in all processes but the first.

    Raises:
        ValueError: settings that are not allowed, or data or a run folder that cannot be used.
    """
    folder = start_run(settings, SAME)
    data = load_data(settings.data, settings.length, settings.seed)
    keywords = network_keywords(settings, data)
    try:
        model = build_model(**keywords)
    except TypeError as error:
        raise ValueError(f"network={settings.network!r} is not allowed: {error}") from None
    about = {
        "data": settings.data,
        "length": data.length,
        "codec": None if data.codec is None else data.codec.stored(),
    }
    task = SequenceTask(model, settings)
    export = trained_exporter(task, keywords, about)
    return train_and_export(task, data.train, data.val, folder, export, monitor="val_loss", mode="min")


def network_keywords(settings: RoutingTransformerSettings, data: SequenceData) -> dict[str, Any]:
    """Keywords of `build_model` for the settings; vocabulary and image size are those of the data."""
    if settings.variant is not None:
        chosen = {**VARIANTS[settings.variant], "dropout": settings.dropout, "decay": settings.decay}
        if chosen["kind"] != data.kind:
            raise ValueError(f"variant={settings.variant!r} is for {chosen['kind']}; data={settings.data!r} is not")
    else:
        chosen = {name: value for name, value in asdict(settings).items() if name in _NETWORK}
        size = settings.cluster_size
        chosen["cluster_size"] = -(-data.length // settings.num_clusters) if size is None else size
        chosen |= {"local_heads": settings.local_heads, **settings.network}
    if not settings.routing:
        chosen["local_heads"] = chosen["num_heads"]
    image = None if data.image is None else list(data.image)
    return {**chosen, "kind": data.kind, "symbols": data.symbols, "image": image}


def load_model(checkpoint: str) -> Trained:
    """A trained model, see `load_trained`."""
    return load_trained(checkpoint, SLUG, build_model)


def load_own_data(trained: Trained, data: str | None = None) -> SequenceData:
    """A data set whose symbols mean what the trained model learned; that of its training unless another is named.

    Raises:
        ValueError: data of another kind, vocabulary or image size.
    """
    about = trained.about
    spec = data or about["data"]
    found = load_data(spec, about["length"], codec=stored_codec(about["codec"]))
    known = trained.network
    image = None if known["image"] is None else tuple(known["image"])
    if (found.kind, found.symbols, found.image) != (known["kind"], known["symbols"], image):
        raise ValueError(
            f"data={spec!r} is {found.kind} of {found.symbols} symbols, image {found.image}; the model is of "
            f"{known['kind']} of {known['symbols']} symbols, image {image}"
        )
    return found


def evaluate(
    checkpoint: str,
    data: str | None = None,
    *,
    stepwise: bool = False,
    limit: int = 0,
    batch_size: int = 16,
    workers: int = 0,
    device: str | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Likelihood of validation data under a trained model.

    Args:
        checkpoint: run folder, or folder of an exported model.
        data: as in training; None takes the data of the training.
        stepwise: computes every position from those before it alone, as in generation. All positions at once, the
            centroids choose by looking at all of them, which leaks a little of what is to be predicted.
        limit: sequences to measure; 0 for all.
        batch_size: sequences per step.
        workers: processes that load data.
        device: such as "cpu" or "cuda:0"; None takes the accelerator where there is one.
        output: file for the metrics, JSON; None writes none.

    Returns:
        loss (nats per symbol), perplexity, bits (per byte or sub-pixel), accuracy, symbols (how many counted),
        sequences, data, stepwise, the baselines of embedded data, and for text word_perplexity = exp(nats in all /
        words), unless `limit` is given.

    Raises:
        ValueError: a checkpoint or data that cannot be used.
    """
    check_least("batch_size", batch_size, 1)
    check_least("limit", limit, 0)
    trained = load_model(checkpoint)
    found = load_own_data(trained, data)
    where = pick_device(device)
    model = trained.model.to(where)
    total = torch.zeros(3, dtype=torch.float64)  # nats, hits, symbols
    count = min(limit, len(found.val)) if limit else len(found.val)
    indices = torch.utils.data.Subset(found.val, range(count))
    with torch.inference_mode():
        for symbols, counted in DataLoader(indices, batch_size, num_workers=workers):
            symbols, counted = symbols.to(where), counted.to(where)
            if stepwise:
                logits = torch.stack(list(stepwise_logits(model, symbols)), 1)  # pyright: ignore[reportArgumentType]
            else:
                logits = model(shift_right(symbols))[0]
            nats, hits = measure(logits, symbols, counted)
            total += torch.stack([nats.double().sum(), hits.double().sum(), counted.double().sum()]).cpu()
    nats, hits, number = total
    metrics = {**summary(nats / number, hits / number), "symbols": int(number), "sequences": count}
    if found.words and not limit:
        metrics["word_perplexity"] = float(min(nats / found.words, torch.tensor(700.0)).exp())
    baselines = {f"baseline_{name}": value for name, value in found.baselines.items()}
    report = {"data": data or trained.about["data"], "stepwise": stepwise, **metrics, **baselines}
    if output is not None:
        write_json(output, report)
    return report


def held_out(data: SequenceData, count: int) -> torch.Tensor:
    """The first validation sequences, (count, length)."""
    return torch.stack([data.val[i][0] for i in islice(range(len(data.val)), count)])

"""The training step of a density model of sequences, and its settings."""

from dataclasses import dataclass, field
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from gridattn.ops.common import check_choice, check_probability
from gridattn.systems.base import Task
from gridattn.systems.routing_transformer.model import FLAVOURS, SequenceModel, shift_right
from gridattn.systems.routing_transformer.variants import VARIANTS
from gridattn.systems.settings import RunSettings, check_least

IGNORED = -100


@dataclass
class RoutingTransformerSettings(RunSettings):
    """Settings of the training of a language model or an image generator with routing heads.

    Args:
        data: "recall", "docstrings", "digits", or "enwik8:PATH", "wikitext103:PATH", "pg19:PATH", "bytes:PATH",
            "imagenet64:PATH".
        length: positions per sequence of text.
        routing: False makes local heads of all routing heads.
        variant: a published configuration, one of `VARIANTS`, in place of all following settings of the network but
            dropout and decay.
        flavour: "package", pre-norm blocks with rotary positions, or "paper", post-norm blocks of the paper's program.
        dim: channels.
        depth: blocks.
        num_heads: heads of a block.
        local_heads: how many of them are local; one number, or one a block.
        window_size: positions per block of local heads.
        num_clusters: centroids per routing head.
        cluster_size: positions that a centroid takes; length / num_clusters when None.
        dropout: probability, in all places of the network.
        decay: of the centroids, per optimiser step.
        network: further keywords of `build_model`, such as hidden, head_dim, embedding, gated, shift, norm, reach.
        commitment: weight of the loss that pulls vectors to their centroids.
        truncate: crops every training batch to a random length, so that short prefixes are learned, too.
        token_dropout: part of the symbols before a position that the model is told as 0 in training.
        warmup_steps: of the schedule "rsqrt", lr * sqrt(warmup_steps / max(step, warmup_steps)).
    """

    data: str = "recall"
    length: int = 96
    routing: bool = True
    variant: str | None = None
    flavour: str = "package"
    dim: int = 48
    depth: int = 2
    num_heads: int = 4
    local_heads: int | list[int] = 2
    window_size: int = 8
    num_clusters: int = 6
    cluster_size: int | None = None
    dropout: float = 0.0
    decay: float = 0.999
    network: dict[str, Any] = field(default_factory=dict)
    commitment: float = 1e-4
    truncate: bool = False
    token_dropout: float = 0.0
    warmup_steps: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("flavour", self.flavour, FLAVOURS)
        if self.variant is not None:
            check_choice("variant", self.variant, sorted(VARIANTS))
        for name in ("length", "dim", "depth", "num_heads", "window_size", "num_clusters", "warmup_steps"):
            check_least(name, getattr(self, name), 1)
        if self.length < 2:
            raise ValueError(f"length={self.length} is not allowed; it must be at least 2")
        check_least("commitment", self.commitment, 0)
        for name in ("dropout", "decay", "token_dropout"):
            check_probability(name, getattr(self, name))


class SequenceTask(Task):
    """Cross entropy of every symbol given those before it, plus the commitment loss of the routing heads.

    Logs train_loss (nats per symbol, with the commitment loss), val_loss (nats per symbol), val_perplexity = exp
    val_loss, val_bits = val_loss / ln 2 (bits per byte or per sub-pixel), val_accuracy and lr. Symbols that do not
    count are left out of all of them.

    Args:
        model: see `SequenceModel`.
        settings: of the run.
    """

    def __init__(self, model: SequenceModel, settings: RoutingTransformerSettings) -> None:
        super().__init__("routing-transformer", model, settings)
        self.options = settings
        self.nats = MeanMetric()
        self.hits = MeanMetric()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        symbols, counted = batch
        if self.options.truncate:
            # The same length in all processes.
            generator = torch.Generator().manual_seed(hash((self.options.seed, self.global_step)) % 2**63)
            length = int(torch.randint(2, symbols.shape[1] + 1, (), generator=generator))
            symbols, counted = symbols[:, :length], counted[:, :length]
        previous = shift_right(symbols)
        if self.options.token_dropout:
            previous = previous * (torch.rand(previous.shape, device=previous.device) >= self.options.token_dropout)
        logits, auxiliary = self.model(previous)
        nats, _ = measure(logits, symbols, counted)
        loss = nats.sum() / counted.sum().clamp_min(1) + self.options.commitment * auxiliary
        self.log("train_loss", loss, on_epoch=True, on_step=False, batch_size=len(symbols), sync_dist=True)
        optimizer: Any = self.optimizers()
        self.log(
            "lr", optimizer.param_groups[0]["lr"], on_epoch=True, on_step=False, batch_size=len(symbols), reduce_fx=max
        )
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.model.update_centroids()  # pyright: ignore[reportCallIssue]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        symbols, counted = batch
        nats, hits = measure(self.model(shift_right(symbols))[0], symbols, counted)
        weight = counted.float()
        self.nats.update(nats, weight)
        self.hits.update(hits, weight)

    def on_validation_epoch_end(self) -> None:
        for name, value in summary(self.nats.compute(), self.hits.compute()).items():
            self.log(f"val_{name}", value)
        self.nats.reset()
        self.hits.reset()

    def optimization(self, steps_per_epoch: int) -> Any:
        if self.options.schedule != "rsqrt":
            return super().optimization(steps_per_epoch)
        warmup, self.options.schedule = self.options.warmup_steps, "none"
        try:
            optimizer = super().optimization(steps_per_epoch)
        finally:
            self.options.schedule = "rsqrt"
        scheduler = LambdaLR(optimizer, lambda step: (warmup / max(step, warmup)) ** 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if isinstance(scheduler, LambdaLR):
            scheduler.step()
        else:
            super().lr_scheduler_step(scheduler, metric)


def measure(logits: Tensor, symbols: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log likelihood in nats and whether the best symbol is right, (B, T) each; 0 where nothing counts.

    Example:
        >>> nats, _ = measure(torch.zeros(1, 1, 256), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1).bool())
        >>> round(float(nats) / log(2), 6)
        8.0
    """
    target = symbols.masked_fill(~counted, IGNORED)
    nats = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none")
    return nats.view(target.shape), (logits.argmax(-1) == target).float()


def summary(nats: Tensor, hits: Tensor) -> dict[str, float]:
    """loss, perplexity, bits and accuracy from the means of `measure`."""
    loss = float(nats)
    return {
        "loss": loss,
        "perplexity": float(torch.tensor(loss, dtype=torch.float64).exp()),
        "bits": loss / log(2),
        "accuracy": float(hits),
    }

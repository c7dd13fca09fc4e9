"""Sampling from a sequence model, with a cache or by running the whole prefix again."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gridattn.systems.routing_transformer.model import SequenceModel, shift_right
from gridattn.systems.settings import check_least


@torch.no_grad()
def generate(
    model: SequenceModel,
    prompt: Tensor,
    count: int,
    *,
    limit: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    cache: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continues sequences.

    With the cache, the prompt is run once, then every new position alone. Without it, the whole prefix is run for every
    new position. Both give the same logits as long as no centroid has to leave a position out, that is for heads that
    are all local and for clusters at least as large as the sequence. Otherwise a new position can push an earlier one
    out of a cluster. Running the whole prefix then changes what earlier positions give to later layers; with the cache
    they keep what they had.

    Args:
        model: in eval mode.
        prompt: (B, n) int64; n may be 0.
        count: new symbols.
        limit: longest sequence that the model is run on; a text that grows beyond goes on from its latter half.
        temperature: divides the logits after the filter; 0 takes the best symbol.
        top_k: keeps the k best symbols.
        top_p: keeps the best symbols up to this sum of probabilities, see `filter_logits`.
        cache: see above.
        generator: of the random numbers, on the CPU.

    Returns:
        (B, n + count).

    Raises:
        ValueError: a count, limit or temperature below what is possible.
    """
    check_least("count", count, 0)
    check_least("limit", limit, 2)
    check_least("temperature", temperature, 0)
    symbols, window = prompt, prompt[:, max(0, prompt.shape[1] - limit + 1) :]
    caches = None
    for _ in range(count):
        if window.shape[1] >= limit:
            window, caches = window[:, window.shape[1] - limit // 2 :], None
        if caches is None:
            caches = model.new_caches() if cache else None
            logits = model(torch.cat([window.new_zeros(len(window), 1), window], 1), None, caches)[0]
        else:
            logits = model.step(window[:, -1:], window.shape[1], caches)
        new = _draw(logits[:, -1].float(), temperature, top_k, top_p, generator)
        symbols, window = torch.cat([symbols, new], 1), torch.cat([window, new], 1)
    return symbols


@torch.no_grad()
def stepwise_logits(model: SequenceModel, symbols: Tensor) -> Iterator[Tensor]:
    """Logits (B, symbols) of one position after the other, of which none can depend on what follows it.

    All at once, centroids choose among all positions, so that which earlier positions a cluster holds depends a little
    on later ones. Here they choose among those that exist so far, as in generation with the cache.
    """
    caches, previous = model.new_caches(), shift_right(symbols)
    for place in range(symbols.shape[1]):
        yield model.step(previous[:, place : place + 1], place, caches)[:, -1]


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Sets the logits of improbable symbols to minus infinity; the best one always stays.

    Args:
        logits: (B, symbols).
        top_k: keeps the k largest.
        top_p: keeps a symbol if those that are more probable have a sum of at most this.

    Raises:
        ValueError: a `top_k` below 1 or a `top_p` outside [0, 1].

    Example:
        >>> filter_logits(torch.tensor([[2.0, 1.0, 0.0]]), top_k=2).tolist()
        [[2.0, 1.0, -inf]]
    """
    if top_k is not None:
        check_least("top_k", top_k, 1)
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        if not 0 <= top_p <= 1:
            raise ValueError(f"top_p={top_p!r} is not allowed; it must be a number in [0, 1]")
        ordered, order = logits.sort(-1, descending=True)
        probability = ordered.softmax(-1)
        improbable = probability.cumsum(-1) - probability > top_p
        logits = logits.scatter(-1, order, ordered.masked_fill(improbable, -torch.inf))
    return logits


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    kept = filter_logits(logits, top_k, top_p)
    if not temperature:
        return kept.argmax(-1, keepdim=True)
    chances = (kept / temperature).softmax(-1)
    return torch.multinomial(chances.cpu(), 1, generator=generator).to(logits.device)

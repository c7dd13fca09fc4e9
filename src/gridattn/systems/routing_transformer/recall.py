"""A task that takes long-range recall: facts in any order, then questions about them."""

import torch
from torch import Tensor

from gridattn.data.sampling import SeededSamples
from gridattn.systems.routing_transformer.text import WordCodec

CLASSES, ATTRIBUTES, FACTS, QUESTIONS = 12, 6, 64, 16


class RecallSequences(SeededSamples):
    """64 facts "class = attribute", then 16 pairs of a question "class?" and its answer.

    Which attribute a class has is drawn for every sequence. Every class occurs, most of them several times, in random
    order. Only the answers count. 1/6 of the answers are right by chance.

    Args:
        size: sequences per epoch; each epoch has new ones.
        seed: of all sequences.

    Example:
        >>> tokens, counted = RecallSequences(8)[0]
        >>> tokens.shape, int(counted.sum())
        (torch.Size([96]), 16)
    """

    HELD_OUT = 2**31 - 1
    """Seed of validation, which is the same for all runs."""

    length = FACTS + 2 * QUESTIONS

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__(seed)
        self.size = size

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        attribute = torch.randint(ATTRIBUTES, (CLASSES,))
        classes = torch.cat([torch.arange(CLASSES), torch.randint(CLASSES, (FACTS - CLASSES,))])
        classes = classes[torch.randperm(FACTS)]
        asked = torch.randint(CLASSES, (QUESTIONS,))
        facts = classes * ATTRIBUTES + attribute[classes]
        first = CLASSES * ATTRIBUTES
        pairs = torch.stack([first + asked, first + CLASSES + attribute[asked]], 1)
        return torch.cat([facts, pairs.flatten()]), self._answers()

    def padding(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.length, dtype=torch.int64), torch.zeros(self.length, dtype=torch.bool)

    def _answers(self) -> Tensor:
        place = torch.arange(self.length)
        return (place >= FACTS) & ((place - FACTS) % 2 == 1)


def is_answer(symbols: Tensor) -> Tensor:
    """Where the symbols are answers, bool."""
    return symbols >= CLASSES * (ATTRIBUTES + 1)


def recall_codec() -> WordCodec:
    """Words for the symbols: facts such as `k3=v2`, questions such as `k3?`, answers such as `v2`."""
    facts = [f"k{c}=v{a}" for c in range(CLASSES) for a in range(ATTRIBUTES)]
    questions = [f"k{c}?" for c in range(CLASSES)]
    return WordCodec([*facts, *questions, *(f"v{a}" for a in range(ATTRIBUTES))], first=0)

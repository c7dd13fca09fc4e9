"""Order and randomness of training samples as pure functions of (seed, epoch, index), so that a run can stop anywhere.

A *draw* is the number `epoch * size + index`: it names one look at one sample. The sampler hands out draws, and the
dataset seeds every random generator from `(seed, draw)` before it augments. Which process or worker does it, and what
was computed before, has no influence.
"""

import random
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Runs its block with the CPU generators of `random`, numpy and torch seeded from `key`, then puts them back.

    Example:
        >>> with seeded(0, 7):
        ...     a = torch.rand(())
        >>> with seeded(0, 7):
        ...     b = torch.rand(())
        >>> bool(a == b)
        True
    """
    # timm's transforms draw from numpy's global generator, so that this one has to be seeded.
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        seed_generators(*key)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def seed_generators(*key: int) -> None:
    """Seeds the generators of `random`, numpy and the CPU generator of torch from a tuple of ints of at least 0."""
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])  # noqa: NPY002
    torch.default_generator.manual_seed(int(words[2]))


class SeededSamples(Dataset[Any]):
    """Samples by draw number, made under generators seeded from (seed, draw).

    A subclass defines `__len__`, `sample` and, where it is used for validation in several processes, `padding`. It may
    define `collate`, which makes a batch of a list of samples.

    Args:
        seed: the run's seed.
    """

    collate: Callable[[list[Any]], Any] | None = None

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __len__(self) -> int:
        raise NotImplementedError

    def sample(self, index: int) -> Any:
        """The sample of an index below the length; may use any of the global CPU generators."""
        raise NotImplementedError

    def padding(self) -> Any:
        """A sample for a draw of -1, which the metrics pass over."""
        raise NotImplementedError

    def __getitem__(self, draw: int) -> Any:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[int]) -> list[Any]:
        with seeded(self.seed):
            return [self._drawn(draw) for draw in draws]

    def _drawn(self, draw: int) -> Any:
        if draw < 0:
            return self.padding()
        seed_generators(self.seed, draw)
        return self.sample(draw % len(self))


class Draws(SeededSamples):
    """Transformed images and their labels, by draw number; padding is an image of zeros with the label -1.

    Args:
        source: gives `(image, label)` for an index.
        transform: maps the image to a tensor; may use any of the global CPU generators.
        seed: the run's seed.
    """

    def __init__(self, source: Any, transform: Callable[[Any], Tensor], seed: int = 0) -> None:
        super().__init__(seed)
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[index]
        return self.transform(image), label

    def padding(self) -> tuple[Tensor, int]:
        return torch.zeros_like(self._drawn(0)[0]), -1


class EpochSampler(Sampler[int]):
    """Hands out the draws of one process, epoch by epoch.

    Training (`shuffle=True`) permutes the samples by (seed, epoch) and drops the tail that does not fill one batch on
    every process. Otherwise every sample comes once, in order, over all processes together; the processes that are
    short of one are given a padding draw of -1, so that all take the same number of steps. Batch `b` of all processes
    together holds the same samples for any number of processes with the same total batch size.

    Args:
        data: what is sampled; only its length is used.
        batch_size: samples per batch and process.
        shuffle: training order.
        seed: the run's seed.
        rank: number of this process.
        world_size: number of processes.
        epoch: the first epoch to be iterated.
        skip: batches of that first epoch that were already taken, by a run that is now resumed.

    Raises:
        ValueError: a training set too small to fill one batch.
    """

    def __init__(
        self,
        data: Sized,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        skip: int = 0,
    ) -> None:
        if shuffle and len(data) < batch_size * world_size:
            raise ValueError(
                f"batch_size={batch_size} on {world_size} process(es) exceeds the {len(data)} training samples; "
                f"at most {len(data) // world_size} is allowed"
            )
        self.data, self.batch_size, self.shuffle, self.seed = data, batch_size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first_epoch = epoch
        self.skip = skip

    def __len__(self) -> int:
        if self.shuffle:
            return len(self.data) // (self.batch_size * self.world_size) * self.batch_size
        return -(-len(self.data) // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        size, total = len(self.data), len(self) * self.world_size
        if not self.shuffle:
            yield from (i if i < size else -1 for i in range(self.rank, total, self.world_size))
            return
        order = np.random.default_rng((self.seed, self.epoch)).permutation(size)[:total]
        done = self.skip * self.batch_size if self.epoch == self.first_epoch else 0
        yield from (self.epoch * size + int(index) for index in order[self.rank :: self.world_size][done:])

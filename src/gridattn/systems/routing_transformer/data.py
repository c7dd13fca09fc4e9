"""Sequences to learn from, by one specification: embedded samples, text files and images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gridattn.data.sampling import SeededSamples
from gridattn.systems.routing_transformer import images, text
from gridattn.systems.routing_transformer.recall import RecallSequences, recall_codec
from gridattn.systems.routing_transformer.text import ByteCodec, Codec, WordCodec

Sample = tuple[Tensor, Tensor]
"""Symbols (T) int64, and where the loss counts, (T) bool."""

EMBEDDED = ("recall", "docstrings", "digits")
FILES = ("enwik8", "wikitext103", "pg19", "bytes", "imagenet64")


@dataclass
class SequenceData:
    """A data set of sequences of one length.

    Attributes:
        kind: "text" or "image".
        symbols: size of the vocabulary, or values of a sub-pixel.
        length: positions per sequence.
        train: training samples, by draw number.
        val: validation samples, by index.
        codec: turns text into symbols and back; None for images.
        image: height, width and channels; None for text.
        baselines: what a model without learning reaches in validation, by name.
        words: words between blanks of the validation text; None where that means nothing.
    """

    kind: str
    symbols: int
    length: int
    train: SeededSamples
    val: SeededSamples
    codec: Codec | None = None
    image: tuple[int, int, int] | None = None
    baselines: dict[str, float] = field(default_factory=dict)
    words: int | None = None


class Windows(SeededSamples):
    """Windows of a long text: at random places, or one after another with the last one padded by 0.

    Args:
        tokens: the whole text, of any integer type.
        length: of a window.
        offset: added to every token.
        random: see above.
        seed: of the random places.
    """

    def __init__(self, tokens: np.ndarray, length: int, *, offset: int = 0, random: bool, seed: int = 0) -> None:
        super().__init__(seed)
        self.tokens, self.length, self.offset, self.random = tokens, length, offset, random

    def __len__(self) -> int:
        return len(self.tokens) // self.length if self.random else -(-len(self.tokens) // self.length)

    def sample(self, index: int) -> Sample:
        start = index * self.length
        if self.random:
            start = int(torch.randint(len(self.tokens) - self.length + 1, ()))
        return _padded(self.tokens[start : start + self.length].astype(np.int64) + self.offset, self.length)

    def padding(self) -> Sample:
        return _padded(np.zeros(0, np.int64), self.length)


class Books(SeededSamples):
    """Windows of bytes of many files, which end in the symbol 1; the last window of a book is padded by 0.

    Args:
        files: one a book.
        length: of a window.
        seed: of the run.
    """

    def __init__(self, files: Sequence[Path], length: int, seed: int = 0) -> None:
        super().__init__(seed)
        self.files, self.length = list(files), length
        self.ends = np.cumsum([-(-(file.stat().st_size + 1) // length) for file in self.files])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def sample(self, index: int) -> Sample:
        book = int(np.searchsorted(self.ends, index, side="right"))
        start = (index - (int(self.ends[book - 1]) if book else 0)) * self.length
        with self.files[book].open("rb") as file:
            file.seek(start)
            content = np.frombuffer(file.read(self.length), np.uint8).astype(np.int64) + text.RESERVED
        if len(content) < self.length:
            content = np.append(content, 1)
        return _padded(content, self.length)

    def padding(self) -> Sample:
        return _padded(np.zeros(0, np.int64), self.length)


class Pixels(SeededSamples):
    """Images as sequences of sub-pixels, rows first, channels last.

    Args:
        source: gives (H, W, C) uint8 for an index.
        seed: of the run.
    """

    def __init__(self, source: Any, seed: int = 0) -> None:
        super().__init__(seed)
        self.source = source
        self.image = tuple(source[0].shape)

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int) -> Sample:
        values = torch.from_numpy(self.source[index].astype(np.int64)).flatten()
        return values, torch.ones_like(values, dtype=torch.bool)

    def padding(self) -> Sample:
        values = torch.zeros(int(np.prod(self.image)), dtype=torch.int64)
        return values, torch.zeros_like(values, dtype=torch.bool)


def load_data(spec: str, length: int, seed: int = 0, codec: Codec | None = None) -> SequenceData:
    """Reads a data set.

    Args:
        spec: "recall", "docstrings", "digits", or "enwik8:PATH", "wikitext103:PATH", "pg19:PATH", "bytes:PATH",
            "imagenet64:PATH".
        length: positions per sequence of text; recall and images have their own.
        seed: of the run.
        codec: that of a trained model, so that symbols mean the same; None takes the data's own.

    Raises:
        ValueError: an unknown name, files that cannot be used, or a text shorter than `length`.
    """
    name, colon, where = spec.partition(":")
    if (name not in EMBEDDED or colon) and (name not in FILES or not where):
        allowed = ", ".join([*EMBEDDED, *(f"{name}:PATH" for name in FILES)])
        raise ValueError(f"data={spec!r} is not known; allowed: {allowed}")
    path = Path(where).expanduser()
    if colon and not path.exists():
        raise ValueError(f"data={spec!r}: {str(path)!r} does not exist")
    if name == "recall":
        own = recall_codec()
        train, val = RecallSequences(1600, seed), RecallSequences(256, RecallSequences.HELD_OUT)
        return SequenceData("text", own.symbols, train.length, train, val, own, baselines={"accuracy": 1 / 6})
    if name in ("digits", "imagenet64"):
        return _image_data(*(images.digits() if name == "digits" else images.imagenet64(path)), name, seed)
    if name == "pg19":
        return _book_data(*text.pg19_books(path), length, seed)
    if name == "wikitext103":
        train, val, codec = text.wikitext103(path, codec if isinstance(codec, WordCodec) else None)
        return _text_data(spec, train, val, codec, 0, length, seed, words=len(val))
    readers: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
        "docstrings": text.docstrings,
        "enwik8": lambda: text.enwik8(path),
        "bytes": lambda: text.any_bytes(path),
    }
    train, val = readers[name]()
    codec = codec if isinstance(codec, ByteCodec) else ByteCodec()
    return _text_data(spec, train, val, codec, codec.offset, length, seed, words=len(val.tobytes().split()))


def _text_data(
    spec: str, train: np.ndarray, val: np.ndarray, codec: Codec, offset: int, length: int, seed: int, words: int
) -> SequenceData:
    for part, tokens in (("training", train), ("validation", val)):
        if len(tokens) < length:
            raise ValueError(f"data={spec!r} has {len(tokens)} tokens for {part}; length={length} needs more")
    return SequenceData(
        "text",
        codec.symbols,
        length,
        Windows(train, length, offset=offset, random=True, seed=seed),
        Windows(val, length, offset=offset, random=False),
        codec,
        baselines={"unigram_bits": _cross_entropy(train, val, codec.symbols)},
        words=words,
    )


def _book_data(train: list[Path], val: list[Path], length: int, seed: int) -> SequenceData:
    codec = ByteCodec()
    words = sum(len(file.read_bytes().split()) for file in val)
    return SequenceData(
        "text", codec.symbols, length, Books(train, length, seed), Books(val, length), codec, words=words
    )


def _image_data(train: images.Images, val: images.Images, name: str, seed: int) -> SequenceData:
    samples, held_out = Pixels(train, seed), Pixels(val)
    height, width, channels = samples.image
    image = height, width, channels
    if held_out.image != image:
        raise ValueError(f"data={name!r} has training images {image} but validation images {held_out.image}")
    symbols, baselines = 256, {}
    if isinstance(train, np.ndarray) and isinstance(val, np.ndarray):
        symbols = 17
        rows, held = train.reshape(len(train), -1), val.reshape(len(val), -1)
        by_place = [_cross_entropy(rows[:, i], held[:, i], symbols) for i in range(rows.shape[1])]
        baselines = {
            "unigram_bits": _cross_entropy(rows.ravel(), held.ravel(), symbols),
            "position_bits": float(np.mean(by_place)),
        }
    length = height * width * channels
    return SequenceData("image", symbols, length, samples, held_out, image=image, baselines=baselines)


def _cross_entropy(train: np.ndarray, val: np.ndarray, symbols: int) -> float:
    """Bits per symbol of `val` under the frequencies of `train`, with one more count for every symbol."""
    counts = [np.bincount(part, minlength=symbols).astype(np.float64) for part in (train, val)]
    probability = (counts[0] + 1) / (counts[0].sum() + len(counts[0]))
    used = counts[1] > 0
    terms = (c * -log2(p) for c, p in zip(counts[1][used], probability[used]))
    return float(sum(terms) / counts[1].sum())


def _padded(tokens: np.ndarray, length: int) -> Sample:
    symbols = torch.zeros(length, dtype=torch.int64)
    symbols[: len(tokens)] = torch.from_numpy(tokens)
    return symbols, torch.arange(length) < len(tokens)

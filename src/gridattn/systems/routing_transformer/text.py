"""Readers of text: enwik8, WikiText-103, PG-19, any file as bytes, and the documentation of Python's own library."""

import ast
import gzip
import sysconfig
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

RESERVED = 2
"""Symbols before those of the text: 0 for padding and the start, 1 for the end of a document."""

ENWIK8_BYTES = 100_000_000
SPLITS = ("train", "valid", "test")


class ByteCodec:
    """Bytes of UTF-8 as symbols.

    Args:
        offset: symbol of the byte 0; 2 leaves room for padding and the end of a document, 0 is for models without them.

    Example:
        >>> codec = ByteCodec()
        >>> codec.encode("Hi").tolist(), codec.decode([74, 107])
        ([74, 107], 'Hi')
    """

    def __init__(self, offset: int = RESERVED) -> None:
        self.offset = offset
        self.symbols = 256 + offset

    def encode(self, text: str) -> np.ndarray:
        """Symbols of a text, int64."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64) + self.offset

    def decode(self, symbols: Sequence[int]) -> str:
        """The text of symbols; what is not UTF-8 shows as a replacement character."""
        return bytes(s - self.offset for s in symbols if s >= self.offset).decode(errors="replace")

    def pieces(self, symbols: Sequence[int]) -> list[str]:
        """What to print for every symbol alone."""
        return [chr(s - self.offset) if s >= self.offset else "" for s in symbols]

    def stored(self) -> dict[str, Any]:
        return {"kind": "bytes", "offset": self.offset}


class WordCodec:
    """Words between spaces as symbols; a word that is not in the list becomes `<unk>`.

    Args:
        words: the vocabulary, from symbol `first` on.
        first: 1 leaves 0 for padding.

    Example:
        >>> codec = WordCodec(["<unk>", "a", "b"])
        >>> codec.encode("b a c").tolist(), codec.decode([3, 2])
        ([3, 2, 1], 'b a')
    """

    def __init__(self, words: Sequence[str], first: int = 1) -> None:
        self.words, self.first = list(words), first
        self.number = {word: i for i, word in enumerate(self.words, first)}
        self.symbols = len(self.words) + first

    def encode(self, text: str) -> np.ndarray:
        """Symbols of a text, int64.

        Raises:
            ValueError: a word that is unknown to a vocabulary without `<unk>`.
        """
        unknown = self.number.get("<unk>")
        symbols = [self.number.get(word, unknown) for word in text.split()]
        if None in symbols:
            word = text.split()[symbols.index(None)]
            raise ValueError(f"word {word!r} is not in the vocabulary of {len(self.words)} words")
        return np.asarray(symbols, np.int64)

    def decode(self, symbols: Sequence[int]) -> str:
        return " ".join(self.words[s - self.first] for s in symbols if s >= self.first)

    def pieces(self, symbols: Sequence[int]) -> list[str]:
        return [f"{self.words[s - self.first]} " if s >= self.first else "" for s in symbols]

    def stored(self) -> dict[str, Any]:
        return {"kind": "words", "words": self.words, "first": self.first}


Codec = ByteCodec | WordCodec


def stored_codec(stored: Mapping[str, Any] | None) -> Codec | None:
    """The codec that `stored()` describes."""
    if stored is None:
        return None
    options = {name: value for name, value in stored.items() if name != "kind"}
    return {"bytes": ByteCodec, "words": WordCodec}[stored["kind"]](**options)


@lru_cache(maxsize=1)
def docstrings() -> tuple[np.ndarray, np.ndarray]:
    """Documentation strings of Python's standard library as bytes: those of most modules, and those of the others.

    The source of the modules that are one file is parsed, not run. A module belongs to the second part if the CRC-32
    of its name is a multiple of 10.

    Raises:
        ValueError: a Python that comes without the source of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[str], list[str]] = ([], [])
    for file in sorted(root.glob("*.py")):
        held_out = zlib.crc32(file.stem.encode()) % 10 == 0
        parts[held_out].extend(f"{text}\n\n" for text in _docstrings(file.read_text(encoding="utf-8")))
    if not all(parts):
        raise ValueError(f"data='docstrings' finds no documentation in {str(root)!r}, the library of this Python")
    train, val = (np.frombuffer("".join(part).encode(), np.uint8) for part in parts)
    return train, val


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= 80:
                yield text


def enwik8(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation bytes of enwik8: the file itself, packed or not, or a folder of lists of numbers.

    A file holds 100,000,000 bytes, of which the first 90 % and the following 5 % are taken. A folder holds `train.txt`
    and `valid.txt` with byte values as decimal numbers between blanks.

    Raises:
        ValueError: a file that is missing, of another size, or not of this form.
    """
    if path.is_dir():
        return _byte_numbers(path / "train.txt"), _byte_numbers(path / "valid.txt")
    content = _unpacked(path)
    if len(content) != ENWIK8_BYTES:
        raise ValueError(f"{str(path)!r} holds {len(content)} bytes; enwik8 has {ENWIK8_BYTES}")
    return split_bytes(content)


def any_bytes(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The first 90 % and the following 5 % of the bytes of a file, packed or not."""
    return split_bytes(_unpacked(path))


def split_bytes(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The first 90 % and the following 5 %."""
    data = np.frombuffer(content, np.uint8)
    first, second = len(data) * 90 // 100, len(data) * 95 // 100
    return data[:first], data[first:second]


def _unpacked(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"data file {str(path)!r} does not exist")
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes())
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                return archive.read(archive.namelist()[0])
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, IndexError) as error:
        raise ValueError(f"{str(path)!r} cannot be unpacked: {error or type(error).__name__}") from None
    return path.read_bytes()


def _byte_numbers(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"data file {str(path)!r} does not exist")
    try:
        numbers = np.array(path.read_text(encoding="ascii").split(), dtype=np.int64)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not a list of byte values: {error}") from None
    if not len(numbers) or numbers.min() < 0 or numbers.max() > 255:
        raise ValueError(f"{str(path)!r} is not a list of byte values from 0 to 255")
    return numbers.astype(np.uint8)


def wikitext103(path: Path, codec: WordCodec | None = None) -> tuple[np.ndarray, np.ndarray, WordCodec]:
    """Symbols of `wiki.train.tokens` and `wiki.valid.tokens` in a folder; every line ends in `<eos>`.

    Args:
        path: the folder.
        codec: a vocabulary; None makes that of the training text, most frequent words first.

    Raises:
        ValueError: a file that is missing, empty, or not UTF-8.
    """
    files = [path / f"wiki.{split}.tokens" for split in SPLITS[:2]]
    for file in files:
        if not file.is_file():
            raise ValueError(f"data file {str(file)!r} does not exist; WikiText-103 has wiki.train.tokens and others")
    if codec is None:
        counts = Counter(word for word in _words(files[0]))
        codec = WordCodec([word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))])
    unknown = codec.number.get("<unk>", 0)
    parts = [np.fromiter((codec.number.get(w, unknown) for w in _words(file)), np.int32) for file in files]
    for file, part in zip(files, parts):
        if not len(part):
            raise ValueError(f"data file {str(file)!r} is empty")
    return parts[0], parts[1], codec


def _words(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield from line.split()
                yield "<eos>"
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not UTF-8: {error}") from None


def pg19_books(path: Path) -> tuple[list[Path], list[Path]]:
    """Files of the folders `train` and `validation` of PG-19, one book each.

    Raises:
        ValueError: a folder that is missing or holds no text, or an empty book.
    """
    found = []
    for split in ("train", "validation"):
        folder = path / split
        files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
        if not files:
            raise ValueError(f"folder {str(folder)!r} holds no *.txt; PG-19 has a file a book in each")
        empty = next((file for file in files if not file.stat().st_size), None)
        if empty is not None:
            raise ValueError(f"book {str(empty)!r} is empty")
        found.append(files)
    return found[0], found[1]

"""Facts of the readers, in the layouts that the data sets have on disk, and of the embedded samples."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gridattn.systems.routing_transformer import text
from gridattn.systems.routing_transformer.data import Books, Windows, load_data
from gridattn.systems.routing_transformer.recall import ATTRIBUTES, CLASSES, FACTS, RecallSequences, recall_codec
from gridattn.systems.routing_transformer.text import ByteCodec, WordCodec, stored_codec


def test_every_answer_of_recall_is_the_attribute_that_the_facts_give_its_class() -> None:
    for tokens, counted in (RecallSequences(4, seed)[seed] for seed in range(4)):
        facts = {int(t) // ATTRIBUTES: int(t) % ATTRIBUTES for t in tokens[:FACTS]}
        assert len(facts) == CLASSES
        for question, answer in tokens[FACTS:].view(-1, 2).tolist():
            assert facts[question - CLASSES * ATTRIBUTES] == answer - CLASSES * (ATTRIBUTES + 1)
        assert counted.nonzero().flatten().tolist() == list(range(FACTS + 1, len(tokens), 2))


def test_codecs_give_back_the_text_and_survive_storage() -> None:
    for codec, words in (
        (ByteCodec(), "Grüße 1"),
        (ByteCodec(0), "a\nb"),
        (WordCodec(["<unk>", "b", "a"]), "a b b"),
        (recall_codec(), "k3=v2 k3? v2"),
    ):
        again = stored_codec(codec.stored())
        assert again is not None
        assert again.decode(codec.encode(words).tolist()) == words
        assert codec.encode(words).max() < codec.symbols
    with pytest.raises(ValueError, match="'z'"):
        recall_codec().encode("k3? z")


def test_windows_cover_a_validation_text_once_and_padding_does_not_count() -> None:
    tokens = np.arange(1, 24, dtype=np.uint8)
    windows = Windows(tokens, 10, random=False)
    seen = torch.cat([symbols[counted] for symbols, counted in (windows[i] for i in range(len(windows)))])
    assert seen.tolist() == tokens.tolist()
    assert not windows[-1][1].any()
    drawn = Windows(tokens, 10, random=True, seed=3)
    assert torch.equal(drawn[5][0], drawn[5][0])
    assert len({int(drawn[i][0][0]) for i in range(30)}) > 3


def test_enwik8_is_read_as_a_file_packed_or_not_and_as_lists_of_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(200))
    (tmp_path / "enwik8").write_bytes(content)
    (tmp_path / "enwik8.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match="200 bytes; enwik8 has 100000000"):
        load_data(f"enwik8:{tmp_path / 'enwik8'}", 8)
    monkeypatch.setattr(text, "ENWIK8_BYTES", 200)
    for name in ("enwik8", "enwik8.gz"):
        train, val = text.enwik8(tmp_path / name)
        assert bytes(train) + bytes(val) == content[:190]
        assert len(train) == 180
    (tmp_path / "broken.gz").write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(ValueError, match=r"broken\.gz"):
        text.enwik8(tmp_path / "broken.gz")
    folder = tmp_path / "numbers"
    folder.mkdir()
    (folder / "train.txt").write_text("1 2 3 255\n")
    with pytest.raises(ValueError, match=r"valid\.txt"):
        text.enwik8(folder)
    (folder / "valid.txt").write_text("4 5")
    assert [part.tolist() for part in text.enwik8(folder)] == [[1, 2, 3, 255], [4, 5]]
    (folder / "valid.txt").write_text("4 256")
    with pytest.raises(ValueError, match="0 to 255"):
        text.enwik8(folder)


def test_wikitext_words_are_numbered_by_frequency_and_lines_end(tmp_path: Path) -> None:
    (tmp_path / "wiki.train.tokens").write_text(" b a b \n <unk> b \n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"wiki\.valid\.tokens"):
        load_data(f"wikitext103:{tmp_path}", 2)
    (tmp_path / "wiki.valid.tokens").write_text("a z\n", encoding="utf-8")
    data = load_data(f"wikitext103:{tmp_path}", 2)
    assert isinstance(data.codec, WordCodec)
    assert data.codec.words == ["b", "<eos>", "<unk>", "a"]
    assert data.val[0][0].tolist() == [4, 3]
    assert data.words == 3
    with pytest.raises(ValueError, match="length=9"):
        load_data(f"wikitext103:{tmp_path}", 9)


def test_books_are_cut_into_windows_that_end_in_the_end_of_the_document(tmp_path: Path) -> None:
    for split, books in {"train": ["abcdef", "gh"], "validation": ["xyz w"]}.items():
        (tmp_path / split).mkdir()
        for i, book in enumerate(books):
            (tmp_path / split / f"{i}.txt").write_text(book)
    data = load_data(f"pg19:{tmp_path}", 4)
    assert isinstance(data.train, Books)
    windows = [symbols[counted].tolist() for symbols, counted in (data.train[i] for i in range(len(data.train)))]
    codec = ByteCodec()
    assert windows == [codec.encode("abcd").tolist(), [*codec.encode("ef"), 1], [*codec.encode("gh"), 1]]
    assert data.words == 2
    (tmp_path / "train" / "1.txt").write_text("")
    with pytest.raises(ValueError, match=r"1\.txt.*empty"):
        load_data(f"pg19:{tmp_path}", 4)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_imagenet_hold_planes_and_become_raster_order(tmp_path: Path, save) -> None:
    planes = np.arange(3 * 12, dtype=np.uint8).reshape(3, 12)  # three images of 2 x 2
    save(tmp_path / "train_data_batch_1.npz", data=planes[:1], labels=[1], mean=np.zeros(12))
    save(tmp_path / "train_data_batch_2.npz", data=planes[1:], labels=[1, 2])
    with pytest.raises(ValueError, match=r"val_data\.npz"):
        load_data(f"imagenet64:{tmp_path}", 1)
    save(tmp_path / "val_data.npz", data=planes, labels=[1, 1, 1])
    data = load_data(f"imagenet64:{tmp_path}", 1)
    assert (data.image, data.length, data.symbols, len(data.train)) == ((2, 2, 3), 12, 256, 3)
    assert data.train[2][0].tolist() == [24, 28, 32, 25, 29, 33, 26, 30, 34, 27, 31, 35]
    (tmp_path / "train_data_batch_2.npz").rename(tmp_path / "train_data_batch_3.npz")
    with pytest.raises(ValueError, match=r"train_data_batch_2\.npz"):
        load_data(f"imagenet64:{tmp_path}", 1)
    whole = (tmp_path / "val_data.npz").read_bytes()
    (tmp_path / "train_data_batch_2.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"train_data_batch_2\.npz"):
        load_data(f"imagenet64:{tmp_path}", 1)


def test_png_files_of_imagenet_are_read_and_odd_ones_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_64x64"):
        load_data(f"imagenet64:{tmp_path}", 1)
    for folder in ("train_64x64", "valid_64x64"):
        (tmp_path / folder).mkdir()
        pixels = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
        Image.fromarray(pixels).save(tmp_path / folder / "1.png")
    data = load_data(f"imagenet64:{tmp_path}", 1)
    assert data.train[0][0].tolist() == list(range(27))
    Image.fromarray(pixels[:2]).save(tmp_path / "train_64x64" / "2.png")
    with pytest.raises(ValueError, match=r"2\.png.*3x2"):
        load_data(f"imagenet64:{tmp_path}", 1).train[1]


def test_embedded_parts_are_disjoint_and_baselines_are_those_of_their_frequencies() -> None:
    train, val = text.docstrings()
    assert len(train) > 200_000
    assert len(val) > 10_000
    assert bytes(val[:400]) not in bytes(train)
    digits = load_data("digits", 1)
    assert (len(digits.train), len(digits.val), digits.image, digits.symbols) == (1437, 360, (8, 8, 1), 17)
    assert 2 < digits.baselines["position_bits"] < digits.baselines["unigram_bits"] < np.log2(17)


@pytest.mark.parametrize("spec", ["nowhere", "recall:x", "enwik8", "enwik8:", "pg19:/does/not/exist"])
def test_unknown_data_is_named(spec: str) -> None:
    with pytest.raises(ValueError, match=spec):
        load_data(spec, 8)

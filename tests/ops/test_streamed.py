"""Attention read and written tile by tile equals attention on the whole grid, whatever the settings and the files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neighborhood_problems import Problem, problems
from torch import Tensor

from gridattn.ops import GridReader, neighborhood_attention, neighborhood_attention_streamed
from gridattn.ops.neighborhood import make_plan
from gridattn.ops.neighborhood.stream_sources import to_tensor
from gridattn.ops.neighborhood.streamed import cut_tiles


@settings(deadline=None, max_examples=150)
@given(problem=problems(), data=st.data())
def test_tiles_of_any_size_equal_the_whole(problem: Problem, data: st.DataObject) -> None:
    options = {**problem.settings, "key_mask": problem.key_mask}
    expected = neighborhood_attention(**problem.tensors, **options, backend="reference")
    grid = problem.tensors["query"].shape[1:-2]
    tile = [data.draw(st.integers(1, size)) for size in grid]
    out = torch.full_like(expected, torch.nan)
    memory = data.draw(st.sampled_from([1, 1 << 20]))  # with 1, one sample at a time
    neighborhood_attention_streamed(**problem.tensors, **options, out=out, tile=tile, memory=memory, backend="tiled")
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)


SHAPE = (2, 11, 13, 2, 4)
OPTIONS = {"kernel_size": (3, 5), "stride": (2, 1), "dilation": (1, 2), "is_causal": (True, False)}


def _inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(3)]


def _memmaps(tensors: list[Tensor], folder: Path) -> list[np.ndarray]:
    for name, tensor in zip("qkv", tensors):
        bits = tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
        np.save(folder / f"{name}.npy", bits)
    return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in "qkv"]


def _mapped_tensors(tensors: list[Tensor], folder: Path) -> list[Tensor]:
    mapped = []
    for name, tensor in zip("qkv", tensors):
        file = str(folder / f"{name}.bin")
        whole = torch.from_file(file, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        mapped.append(whole.copy_(tensor))
    return mapped


def _readers(tensors: list[Tensor], folder: Path) -> list[GridReader]:
    return [GridReader(lambda region, t=tensor: t[region], tensor.shape, tensor.dtype) for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("store", [_memmaps, _mapped_tensors, _readers])
def test_files_tensors_and_functions_give_the_same(store: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = _inputs(dtype)
    result = neighborhood_attention_streamed(*store(tensors, tmp_path), **OPTIONS, out=tmp_path / "out.npy", tile=4)
    assert isinstance(result, np.memmap)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    expected = neighborhood_attention(*tensors, **OPTIONS)
    torch.testing.assert_close(to_tensor(np.array(result)), expected, **tolerance)


def test_reading_changes_no_file_and_no_private_copy(tmp_path: Path) -> None:
    tensors = _inputs()
    shared = _memmaps(tensors, tmp_path)
    private = [np.load(tmp_path / f"{name}.npy", mmap_mode="c") for name in "qkv"]
    for array in private:
        array += 1.0  # lives in memory only
    neighborhood_attention_streamed(*private, **OPTIONS, out=tmp_path / "out.npy", tile=4)
    for mine, file, tensor in zip(private, shared, tensors):
        np.testing.assert_array_equal(mine, tensor.numpy() + 1.0)
        np.testing.assert_array_equal(file, tensor.numpy())


def test_other_byte_orders_are_read() -> None:
    tensors, out = _inputs(), np.zeros(SHAPE, np.float32)
    neighborhood_attention_streamed(*(t.numpy().astype(">f4") for t in tensors), **OPTIONS, out=out, tile=5)
    np.testing.assert_allclose(out, neighborhood_attention(*tensors, **OPTIONS), rtol=1e-5, atol=1e-6)


def test_a_function_receives_every_position_once() -> None:
    seen = torch.zeros(SHAPE[:-2], dtype=torch.int64)

    def count(region: tuple[slice, ...], tile: Tensor) -> None:
        assert tile.shape == (*seen[region].shape, *SHAPE[-2:])
        seen[region] += 1

    calls: list[tuple[int, int]] = []
    neighborhood_attention_streamed(
        *_inputs(), **OPTIONS, out=count, tile=(4, 6), memory=1, progress=lambda *call: calls.append(call)
    )
    assert (seen == 1).all()
    assert calls == [(done, 18) for done in range(1, 19)]  # 2 samples x 3 x 3 tiles


def test_only_the_keys_that_a_tile_sees_are_read() -> None:
    regions = []

    def read(region: tuple[slice, ...]) -> Tensor:
        regions.append(region[1:])
        return torch.zeros(1, *(part.stop - part.start for part in region[1:]), 1, 4)

    key = GridReader(read, (1, 100, 90, 1, 4), torch.float32)
    other = torch.zeros(1, 100, 90, 1, 4)
    neighborhood_attention_streamed(other, key, other, 5, out=torch.empty_like(other), tile=50)
    assert regions == [(slice(a, b), slice(c, d)) for a, b in ((0, 52), (48, 100)) for c, d in ((0, 52), (48, 90))]


def test_an_interrupted_call_leaves_no_file(tmp_path: Path) -> None:
    def stop(done: int, tiles: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        neighborhood_attention_streamed(*_inputs(), **OPTIONS, out=tmp_path / "out.npy", tile=4, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_call_is_resumed(tmp_path: Path) -> None:
    tensors, done, read = _inputs(), [], []

    def stop(number: int, tiles: int) -> None:
        done.append(number)
        if len(done) == 5:
            raise KeyboardInterrupt

    def reader(region: tuple[slice, ...]) -> Tensor:
        read.append(region)
        return tensors[0][region]

    query = GridReader(reader, SHAPE, torch.float32)
    options: dict = {**OPTIONS, "out": tmp_path / "out.npy", "tile": 4, "resume": True}
    with pytest.raises(KeyboardInterrupt):
        neighborhood_attention_streamed(query, *tensors[1:], **options, progress=stop)
    assert not (tmp_path / "out.npy").exists()
    result = neighborhood_attention_streamed(query, *tensors[1:], **options)
    assert len(read) == len(set(map(repr, read)))
    assert [file.name for file in tmp_path.iterdir()] == ["out.npy"]
    expected = neighborhood_attention(*tensors, **OPTIONS)
    np.testing.assert_allclose(np.array(result), expected, rtol=1e-6, atol=1e-6)


def test_a_call_with_other_settings_does_not_resume(tmp_path: Path) -> None:
    tensors = _inputs()

    def stop(number: int, tiles: int) -> None:
        raise KeyboardInterrupt

    options: dict = {"out": tmp_path / "out.npy", "tile": 4, "resume": True}
    with pytest.raises(KeyboardInterrupt):
        neighborhood_attention_streamed(*tensors, kernel_size=5, **options, progress=stop)
    result = neighborhood_attention_streamed(*tensors, kernel_size=3, **options)
    np.testing.assert_allclose(np.array(result), neighborhood_attention(*tensors, kernel_size=3), rtol=1e-6, atol=1e-6)


def test_an_empty_batch_gives_an_empty_file(tmp_path: Path) -> None:
    empty = torch.zeros(0, 8, 8, 1, 4)
    result = neighborhood_attention_streamed(empty, empty, empty, 3, out=tmp_path / "out.npy")
    assert result.shape == (0, 8, 8, 1, 4)


def test_default_tiles_keep_within_the_memory_and_use_it() -> None:
    like = torch.zeros(()).expand(1, 4096, 4096, 2, 32)
    plan = make_plan((4096, 4096), 7)
    positions = [
        max(tile.crop.positions for tile in cut_tiles(plan, like, like, like, tile=None, memory=memory))
        for memory in (2**26, 2**28)
    ]
    per_position = 4 * 2 * 32 * 4  # query, key, value, out once
    assert positions[0] * per_position < 2**26
    assert positions[1] > 2.5 * positions[0]


def test_an_axis_that_every_query_sees_whole_is_not_cut_in_vain() -> None:
    like = torch.zeros(()).expand(1, 1000, 512, 1, 16)
    tiles = cut_tiles(make_plan((1000, 512), (5, 512)), like, like, like, tile=None, memory=2**24)
    assert tiles.boxes[1] == 512
    assert tiles.boxes[0] < 1000


MASK = torch.zeros(SHAPE[:-2], dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": "file.npy"}, "query is a str"),
        ({"query": np.zeros(SHAPE, np.int32)}, "query is an array of int32"),
        ({"key": torch.zeros(1, 11, 13, 2, 4)}, "key has batch and grid"),
        ({"kernel_size": 12}, "exceeds the grid"),
        ({"tile": 0}, "tile=0"),
        ({"memory": 100}, "memory=100 is not allowed; the smallest tile needs"),
        ({"key_mask": MASK}, r"key_mask leaves queries without a key, one at position \(0, 0\) of sample 0"),
        ({"key_mask": MASK.float()}, "key_mask is torch.float32"),
        ({"out": "out.bin"}, "must end in .npy"),
        ({"out": 3}, "out is a int"),
        ({"out": torch.zeros(3)}, "out is "),
        ({"out": torch.zeros(SHAPE), "resume": True}, "resume=True is not allowed"),
        ({"query": GridReader(lambda region: torch.zeros(1), SHAPE, torch.float32)}, r"query gave \(1,\)"),
        ({"backend": "fast"}, "backend='fast' is not known"),
    ],
)
def test_bad_input_is_one_clear_error_and_leaves_no_file(change: dict, message: str, tmp_path: Path) -> None:
    query, key, value = _inputs()
    call = {"query": query, "key": key, "value": value, "kernel_size": 3, "out": tmp_path / "out.npy", **change}
    with pytest.raises(ValueError, match=message):
        neighborhood_attention_streamed(**call)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_any_work(tmp_path: Path) -> None:
    huge = GridReader(lambda region: pytest.fail("read"), (1, 2**24, 2**24, 1, 16), torch.float32)
    with pytest.raises(ValueError, match=r"needs 1\.68e\+07 GiB"):
        neighborhood_attention_streamed(huge, huge, huge, 7, out=tmp_path / "out.npy")

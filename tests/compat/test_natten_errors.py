"""What NATTEN refuses is refused here too, before any work and with a message that names the argument."""

from typing import Any

import pytest
import torch
from torch import Tensor

import gridattn.compat.natten as natten

GRID = (7, 9)


def tensor(*shape: int, **options: Any) -> Tensor:
    return torch.randn(shape, **options)


def tokens(grid: tuple[int, ...] = GRID, batch: int = 2, heads: int = 4, dim: int = 8, **options: Any) -> Tensor:
    return tensor(batch, *grid, heads, dim, **options)


def call(**changes: Any) -> Any:
    arguments = {"query": tokens(), "key": tokens(), "value": tokens(), "kernel_size": 3} | changes
    return natten.na2d(**arguments)


SETTINGS = {
    "kernel_size below 2": ({"kernel_size": 1}, "kernel_size"),
    "kernel_size below 2 on one axis": ({"kernel_size": (3, 1)}, "kernel_size"),
    "kernel_size of a float": ({"kernel_size": 3.0}, "kernel_size"),
    "kernel_size of a bool": ({"kernel_size": True}, "kernel_size"),
    "kernel_size of a string": ({"kernel_size": "33"}, "kernel_size"),
    "kernel_size None": ({"kernel_size": None}, "kernel_size"),
    "kernel_size too short": ({"kernel_size": (3,)}, "kernel_size"),
    "kernel_size too long": ({"kernel_size": [3, 3, 3]}, "kernel_size"),
    "stride zero": ({"stride": 0}, "stride"),
    "stride of a float": ({"stride": 1.0}, "stride"),
    "stride too long": ({"stride": (1, 1, 1)}, "stride"),
    "stride above the kernel": ({"stride": (3, 4)}, "stride"),
    "dilation zero": ({"dilation": (1, 0)}, "dilation"),
    "dilation negative": ({"dilation": -1}, "dilation"),
    "dilation too short": ({"dilation": [2]}, "dilation"),
    "is_causal 1": ({"is_causal": 1}, "is_causal"),
    "is_causal 0": ({"is_causal": (0, True)}, "is_causal"),
    "is_causal too short": ({"is_causal": [True]}, "is_causal"),
    "kernel above the grid": ({"kernel_size": (8, 3)}, "kernel_size"),
    "dilated kernel above the grid": ({"dilation": (1, 4)}, "kernel_size"),
    "kernel_schedule unknown": ({"kernel_schedule": "fast"}, "kernel_schedule"),
    "q_tile_shape too short": ({"q_tile_shape": (8,)}, "q_tile_shape"),
    "kv_tile_shape zero": ({"kv_tile_shape": (8, 0)}, "kv_tile_shape"),
    "backward_q_tile_shape of floats": ({"backward_q_tile_shape": (8.0, 8.0)}, "backward_q_tile_shape"),
    "backward_kv_tile_shape negative": ({"backward_kv_tile_shape": (-8, 8)}, "backward_kv_tile_shape"),
    "backward_kv_splits zero": ({"backward_kv_splits": (0, 1)}, "backward_kv_splits"),
    "attention_kwargs unknown": ({"attention_kwargs": {"q_tile_shape": 8}}, "attention_kwargs"),
    "attention_kwargs tile": ({"attention_kwargs": {"q_tile_size": 0}}, "q_tile_size"),
    "attention_kwargs schedule": ({"attention_kwargs": {"kernel_schedule": "fast"}}, "kernel_schedule"),
}
TENSORS = {
    "ranks differ": ({"key": tokens((7,))}, "key"),
    "rank 3": (dict.fromkeys(("query", "key", "value"), tensor(2, 4, 8)), "query"),
    "rank 7": (dict.fromkeys(("query", "key", "value"), tokens((4, 4, 4, 4))), "query"),
    "head dims differ": ({"key": tokens(dim=16)}, "head_dim"),
    "batches differ": ({"key": tokens(batch=1), "value": tokens(batch=1)}, "key"),
    "grids differ": ({"key": tokens((9, 7)), "value": tokens((9, 7))}, "key"),
    "value on another grid": ({"value": tokens((7, 8))}, "value"),
    "kv head counts differ": ({"value": tokens(heads=2)}, "value"),
    "heads no multiple": ({"key": tokens(heads=3), "value": tokens(heads=3)}, "heads"),
    "more kv heads than query heads": ({"key": tokens(heads=8), "value": tokens(heads=8)}, "heads"),
    "dtypes differ": ({"value": tokens(dtype=torch.float64)}, "value"),
    "integers": (dict.fromkeys(("query", "key", "value"), tokens().long()), "query"),
    "devices differ": ({"key": tokens(device="meta")}, "key"),
}
EXTRA_KEYS, EXTRA_VALUES = tensor(2, 5, 4, 8), tensor(2, 5, 4, 8)
ADDITIONAL = {
    "only keys": {"additional_keys": EXTRA_KEYS},
    "only values": {"additional_values": EXTRA_VALUES},
    "batch": {"additional_keys": EXTRA_KEYS[:1], "additional_values": EXTRA_VALUES[:1]},
    "heads": {"additional_keys": EXTRA_KEYS[:, :, :2], "additional_values": EXTRA_VALUES[:, :, :2]},
    "key head dim": {"additional_keys": EXTRA_KEYS[..., :4], "additional_values": EXTRA_VALUES},
    "value head dim": {"additional_keys": EXTRA_KEYS, "additional_values": EXTRA_VALUES[..., :4]},
    "lengths": {"additional_keys": EXTRA_KEYS[:, :3], "additional_values": EXTRA_VALUES},
    "rank": {"additional_keys": EXTRA_KEYS[0], "additional_values": EXTRA_VALUES[0]},
    "dtype": {"additional_keys": EXTRA_KEYS.double(), "additional_values": EXTRA_VALUES.double()},
    "device": {"additional_keys": EXTRA_KEYS.to("meta"), "additional_values": EXTRA_VALUES.to("meta")},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_not_allowed(case: str) -> None:
    changes, message = SETTINGS[case]
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_each_other(case: str) -> None:
    changes, message = TENSORS[case]
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("case", ADDITIONAL)
def test_additional_tokens_that_do_not_fit(case: str) -> None:
    with pytest.raises(ValueError, match="additional_"):
        call(**ADDITIONAL[case])


@pytest.mark.parametrize("name", ["query", "key", "value", "additional_keys", "additional_values"])
@pytest.mark.parametrize("kind", ["sparse", "nested"])
def test_sparse_and_nested_tensors_are_not_implemented(name: str, kind: str) -> None:
    extra = {"additional_keys": EXTRA_KEYS, "additional_values": EXTRA_VALUES}
    ragged = [tensor(3, 4, 8), tensor(5, 4, 8)]
    odd = tokens().to_sparse() if kind == "sparse" else torch.nested.nested_tensor(ragged, layout=torch.jagged)
    with pytest.raises(NotImplementedError, match=name):
        call(**extra | {name: odd})


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_dense_attention_does_not_take_sparse_tensors(name: str) -> None:
    arguments = {"query": tokens((7,)), "key": tokens((7,)), "value": tokens((7,))}
    with pytest.raises(NotImplementedError, match=name):
        natten.attention(**arguments | {name: arguments[name].to_sparse()})


@pytest.mark.parametrize("backend", ["cutlass", "cutlass-fmha", "hopper", "numba", ""])
def test_unknown_backends_of_neighborhood_attention(backend: str) -> None:
    with pytest.raises(NotImplementedError, match="backend"):
        call(backend=backend)


@pytest.mark.parametrize("backend", ["cutlass", "cutlass-fna", "flash", ""])
def test_unknown_backends_of_dense_attention(backend: str) -> None:
    x = tokens((7,))
    with pytest.raises(NotImplementedError, match="backend"):
        natten.attention(x, x, x, backend=backend)
    with pytest.raises(NotImplementedError, match="backend"):
        call(attention_kwargs={"backend": backend})


DENSE = {
    "rank": ({"query": tokens()}, "query"),
    "batch": ({"query": tokens((7,), batch=1)}, "batch"),
    "key and value tokens": ({"value": tokens((6,))}, "value"),
    "key and value heads": ({"value": tokens((7,), heads=2)}, "value"),
    "head dims": ({"key": tokens((7,), dim=4)}, "head_dim"),
    "heads no multiple": ({"key": tokens((7,), heads=3), "value": tokens((7,), heads=3)}, "heads"),
    "dtype": ({"value": tokens((7,), dtype=torch.float64)}, "value"),
    "integers": (dict.fromkeys(("query", "key", "value"), tokens((7,)).long()), "query"),
    "device": ({"key": tokens((7,), device="meta")}, "key"),
    "is_causal": ({"is_causal": 1}, "is_causal"),
    "kernel_schedule": ({"kernel_schedule": "fast"}, "kernel_schedule"),
    "q_tile_size": ({"q_tile_size": 0}, "q_tile_size"),
    "kv_tile_size": ({"kv_tile_size": 1.5}, "kv_tile_size"),
    "backward_q_tile_size": ({"backward_q_tile_size": -1}, "backward_q_tile_size"),
    "backward_kv_tile_size": ({"backward_kv_tile_size": (8, 8)}, "backward_kv_tile_size"),
    "backward_kv_splits": ({"backward_kv_splits": 0}, "backward_kv_splits"),
}


@pytest.mark.parametrize("case", DENSE)
def test_dense_attention_refuses(case: str) -> None:
    changes, message = DENSE[case]
    arguments = {"query": tokens((7,)), "key": tokens((7,)), "value": tokens((7,))} | changes
    with pytest.raises(ValueError, match=message):
        natten.attention(**arguments)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


SUMS = {"cumulative_seqlen_Q": ints(0, 3, 7), "cumulative_seqlen_KV": ints(0, 5, 6)}
LONGEST = {"max_seqlen_Q": 4, "max_seqlen_KV": 5}
PACKING = {
    "only queries": {"seqlens_Q": ints(3, 4)},
    "only keys": {"seqlens_KV": ints(5, 1)},
    "no tensor": {"seqlens_Q": [3, 4], "seqlens_KV": [5, 1]},
    "floats": {"seqlens_Q": ints(3, 4).float(), "seqlens_KV": ints(5, 1).float()},
    "matrix": {"seqlens_Q": ints(3, 4)[None], "seqlens_KV": ints(5, 1)[None]},
    "counts differ": {"seqlens_Q": ints(3, 4), "seqlens_KV": ints(6)},
    "no sequences": {"seqlens_Q": ints(), "seqlens_KV": ints()},
    "queries do not add up": {"seqlens_Q": ints(3, 3), "seqlens_KV": ints(5, 1)},
    "keys do not add up": {"seqlens_Q": ints(3, 4), "seqlens_KV": ints(5, 2)},
    "negative": {"seqlens_Q": ints(8, -1), "seqlens_KV": ints(5, 1)},
    "both descriptions": {"seqlens_Q": ints(3, 4), "seqlens_KV": ints(5, 1)} | SUMS | LONGEST,
    "sums without longest": SUMS,
    "longest without sums": LONGEST,
    "only one sum": {"cumulative_seqlen_Q": ints(0, 3, 7)} | LONGEST,
    "no leading 0": SUMS | LONGEST | {"cumulative_seqlen_Q": ints(3, 7)},
    "longest too small": SUMS | LONGEST | {"max_seqlen_KV": 4},
    "longest no int": SUMS | LONGEST | {"max_seqlen_Q": 4.0},
}


@pytest.mark.parametrize("case", PACKING)
def test_packed_sequences_that_do_not_fit(case: str) -> None:
    with pytest.raises(ValueError, match=r"seqlen|sequences"):
        natten.attention(tensor(1, 7, 2, 8), tensor(1, 6, 2, 8), tensor(1, 6, 2, 8), **PACKING[case])


def test_packed_sequences_have_batch_one() -> None:
    x = tensor(2, 7, 2, 8)
    with pytest.raises(ValueError, match="batch 2"):
        natten.attention(x, x, x, seqlens_Q=ints(3, 4), seqlens_KV=ints(3, 4))


@pytest.mark.parametrize(
    ("outputs", "lses"),
    [
        ([], []),
        ([tensor(1, 5, 2, 8)], []),
        ([tensor(1, 5, 2, 8)] * 2, [tensor(1, 5, 2)]),
        ([tensor(1, 5, 2, 8), tensor(1, 4, 2, 8)], [tensor(1, 5, 2), tensor(1, 4, 2)]),
        ([tensor(1, 5, 2, 8)] * 2, [tensor(1, 5, 2), tensor(1, 5, 1)]),
        ([tensor(5, 2, 8)] * 2, [tensor(5, 2)] * 2),
        ([tensor(1, 5, 2, 8)] * 2, [tensor(1, 5, 2, 1)] * 2),
    ],
    ids=["nothing", "no lse", "one lse", "tokens differ", "heads differ", "rank 3", "lse of rank 4"],
)
def test_merging_what_does_not_fit(outputs: list[Tensor], lses: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"outputs|lse"):
        natten.merge_attentions(outputs, lses)


LAYERS = (natten.NeighborhoodAttention1D, natten.NeighborhoodAttention2D, natten.NeighborhoodAttention3D)
MODULE = {
    "heads do not divide": ({"num_heads": 5}, "num_heads"),
    "no heads": ({"num_heads": 0}, "num_heads"),
    "kernel_size": ({"kernel_size": 1}, "kernel_size"),
    "kernel_size too long": ({"kernel_size": (3, 3, 3, 3)}, "kernel_size"),
    "stride": ({"stride": 0}, "stride"),
    "stride above the kernel": ({"stride": 4}, "stride"),
    "dilation": ({"dilation": 0}, "dilation"),
    "is_causal": ({"is_causal": 1}, "is_causal"),
    "proj_drop": ({"proj_drop": 1.5}, "proj_drop"),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("case", MODULE)
def test_modules_refuse_settings(layer: type, case: str) -> None:
    changes, message = MODULE[case]
    with pytest.raises(ValueError, match=message):
        layer(**{"embed_dim": 16, "num_heads": 4, "kernel_size": 3} | changes)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules_refuse_inputs_of_another_rank_width_or_a_small_grid(rank: int) -> None:
    layer = LAYERS[rank - 1](16, 4, kernel_size=3, dilation=2)
    grid = (6,) * rank
    assert layer(tensor(1, *grid, 16)).shape == (1, *grid, 16)
    with pytest.raises(ValueError, match="shape"):
        layer(tensor(1, *grid, 6, 16))
    with pytest.raises(ValueError, match="channels"):
        layer(tensor(1, *grid, 8))
    with pytest.raises(ValueError, match="kernel_size"):
        layer(tensor(1, *grid[1:], 5, 16))

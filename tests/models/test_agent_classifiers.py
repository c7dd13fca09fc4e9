"""The Agent Attention backbones compute what the published networks compute, from their state dicts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gridattn.models import AgentCSWin, AgentDeiT, AgentPVT, AgentSwin, CheckpointError

from . import agent_official as official
from .agent_official import agent_tensors, block, under, weights


def deit_state(dim: int, heads: int, counts: list[int], grid: int) -> dict[str, Tensor]:
    """Blocks with `counts` agents each; 0 for a dense one."""
    state = weights(patch_embed__proj=(dim, 3, 4, 4), norm=(dim,), head=(5, dim))
    state["cls_token"] = torch.randn(1, 1, dim, dtype=torch.float64)
    state["pos_embed"] = torch.randn(1, 1 + grid**2, dim, dtype=torch.float64)
    for i, count in enumerate(counts):
        attention = weights(qkv=(3 * dim, dim), proj=(dim, dim))
        if count:
            attention |= agent_tensors(dim, heads, count, (grid, grid))
            for name, shape in (("ac_bias", (1, heads, count, 1)), ("ca_bias", (1, heads, 1, count))):
                attention[name] = torch.randn(*shape, dtype=torch.float64)
        state |= under(f"blocks.{i}.", block(dim)) | under(f"blocks.{i}.attn.", attention)
    return state


def pvt_state(dims: list[int], heads: list[int], layers: list[list[int]], grid: int) -> dict[str, Tensor]:
    """Per level its blocks: a number of agents, or minus the reduction of a dense block."""
    state = weights(head=(5, dims[-1]))
    for level, dim in enumerate(dims):
        below, side = (dims[level - 1], 2) if level else (3, 4)
        state |= under(f"patch_embed{level + 1}.", weights(proj=(dim, below, side, side), norm=(dim,)))
        state[f"pos_embed{level + 1}"] = torch.randn(1, grid**2, dim, dtype=torch.float64)
        for i, kind in enumerate(layers[level]):
            attention = weights(q=(dim, dim), kv=(2 * dim, dim), proj=(dim, dim))
            if kind > 0:
                attention |= agent_tensors(dim, heads[level], kind, (grid, grid))
            elif kind < -1:
                attention |= weights(sr=(dim, dim, -kind, -kind), norm=(dim,))
            path = f"block{level + 1}.{i}."
            state |= under(path, block(dim)) | under(f"{path}attn.", attention)
        grid //= 2
    return state


def cswin_state(dim: int, heads: list[int], layers: list[list[tuple[int, int]]], grid: int) -> dict[str, Tensor]:
    """Per level its blocks: agents, or 0, and the width of the stripes; as wide as the map they are one branch."""
    state = weights(stage1_conv_embed__0=(dim, 3, 7, 7), stage1_conv_embed__2=(dim,))
    for level, blocks in enumerate(layers):
        if level:
            state |= under(f"merge{level}.", weights(conv=(2 * dim, dim, 3, 3), norm=(2 * dim,)))
            dim, grid = 2 * dim, grid // 2
        for i, (count, stripe) in enumerate(blocks):
            path, branches = f"stage{level + 1}.{i}.", 1 if stripe == grid else 2
            state |= under(path, block(dim) | weights(qkv=(3 * dim, dim), proj=(dim, dim)))
            for b in range(branches):
                sides = [grid if axis == b else stripe for axis in range(2)]
                mixer = agent_tensors(dim // branches, heads[level] // branches, max(count, 1), sides, "get_v")
                mixer = {name: t for name, t in mixer.items() if count or name.startswith("get_v")}
                state |= under(f"{path}attns.{b}.", mixer)
    return state | weights(norm=(dim,), head=(5, dim))


def swin_state(dim: int, heads: list[int], layers: list[list[int]], grid: int, window: int) -> dict[str, Tensor]:
    """Per level its blocks: a number of agents, or 0 for windows."""
    state = under("patch_embed.", weights(proj=(dim, 3, 4, 4), norm=(dim,)))
    for level, kinds in enumerate(layers):
        if level:
            path = f"layers.{level - 1}.downsample."
            state |= under(path, weights(norm=(4 * dim,)) | weights(bias=False, reduction=(2 * dim, 4 * dim)))
            dim, grid = 2 * dim, grid // 2
        for i, count in enumerate(kinds):
            path = f"layers.{level}.blocks.{i}."
            attention = weights(qkv=(3 * dim, dim), proj=(dim, dim))
            if count:
                attention |= agent_tensors(dim, heads[level], count, (grid, grid))
            else:
                table = ((2 * min(window, grid) - 1) ** 2, heads[level])
                attention["relative_position_bias_table"] = torch.randn(*table, dtype=torch.float64)
                attention["relative_position_index"] = torch.zeros(3, 3, dtype=torch.int64)
                state[f"{path}attn_mask"] = torch.zeros(3)
            state |= under(path, block(dim)) | under(f"{path}attn.", attention)
    return state | weights(norm=(dim,), head=(5, dim))


def loaded(model: Any, state: dict[str, Tensor]) -> Any:
    model = model.double().eval()
    model.load_official(state)
    return model


def test_deit_with_agents_first_and_dense_blocks_after() -> None:
    state = deit_state(8, 2, [4, 4, 9, 9, 4, 0, 0], grid=4)
    model = AgentDeiT(
        16, 4, 8, depth=7, num_heads=2, agent_sizes=(2, 3, 2, 2), agent_depth=5, mlp_ratio=2, num_classes=5
    )
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = official.deit(state, images, heads=2)
    torch.testing.assert_close(loaded(model, state)(images), expected)
    torch.testing.assert_close(model.forward_head(model.forward_features(images)), expected)


def test_pvt_with_agents_with_reduced_keys_and_dense() -> None:
    state = pvt_state([6, 8, 12], [1, 2, 3], [[4, -4], [9, -2], [-1, -1]], grid=8)
    model = AgentPVT(
        32,
        4,
        (6, 8, 12),
        (2, 2, 2),
        (1, 2, 3),
        mlp_ratios=(2, 2, 2),
        agent_sizes=(2, 3, 2),
        agent_depths=(1, 1, 0),
        agent_reductions=(1, 1, 1),
        reductions=(4, 2, 1),
        num_classes=5,
    )
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(loaded(model, state)(images), official.pvt(state, images, heads=(1, 2, 3)))


def test_cswin_with_agents_in_stripes_agents_in_one_window_and_dense_stripes() -> None:
    heads = [2, 2, 4]
    state = cswin_state(8, heads, [[(4, 4), (0, 4)], [(4, 8), (0, 4)], [(9, 4), (0, 4)]], grid=16)
    model = AgentCSWin(
        64,
        8,
        (2, 2, 2),
        heads,
        window_sizes=(4, 4, 2),
        mlp_ratio=2,
        agent_sizes=(2, 2, 3),
        agent_depths=(1, 1, 1),
        agent_window_sizes=(4, 8, 2),
        num_classes=5,
    )
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = official.cswin(state, images, heads, stripes=(4, 4, 4))
    torch.testing.assert_close(loaded(model, state)(images), expected)


def test_swin_with_agents_and_shifted_windows() -> None:
    heads = [1, 2, 4]
    state = swin_state(8, heads, [[4, 0, 0], [9, 0], [0, 0]], grid=28, window=7)
    model = AgentSwin(
        112,
        4,
        8,
        (3, 2, 2),
        heads,
        mlp_ratio=2,
        agent_sizes=(2, 3, 2),
        agent_depths=(1, 1, 0),
        num_classes=5,
    )
    images = torch.randn(2, 3, 112, 112, dtype=torch.float64)
    torch.testing.assert_close(loaded(model, state)(images), official.swin(state, images, heads))


def test_a_missing_or_damaged_name_is_refused() -> None:
    state = deit_state(8, 2, [4], grid=4)
    model = AgentDeiT(16, 4, 8, depth=1, num_heads=2, agent_sizes=(2, 2, 2, 2), mlp_ratio=2, num_classes=5)
    state["blocks.0.attn.extra"] = state.pop("blocks.0.attn.ac_bias")
    with pytest.raises(CheckpointError, match=r"1 missing \(blocks.0.attn.token_key_bias\); 1 unexpected"):
        model.load_official(state)
    halves = pvt_state([6], [1], [[4]], grid=4)
    del halves["block1.0.attn.kv.weight"]
    pyramid = AgentPVT(16, 4, (6,), (1,), (1,), (2,), (2,), None, (1,), (1,), num_classes=5)
    with pytest.raises(CheckpointError, match=r"1 missing \(levels.0.blocks.0.attn.qkv.weight\)"):
        pyramid.load_official(halves)

"""What the agent attention backbones share: checks of their settings, position tables and the map of their weights."""

from collections.abc import Mapping, Sequence
from math import isqrt, prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.agent import convert_official_agent
from gridattn.layers.agent_window import CrossWindowAttention, convert_official_cross_window
from gridattn.layers.window import WindowAttention
from gridattn.models.common import attention_layers
from gridattn.models.convit import resize_grid
from gridattn.models.patches import check_level_lists
from gridattn.ops.common import per_axis
from gridattn.ops.relative_bias import resize_relative_bias
from gridattn.ops.resize import resize_table

SOURCE = "arXiv 2312.08874"
AGENTS = (3, 4, 7, 7)
"""Agents per axis on the four levels of the published pyramids."""


def leading_agents(agent_depths: Sequence[int] | None, depths: Sequence[int]) -> tuple[int, ...]:
    """Blocks with agents per level; all of them for None.

    Raises:
        ValueError: another number of levels, or an entry outside 0 to the level's depth.

    Example:
        >>> leading_agents(None, (2, 2)), leading_agents((2, 0), (2, 2))
        ((2, 2), (2, 0))
    """
    if agent_depths is None:
        return tuple(depths)
    check_level_lists(depths=depths, agent_depths=agent_depths)
    if any(isinstance(a, bool) or not isinstance(a, int) or not 0 <= a <= d for a, d in zip(agent_depths, depths)):
        raise ValueError(
            f"agent_depths={tuple(agent_depths)} is not allowed; 0 to the depth of each level are, {tuple(depths)}"
        )
    return tuple(agent_depths)


def check_levels(depths: Sequence[int], **lists: Sequence[Any] | None) -> None:
    """Raises ValueError unless every level has a block, there is a level, and all given lists have an entry a level."""
    if not depths or any(isinstance(d, bool) or not isinstance(d, int) or d < 1 for d in depths):
        raise ValueError(f"depths={tuple(depths)} is not allowed; one int of at least 1 per level is")
    check_level_lists(depths=depths, **{name: values for name, values in lists.items() if values is not None})


def pad_short_axes(x: Tensor, size: int) -> Tensor:
    """Appends zeros to the axes after the first two that are shorter than `size`.

    Example:
        >>> import torch
        >>> pad_short_axes(torch.ones(1, 3, 2, 9), 4).shape
        torch.Size([1, 3, 4, 9])
    """
    # A symbolic size, met while a graph with dynamic sizes is exported, is taken to be long enough.
    missing = [max(size - n, 0) if isinstance(n, int) else 0 for n in x.shape[2:]]
    return F.pad(x, [amount for pad in reversed(missing) for amount in (0, pad)]) if any(missing) else x


def fit_position_table(table: Tensor, grid: Sequence[int]) -> Tensor:
    """A position embedding for our nominal grid, bicubic: (1, N, C) or (1, h, w, C) -> (1, *grid, C).

    One with another number of positions than the grid is taken to be of a square grid; one that is of none stays.

    Example:
        >>> import torch
        >>> fit_position_table(torch.ones(1, 16, 8), (3, 5)).shape
        torch.Size([1, 3, 5, 8])
    """
    if table.ndim == 3:
        side = isqrt(table.shape[1])
        for shape in (tuple(grid), (side, side)):
            if table.ndim == 3 and prod(shape) == table.shape[1]:
                table = table.unflatten(1, shape)
    return resize_grid(table, grid) if table.ndim == 4 else table


def convert_attentions(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a published network under our names, tables of position biases interpolated to the model's size.

    Lines of agent biases are interpolated linearly and tables of relative positions bicubically, as the authors do
    before fine-tuning.

    Args:
        model: a backbone of this family.
        state: published weights, every module already under our path; names that are ours already stay.
    """
    own = model.state_dict()
    left = dict(state)
    ours = {name: left.pop(name) for name in list(left) if name in own}
    for path, layer in attention_layers(model):
        part = {name: left.pop(name) for name in list(left) if name.startswith(f"{path}.")}
        official = {name.removeprefix(f"{path}."): tensor for name, tensor in part.items()}
        if isinstance(layer, CrossWindowAttention):
            official = convert_official_cross_window(official)
        elif isinstance(layer, WindowAttention):
            official = {_window_name(name): _window_table(name, tensor) for name, tensor in official.items()}
        else:
            official = convert_official_agent(official)
        ours |= {f"{path}.{name}": tensor for name, tensor in official.items()}
    return {name: _fit(name, tensor, own.get(name)) for name, tensor in (left | ours).items()}


def _window_name(name: str) -> str:
    return "relative_position_bias" if name == "relative_position_bias_table" else name


def _window_table(name: str, tensor: Tensor) -> Tensor:
    """Their table has a row per offset, query minus key; ours has an axis per direction, key minus query."""
    side = isqrt(tensor.shape[0])
    if name != "relative_position_bias_table" or side**2 != tensor.shape[0]:
        return tensor
    return tensor.T.reshape(-1, side, side).flip(1, 2)


def _fit(name: str, tensor: Tensor, own: Tensor | None) -> Tensor:
    if own is None or own.ndim != 3 or tensor.ndim != 3 or own.shape == tensor.shape:
        return tensor
    if "_bias.axes." in name and own.shape[:2] == tensor.shape[:2]:
        return resize_table(tensor, own.shape[2:], "linear")
    if name.endswith("relative_position_bias") and own.shape[0] == tensor.shape[0]:
        return resize_relative_bias(tensor, [(size + 1) // 2 for size in own.shape[1:]])
    return tensor


def agent_sizes_of(value: Sequence[Any], levels: int, name: str) -> list[tuple[int, ...]]:
    """One pair of agents per axis for every level.

    Example:
        >>> agent_sizes_of((3, (4, 2)), 2, "agent_sizes")
        [(3, 3), (4, 2)]
    """
    check_level_lists(depths=range(levels), **{name: value})
    return [per_axis(size, 2, name) for size in value]

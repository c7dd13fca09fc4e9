"""Layers on slabs of a grid, and models whose activations are cut into slabs over several devices."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules import activation

from gridattn.layers.neighborhood import NeighborhoodAttention
from gridattn.ops.neighborhood import make_plan
from gridattn.parallel.attention import attend_shards
from gridattn.parallel.exchange import sum_over
from gridattn.parallel.slabs import check_shard_axes, make_shards, whole_grid

POSITION_WISE: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Dropout,
    nn.Identity,
    *(getattr(activation, name) for name in ("GELU", "ReLU", "SiLU", "Sigmoid", "Tanh", "LeakyReLU", "Hardswish")),
)
"""Layers that treat every position by itself, so that a slab needs nothing of its neighbours."""


class ShardedNeighborhoodAttention(NeighborhoodAttention):
    """A `NeighborhoodAttention` that takes and gives slabs; made of one by `parallelize`.

    Attributes:
        mesh, shard_axes, slabs: as in `sharded_neighborhood_attention`.
    """

    mesh: DeviceMesh
    shard_axes: tuple[int, ...]
    slabs: Sequence[Sequence[int]] | None

    def forward(self, x: Tensor, *, positions: Tensor | None = None, choice: Tensor | None = None) -> Tensor:
        """(B, *slab, C) -> (B, *slab, C); `positions` and `choice` are not available on slabs."""
        if positions is not None or choice is not None:
            raise ValueError("positions or choice is given; a layer on slabs attends at every position of its slab")
        self.check_input(x)
        shards = make_shards(self.mesh, self.shard_axes, x.shape, self.rank, self.slabs)
        grid = whole_grid(x.shape[1:-1], shards)
        if self._padded(grid) != grid:
            raise ValueError(
                f"the grid {grid} is smaller than kernel_size * dilation = {self._span()} and small_grid='pad'; a grid "
                "that must be padded cannot be cut into slabs"
            )
        query, key, value = self._heads(x)
        kernel, *others = self._settings(grid)
        if kernel:
            axes = [axis for axis, size in enumerate(grid) if size > 1]
            plan = make_plan([grid[axis] for axis in axes], kernel, *others)
            shards = [replace(shard, axis=axes.index(shard.axis)) for shard in shards if shard.axis in axes]
            q, k, v = (
                t.reshape(len(t), *(t.shape[1 + axis] for axis in axes), *t.shape[-2:]) for t in (query, key, value)
            )
            bias = self._bias(kernel, grid)
            out, _ = attend_shards(
                q, k, v, plan, shards, self.scale, bias, None, (None, None), need_lse=False, backend=self.backend
            )
            value = out.reshape(value.shape)
        return self.proj_drop(self.proj(value.flatten(-2)))

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        raise NotImplementedError("attention_map of a layer on slabs is not available; call it on the layer as it was")


def parallelize(
    module: nn.Module,
    mesh: DeviceMesh,
    shard_axes: int | Sequence[int] | None = None,
    slabs: Sequence[Sequence[int]] | None = None,
) -> nn.Module:
    """Makes a module work on slabs of its grid, each process on its own: same outputs, same gradients.

    Every `NeighborhoodAttention` in the module exchanges the rows around its slab. All other layers must treat every
    position by itself. Parameters and buffers take the values of the mesh's first process; gradients of parameters
    become the sums over the mesh, so that every process takes the same optimizer step. The objective is the sum of the
    processes' losses: a mean over positions is the sum over the slab divided by the positions of the whole grid.

    The module is changed in place; names of parameters stay.

    Args:
        module: a `NeighborhoodAttention`, or a module of such and of layers in `POSITION_WISE`, whose own code treats
            every position by itself too.
        mesh, shard_axes, slabs: as in `sharded_neighborhood_attention`.

    Returns:
        The module.

    Raises:
        ValueError: no `NeighborhoodAttention` in the module, a layer that may mix positions, or axes that do not fit.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = dist.init_device_mesh("cpu", (1,))
        >>> layer = parallelize(NeighborhoodAttention(32, num_heads=4), mesh, shard_axes=0)
        >>> layer(torch.randn(1, 14, 14, 32)).shape
        torch.Size([1, 14, 14, 32])
        >>> dist.destroy_process_group()
    """
    layers = {name: child for name, child in module.named_modules() if isinstance(child, NeighborhoodAttention)}
    if not layers:
        raise ValueError(f"{type(module).__name__} holds no NeighborhoodAttention; there is nothing to parallelize")
    inside = {id(child) for layer in layers.values() for child in layer.modules()}
    for name, child in module.named_modules():
        if isinstance(child, NeighborhoodAttention):
            if type(child) is not NeighborhoodAttention:
                raise ValueError(
                    f"{name or 'module'} is a {type(child).__name__}; a NeighborhoodAttention itself is allowed"
                )
            check_shard_axes(mesh, shard_axes, child.rank)
        elif id(child) not in inside and _may_mix_positions(child):
            raise ValueError(
                f"{name} is a {type(child).__name__}, which may mix positions; NeighborhoodAttention and "
                f"{', '.join(kind.__name__ for kind in POSITION_WISE)} are allowed"
            )

    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
    _take_from_first(module, groups)
    summed_by_the_operator = set()
    for layer in layers.values():
        axes = check_shard_axes(mesh, shard_axes, layer.rank)
        layer.__class__ = ShardedNeighborhoodAttention
        layer.__dict__.update(mesh=mesh, shard_axes=axes, slabs=slabs)
        summed_by_the_operator.add(layer.relative_position_bias)
    for parameter in module.parameters():
        if parameter not in summed_by_the_operator:
            _sum_gradients(parameter, groups)
    return module


def _may_mix_positions(module: nn.Module) -> bool:
    if next(module.children(), None) is not None:
        return False  # a container: its layers are judged one by one
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return len(module.normalized_shape) > 1
    return not isinstance(module, POSITION_WISE)


def _take_from_first(module: nn.Module, groups: Sequence) -> None:
    """Gives all processes the parameters and buffers of the mesh's first one."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            for group in groups:
                values = tensor.detach().contiguous()
                dist.broadcast(values, src=dist.get_global_rank(group, 0), group=group)
                tensor.copy_(values)


def _sum_gradients(parameter: nn.Parameter, groups: Sequence) -> None:
    """Makes the gradient of a parameter the sum over the processes, also if it is unfrozen only later."""
    trained = parameter.requires_grad
    parameter.requires_grad_(True)
    parameter.register_hook(partial(sum_over, groups=groups))
    parameter.requires_grad_(trained)

"""Problems on slabs, run by several processes; each writes what it found to a file."""

import random
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gridattn.layers import NeighborhoodAttention
from gridattn.ops import neighborhood_attention
from gridattn.ops.neighborhood import make_plan
from gridattn.ops.neighborhood.checks import count_visible_keys
from gridattn.parallel import count_exchange, gather_grid, parallelize, shard_grid, sharded_neighborhood_attention

DEPTH, VALUE_DEPTH, HEADS, KV_HEADS = 4, 3, 2, 1


@dataclass
class Case:
    """One problem, and how a mesh cuts it."""

    seed: int
    mesh: tuple[int, ...]
    axes: tuple[int, ...]
    slabs: list[list[int]]
    grid: list[int]
    settings: dict[str, Any]
    with_bias: bool
    with_mask: bool
    with_extra: bool
    batch: int = 2
    dtype: torch.dtype = torch.float64

    def tensors(self) -> dict[str, Tensor]:
        """The whole problem, the same in every process."""
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype).requires_grad_()

        tensors = {
            "query": randn(self.batch, *self.grid, HEADS, DEPTH),
            "key": randn(self.batch, *self.grid, KV_HEADS, DEPTH),
            "value": randn(self.batch, *self.grid, KV_HEADS, VALUE_DEPTH),
        }
        if self.with_bias:
            tensors["bias"] = randn(HEADS, *(2 * k - 1 for k in self.settings["kernel_size"]))
        if self.with_extra:
            tensors["additional_keys"] = randn(self.batch, 2, KV_HEADS, DEPTH)
            tensors["additional_values"] = randn(self.batch, 2, KV_HEADS, VALUE_DEPTH)
        return tensors

    def key_mask(self) -> Tensor | None:
        if not self.with_mask:
            return None
        mask = torch.rand(self.batch, *self.grid, generator=torch.Generator().manual_seed(self.seed)) > 0.4
        return mask | (count_visible_keys(mask, make_plan(self.grid, **self.settings)) == 0)

    def weights(self) -> tuple[Tensor, Tensor]:
        """What the loss weighs output and lse by."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.batch, *self.grid, HEADS)
        out = torch.randn((*shape, VALUE_DEPTH), generator=generator, dtype=torch.float64)
        return out, torch.randn(shape, generator=generator, dtype=torch.float64)


def whole(case: Case) -> dict[str, Tensor]:
    """Output, lse and gradients of one process."""
    tensors = case.tensors()
    out, lse = neighborhood_attention(
        **tensors, **case.settings, key_mask=case.key_mask(), return_lse=True, backend="tiled"
    )
    of_out, of_lse = case.weights()
    grads = torch.autograd.grad((out * of_out).sum() + (lse * of_lse).sum(), list(tensors.values()))
    return {"out": out.detach(), "lse": lse.detach(), **{f"grad {n}": g for n, g in zip(tensors, grads)}}


def cut(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """The same of this process's slab, gathered; and the bytes that it received."""
    tensors, mask = case.tensors(), case.key_mask()
    place = (mesh, case.axes, case.slabs)
    local = {n: shard_grid(t, *place) if n in ("query", "key", "value") else t for n, t in tensors.items()}
    of_out, of_lse = (shard_grid(t, *place) for t in case.weights())
    mask = None if mask is None else shard_grid(mask, *place)
    told = case.slabs if case.seed % 2 else None
    with count_exchange() as count:
        out, lse = sharded_neighborhood_attention(
            **local,
            **case.settings,
            key_mask=mask,
            return_lse=True,
            backend="tiled",
            mesh=mesh,
            shard_axes=case.axes,
            slabs=told,
        )
        loss = (out * of_out).sum() + (lse * of_lse).sum()
        grads = torch.autograd.grad(loss, list(tensors.values()))
    return {
        "out": gather_grid(out.detach(), mesh, case.axes),
        "lse": gather_grid(lse.detach(), *place),
        **{f"grad {n}": g for n, g in zip(tensors, grads)},
        "received": (count.forward, count.backward),
        "coordinate": tuple(mesh.get_coordinate() or ()),
    }


def make_cases(processes: int) -> list[Case]:
    """Problems of every rank and setting, with slabs of uneven sizes, some smaller than a window."""
    draw = random.Random(processes)
    cases = []
    for seed in range(12):
        rank = 1 + seed % 3
        meshes = [(processes,)]
        if processes == 4 and rank > 1:
            meshes.append((2, 2))
        mesh = draw.choice(meshes)
        axes = tuple(draw.sample(range(rank), len(mesh)))
        grid = [draw.randint(4, {1: 24, 2: 12, 3: 7}[rank]) for _ in range(rank)]
        slabs = []
        for axis, parts in zip(axes, mesh):
            ends = sorted(draw.sample(range(1, grid[axis]), parts - 1))
            slabs.append([high - low for low, high in zip([0, *ends], [*ends, grid[axis]])])
        kernel = [draw.randint(2, min(size, draw.choice((3, 7)))) for size in grid]
        settings = {
            "kernel_size": kernel,
            "stride": [draw.choice((1, 1, draw.randint(1, k))) for k in kernel],
            "dilation": [draw.choice((1, draw.randint(1, size // k))) for size, k in zip(grid, kernel)],
            "is_causal": [draw.random() < 0.3 for _ in kernel],
        }
        options = [draw.random() < 0.5, draw.random() < 0.4, draw.random() < 0.3]
        cases.append(Case(seed, mesh, axes, slabs, grid, settings, *options))
    cases[4].dtype = torch.float32
    return cases


def halo_bytes(case: Case, coordinate: tuple[int, ...]) -> int:
    """Bytes of the keys, values and mask outside of a process's slab that its queries see, position by position."""
    plan = make_plan(case.grid, **case.settings)
    seen, own = [], []
    for axis, of_axis in enumerate(plan.axes):
        first, last = 0, of_axis.length
        if axis in case.axes:
            dim = case.axes.index(axis)
            sizes, here = case.slabs[dim], coordinate[dim]
            first, last = sum(sizes[:here]), sum(sizes[: here + 1])
        own.append(last - first)
        seen.append(len({int(key) for query in range(first, last) for key in of_axis.visible(query)}))
    token = KV_HEADS * (DEPTH + VALUE_DEPTH) * case.dtype.itemsize
    return case.batch * (prod(seen) - prod(own)) * (token + case.with_mask)


def make_model(seed: int, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    layer = NeighborhoodAttention(8, num_heads=2, backend="tiled", **options)
    return nn.Sequential(nn.LayerNorm(8), layer, nn.GELU(), nn.Linear(8, 8), layer).double()


MODELS = {
    "plain": ((9, 10), {"kernel_size": 3}),
    "dilated, causal": ((11, 8), {"kernel_size": (5, 3), "dilation": (2, 1), "is_causal": (True, False)}),
    "shrunk": ((5, 8), {"kernel_size": 7}),
    "flat": ((9, 1), {"kernel_size": 3}),
}


def model_input(grid: tuple[int, ...]) -> Tensor:
    return torch.randn(2, *grid, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def train_whole(name: str) -> dict[str, Tensor]:
    """Output and parameters after two steps of one process."""
    grid, options = MODELS[name]
    model, x = make_model(0, **options), model_input(grid)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out = x
    for _ in range(2):
        optimizer.zero_grad()
        out = model(x)
        out.square().mean().backward()
        optimizer.step()
    return {"out": out.detach(), **model.state_dict()}


def train_cut(name: str, mesh: DeviceMesh, shard_axes: tuple[int, ...]) -> dict[str, Tensor]:
    """The same of slabs; the processes begin with different parameters."""
    grid, options = MODELS[name]
    model = make_model(dist.get_rank(), **options)
    for parameter in model[3].parameters():
        parameter.requires_grad_(False)
    parallelize(model, mesh, shard_axes)
    for parameter in model[3].parameters():
        parameter.requires_grad_(True)
    x = model_input(grid)
    slab = shard_grid(x, mesh, shard_axes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out = slab
    for _ in range(2):
        optimizer.zero_grad()
        out = model(slab)
        (out.square().sum() / x.numel()).backward()
        optimizer.step()
    return {"out": gather_grid(out.detach(), mesh, shard_axes), **model.state_dict()}


def errors(mesh: DeviceMesh) -> dict[str, str]:
    """Messages that every process must get, although only one of them has brought the fault."""
    rank = dist.get_rank()
    x = torch.zeros(1, 6, 5 + (rank == 0), 1, 4)
    mask = torch.ones(1, 6, 5, dtype=torch.bool) if rank else torch.zeros(1, 6, 5, dtype=torch.bool)
    y = torch.zeros(1, 6, 5, 1, 4)
    calls = {
        "slabs": lambda: sharded_neighborhood_attention(x, x, x, 3, mesh=mesh),
        "mask": lambda: sharded_neighborhood_attention(y, y, y, 3, mesh=mesh, key_mask=mask),
        "kernel": lambda: sharded_neighborhood_attention(y, y, y, (64, 3), mesh=mesh),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def gathered_gradient(mesh: DeviceMesh) -> Tensor:
    """Gradient of a whole grid that is cut, gathered, and weighed by each process in its own way."""
    x = torch.ones(1, 7, 3, dtype=torch.float64, requires_grad=True)
    whole = gather_grid(shard_grid(x, mesh), mesh)
    return torch.autograd.grad((whole * (dist.get_rank() + 1)).sum(), x)[0]


def work(rank: int, processes: int, folder: str) -> None:
    """One process: runs everything and writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "rendezvous").as_uri(),
        rank=rank,
        world_size=processes,
        timeout=timedelta(minutes=5),
    )
    meshes = {shape: init_device_mesh("cpu", shape) for shape in {(processes,), (2, processes // 2)}}
    line = meshes[(processes,)]
    found = {
        "cases": [cut(case, meshes[case.mesh]) for case in make_cases(processes)],
        "models": {name: train_cut(name, line, (0,)) for name in MODELS},
        "errors": errors(line),
        "gathered": gathered_gradient(line),
    }
    if processes == 4:
        found["square"] = train_cut("plain", meshes[(2, 2)], (1, 0))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()

"""Slabs of a grid on several processes give the numbers of one process, and exchange the halo and nothing else."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gridattn.layers import NeighborhoodAttention
from gridattn.ops import neighborhood_attention
from gridattn.parallel import parallelize, shard_grid, sharded_neighborhood_attention
from tests.parallel.processes import MODELS, halo_bytes, make_cases, train_whole, whole, work

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
PROCESSES = (2, 4)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """What each process found, for each number of processes."""
    method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
    if method == "forkserver":
        mp.get_context(method).set_forkserver_preload(["tests.parallel.processes"])  # imports torch once for all
    results = {}
    for processes in PROCESSES:
        folder = tmp_path_factory.mktemp(f"processes{processes}")
        mp.start_processes(work, (processes, str(folder)), nprocs=processes, start_method=method)
        results[processes] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    return results


@pytest.mark.parametrize("processes", PROCESSES)
def test_slabs_equal_the_whole_forward_and_backward(processes: int, found: dict) -> None:
    for number, case in enumerate(make_cases(processes)):
        expected, tolerance = whole(case), 1e-6 if case.dtype == torch.float64 else 1e-5
        for of_rank in found[processes]:
            for name, tensor in expected.items():
                torch.testing.assert_close(
                    of_rank["cases"][number][name],
                    tensor,
                    rtol=tolerance,
                    atol=tolerance,
                    msg=lambda m, n=name, c=case: f"{n} of {c}: {m}",
                )


@pytest.mark.parametrize("processes", PROCESSES)
def test_the_bytes_received_are_those_of_the_halo(processes: int, found: dict) -> None:
    exchanged = 0
    for number, case in enumerate(make_cases(processes)):
        results = [of_rank["cases"][number] for of_rank in found[processes]]
        assert [r["received"][0] for r in results] == [halo_bytes(case, r["coordinate"]) for r in results], case
        case.with_mask = False  # masks have no gradient
        assert sum(r["received"][1] for r in results) == sum(halo_bytes(case, r["coordinate"]) for r in results), case
        exchanged += results[0]["received"][0]
    assert exchanged > 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("processes", PROCESSES)
def test_a_model_on_slabs_trains_like_the_whole_model(processes: int, name: str, found: dict) -> None:
    expected = train_whole(name)
    results = [of_rank["models"][name] for of_rank in found[processes]]
    if processes == 4 and name == "plain":
        results += [of_rank["square"] for of_rank in found[processes]]
    for result in results:
        assert list(result) == list(expected)
        for part, tensor in expected.items():
            torch.testing.assert_close(result[part], tensor, rtol=1e-9, atol=1e-10, msg=lambda m, p=part: f"{p}: {m}")


@pytest.mark.parametrize("processes", PROCESSES)
def test_a_fault_of_one_process_is_told_by_all(processes: int, found: dict) -> None:
    for of_rank in found[processes]:
        assert "must be equal but for that axis" in of_rank["errors"]["slabs"]
        assert "queries without a key" in of_rank["errors"]["mask"]
        assert "exceeds the grid" in of_rank["errors"]["kernel"]


@pytest.mark.parametrize("processes", PROCESSES)
def test_gradients_through_gathering_are_summed_over_the_processes(processes: int, found: dict) -> None:
    for of_rank in found[processes]:
        expected = torch.full((1, 7, 3), float(sum(range(1, processes + 1))), dtype=torch.float64)
        assert torch.equal(of_rank["gathered"], expected)


@pytest.fixture
def alone() -> Iterator[DeviceMesh]:
    """A mesh of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_one_process_needs_no_exchange(alone: DeviceMesh) -> None:
    x: Tensor = torch.randn(1, 9, 8, 2, 8, requires_grad=True)
    got = sharded_neighborhood_attention(x, x, x, 5, stride=2, mesh=alone, shard_axes=1, backend="tiled")
    expected = neighborhood_attention(x, x, x, 5, stride=2, backend="tiled")
    assert torch.equal(got, expected)
    assert torch.equal(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (got, expected)))


def test_autocast_is_that_of_the_operator(alone: DeviceMesh) -> None:
    x = torch.randn(1, 9, 8, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert sharded_neighborhood_attention(x, x, x, 5, mesh=alone, backend="tiled").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_axes": 2}, r"shard_axes=\(2,\) is not allowed; different grid axes from 0 to 1"),
        ({"shard_axes": (0, 1)}, "names 2 axes, but the mesh has 1 dimensions"),
        ({"slabs": [[4]]}, "the slab has 9 positions on axis 0"),
        ({"slabs": [[4, 5]]}, "slabs="),
        ({"kernel_size": 10}, "exceeds the grid"),
        ({"backend": "fast"}, "backend='fast' is not known"),
        ({"key_mask": torch.ones(1, 9, 8)}, "key_mask is torch.float32"),
        ({"bias": torch.zeros(2, 3, 3)}, "bias has shape"),
        ({"value": torch.zeros(1, 9, 7, 2, 8)}, "value has batch and grid"),
    ],
)
def test_bad_input_is_one_clear_error(alone: DeviceMesh, change: dict, message: str) -> None:
    x = torch.zeros(1, 9, 8, 2, 8)
    with pytest.raises(ValueError, match=message):
        sharded_neighborhood_attention(**{"query": x, "key": x, "value": x, "kernel_size": 3, "mesh": alone, **change})


def test_a_grid_with_fewer_positions_than_processes_is_refused(alone: DeviceMesh) -> None:
    with pytest.raises(ValueError, match="an axis of 0 positions cannot be cut into 1 slabs"):
        shard_grid(torch.zeros(1, 0, 4), alone)


def test_models_that_may_mix_positions_are_refused(alone: DeviceMesh) -> None:
    layer = NeighborhoodAttention(8, num_heads=2, kernel_size=3)
    with pytest.raises(ValueError, match="1 is a Conv2d, which may mix positions"):
        parallelize(nn.Sequential(layer, nn.Conv2d(8, 8, 3)), alone)
    with pytest.raises(ValueError, match="holds no NeighborhoodAttention"):
        parallelize(nn.Linear(8, 8), alone)
    assert type(layer) is NeighborhoodAttention


def test_a_grid_that_must_be_padded_is_refused(alone: DeviceMesh) -> None:
    layer = parallelize(NeighborhoodAttention(8, num_heads=2, kernel_size=7, small_grid="pad"), alone)
    with pytest.raises(ValueError, match="cannot be cut into slabs"):
        layer(torch.zeros(1, 5, 9, 8))


@pytest.mark.slow
def test_the_example_script_runs_under_torchrun() -> None:
    script = Path(__file__).resolve().parents[2] / "docs" / "guide" / "sharded_training.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert "as one process: True" in done.stdout

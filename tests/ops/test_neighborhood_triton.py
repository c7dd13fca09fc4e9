"""The Triton backend: its kernels in the interpreter, and which problems it takes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gridattn.ops import neighborhood_attention

triton = pytest.importorskip("triton")


def test_the_kernels_in_the_interpreter() -> None:
    """Runs `interpreted_triton.py` in a process of its own: Triton is asked to interpret before it is imported."""
    file = Path(__file__).parent / "interpreted_triton.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def of_one_head_on_a_line(kernel: Any) -> tuple[dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types of a kernel's arguments and its constants, among them, as in a launch, all integers that equal 1."""
    constants = {"DEPTH": 24, "WIDTH": 16, "BLOCK_D": 32, "BLOCK_W": 16, "PRECISION": "ieee"}
    constants |= {"KEPT": True, "Q_TILE": (1, 1, 32), "K_TILE": (1, 1, 32), "heads": 1, "group": 1}
    types: dict[str, Any] = {}
    values: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name], values[(i,)] = "constexpr", constants[name]
        elif name.endswith("strides"):
            types[name] = ("i64", "i32", "i32", "i32", "i32")
        elif name in ("shape", "dilation", "q_tiles", "q_per_group", "k_tiles", "k_per_group"):
            types[name] = ("constexpr", "constexpr", "i32")
            values |= {(i, 0): 1, (i, 1): 1}
        elif name in ("scale", "factor"):
            types[name] = "fp32"
        elif name == "kept":
            types[name] = "*u8"
        elif name in ("lse", "delta"):
            types[name] = "*fp32"
        else:
            types[name] = "*i32" if name in ("first", "stop", "starts", "partials", "columns") else "*bf16"
    return types, values


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is not compiled")
@pytest.mark.parametrize("name", ["forward", "query_gradient", "key_gradient"])
def test_the_kernels_compile_for_a_gpu_and_use_its_matrix_units(name: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gridattn.ops.neighborhood import triton_kernels

    kernel = getattr(triton_kernels, name)
    source = ASTSource(kernel, *of_one_head_on_a_line(kernel))
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4, "num_stages": 2})
    assert "mma.sync" in compiled.asm["ptx"]
    assert "atom" not in compiled.asm["ptx"]


def test_without_a_gpu_and_without_the_interpreter_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.randn(1, 6, 2, 8)
    with pytest.raises(ValueError, match="backend='triton' cannot run this problem: the tensors are on cpu, not on a"):
        neighborhood_attention(q, q, q, 3, backend="triton")

"""What a network costs on this machine: time of a forward pass, memory of a training step, multiply-accumulates."""

import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gridattn
from gridattn.models.common import Backbone


def latency(model: nn.Module, images: Tensor, repeats: int = 7) -> float:
    """Median seconds per image of a forward pass in eval mode, after one pass that is not counted.

    Args:
        model: any network from images to anything.
        images: (B, C, H, W); the batch that is timed.
        repeats: timed passes.

    Returns:
        Seconds per image.

    Raises:
        ValueError: no repeat, or an empty batch.

    Example:
        >>> latency(nn.Conv2d(3, 8, 3), torch.randn(2, 3, 16, 16), repeats=2) > 0
        True
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} is not allowed; it must be at least 1")
    if not len(images):
        raise ValueError("images holds no image; the batch that is timed must hold at least one")
    was_training = model.training
    model.eval()
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            _wait(images.device)
            start = time.perf_counter()
            model(images)
            _wait(images.device)
            seconds.append(time.perf_counter() - start)
    model.train(was_training)
    return statistics.median(seconds[1:]) / len(images)


def count_macs(model: Backbone, image: Tensor) -> int:
    """Multiply-accumulates of one forward pass on one image.

    Attention layers count by their own `macs`, which holds for every backend; of the rest of the network, PyTorch's
    counter takes account in one run.

    Args:
        model: a backbone with attention layers.
        image: (1, C, H, W).

    Example:
        >>> from gridattn.models import create_model
        >>> small, large = (torch.randn(1, 3, size, size) for size in (32, 64))
        >>> model = create_model("grid_vit_micro", attention="window")
        >>> count_macs(model, small) < count_macs(model, large)
        True
    """
    attention = sum(layer.macs(x.shape[1:-1]) for _, layer, x in model.attention_inputs(image))
    whole = copy.deepcopy(model).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        whole(image)
    counts = counter.get_flop_counts()
    root = type(whole).__name__
    inside = sum(sum(counts.get(f"{root}.{name}", {}).values()) for name, _ in whole.attention_layers())
    return attention + (counter.get_total_flops() - inside) // 2


def step_memory(step: Callable[[], Any], device: torch.device) -> tuple[int, str]:
    """Peak bytes of the tensors that `step` allocates, and the method in words.

    On CUDA the caching allocator's own peak counts. Elsewhere the profiler's record of every allocation and release is
    replayed, so that the figure does not depend on what else the process holds, nor on the operating system.

    Args:
        step: what is measured; for a training step, forward and backward.
        device: where it runs.

    Example:
        >>> step_memory(lambda: torch.zeros(1000).sum(), torch.device("cpu"))[0] >= 4000
        True
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, "peak of the CUDA allocator above the weights"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak, "peak of all tensors allocated during the step, from the profiler's record, weights not counted"


def machine() -> dict[str, str]:
    """The machine and the versions, for the head of a report.

    Example:
        >>> sorted(machine())
        ['accelerator', 'cpu', 'gridattn', 'python', 'system', 'threads', 'torch']
    """
    if torch.cuda.is_available():
        accelerator = torch.cuda.get_device_name()
    else:
        accelerator = "Apple MPS" if torch.backends.mps.is_available() else "none"
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "accelerator": accelerator,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gridattn": gridattn.__version__,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

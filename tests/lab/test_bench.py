"""Costs: counted figures are exact, timed ones are sane."""

import pytest
import torch
from torch import nn

from gridattn.lab.bench import count_macs, latency, step_memory
from gridattn.models import create_model

CPU = torch.device("cpu")


def test_peak_memory_counts_what_lives_at_once_and_not_what_was_freed() -> None:
    def both() -> None:
        a = torch.zeros(1_000_000)
        b = torch.zeros(1_000_000)
        del a, b

    def one_after_the_other() -> None:
        a = torch.zeros(1_000_000)
        del a
        torch.zeros(1_000_000)

    assert step_memory(both, CPU)[0] == pytest.approx(8e6, rel=0.01)
    assert step_memory(one_after_the_other, CPU)[0] == pytest.approx(4e6, rel=0.01)


def test_macs_of_the_host_are_its_matmuls_and_convolutions_plus_its_layers_own_count() -> None:
    model = create_model("grid_vit_micro", num_classes=10, attention="global")
    image = torch.randn(1, 3, 32, 32)
    n, dim = 64, 48
    per_block = 4 * n * dim**2 + 2 * n**2 * dim + n * 2 * dim * 2 * dim
    stem_and_head = n * 3 * 16 * dim + n * 9 * dim + dim * 10
    assert count_macs(model, image) == 4 * per_block + stem_and_head


def test_latency_is_per_image_and_leaves_the_mode_alone() -> None:
    class Sleeper(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            import time

            time.sleep(0.02)
            return x

    model = Sleeper().train()
    assert latency(model, torch.zeros(4, 1), repeats=2) == pytest.approx(0.005, rel=0.5)
    assert model.training


@pytest.mark.parametrize(("batch", "repeats", "word"), [(0, 3, "images"), (1, 0, "repeats")])
def test_nothing_to_time_is_refused(batch: int, repeats: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        latency(nn.Identity(), torch.zeros(batch, 3), repeats)

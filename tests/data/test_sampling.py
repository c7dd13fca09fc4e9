"""Samples are functions of (seed, epoch, index): not of the process, the worker, or what was drawn before."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gridattn.data import EpochSampler, load_dataset


@pytest.mark.parametrize("name", ["digits", "textures"])
def test_a_draw_gives_the_same_tensor_whatever_was_drawn_before(name: str) -> None:
    data = load_dataset(name, image_size=16, augment={"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5}).train
    first = data[5][0]
    torch.rand(3)
    many = data.__getitems__([7, 3, 5])
    assert torch.equal(many[2][0], first)
    assert not torch.equal(data[5 + len(data)][0], first)  # the same sample, in the next epoch


def test_the_generators_of_the_caller_are_left_alone() -> None:
    data = load_dataset("textures", image_size=16).train
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    data[0]
    assert torch.equal(torch.rand(2), expected)


def test_workers_change_nothing() -> None:
    data = load_dataset("textures", image_size=16).train
    alone, helped = (
        [x for x, _ in DataLoader(data, 16, sampler=range(40, 72), num_workers=workers)] for workers in (0, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, helped))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 60), batch=st.integers(1, 5), world=st.integers(1, 4), epoch=st.integers(0, 3))
def test_processes_share_the_samples_out(size: int, batch: int, world: int, epoch: int) -> None:
    data = range(size)
    held = [list(EpochSampler(data, batch, shuffle=False, rank=r, world_size=world)) for r in range(world)]
    assert sorted(i for part in held for i in part if i >= 0) == list(data)
    assert len({len(part) for part in held}) == 1
    if size < batch * world:
        return
    one = list(EpochSampler(data, batch * world, shuffle=True, epoch=epoch))
    many = [list(EpochSampler(data, batch, shuffle=True, rank=r, world_size=world, epoch=epoch)) for r in range(world)]
    for step in range(len(one) // (batch * world)):
        together = {i for part in many for i in part[step * batch : (step + 1) * batch]}
        assert together == set(one[step * batch * world : (step + 1) * batch * world])
        assert len(together) == batch * world
        assert all(draw // size == epoch for draw in together)


def test_skipped_batches_leave_the_rest_of_that_epoch_in_order() -> None:
    whole = EpochSampler(range(50), 4, shuffle=True, epoch=2)
    resumed = EpochSampler(range(50), 4, shuffle=True, epoch=2, skip=5)
    assert list(resumed) == list(whole)[20:]
    whole.set_epoch(3)
    resumed.set_epoch(3)
    assert list(resumed) == list(whole)
    assert len(resumed) == len(whole) == 48


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=8 on 2 process\(es\) exceeds the 10 training samples; at most 5"):
        EpochSampler(range(10), 8, shuffle=True, world_size=2)


def test_padding_is_zeros_labelled_as_padding() -> None:
    image, label = load_dataset("textures", image_size=16).val[-1]
    assert label == -1
    assert image.shape == (3, 16, 16)
    assert not image.any()

"""Facts about subspace attention."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gridattn.ops.subspace import subspace_attention, subspace_gate, subspace_maps, subspace_scores


def reference(x, scale, shift, weight, bias) -> torch.Tensor:
    """The equation, subspace after subspace, on an image."""
    size = x.shape[-1] // len(bias)
    outputs = []
    for n in range(len(bias)):
        block = slice(n * size, (n + 1) * size)
        part = x[..., block]
        features = F.max_pool2d((part * scale[block] + shift[block]).relu().movedim(-1, 1), 3, 1, 1).movedim(1, -1)
        score = ((features * weight[block]).sum(-1) + bias[n]).relu()
        outputs.append(part + part * score.flatten(1).softmax(1).view(*score.shape, 1))
    return torch.cat(outputs, -1)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([1, 2, 3, 6, 12]))
def test_all_subspaces_at_once_equal_one_after_another(height: int, width: int, num_subspaces: int) -> None:
    shapes = [(2, height, width, 12), (12,), (12,), (12,), (num_subspaces,)]
    arguments = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    ours, theirs = subspace_attention(*arguments), reference(*arguments)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, arguments, cotangent), torch.autograd.grad(theirs, arguments, cotangent)):
        torch.testing.assert_close(a, b)


def test_the_gain_is_between_one_and_two_and_its_excess_sums_to_one_in_every_subspace() -> None:
    x = torch.randn(2, 5, 6, 12, dtype=torch.float64)
    gain = subspace_gate(x, 3 * torch.randn(2, 5, 6, 4, dtype=torch.float64)) / x
    assert ((gain >= 1) & (gain <= 2)).all()
    torch.testing.assert_close((gain - 1).sum((1, 2)), torch.ones(2, 12, dtype=torch.float64))


def test_every_map_sums_to_one_and_negative_scores_make_it_uniform() -> None:
    torch.testing.assert_close(subspace_maps(torch.randn(2, 5, 6, 4)).sum((1, 2)), torch.ones(2, 4))
    torch.testing.assert_close(subspace_maps(-torch.rand(2, 5, 6, 4)), torch.full((2, 5, 6, 4), 1 / 30))


def test_a_score_sees_the_positions_next_to_it_and_no_others() -> None:
    features = torch.rand(1, 9, 9, 4, requires_grad=True)
    score = subspace_scores(features, torch.ones(4), torch.zeros(1))[0, 4, 4, 0]
    (grad,) = torch.autograd.grad(score, features)
    outside = grad.clone()
    outside[:, 3:6, 3:6] = 0
    assert grad.sum() == 4
    assert not outside.any()


def test_wrong_arguments_are_named() -> None:
    x = torch.randn(1, 3, 3, 6)
    with pytest.raises(ValueError, match=r"6 channels cannot be split into num_subspaces=4"):
        subspace_gate(x, torch.randn(1, 3, 3, 4))
    with pytest.raises(ValueError, match=r"weight has shape \(5,\); \(6,\) is allowed"):
        subspace_scores(x, torch.randn(5), torch.randn(2))
    with pytest.raises(ValueError, match="1 to 3 grid axes"):
        subspace_scores(torch.randn(2, 6), torch.randn(6), torch.randn(2))

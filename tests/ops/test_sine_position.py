"""Facts about sine position codes."""

import pytest
import torch

from gridattn.ops.sine_position import image_code, point_code, sine_code


def test_a_padded_image_has_the_code_of_the_image_alone() -> None:
    padding = torch.ones(1, 7, 9, dtype=torch.bool)
    padding[:, :4, :6] = False
    alone = image_code(torch.zeros(1, 4, 6, dtype=torch.bool), 16)
    # the last line of a padded column carries the count of its image, whatever the padding below it
    torch.testing.assert_close(image_code(padding, 16)[:, :4, :6], alone)


def test_a_fully_padded_image_has_a_finite_code() -> None:
    assert torch.isfinite(image_code(torch.ones(1, 3, 3, dtype=torch.bool), 8)).all()


def test_height_has_the_first_half_of_the_channels_and_width_the_second() -> None:
    padding = torch.zeros(1, 5, 6, dtype=torch.bool)
    code = image_code(padding, 16, (20.0, 30.0))
    assert (code[:, :, :1, :8] == code[:, :, :, :8]).all()
    assert (code[:, :1, :, 8:] == code[:, :, :, 8:]).all()
    moved = point_code(torch.tensor([[0.2, 0.4], [0.7, 0.4]]), 16)
    assert torch.equal(moved[0, :8], moved[1, :8])
    assert not torch.equal(moved[0, 8:], moved[1, 8:])


def test_a_shift_turns_each_pair_of_channels_by_an_angle_that_depends_on_the_shift_alone() -> None:
    angle = torch.tensor([0.3, 1.1], dtype=torch.float64)
    before, after = (sine_code(a, 8, 20.0).unflatten(-1, (4, 2)) for a in (angle, angle + 0.5))
    products = (before * after).sum(-1)
    torch.testing.assert_close(products[0], products[1])


def test_an_odd_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="dim=5 is not allowed"):
        sine_code(torch.zeros(2), 5, 20.0)

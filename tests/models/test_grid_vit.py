"""Facts of the host backbone."""

import pytest
import torch

from gridattn.layers import WindowAttention, attention_info, list_attentions
from gridattn.models import GridViT


def build(**options) -> GridViT:
    torch.manual_seed(0)
    return GridViT(
        **{"img_size": 32, "patch_size": 4, "dims": 32, "depths": 1, "num_heads": 4, "num_classes": 3} | options
    ).eval()


@pytest.mark.parametrize("name", [n for n in list_attentions() if 2 in attention_info(n).ranks])
def test_hosts_every_attention_of_two_axes(name) -> None:
    model = build(attention=name)
    assert torch.isfinite(model(torch.randn(1, 3, 32, 40))).all()


@pytest.mark.parametrize("size", [(50,), (19, 30), (9, 8, 12)])
def test_takes_any_size_on_one_two_and_three_axes(size) -> None:
    model = build(img_size=size, patch_size=2, dims=(16, 32), depths=(1, 1), num_heads=(2, 2), attention="window")
    longer = tuple(s + 3 for s in size)
    maps = model.forward_maps(torch.randn(1, 3, *longer))
    assert maps[0].shape[1:-1] == tuple(-(-s // 2) for s in longer)
    assert maps[1].shape[1:-1] == tuple(-(-s // 4) for s in longer)


def test_attention_and_its_options_may_differ_by_level() -> None:
    model = build(
        dims=(16, 32),
        depths=(2, 1),
        num_heads=(2, 2),
        attention=("window+shifted_window", "global"),
        attention_options=({"window_size": 3}, {}),
    )
    first, second, third = (layer for _, layer in model.attention_layers())
    assert isinstance(first, WindowAttention)
    assert isinstance(second, WindowAttention)
    assert (first.shifted, second.shifted, first.window_size) == (False, True, (3, 3))
    assert type(third).__name__ == "GlobalAttention"


def test_the_convolution_tells_positions_apart() -> None:
    """On a constant image, dense attention alone could not; the zero padding of the position encoding does."""
    x = build().forward_features(torch.ones(1, 3, 32, 32))[0]
    assert (x[0, 0] - x[4, 4]).abs().max() > 1e-3
    torch.testing.assert_close(x[3, 3], x[4, 4])


def test_settings_of_different_length_are_named() -> None:
    with pytest.raises(ValueError, match="depths has 2 entries but dims has 1"):
        build(depths=(1, 1))
    with pytest.raises(ValueError, match="attention has 2 entries but dims has 1"):
        build(attention=("window", "global"))
    with pytest.raises(ValueError, match="attention='nowhere' is not known"):
        build(attention="window+nowhere")
    with pytest.raises(ValueError, match="img_size has 4 axes"):
        build(img_size=(8, 8, 8, 8))

"""Facts of TiC."""

from typing import Any

import pytest
import torch

from gridattn.layers import MSAConv
from gridattn.models import CheckpointError, create_model
from gridattn.models.tic import InterPool

SMALL = {"embed_dims": (8, 16), "depths": (1, 2), "num_heads": (2, 4), "num_classes": 5}


def small(**options) -> Any:
    torch.manual_seed(0)
    return create_model("tic_t", **SMALL | options).eval()


def randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)


def changed(model: Any, size: int, position: tuple[int, int]) -> torch.Tensor:
    """Positions of the first map that change with the image at the first pixel of `position`'s patch: (h, w) bool."""
    randomise(model)
    x = torch.randn(1, 3, size, size)
    stride = model.feature_info[0]["reduction"]
    other = x.clone()
    other[:, :, position[0] * stride, position[1] * stride] += 1.0
    return (model.forward_maps(x)[0] - model.forward_maps(other)[0])[0].abs().amax(-1) > 0


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [("tic_t", {}, 12_231_848), ("tic_mini", {"in_chans": 1, "num_classes": 2}, 34_626)],
)
def test_parameters_follow_the_formula_of_the_design(name, options, count) -> None:
    with torch.device("meta"):
        model = create_model(name, **options)
    assert sum(p.numel() for p in model.parameters()) == count


def test_any_image_size_gives_maps_of_rounded_up_size() -> None:
    for size, grids in (((29, 50), [(8, 13), (4, 7)]), ((1, 5), [(1, 2), (1, 1)])):
        maps = small().forward_maps(torch.randn(2, 3, *size))
        assert [tuple(m.shape[1:3]) for m in maps] == grids


def test_dilations_and_directions_change_from_block_to_block() -> None:
    model = create_model("tic_t", depths=(2, 1, 2, 1), num_classes=0)
    layers = [layer for _, layer in model.attention_layers()]
    assert all(isinstance(layer, MSAConv) for layer in layers)
    assert [layer.dilation for layer in layers] == [(1, 1), (2, 2)] * 3
    assert [layer.shift for layer in layers] == [(1, 1), (-2, 2), (1, -1), (-2, -2), (1, 1), (-2, 2)]
    assert {layer.shift for _, layer in small(shift="none").attention_layers()} == {(0, 0)}


def test_a_shifted_block_links_opposite_borders_and_a_plain_one_sees_its_window_alone() -> None:
    plain = changed(small(shift="none"), 32, (7, 3))
    assert plain.nonzero().amin(0).tolist() == [6, 2]
    assert plain.nonzero().amax(0).tolist() == [7, 4]
    shifted = changed(small(), 32, (7, 3))
    assert shifted[0].any()
    assert not shifted[2:5].any()


def test_pooling_averages_and_without_it_every_second_position_is_kept() -> None:
    x = torch.arange(12.0).view(1, 3, 4, 1)
    assert InterPool(1, 1)(x).flatten().tolist() == [2.5, 4.5, 8.5, 10.5]
    assert InterPool(1, 1, average=False)(x).flatten().tolist() == [0, 2, 8, 10]
    assert not list(InterPool(4, 4).parameters())
    assert InterPool(4, 6)(torch.randn(2, 5, 7, 4)).shape == (2, 3, 4, 6)


def test_the_norm_of_the_classifier_acts_on_the_mean_over_positions() -> None:
    model = small()
    randomise(model)
    x = torch.randn(2, 3, 32, 24)
    expected = model.head(model.norm(model.forward_maps(x)[-1].mean((1, 2))))
    torch.testing.assert_close(model(x), expected)


def test_weights_are_truncated_normal_and_biases_zero() -> None:
    for name, parameter in small(embed_dims=(64, 128)).named_parameters():
        if "patch_embed" not in name and name.endswith("weight") and parameter.ndim > 1 and "head" not in name:
            assert 0.018 < parameter.std() < 0.022, name
        if "patch_embed" not in name and name.endswith("bias"):
            assert (parameter == 0).all(), name


def test_a_state_dict_loads_strictly() -> None:
    model, other = small(), small()
    randomise(model)
    state = model.state_dict()
    other.load_official(state)
    x = torch.randn(1, 3, 20, 20)
    assert torch.equal(model(x), other(x))
    with pytest.raises(CheckpointError, match=r"1 missing \(norm.bias\)"):
        other.load_official({name: tensor for name, tensor in state.items() if name != "norm.bias"})


def test_a_feature_extractor_normalises_each_map() -> None:
    maps = small(features_only=True)
    assert maps.feature_info.reduction() == [4, 8]
    for m in maps(torch.randn(1, 3, 37, 40)):
        torch.testing.assert_close(m.mean(1), torch.zeros_like(m.mean(1)), atol=1e-4, rtol=0)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="shift='left' is not known; allowed: 'multi', 'none'"):
        small(shift="left")
    with pytest.raises(ValueError, match="stem='pool' is not known"):
        small(stem="pool")
    with pytest.raises(ValueError, match="has no centre"):
        small(kernel_size=2)

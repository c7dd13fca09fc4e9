"""Facts of MaxViT."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from gridattn.layers.drop_path import DropPath
from gridattn.layers.window import WindowAttention
from gridattn.models import CheckpointError, MaxViT, create_model, list_models
from gridattn.models.maxvit_blocks import MlpBiasWindowAttention

# Parameters, as counted from the published models.
PARAMETERS = {
    "maxvit_tiny_tf_224": 30_916_528,
    "maxvit_tiny_tf_384": 30_977_008,
    "maxvit_tiny_tf_512": 31_049_584,
    "maxvit_small_tf_224": 68_927_956,
    "maxvit_base_tf_224": 119_467_708,
    "maxvit_large_tf_224": 211_785_560,
    "maxvit_xlarge_tf_224": 506_987_643,
    "maxvit_xlarge_tf_384": 475_323_472,
    "maxvit_pico_rw_256": 7_457_996,
    "maxvit_nano_rw_256": 15_451_148,
    "maxvit_tiny_rw_224": 29_057_312,
    "maxvit_rmlp_pico_rw_256": 7_515_980,
    "maxvit_rmlp_nano_rw_256": 15_501_452,
    "maxvit_rmlp_tiny_rw_256": 29_148_896,
    "maxvit_rmlp_small_rw_224": 64_895_044,
    "maxvit_rmlp_base_rw_224": 116_135_788,
    "maxvit_tiny_pm_256": 30_089_344,
}
SMALL: dict[str, Any] = {"embed_dim": (8, 16), "depths": (1, 2), "stem_width": (4, 8), "head_dim": 4, "window_size": 3}


def small(**options) -> Any:
    torch.manual_seed(0)
    return randomized(MaxViT(**{**SMALL, "num_classes": 5, **options})).eval()


@torch.no_grad()
def randomized(model):
    """Parameters and statistics that are far from their initial values, so that none can be left out unseen."""
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("running_mean") or tensor.ndim == 1:
            tensor.add_(0.1 * torch.randn_like(tensor))
        elif "position" in name:
            tensor.normal_(std=0.5)
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_model(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_models_for_larger_images_differ_in_their_tables_alone() -> None:
    assert len(list_models("maxvit*")) == 27
    with torch.device("meta"):
        models = [create_model(f"maxvit_small_tf_{size}") for size in (224, 512)]
    shapes = [{n: tuple(p.shape) for n, p in model.named_parameters()} for model in models]
    assert shapes[0].keys() == shapes[1].keys()
    different = {n for n in shapes[0] if shapes[0][n] != shapes[1][n]}
    assert all(n.endswith("relative_position_bias") and shapes[1][n][1:] == (31, 31) for n in different)
    assert len(different) == 2 * (2 + 2 + 5 + 2)


# One of each form: the paper's, a flat table, an MLP of the offset with layer scale, the parallel one.
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("maxvit_tiny_tf_224", (224, 448)),
        ("maxvit_pico_rw_256", (256, 256)),
        ("maxvit_rmlp_small_rw_224", (224, 224)),
        ("maxvit_tiny_pm_256", (256, 256)),
    ],
)
@torch.no_grad()
def test_weights_of_another_implementation_load_and_give_its_logits(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    narrow: dict[str, Any] = {"embed_dim": (32, 32, 64, 64), "depths": (1, 1, 2, 1)}
    other = randomized(timm.create_model(name, num_classes=7, **narrow)).eval().double()
    ours = create_model(name, num_classes=7, **narrow)
    ours.double().eval().load_official(other.state_dict())
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(ours(images), other(images), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"variant": "rw", "position": "mlp", "parallel": True}])
def test_any_image_size_gives_maps_of_rounded_up_size(options) -> None:
    maps = small(**options).forward_maps(torch.randn(1, 3, 29, 50))
    assert [tuple(m.shape) for m in maps] == [(1, 15, 25, 8), (1, 8, 13, 8), (1, 4, 7, 16)]


def test_padding_of_a_map_that_windows_do_not_fill_never_reaches_a_result() -> None:
    block = small().levels[1].blocks[1].attention.block.eval()
    x = torch.randn(1, 4, 4, 16)
    corner = block(x[:, 3:, 3:])
    torch.testing.assert_close(block(x)[:, 3:, 3:], corner)


def test_every_output_of_a_block_depends_on_every_input_when_lattices_step_within_windows() -> None:
    attention = small().levels[0].blocks[0].attention
    x = torch.randn(1, 9, 9, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(x)[0, 0, 0].sum(), x)
    assert (gradient.abs().sum(-1) > 0).all()


def test_drop_path_reaches_the_full_rate_after_the_last_block_or_in_the_rw_form_with_it() -> None:
    def rates(**options):
        blocks = [block for level in small(drop_path_rate=0.3, **options).levels for block in level.blocks]
        found = [{m.probability for m in block.modules() if isinstance(m, DropPath)} for block in blocks]
        assert all(len(values) == 1 for values in found)
        return [round(values.pop(), 6) for values in found]

    assert rates() == [0.0, 0.1, 0.2]
    assert rates(variant="rw") == [0.0, 0.15, 0.3]


def test_tables_of_another_window_are_interpolated_and_of_the_same_one_kept() -> None:
    def first_table(model: Any) -> Any:
        return next(m.relative_position_bias for m in model.modules() if isinstance(m, WindowAttention))

    model = small()
    table = first_table(model)
    expected = nn.functional.interpolate(table[None], (7, 7), mode="bilinear", align_corners=False)[0]
    for window, entries in ((4, expected), (3, table)):
        other = small(window_size=window)
        other.load_official(model.state_dict())
        assert torch.equal(first_table(other), entries)


def test_biases_from_an_mlp_are_those_of_the_same_offsets_in_any_window() -> None:
    layer, larger = (MlpBiasWindowAttention(8, 2, window_size=size).eval() for size in (3, 5))
    larger.load_state_dict(layer.state_dict())
    torch.testing.assert_close(larger.bias_table()[:, 2:-2, 2:-2], layer.bias_table())


def test_a_state_dict_of_another_model_is_refused_by_name() -> None:
    state = small().state_dict()
    state["head.extra"] = state.pop("head.fc.bias")
    with pytest.raises(CheckpointError, match=r"1 missing \(head.fc.bias\); 1 unexpected \(head.extra\)"):
        small().load_official(state)


def test_the_head_is_replaced_whole_and_features_are_pooled_without_it() -> None:
    model = small(head_hidden_size=6)
    images = torch.randn(2, 3, 32, 32)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)
    model.reset_classifier(3)
    assert model.get_classifier().weight.shape == (3, 6)
    assert model(images).shape == (2, 3)


def test_a_feature_extractor_has_the_stem_and_every_level() -> None:
    maps = create_model("maxvit_nano_rw_256", features_only=True, out_indices=(0, 2), **SMALL)
    assert maps.feature_info.reduction() == [2, 8]
    assert [tuple(m.shape) for m in maps(torch.randn(1, 3, 64, 48))] == [(1, 8, 32, 24), (1, 16, 8, 6)]
    maps.load_official(create_model("maxvit_nano_rw_256", **SMALL).state_dict())


def test_recomputing_blocks_changes_no_gradient() -> None:
    model = small()
    images = torch.randn(1, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(recompute)
        model(images).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


def test_position_tables_are_spared_from_weight_decay() -> None:
    names = small().no_weight_decay()
    assert len(names) == 6
    assert all(name.endswith("attn.relative_position_bias") for name in names)


def test_settings_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="embed_dim has 2 entries but depths has 1"):
        small(depths=(1,))
    with pytest.raises(ValueError, match=r"embed_dim=\(8, 18\) does not fit head_dim=4"):
        small(embed_dim=(8, 18))
    with pytest.raises(ValueError, match="variant='hf' is not"):
        small(variant="hf")

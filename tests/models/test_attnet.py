"""Facts of AttNet."""

import re
from typing import Any

import pytest
import torch

from gridattn.layers.attentive_conv import AttentiveConvBlock
from gridattn.models import AttNet, CheckpointError, create_model, list_models

# Parameters with 1000 classes, as counted from the published models.
PARAMETERS = {
    "attnet_xxs": 2_853_556,
    "attnet_xs": 5_554_902,
    "attnet_s": 7_681_316,
    "attnet_t1": 13_714_900,
    "attnet_t2": 27_010_782,
    "attnet_t3": 49_175_682,
    "attnet_t4": 87_320_214,
}
SMALL = {
    "embed_dims": (8, 12),
    "depths": (1, 2),
    "mlp_ratios": (4, 2),
    "kernel_sizes": (3, 5),
    "feed_forward_conv": (True, False),
    "feed_forward_norm": (False, True),
    "num_classes": 5,
}


def small(**options) -> Any:
    torch.manual_seed(0)
    return create_model("attnet_t2", **SMALL | options).eval()


def randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)


def official(model: AttNet) -> dict[str, torch.Tensor]:
    """The state dict under the published names, with 1x1 convolutions for linear maps and without counters."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        name = name.replace("patch_embed.", "downsample_layers.0.")
        name = re.sub(r"^levels\.(\d+)\.downsample\.reduction\.", lambda m: f"downsample_layers.{int(m[1]) + 1}.", name)
        name = name.replace("levels.", "stages.").replace("blocks.", "")
        if name.startswith("stages."):
            pointwise = tensor.ndim == 2 and "kernel_gen" not in name
            tensor = tensor[..., None, None] if pointwise else tensor
            name = name.replace("attention.", "token_mixer.").replace("feed_forward.conv.", "channel_mixer.dwconv.")
            name = name.replace("feed_forward.norm.", "channel_mixer.norm_layer.")
            name = name.replace("feed_forward.", "channel_mixer.")
            for i in "12":
                name = name.replace(f"norm{i}.", f"norm_{i}.").replace(f"scale{i}.", f"layer_scale_{i}.")
        state[name] = tensor
    return state


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_model(name) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_every_variant_has_its_count_here() -> None:
    assert set(list_models("attnet_*")) == set(PARAMETERS)


def test_any_image_size_gives_maps_of_rounded_up_size() -> None:
    for size, grids in (((29, 50), [(8, 13), (4, 7)]), ((1, 5), [(1, 2), (1, 1)])):
        maps = small().forward_maps(torch.randn(2, 3, *size))
        assert [tuple(m.shape[1:3]) for m in maps] == grids


def test_the_norm_of_the_classifier_acts_on_the_mean_over_positions() -> None:
    model = small()
    randomise(model)
    x = torch.randn(2, 3, 32, 32)
    mean = model.forward_maps(x)[-1].mean((1, 2))
    expected = torch.nn.functional.layer_norm(mean, (12,), model.norm.weight, model.norm.bias)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), expected)
    torch.testing.assert_close(model(x), model.head(expected))


def test_logits_of_a_sample_do_not_depend_on_its_batch() -> None:
    model = small(layer_scale=1.0)
    randomise(model)
    x = torch.randn(3, 3, 24, 32)
    torch.testing.assert_close(model(x)[[2, 0]], model(x[[2, 0]]))


def test_the_published_initialisation() -> None:
    model = create_model("attnet_xs")
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    for name, weight in weights.items():
        if weight.numel() > 1000:
            assert 0.015 < weight.std() < 0.025, name
        assert weight.abs().max() < 0.12, name
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith((".bias", "difference_control")))
    assert all((p == 1e-6).all() for n, p in model.named_parameters() if n.endswith("gamma"))


def test_published_names_load_and_give_the_same_logits() -> None:
    model, other = small(layer_scale=1e-6), small(layer_scale=1e-6)
    randomise(model)
    state = official(model)
    assert "stages.1.1.channel_mixer.norm_layer.weight" in state
    assert state["stages.0.0.token_mixer.proj.weight"].shape == (8, 8, 1, 1)
    assert "stages.0.0.layer_scale_1.gamma" in state
    other.load_official(state)
    x = torch.randn(1, 3, 32, 40)
    assert torch.equal(other(x), model(x))
    other.load_official(model.state_dict())
    state["stages.0.0.extra"] = state.pop("norm.bias")
    with pytest.raises(CheckpointError, match=r"1 missing \(norm.bias\); 1 unexpected \(levels.0.blocks.0.extra\)"):
        other.load_official(state)


def test_a_feature_extractor_loads_a_published_classifier() -> None:
    classifier, maps = small(), small(features_only=True)
    randomise(classifier)
    maps.load_official(official(classifier))
    assert maps.feature_info.channels() == [8, 12]
    x = torch.randn(1, 3, 37, 40)
    for tap, expected in zip(maps(x), classifier.forward_maps(x)):
        torch.testing.assert_close(tap.movedim(1, -1), torch.nn.functional.layer_norm(expected, expected.shape[-1:]))


def test_recomputing_blocks_changes_no_gradient() -> None:
    model = small(layer_scale=1.0)
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(recompute)
        model(x).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_drop_path_grows_linearly_over_all_blocks() -> None:
    model = small(drop_path_rate=0.2)
    rates = [m.drop_path.probability for m in model.modules() if isinstance(m, AttentiveConvBlock)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([0.0, 0.1, 0.2]))


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="depths has 1 entries but embed_dims has 2"):
        small(depths=(1,))
    with pytest.raises(ValueError, match=r"drop_path_rate=1.5 is not allowed"):
        small(drop_path_rate=1.5)

"""Every family works where models of timm work: feature pyramids, layer-wise learning rates, any number of channels."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torchvision.ops import FeaturePyramidNetwork

import gridattn.models.timm_names  # noqa: F401 (registers the models)
from tests.models.families import SIZE, small_options, small_variants

VARIANTS = list(small_variants().values())


def create(name: str, **options):
    return timm.create_model(f"gridattn_{name}", **{**small_options(name), **options})


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("in_chans", [1, 4])
def test_maps_feed_a_feature_pyramid(name: str, in_chans: int) -> None:
    body = create(name, features_only=True, in_chans=in_chans).eval()
    channels, strides = body.feature_info.channels(), body.feature_info.reduction()
    height, width = SIZE, SIZE + 13
    with torch.no_grad():
        maps = body(torch.randn(1, in_chans, height, width))
        pyramid = FeaturePyramidNetwork(channels, 8)({str(i): x for i, x in enumerate(maps)})
    assert [x.shape[1] for x in maps] == channels
    for x, stride in zip(maps, strides):
        assert abs(x.shape[2] - height / stride) < 1
        assert abs(x.shape[3] - width / stride) < 1
    assert [x.shape[1:] for x in pyramid.values()] == [(8, *x.shape[2:]) for x in maps]
    assert all(torch.isfinite(x).all() for x in pyramid.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_learning_rates_decay_from_the_head_to_the_stem(name: str) -> None:
    model = create(name, num_classes=5)
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75).param_groups
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert scales.keys() == {id(p) for p in model.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(scales)
    of = {key: scales[id(p)] for key, p in model.named_parameters()}
    stem = [scale for key, scale in of.items() if key.startswith("patch_embed.")]
    head = [scales[id(p)] for p in model.get_classifier().parameters()]
    assert set(head) == {1.0}
    assert set(stem) == {min(of.values())}
    assert max(stem) < 0.75
    # Blocks of one level differ, later ones learn faster.
    by_level: dict[str, list[float]] = {}
    for key, scale in of.items():
        if ".blocks." in key:
            by_level.setdefault(key.split(".blocks.")[0], []).append(scale)
    assert all(scales == sorted(scales) for scales in by_level.values())
    for key in model.no_weight_decay():
        assert decays[id(model.get_parameter(key))] == 0.0


@pytest.mark.parametrize("name", VARIANTS)
def test_without_classes_a_model_gives_its_features(name: str) -> None:
    model = create(name, num_classes=0).eval()
    x = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        features = model(x)
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(features, expected)
    assert features.shape[1] == model.num_features
    assert not list(model.get_classifier().parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_cannot_be_downloaded(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r} comes without weights, give checkpoint=PATH"):
        create(name, pretrained=True)

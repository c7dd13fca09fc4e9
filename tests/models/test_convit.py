"""Facts of ConViT."""

import re
from typing import Any

import pytest
import torch
from timm.models.convit import ConVit

from gridattn.layers.gated_positional import GatedPositionalAttention, attention_distances
from gridattn.models import CheckpointError, ConViT, create_model, list_models

# Parameters with 1000 classes, as counted from the published models.
PARAMETERS = {
    "convit_tiny": 5_710_512,
    "convit_tiny_plus": 9_972_912,
    "convit_small": 27_777_322,
    "convit_small_plus": 48_979_882,
    "convit_base": 86_540_040,
    "convit_base_plus": 153_134_856,
}
SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 18, "depth": 3, "num_heads": 9, "local_up_to_layer": 2}


def small(**options) -> Any:
    torch.manual_seed(0)
    return ConViT(**{"img_size": 32, "num_classes": 5, **SMALL, **options}).eval()


def theirs(**options) -> Any:
    torch.manual_seed(1)
    per_head = {"embed_dim": SMALL["embed_dim"] // SMALL["num_heads"]}
    model = ConVit(**{"img_size": 32, "num_classes": 5, **SMALL, **per_head, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_model(name) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_every_variant_has_its_count_here() -> None:
    assert set(list_models("convit_*")) == set(PARAMETERS)


@pytest.mark.parametrize("options", [{}, {"local_up_to_layer": 0}, {"use_pos_embed": False, "qkv_bias": True}])
@pytest.mark.parametrize("size", [32, 48])
def test_weights_of_timm_give_the_logits_of_timm(options, size) -> None:
    model, other = small(img_size=size, **options), theirs(img_size=size, **options)
    model.load_official(other.state_dict())
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.forward_features(x), other.forward_features(x), atol=1e-5, rtol=1e-5)


def test_the_first_heads_look_at_the_taps_of_a_convolution_and_values_pass_unchanged() -> None:
    model = small(depth=4, local_up_to_layer=3, locality_strength=0.5)
    layers = [block.attn for block in model.levels[0].blocks]
    taps = [[x, y] for x in (-1, 0, 1) for y in (-1, 0, 1)]
    assert len(layers) == 3
    for layer in layers:
        assert isinstance(layer, GatedPositionalAttention)
        torch.testing.assert_close(layer.locality().centre, torch.tensor(taps, dtype=torch.float32))
        assert torch.equal(layer.v.weight, torch.eye(18))
        assert (layer.pos_proj.weight[:, 2] == -0.5).all()
    weight = small(embed_dim=90).levels[1].blocks[0].attn.qkv.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_class_token_is_there_in_the_dense_blocks_alone() -> None:
    found = small().attention_inputs(torch.randn(2, 3, 32, 40))
    assert [tuple(x.shape) for _, _, x in found] == [(2, 4, 5, 18), (2, 4, 5, 18), (2, 21, 18)]
    with pytest.raises(ValueError, match="local_up_to_layer=3 is not allowed; 0 to 2 are"):
        small(local_up_to_layer=3)


def test_images_of_other_sizes_are_padded_and_their_positions_interpolated() -> None:
    model = small()
    assert model(torch.randn(1, 3, 17, 50)).shape == (1, 5)
    images = torch.randn(1, 3, 29, 32)
    padded = torch.nn.functional.pad(images, [0, 0, 0, 3])
    torch.testing.assert_close(model(images), model(padded))
    model.pos_embed.data.fill_(0.5)
    larger = small(img_size=(48, 40))
    larger.load_official(model.state_dict())
    assert larger.pos_embed.shape == (1, 6, 5, 18)
    x = torch.randn(1, 3, 48, 40)
    torch.testing.assert_close(larger(x), model(x))


def test_a_position_embedding_for_another_size_is_taken_to_be_square() -> None:
    other = theirs(img_size=48)
    model = small()
    model.load_official(other.state_dict())
    expected = torch.nn.functional.interpolate(
        other.pos_embed.view(1, 6, 6, 18).movedim(-1, 1), (4, 4), mode="bicubic"
    ).movedim(1, -1)
    torch.testing.assert_close(model.pos_embed.data, expected.data)
    state = other.state_dict()
    state["pos_embed"] = state["pos_embed"][:, :35]
    with pytest.raises(CheckpointError, match=r"1 of another shape \(pos_embed \(1, 35, 18\)"):
        model.load_official(state)


def test_a_feature_extractor_gives_the_patches_of_the_last_block() -> None:
    maps = create_model("convit_tiny", features_only=True, img_size=32, **SMALL).eval()
    assert maps.feature_info.reduction() == [8]
    maps.load_official(theirs().state_dict())
    assert [tuple(m.shape) for m in maps(torch.randn(1, 3, 32, 37))] == [(1, 18, 4, 5)]


def test_nonlocality_is_measured_on_patches_alone() -> None:
    model, images = small(), torch.randn(2, 3, 32, 40)
    found = model.attention_inputs(images)
    running = model.nonlocality(images)
    assert running.shape == (3, 9)
    torch.testing.assert_close(running[1], attention_distances(found[1].layer, found[1].x))
    patches = model.patch_embed(images)
    official = model.nonlocality(images, mode="official")
    torch.testing.assert_close(official[1], attention_distances(found[1].layer, patches))
    model.levels[1].blocks[0].attn.qkv.weight.data.zero_()
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    points = torch.stack([rows.flatten(), columns.flatten()], 1)
    mean_distance = torch.cdist(points, points).mean()
    for mode in ("running", "official"):
        torch.testing.assert_close(model.nonlocality(images, mode)[2], mean_distance.expand(9))


def test_tables_are_spared_from_weight_decay_and_every_parameter_has_a_group() -> None:
    model = small()
    assert model.no_weight_decay() == {"cls_token", "pos_embed"}
    groups = model.group_matcher()
    patterns = [groups["stem"], *(pattern for pattern, _ in groups["blocks"])]
    left = {n for n, _ in model.named_parameters() if not any(re.match(p, n) for p in patterns)}
    assert left == {"head.weight", "head.bias"}


def test_recomputing_blocks_changes_no_gradient() -> None:
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        model = small().train()
        model.set_grad_checkpointing(recompute)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)

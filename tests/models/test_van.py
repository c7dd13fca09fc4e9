"""Facts of the Visual Attention Network."""

import pytest
import torch

from gridattn.models import VAN, CheckpointError, create_model, list_models

# Parameters with 1000 classes, as counted from the published models.
PARAMETERS = {
    "van_b0": 4_105_800,
    "van_b1": 13_861_800,
    "van_b2": 26_578_472,
    "van_b3": 44_765_608,
    "van_b4": 60_283_176,
    "van_b5": 89_967_688,
    "van_b6": 199_829_416,
}
SMALL = {"embed_dims": (8, 16, 24, 32), "depths": (1, 2, 1, 1), "mlp_ratios": (2, 2, 1, 1), "num_classes": 5}


def small(**options) -> VAN:
    torch.manual_seed(0)
    return VAN(**{**SMALL, **options}).eval()


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.2)
    return model


def official(model: VAN) -> dict[str, torch.Tensor]:
    """The state dict under the published names; maps of single positions are convolutions of width 1 there."""
    state = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "patch_embed":
            parts[0] = "patch_embed1"
        elif parts[0] == "levels":
            level = int(parts[1]) + 1
            parts[:3] = {"blocks": [f"block{level}"], "norm": [f"norm{level}"]}.get(
                parts[2], [f"patch_embed{level + 1}"]
            )
        name = ".".join(parts)
        for ours, theirs in (
            (".attention.attention.local.", ".attn.spatial_gating_unit.conv0."),
            (".attention.attention.dilated.", ".attn.spatial_gating_unit.conv_spatial."),
            (".attention.attention.pointwise.", ".attn.spatial_gating_unit.conv1."),
            (".attention.", ".attn."),
            (".feed_forward.conv.", ".mlp.dwconv.dwconv."),
            (".feed_forward.", ".mlp."),
            (".scale", ".layer_scale_"),
        ):
            name = name.replace(ours, theirs)
        pointwise = tensor.ndim == 2 and not name.startswith("head")
        state[name] = tensor[..., None, None] if pointwise else tensor
    return state


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_model(name) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_every_variant_has_its_count_here() -> None:
    assert set(list_models("van_*")) == set(PARAMETERS)
    with torch.device("meta"):
        features = create_model("van_b0", features_only=True)
    assert sum(p.numel() for p in features.parameters()) == 3_848_800


def test_any_image_size_gives_maps_of_rounded_up_size() -> None:
    model = small()
    maps = model.forward_maps(torch.randn(1, 3, 45, 70))
    assert [tuple(m.shape) for m in maps] == [(1, 12, 18, 8), (1, 6, 9, 16), (1, 3, 5, 24), (1, 2, 3, 32)]
    assert model(torch.randn(1, 3, 1, 1)).isfinite().all()


def test_published_names_load_and_give_the_same_logits() -> None:
    model, other = randomised(small()), small()
    state = official(model)
    assert "block2.1.attn.spatial_gating_unit.conv_spatial.weight" in state
    other.load_official({name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")})
    x = torch.randn(1, 3, 40, 33)
    assert torch.equal(other(x), model(x))
    state["block9.bias"] = state.pop("norm2.bias")
    with pytest.raises(CheckpointError, match=r"1 missing \(levels.1.norm.bias\); 1 unexpected \(levels.8.blocks.bias"):
        other.load_official(state)


def test_a_file_of_a_classifier_fits_other_classes_and_the_feature_extractor(tmp_path) -> None:
    model = randomised(small())
    torch.save({"state_dict": official(model)}, tmp_path / "van.pth")
    x = torch.randn(1, 3, 40, 33)
    finetuned = create_model("van_b0", **(SMALL | {"num_classes": 7}), checkpoint=tmp_path / "van.pth").eval()
    torch.testing.assert_close(finetuned.forward_features(x), model.forward_features(x))
    body = {key: value for key, value in SMALL.items() if key != "num_classes"}
    features = create_model("van_b0", features_only=True, **body, checkpoint=tmp_path / "van.pth").eval()
    for ours, expected in zip(features(x), model.forward_maps(x)):
        torch.testing.assert_close(ours.movedim(1, -1), expected)


def test_maps_are_normalised_before_they_go_on() -> None:
    model = small()
    maps = model.forward_maps(torch.randn(1, 3, 40, 33))
    for m in maps:
        torch.testing.assert_close(m.mean(-1), torch.zeros(m.shape[:-1]), atol=1e-4, rtol=0)
    second, _ = model.levels[1](model.levels[0].downsample(maps[0]))
    torch.testing.assert_close(second, maps[1])


def test_a_pixel_reaches_no_further_than_its_large_kernel() -> None:
    model = small(embed_dims=(8,), depths=(1,), mlp_ratios=(2,))
    block = model.levels[0].blocks[0].double()
    block.feed_forward.conv.weight.data.zero_()
    x = torch.randn(1, 31, 31, 8, dtype=torch.float64, requires_grad=True)
    block(x)[0, 15, 15].sum().backward()
    rows = x.grad[0].abs().sum((1, 2)).nonzero().flatten()
    assert (rows.min(), rows.max()) == (15 - 11, 15 + 11)


def test_convolutions_start_with_the_variance_of_their_fan_out() -> None:
    torch.manual_seed(0)
    block = VAN((64,), depths=(1,), mlp_ratios=(4,)).levels[0].blocks[0]
    for weight, fan_out in (
        (block.feed_forward.fc1.weight, 256),
        (block.attention.proj_1.weight, 64),
        (block.attention.attention.dilated.weight, 49),
        (block.feed_forward.conv.weight, 9),
    ):
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.06)
    assert (block.scale1 == 0.01).all()
    assert not block.feed_forward.fc1.bias.any()


def test_recomputing_blocks_changes_no_gradient() -> None:
    x = torch.randn(2, 3, 33, 40)
    gradients = []
    for recompute in (False, True):
        model = small().train()
        model.set_grad_checkpointing(recompute)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)

"""Facts of the MobileNets with subspace attention."""

from typing import Any

import pytest
import torch
import torchvision

from gridattn.layers.ulsam import UltraLightweightSubspaceAttention
from gridattn.models import CheckpointError, SubspaceMobileNetV1, SubspaceMobileNetV2, create_model, list_models

# Parameters with 1000 classes and four subspaces, as published differences and our counts have them.
PARAMETERS = {
    "mobilenet_v1_100": 4_231_976,
    "mobilenet_v1_100_ulsam_11": 3_965_748,
    "mobilenet_v1_100_ulsam_after_11": 4_234_548,
    "mobilenet_v1_100_ulsam_after_13": 4_237_108,
    "mobilenet_v1_075": 2_585_560,
    "mobilenet_v1_075_ulsam_11": 2_435_044,
    "mobilenet_v1_050": 1_331_592,
    "mobilenet_v1_050_ulsam_11": 1_264_020,
    "mobilenet_v2_100": 3_504_872,
    "mobilenet_v2_100_ulsam_after_16": 3_505_684,
    "mobilenet_v2_100_ulsam_13": 3_387_092,
    "mobilenet_v2_100_ulsam_16": 3_185_684,
    "mobilenet_v2_100_ulsam_10_13": 3_333_152,
    "mobilenet_v2_100_ulsam_15_16": 2_866_496,
    "mobilenet_v2_100_ulsam_13_16": 3_067_904,
    "mobilenet_v2_100_ulsam_12_13_15_16": 2_630_936,
}
FAMILIES = [SubspaceMobileNetV1, SubspaceMobileNetV2]


def randomised(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


def usual_layout(model: Any, sequence: str, head: str) -> dict[str, torch.Tensor]:
    """The state dict with one number for every block and one module for every subspace."""
    prefixes = ["patch_embed."]
    prefixes += [f"levels.{i}.blocks.{j}." for i, level in enumerate(model.levels) for j in range(len(level.blocks))]
    modules = dict(model.named_modules())
    state = {f"{head}.{name}": tensor for name, tensor in model.head.state_dict().items()}
    for number, prefix in enumerate(prefixes):
        block = modules[prefix[:-1]]
        for name, tensor in block.state_dict().items():
            if not isinstance(block, UltraLightweightSubspaceAttention):
                bottleneck = sequence == "features" and 0 < number < len(prefixes) - 1
                state[f"{sequence}.{number}.{name if bottleneck else name.removeprefix('conv.')}"] = tensor
                continue
            count = block.num_subspaces
            parts = [tensor] * count if tensor.ndim == 0 else tensor.chunk(count)
            for ours, theirs in (
                ("channel_norm", "bn_dws"),
                ("score_norm", "bn_point"),
                ("scale", "conv_dws.weight"),
                ("shift", "conv_dws.bias"),
            ):
                name = name.replace(ours, theirs)
            name = f"conv_point.{name}" if name in ("weight", "bias") else name
            shape = {"conv_dws.weight": (-1, 1, 1, 1), "conv_point.weight": (1, -1, 1, 1)}.get(name)
            for n, part in enumerate(parts):
                state[f"{sequence}.{number}.subspaces.{n}.{name}"] = part.view(shape) if shape else part
    return state


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_model(name) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_every_variant_has_its_count_here() -> None:
    assert set(list_models("mobilenet_*")) == set(PARAMETERS)
    with torch.device("meta"):
        model = create_model("mobilenet_v1_100_ulsam_11", num_subspaces=1)
    assert sum(p.numel() for p in model.parameters()) == 3_965_739


def test_weights_of_torchvision_give_the_logits_of_torchvision() -> None:
    other = randomised(torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.35))
    model = SubspaceMobileNetV2(0.35, num_classes=5).eval()
    model.load_official(other.state_dict())
    x = torch.randn(1, 3, 61, 80)
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "layout"),
    [(SubspaceMobileNetV1, ("model", "fc")), (SubspaceMobileNetV2, ("features", "classifier.1"))],
)
def test_names_of_the_usual_layout_load_and_give_the_same_logits(family, layout) -> None:
    options = {"replace": (10, 13), "insert_after": (8,), "num_subspaces": 2, "num_classes": 5}
    model = randomised(family(0.125, **options))
    state = usual_layout(model, *layout)
    assert f"{layout[0]}.11.subspaces.1.conv_point.bias" in state  # number 9 is the inserted attention
    other = family(0.125, **options).eval()
    other.load_official({name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")})
    x = torch.randn(1, 3, 64, 50)
    assert torch.equal(other(x), model(x))
    state["bogus"] = state.pop(f"{layout[1]}.bias")
    with pytest.raises(CheckpointError, match=r"1 missing \(head.bias\); 1 unexpected \(bogus\)"):
        other.load_official(state)


@pytest.mark.parametrize(("family", "dims"), [(FAMILIES[0], (8, 16, 32, 64, 128)), (FAMILIES[1], (8, 8, 8, 16, 1280))])
def test_any_image_size_gives_maps_of_rounded_up_size(family, dims) -> None:
    model = family(0.125, replace=(3, 9), num_subspaces=2).eval()
    maps = model.forward_maps(torch.randn(1, 3, 67, 40))
    sizes = [(34, 20), (17, 10), (9, 5), (5, 3), (3, 2)]
    assert [tuple(m.shape[1:]) for m in maps] == [(*size, dim) for size, dim in zip(sizes, dims)]
    assert [info["num_chs"] for info in model.feature_info] == list(dims)
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("family", "allowed"), [(FAMILIES[0], "3, 5, 7, 8, 9, 10, 11, 13"), (FAMILIES[1], "3, 5, 6, 8, 9, 10")]
)
def test_only_blocks_that_keep_their_shape_can_be_replaced(family, allowed) -> None:
    with torch.device("meta"):
        with pytest.raises(ValueError, match=rf"replace=\(3, 4\) is not allowed; {allowed}.*, 4 is not"):
            family(replace=(3, 4))
        with pytest.raises(ValueError, match=r"insert_after=\(18,\) is not allowed; 1, 2, .*1[37] are the blocks"):
            family(insert_after=(18,))
        with pytest.raises(ValueError, match="is not divisible by num_subspaces=7"):
            family(insert_after=(11,), num_subspaces=7)


def test_attention_stands_in_for_the_block_and_its_shortcut_or_follows_it() -> None:
    with torch.device("meta"):
        model = create_model("mobilenet_v2_100", replace=(13,), insert_after=(16,))
    assert [name for name, _ in model.attention_layers()] == ["levels.3.blocks.6", "levels.4.blocks.3"]
    with pytest.raises(ValueError, match="'mobilenet_v1_050' has no option 'drop_path_rate'"):
        create_model("mobilenet_v1_050", drop_path_rate=0.1)


def test_drop_path_grows_over_the_bottlenecks() -> None:
    with torch.device("meta"):
        model = create_model("mobilenet_v2_100", drop_path_rate=0.16)
    blocks = [block for level in model.levels for block in level.blocks][:17]
    rates = [block.drop_path.probability for block in blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.16, 17))


def test_a_feature_extractor_has_no_parameter_that_its_maps_do_not_use() -> None:
    maps = create_model("mobilenet_v2_100", features_only=True, width_mult=0.1, replace=(13,), round_nearest=4)
    sum(m.sum() for m in maps(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in maps.parameters())

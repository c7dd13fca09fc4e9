"""Facts of ResNet and HRNet with polarized self-attention."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gridattn.layers import PolarizedSelfAttention
from gridattn.models import CheckpointError, create_model, list_models
from gridattn.models.polarized_hrnet import BasicBlock, ExchangeModule, PolarizedHRNet, resize
from gridattn.models.polarized_resnet import Bottleneck, deconv_norm

# Parameters as counted from the published networks: 17 joints, or the four maps of the segmentation backbone.
PARAMETERS = {
    "pose_hrnet_w32_256x192": 28_536_113,
    "pose_hrnet_w32_psa_p_256x192": 31_363_889,
    "pose_hrnet_w32_psa_s_256x192": 30_936_945,
    "pose_hrnet_w32_psa_p_allblocks_256x192": 31_396_913,
    "pose_hrnet_w32_psa_s_allblocks_256x192": 30_965_201,
    "pose_hrnet_w48_psa_p_384x288": 69_950_945,
    "pose_hrnet_w48_psa_s_384x288": 68_980_289,
    "pose_simplebaseline_r50": 33_999_697,
    "pose_simplebaseline_r50_psa_p": 36_518_417,
    "pose_simplebaseline_r152_psa_s": 74_214_233,
    "hrnet_w48_psa_p": 71_680_320,
    "hrnet_w48_psa_s": 70_709_664,
}
SMALL = {
    "pose_simplebaseline_r50_psa_s": {
        "depths": (1, 2),
        "planes": (8, 16),
        "stem_dim": 8,
        "deconv_dims": (12,),
        "deconv_kernels": (4,),
        "num_classes": 5,
    },
    "resnet50_psa_p": {"depths": (1, 2), "planes": (8, 16), "stem_dim": 8, "num_classes": 5},
    "pose_hrnet_w32_psa_p_256x192": {"width": 6, "depths": (1, 1, 1, 2), "blocks": 1, "num_classes": 5},
    "hrnet_w32_psa_s": {"width": 8, "depths": (2, 1, 1, 1), "blocks": 1, "num_classes": 5},
}
POSE = [name for name in SMALL if name.startswith("pose")]


def small(name: str, **options) -> Any:
    torch.manual_seed(0)
    return create_model(name, **SMALL[name] | options).eval()


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_network(name) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=17 if name.startswith("pose") else 0)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_pose_networks_have_17_joints_and_their_image_size() -> None:
    for name in list_models("pose_hrnet_*"):
        with torch.device("meta"):
            model = create_model(name, depths=(1, 1, 1, 1), blocks=1)
        assert model.default_cfg["num_classes"] == 17
        size = tuple(map(int, re.findall(r"(\d+)x(\d+)", name)[0]))
        assert model.default_cfg["input_size"] == (3, *size)


@pytest.mark.parametrize("name", SMALL)
def test_any_image_size_gives_maps_of_rounded_up_size(name) -> None:
    maps = small(name, features_only=True)
    for size in ((45, 70), (64, 32), (3, 1)):
        found = [tuple(m.shape[1:]) for m in maps(torch.randn(1, 3, *size))]
        info = zip(maps.feature_info.channels(), maps.feature_info.reduction())
        assert found == [(c, -(-size[0] // s), -(-size[1] // s)) for c, s in info]


@pytest.mark.parametrize("name", POSE)
def test_heatmaps_have_a_quarter_of_the_image_size(name) -> None:
    model = small(name)
    assert model(torch.randn(2, 3, 45, 70)).shape == (2, 5, 12, 18)
    model.reset_classifier(3)
    assert model(torch.randn(2, 3, 64, 32)).shape == (2, 3, 16, 8)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 64, 32)).shape == (2, model.num_features, 16, 8)


@pytest.mark.parametrize(("build", "dim", "before"), [(Bottleneck, 32, "conv2"), (BasicBlock, 8, "conv1")])
def test_attention_gates_the_3x3_convolution_of_a_bottleneck_and_the_first_of_a_basic_block(build, dim, before) -> None:
    gate = PolarizedSelfAttention(8, variant="official")
    block = build(dim, 8, attention=gate) if build is Bottleneck else build(dim, gate)
    randomise(block.eval())
    found: list[Tensor] = []
    block.get_submodule(before).register_forward_hook(lambda _m, _a, out: found.append(out))
    gate.register_forward_pre_hook(lambda _m, args: found.append(args[0].movedim(-1, 1)))
    block(torch.randn(1, dim, 6, 5))
    assert len(found) == 2
    assert torch.equal(*found)


def test_the_layout_says_which_attention_stands_in_which_blocks() -> None:
    where = {
        "pose_hrnet_w32_256x192": (None, None),
        "pose_hrnet_w32_psa_p_256x192": (None, "parallel"),
        "pose_hrnet_w32_psa_s_allblocks_256x192": ("sequential", "sequential"),
    }
    for name, expected in where.items():
        with torch.device("meta"):
            model = create_model(name)
        for kind, layout in zip((Bottleneck, BasicBlock), expected):
            found = {m.attn and m.attn.layout for m in model.modules() if isinstance(m, kind)}
            assert found == {layout}


def test_branches_exchange_in_both_directions_and_only_the_kept_ones_are_given_out() -> None:
    paths = [nn.Identity() for _ in range(3)]
    module = ExchangeModule(paths, (4, 8, 16), outputs=2, upsampling="nearest").eval()
    branches = [torch.rand(1, 4 * 2**i, -(-11 // 2**i), -(-13 // 2**i), requires_grad=True) for i in range(3)]
    outputs = module(branches)
    assert [o.shape for o in outputs] == [b.shape for b in branches[:2]]
    for output in outputs:
        assert all((g != 0).any() for g in torch.autograd.grad(output.sum(), branches, retain_graph=True))


def test_repetition_keeps_strides_aligned_where_sizes_are_odd() -> None:
    x = torch.arange(4.0).view(1, 1, 1, 4)
    assert resize(x, (1, 7), "nearest")[0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert resize(x, (2, 13), "nearest")[0, 0, 1].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3]


@pytest.mark.parametrize("kernel_size", [2, 3, 4, 5])
def test_transposed_convolutions_double_the_resolution(kernel_size) -> None:
    assert deconv_norm(4, 6, kernel_size)(torch.randn(2, 4, 5, 3)).shape == (2, 6, 10, 6)


ATTENTION = {
    "channel.query": "conv_q_right",
    "channel.value": "conv_v_right",
    "channel.up": "conv_up",
    "spatial.query": "conv_q_left",
    "spatial.value": "conv_v_left",
}


def official(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under the published names, without counters of batches."""
    hrnet = isinstance(model, PolarizedHRNet)
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        block, attention, inner = name.partition(".attn.")
        if attention:
            name = f"{block}.deattn.{inner}"
            for ours, theirs in ATTENTION.items():
                name = name.replace(ours, theirs)
            if model.get_submodule(f"{block}.attn").layout == "parallel":
                name = name.replace("conv_up.0.", "conv_up.")
            tensor = tensor[..., None, None] if tensor.ndim == 2 or "conv_up.1." in name else tensor
        name = re.sub(r"^patch_embed\.(\d)\.", lambda m: f"conv{int(m[1]) + 1}.", name)
        name = re.sub(r"\bconv(\d)\.0\.(weight)", r"conv\1.\2", name)
        name = re.sub(r"\bconv(\d)\.1\.", r"bn\1.", name).replace("shortcut.", "downsample.")
        name = re.sub(r"^decoder\.(\d)\.(\d)\.", lambda m: f"deconv_layers.{3 * int(m[1]) + int(m[2])}.", name)
        name = re.sub(r"^levels\.(\d)\.transition\.paths\.(\d)\.", _transition, name).replace(".fuse.", ".fuse_layers.")
        if hrnet:
            name = name.replace("levels.0.blocks.", "layer1.")
        level = "stage" if hrnet else "layer"
        name = re.sub(r"^levels\.(\d)\.blocks\.", lambda m, level=level: f"{level}{int(m[1]) + 1}.", name)
        if name.startswith("head."):
            name = name.replace("head.", "final_layer." if hrnet or hasattr(model, "decoder") else "fc.")
        state[name] = tensor[..., None, None] if name == "final_layer.weight" else tensor
    return state


def _transition(match: re.Match) -> str:
    level, path = int(match[1]), int(match[2])
    return f"transition{level}.{path}." + ("0." if path == level else "")


@pytest.mark.parametrize("name", SMALL)
def test_published_names_load_and_give_the_same_output(name) -> None:
    model, other = small(name), small(name)
    randomise(model)
    state = official(model)
    expected = {"transition1.0.0.weight", "transition1.1.0.1.bias", "stage2.0.branches.1.0.bn1.weight"}
    expected |= {"stage3.0.fuse_layers.0.2.0.weight", "stage3.0.fuse_layers.2.0.1.0.weight"}
    if "resnet" in name or "simple" in name:
        expected = {"layer2.0.deattn.conv_v_left.weight", "layer2.1.conv3.weight", "layer1.0.downsample.1.bias"}
    assert expected | {"conv1.weight", "bn1.running_mean"} <= set(state)
    other.load_official(state)
    x = torch.randn(1, 3, 32, 40)
    assert torch.equal(other(x), model(x))
    other.load_official(model.state_dict())
    state["extra"] = state.pop("conv1.weight")
    with pytest.raises(CheckpointError, match=r"1 missing \(patch_embed.0.0.weight\); 1 unexpected \(extra\)"):
        other.load_official(state)


def test_pose_networks_start_with_weights_of_deviation_a_thousandth() -> None:
    for name in POSE:
        for key, weight in small(name).named_parameters():
            if weight.ndim > 1 and weight.numel() > 500:
                assert 0.0008 < weight.std() < 0.0012, key


@pytest.mark.parametrize("name", ["pose_simplebaseline_r50_psa_s", "hrnet_w32_psa_s"])
def test_recomputing_blocks_changes_no_gradient(name) -> None:
    model = small(name)
    randomise(model)
    x = torch.randn(1, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(recompute)
        model(x).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", SMALL)
def test_groups_for_layer_wise_rates_cover_the_body(name) -> None:
    model = small(name)
    groups = model.group_matcher()
    patterns = [groups["stem"], *(pattern for pattern, _ in groups["blocks"])]
    left = {n.split(".")[0] for n, _ in model.named_parameters() if not any(re.match(p, n) for p in patterns)}
    assert left <= {"head", "decoder"}


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="depths has 3 entries"):
        small("hrnet_w32_psa_s", depths=(1, 1, 1))
    with pytest.raises(ValueError, match="layout='both' is not known"):
        small("resnet50_psa_p", layout="both")
    with pytest.raises(ValueError, match=r"deconv_kernels=\(1,\) is not allowed"):
        small("pose_simplebaseline_r50_psa_s", deconv_kernels=(1,))

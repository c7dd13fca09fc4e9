"""Facts of the Agent Attention backbones: sizes, cost, any image, their place among the registered models."""

import re
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import gridattn.models.timm_names  # noqa: F401 (registers the names)
from gridattn.lab.bench import count_macs
from gridattn.layers.agent import AgentAttention, AgentBias
from gridattn.layers.agent_window import AgentWindowAttention
from gridattn.layers.spatial_reduction import SpatialReductionAttention
from gridattn.models import AgentSwin, create_model, list_models, model_info

# Parameters with 1000 classes and multiply-accumulates in billions, as counted on the published models.
PUBLISHED = {
    "agent_deit_t": (6_015_640, 1.168),
    "agent_deit_s": (22_647_112, 4.427),
    "agent_deit_s_448": (23_070_472, 17.642),
    "agent_deit_b": (87_204_904, 17.527),
    "agent_pvt_t": (11_570_352, 1.986),
    "agent_pvt_s": (20_635_066, 3.955),
    "agent_pvt_m": (35_921_746, 6.999),
    "agent_pvt_m_256": (36_083_682, 9.142),
    "agent_pvt_l": (48_738_180, 10.339),
    "agent_swin_t": (28_902_964, 4.499),
    "agent_swin_s": (49_666_684, 8.701),
    "agent_swin_s_288": (49_707_964, 14.535),
    "agent_swin_b": (88_095_096, 15.4),
    "agent_swin_b_384": (88_305_016, 46.207),
    "agent_cswin_t": (20_458_672, 4.292),
    "agent_cswin_s": (32_814_100, 6.744),
    "agent_cswin_b": (73_249_696, 14.87),
    "agent_cswin_b_384": (73_328_416, 46.177),
}
SMALL: dict[str, dict[str, Any]] = {
    "agent_deit_t": {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "agent_sizes": (2, 2, 2, 2),
        "agent_depth": 1,
    },
    "agent_pvt_t": {
        "img_size": 32,
        "embed_dims": (8, 16),
        "depths": (2, 1),
        "num_heads": (1, 2),
        "mlp_ratios": (2, 2),
        "agent_sizes": (2, 2),
        "agent_depths": (1, 1),
        "agent_reductions": (1, 1),
        "reductions": (2, 1),
    },
    "agent_swin_t": {
        "img_size": 32,
        "embed_dim": 8,
        "depths": (2, 2),
        "num_heads": (1, 2),
        "agent_sizes": (2, 2),
        "agent_depths": (1, 0),
    },
    "agent_cswin_t": {
        "img_size": 32,
        "embed_dim": 8,
        "depths": (2, 1),
        "num_heads": (2, 2),
        "window_sizes": (2, 4),
        "agent_sizes": (2, 2),
        "agent_depths": (1, 0),
    },
}
PYRAMIDS = ("agent_pvt_t", "agent_swin_t", "agent_cswin_t")


def small(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    chosen: dict[str, Any] = {"num_classes": 5} | SMALL[name] | options
    return create_model(name, **chosen).eval()


def strengthen(model: nn.Module) -> Any:
    """Weights so large that every part of the network leaves its mark on the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_model(name) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name][0]


@pytest.mark.parametrize(
    "name", [n if n.endswith("_t") else pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED]
)
def test_cost_is_that_of_the_published_model(name) -> None:
    size = model_info(name).config.get("img_size", 224)
    with torch.device("meta"):
        macs = count_macs(create_model(name), torch.empty(1, 3, size, size))
    assert macs / 1e9 == pytest.approx(PUBLISHED[name][1], rel=0.005)


def test_every_variant_has_its_count_here() -> None:
    assert set(list_models("agent_*")) == set(PUBLISHED)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(1, 1), (33, 20), (45, 70)])
def test_any_image_size_is_taken_and_samples_do_not_meet(name, size) -> None:
    model = strengthen(small(name))
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        logits = model(images)
        assert logits.isfinite().all()
        torch.testing.assert_close(model(images[1:]), logits[1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("agent_pvt_t", [(11, 17), (5, 8)]),
        ("agent_swin_t", [(12, 18), (6, 9)]),
        ("agent_cswin_t", [(11, 17), (6, 9)]),
    ],
)
def test_pyramids_give_feature_maps(name, sizes) -> None:
    model = small(name, features_only=True, num_classes=0)
    maps = model(torch.randn(1, 3, 45, 70))
    assert [tuple(m.shape) for m in maps] == [(1, c, *s) for c, s in zip(model.feature_info.channels(), sizes)]
    assert model.feature_info.reduction() == [4, 8]
    assert small(name, features_only=True, out_indices=(1,))(torch.randn(1, 3, 32, 32))[0].shape[2:] == (4, 4)


def test_a_plain_transformer_gives_its_patches() -> None:
    model = small("agent_deit_t", features_only=True)
    assert [tuple(m.shape) for m in model(torch.randn(1, 3, 45, 70))] == [(1, 16, 6, 9)]


@pytest.mark.parametrize("name", SMALL)
def test_weights_fit_another_nominal_size_and_tables_are_interpolated(name) -> None:
    model, larger = strengthen(small(name)), small(name, img_size=(48, 64))
    larger.load_official(model.state_dict())
    lines = [line for layer in larger.modules() if isinstance(layer, AgentBias) for line in layer.axes]
    own = [line for layer in model.modules() if isinstance(layer, AgentBias) for line in layer.axes]
    for new, old in zip(lines, own):
        wanted = torch.nn.functional.interpolate(old, new.shape[2], mode="linear")
        torch.testing.assert_close(new.data, wanted.data)
    assert any(new.shape != old.shape for new, old in zip(lines, own))
    back = small(name)
    back.load_official(model.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(back(images), model(images))


def test_agents_of_a_dense_form_that_are_those_trained_change_nothing() -> None:
    images = torch.randn(1, 3, 45, 70)
    for name, sizes in (("agent_pvt_t", (2, 2)), ("agent_swin_t", (2, 2))):
        plain = strengthen(small(name))
        dense = small(name, dense_agent_sizes=sizes)
        dense.load_official(plain.state_dict())
        assert torch.equal(dense(images), plain(images))
        more = small(name, dense_agent_sizes=((3, 4), (2, 3)))
        more.load_official(plain.state_dict())
        assert not torch.allclose(more(images), plain(images), atol=1e-4)


def test_windows_of_agents_are_the_whole_map_unless_they_are_shorter() -> None:
    options: Any = {"embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "agent_sizes": (2, 2)}
    model: Any = AgentSwin(64, window_size=8, **options)
    first, second = model.levels[0].blocks
    assert isinstance(first.attn, AgentWindowAttention)
    assert (first.attn.shifted, second.attn.shifted) == (False, True)
    assert isinstance(model.levels[1].blocks[0].attn, AgentAttention)
    dense: Any = AgentSwin(64, window_size=8, dense_agent_sizes=(3, 3), **options)
    assert isinstance(dense.levels[0].blocks[0].attn, AgentAttention)
    dense.load_official(model.state_dict())


def test_a_level_with_one_window_is_not_shifted() -> None:
    model = AgentSwin(56, depths=(2, 2), num_heads=(3, 6), agent_sizes=(2, 2), agent_depths=(0, 0))
    levels: Any = model.levels
    assert [block.attn.shifted for level in levels for block in level.blocks] == [False, True, False, False]
    assert [level.blocks[0].attn.window_size for level in levels] == [(7, 7), (7, 7)]


def test_drop_path_grows_over_all_blocks() -> None:
    with torch.device("meta"):
        model = create_model("agent_swin_t")
    rates = [block.drop_path.probability for level in model.levels for block in level.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.2, 12))


@pytest.mark.parametrize("name", SMALL)
def test_timm_builds_the_model_and_its_interface_is_there(name) -> None:
    model: Any = timm.create_model(f"gridattn_{name}", num_classes=3, in_chans=4, **SMALL[name])
    x = torch.randn(2, 4, 32, 32)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    assert model.get_classifier() is model.head
    names = {n for n, _ in model.named_parameters()}
    assert model.no_weight_decay() <= names
    for coarse in (True, False):
        groups = model.group_matcher(coarse)
        blocks = groups["blocks"] if isinstance(groups["blocks"], str) else [p for p, _ in groups["blocks"]]
        patterns = [groups["stem"], *([blocks] if isinstance(blocks, str) else blocks)]
        left = {n for n in names if not any(re.match(p, n) for p in patterns)}
        assert left <= {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_weight_decay_spares_what_the_authors_spared() -> None:
    spared = {name: small(name).no_weight_decay() for name in SMALL}
    assert spared["agent_deit_t"] == {"cls_token", "pos_embed"}
    assert spared["agent_pvt_t"] == spared["agent_cswin_t"] == set()
    assert {n.rsplit(".", 1)[-1] for n in spared["agent_swin_t"]} == {"relative_position_bias"}


@pytest.mark.parametrize("name", SMALL)
def test_recomputing_blocks_changes_no_gradient(name) -> None:
    x = torch.randn(2, 3, 32, 32)
    gradients: list[list[Tensor]] = []
    for recompute in (False, True):
        model = small(name, drop_path_rate=0.0).train()
        model.set_grad_checkpointing(recompute)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_stays_close(name) -> None:
    model, x = small(name), torch.randn(1, 3, 45, 40)
    logits = model(x)
    halves = model.to(torch.bfloat16)(x.bfloat16())
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.float(), logits, atol=0.02, rtol=0.1)


@pytest.mark.parametrize("name", [n if n == "agent_deit_t" else pytest.param(n, marks=pytest.mark.slow) for n in SMALL])
def test_the_network_compiles_into_one_graph(name) -> None:
    model, x = small(name), torch.randn(1, 3, 45, 40)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_compiled_network_trains_as_well(name) -> None:
    model, x = small(name), torch.randn(1, 3, 45, 40)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_attention_inputs_are_grids_also_beside_a_class_token() -> None:
    found = small("agent_deit_t").attention_inputs(torch.randn(1, 3, 32, 40))
    assert [tuple(x.shape) for _, _, x in found] == [(1, 4, 5, 16), (1, 21, 16)]
    weights = found[0].layer.attention_map(found[0].x, (1, 2))
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(1, 2))


def test_reduced_keys_are_patches_and_the_rest_of_the_grid_has_no_influence() -> None:
    layer = SpatialReductionAttention(8, 2, reduction=4).eval()
    x = torch.randn(1, 9, 11, 8)
    changed = x.clone()
    changed[:, 8], changed[:, :, 8:] = 7.0, -7.0
    inside = (slice(None), slice(8), slice(8))
    torch.testing.assert_close(layer(changed)[inside], layer(x)[inside])
    changed[0, 3, 3] += 1.0
    assert (layer(changed) - layer(x))[inside].abs().amin((0, 3)).min() > 0
    assert layer.macs((9, 11)) == 64 * (2 * 99 + 2 * 4 + 4 * 16) + 2 * 99 * 4 * 8


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("agent_deit_t", {"agent_depth": 3}, r"agent_depths=\(3,\) is not allowed; 0 to the depth of each level are"),
        ("agent_deit_t", {"agent_sizes": (2, 2)}, r"agent_sizes has 2 entries but .* has 4"),
        ("agent_deit_t", {"depth": 0}, r"depths=\(0,\) is not allowed"),
        ("agent_pvt_t", {"num_heads": (1,)}, r"num_heads has 1 entries but depths has 2"),
        ("agent_pvt_t", {"reductions": (0, 1)}, r"reduction=0 is not allowed"),
        ("agent_swin_t", {"agent_depths": (3, 0)}, r"agent_depths=\(3, 0\) is not allowed"),
        ("agent_swin_t", {"window_size": 0}, r"window_size=0 is not allowed"),
        ("agent_swin_t", {"dense_agent_sizes": ((0, 2), 2)}, r"dense_agent_sizes=\(0, 2\) is not allowed"),
        ("agent_cswin_t", {"window_sizes": (0, 2)}, r"window_sizes=\(0, 2\) is not allowed"),
        ("agent_cswin_t", {"drop_path_rate": 1.5}, r"drop_path_rate=1.5 is not allowed"),
        ("agent_cswin_t", {"img_size": (32, 0)}, r"img_size=\(32, 0\) is not allowed"),
    ],
)
def test_settings_outside_their_range_are_refused(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        small(name, **options)

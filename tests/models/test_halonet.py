"""Facts of HaloNet and its ResNet hybrids."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from gridattn.layers import HaloAttention
from gridattn.models import CheckpointError, HaloNet, create_model, list_models

# Parameters: of the paper's models from its table of widths, of the hybrids as counted from the published models.
PARAMETERS = {
    "halonet_h0": 5_502_248,
    "halonet_h1": 8_101_352,
    "halonet_h2": 9_405_608,
    "halonet_h3": 11_842_792,
    "halonet_h4": 19_103_464,
    "halonet_h5": 30_718_952,
    "halonet_h6": 43_458_280,
    "halonet_h7": 67_434_728,
    "timm_halonet_h1": 8_100_056,
    "timm_halonet26t": 12_480_288,
    "timm_halo2botnet50ts_256": 22_635_360,
    "timm_halonet50ts": 22_733_280,
    "timm_sehalonet33ts": 13_691_712,
    "timm_eca_halonext26ts": 10_756_885,
    "timm_haloregnetz_b": 11_680_072,
}
SMALL: dict[str, Any] = {
    "depths": (1, 2),
    "widths": (16, 32),
    "strides": (1, 2),
    "num_heads": 4,
    "block_size": 4,
    "halo_size": 1,
    "stem_width": 8,
}


def small(**options) -> Any:
    torch.manual_seed(0)
    return randomized(HaloNet(**{**SMALL, "num_classes": 5, **options})).eval()


@torch.no_grad()
def randomized(model):
    """Parameters and statistics that are far from their initial values, so that none can be left out unseen."""
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            tensor.normal_(std=0.1)
        elif tensor.ndim == 1:
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_model(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_every_variant_has_its_count_here() -> None:
    assert set(list_models("*halo*")) == set(PARAMETERS)


# The paper's layout; hybrids with squeeze and excitation, with groups, with odd blocks and no shortcuts, and with full
# attention in the last level.
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("halonet_h1", (256, 256)),
        ("sehalonet33ts", (256, 512)),
        ("eca_halonext26ts", (256, 256)),
        ("haloregnetz_b", (224, 224)),
        ("halo2botnet50ts_256", (256, 256)),
    ],
)
@torch.no_grad()
def test_weights_of_another_implementation_load_and_give_its_logits(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    other = randomized(timm.create_model(name, num_classes=7)).eval().double()
    ours = create_model(f"timm_{name}", num_classes=7).double().eval()
    ours.load_official(other.state_dict())
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(ours(images), other(images), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"halo_blocks": ((), (1,)), "stem": "tiered", "stem_pool": False}])
def test_any_image_size_gives_maps_of_rounded_up_size(options) -> None:
    model = small(final_width=24, **options)
    maps = model.forward_maps(torch.randn(1, 3, 37, 50))
    assert [tuple(m.shape[1:3]) for m in maps] == [(19, 25), (10, 13), (5, 7)]
    assert [m.shape[-1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8]


def test_what_fills_up_the_last_blocks_counts_as_zero_keys_and_values() -> None:
    layer = small().levels[0].blocks[0].middle
    x = torch.randn(1, 6, 7, 16)
    filled = nn.functional.pad(x, (0, 0, 0, 1, 0, 2))
    torch.testing.assert_close(layer(x), layer(filled)[:, :6, :7])


def test_halo_layers_stand_where_they_are_asked_for_and_everywhere_by_default() -> None:
    def places(name: str) -> list[list[int]]:
        with torch.device("meta"):
            model = create_model(name)
        return [
            [j for j, block in enumerate(level.blocks) if isinstance(block.middle, HaloAttention)]
            for level in model.levels
        ]

    assert places("timm_halonet50ts") == [[], [3], [1, 3, 5], [1]]
    assert [len(level) for level in places("halonet_h0")] == [3, 3, 7, 3]


def test_wider_values_leave_queries_and_keys_at_the_width_of_the_block() -> None:
    layer = small(value_ratio=2.5).levels[1].blocks[0].middle
    assert layer.query.out_features == 32
    assert layer.key_value.out_features == 32 + 80


def test_an_inverted_block_has_no_shortcut_where_the_shape_changes_and_ends_without_activation() -> None:
    options = {"inverted": True, "bottleneck_ratio": 2.0, "channel_attention": "eca", "group_width": 8}
    first, second = small(halo_blocks=((), ()), **options).levels[1].blocks
    x = torch.randn(2, 6, 6, 32)
    with torch.no_grad():
        for block in (first, second):
            block.conv3.bn.weight.zero_()
            block.conv3.bn.bias.zero_()
    assert not first(torch.randn(2, 6, 6, 16)).any()
    assert torch.equal(second(x), x)


def test_tables_of_another_window_are_interpolated_and_of_the_same_one_kept() -> None:
    model = small()
    table = model.levels[0].blocks[0].middle.relative[0]
    expected = nn.functional.interpolate(table.T[None], 15, mode="linear", align_corners=False)[0].T
    for halo, entries in ((2, expected), (1, table)):
        other = small(halo_size=halo)
        other.load_official(model.state_dict())
        torch.testing.assert_close(other.levels[0].blocks[0].middle.relative[0].detach(), entries.detach())


def test_counters_of_batches_may_be_missing_and_nothing_else() -> None:
    state = {name: t for name, t in small().state_dict().items() if not name.endswith("num_batches_tracked")}
    small().load_official(state)
    state["head.extra"] = state.pop("head.fc.bias")
    with pytest.raises(CheckpointError, match=r"1 missing \(head.fc.bias\); 1 unexpected \(head.extra\)"):
        small().load_official(state)


def test_the_classifier_is_replaced_and_features_are_pooled_without_it() -> None:
    model = small()
    images = torch.randn(2, 3, 32, 32)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)
    model.reset_classifier(3)
    assert model.get_classifier().weight.shape == (3, 32)
    assert model(images).shape == (2, 3)


def test_a_feature_extractor_has_the_stem_and_every_level() -> None:
    maps = create_model("timm_halonet26t", features_only=True, out_indices=(0, 2), halo_blocks=None, **SMALL)
    assert maps.feature_info.channels() == [8, 32]
    assert [tuple(m.shape) for m in maps(torch.randn(1, 3, 64, 48))] == [(1, 8, 32, 24), (1, 32, 8, 6)]
    maps.load_official(create_model("timm_halonet26t", halo_blocks=None, **SMALL).state_dict())


def test_drop_path_grows_linearly_over_all_blocks() -> None:
    blocks = [block for level in small(drop_path_rate=0.3).levels for block in level.blocks]
    assert [round(block.drop_path.probability, 6) for block in blocks] == [0.0, 0.15, 0.3]


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


def test_relative_vectors_are_spared_from_weight_decay() -> None:
    assert small().no_weight_decay() == {
        f"levels.{i}.blocks.{j}.middle.relative.{axis}" for i, j in ((0, 0), (1, 0), (1, 1)) for axis in (0, 1)
    }


def test_settings_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="num_heads has 1 entries but depths has 2"):
        small(num_heads=(4,))
    with pytest.raises(ValueError, match=r"halo_blocks=\(\(\), \(2,\)\) names a block that depths=\(1, 2\)"):
        small(halo_blocks=((), (2,)))
    with pytest.raises(ValueError, match="stem='5x5' is not"):
        small(stem="5x5")

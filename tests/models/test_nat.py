"""Facts of NAT, DiNAT, DiNAT_s and the isotropic forms."""

import pytest
import torch

from gridattn.layers import NeighborhoodAttention
from gridattn.models import NAT, CheckpointError, DiNATs, IsotropicNAT, create_model, list_models
from gridattn.models.nat import PatchMerging

# Parameters with 1000 classes, as counted from the published models.
PARAMETERS = {
    "nat_mini": 19_984_174,
    "nat_tiny": 27_901_582,
    "nat_small": 50_743_297,
    "nat_base": 89_769_652,
    "dinat_mini": 19_984_174,
    "dinat_tiny": 27_901_582,
    "dinat_small": 50_719_681,
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
    "dinat_large_384": 200_943_514,
    "dinat_large_384_11x11": 201_144_250,
    "dinat_s_tiny": 28_288_354,
    "dinat_s_small": 49_606_258,
    "dinat_s_base": 87_768_224,
    "dinat_s_large": 196_532_476,
    "dinat_s_large_384": 196_532_476,
    "nat_isotropic_small": 21_999_736,
    "nat_isotropic_base": 86_465_800,
    "dinat_isotropic_small": 21_999_736,
    "dinat_isotropic_base": 86_465_800,
    "vitrpb_small": 22_080_376,
    "vitrpb_base": 86_627_080,
}


def on_meta(name: str, **options):
    with torch.device("meta"):
        return create_model(name, **options)


def dilations(model: NAT) -> list[list[int]]:
    return [[block.attn.dilation[0] for block in level.blocks] for level in model.levels]


def small(family: type[NAT] = NAT, **options) -> NAT:
    torch.manual_seed(0)
    settings = {"depths": (2, 1), "num_heads": (1, 2), "kernel_size": 3, "dilations": ((1, 2), (1,)), "num_classes": 5}
    return family(16, **{**settings, **options}).eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_model(name) -> None:
    assert sum(p.numel() for p in on_meta(name).parameters()) == PARAMETERS[name]


def test_every_variant_has_its_count_here() -> None:
    names = {n for p in ("nat_*", "dinat_*", "vitrpb_*") for n in list_models(p)}
    assert names == set(PARAMETERS)


def test_dilations_repeat_over_the_blocks_of_a_level() -> None:
    assert dilations(on_meta("dinat_mini")) == [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1] * 5]
    coco = dilations(on_meta("dinat_tiny", dilations="coco"))
    assert coco == [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]]
    assert dilations(on_meta("dinat_s_tiny", dilations="ade20k")) == [[1, 16], [1, 8], [1, 2, 1, 3, 1, 4], [1, 2]]
    with pytest.raises(ValueError, match="dilations='kitti' is not known; allowed: 'coco', 'ade20k'"):
        on_meta("dinat_s_tiny", dilations="kitti")


def test_drop_path_grows_linearly_over_all_blocks() -> None:
    rates = [block.drop_path.probability for level in on_meta("nat_mini").levels for block in level.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.2, 18))


def test_merging_concatenates_column_by_column() -> None:
    merging = PatchMerging(1)
    merging.norm = torch.nn.Identity()
    merging.reduction = torch.nn.Identity()
    x = torch.arange(1.0, 7.0).view(1, 2, 3, 1)
    assert merging(x)[0, 0].tolist() == [[1, 4, 2, 5], [3, 6, 0, 0]]  # (row, column): (0,0) (1,0) (0,1) (1,1)


@pytest.mark.parametrize("family", [NAT, DiNATs])
def test_any_image_size_gives_maps_of_rounded_up_size(family) -> None:
    maps = small(family).forward_maps(torch.randn(1, 3, 29, 50))
    assert [tuple(m.shape) for m in maps] == [(1, 8, 13, 16), (1, 4, 7, 32)]


def official(model: NAT) -> dict[str, torch.Tensor]:
    """The state dict under the published names."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("relative_position_bias", "rpb")
        if isinstance(model, IsotropicNAT):
            name = name.replace("levels.0.blocks.", "layers.")
        elif isinstance(model, DiNATs):
            name = name.replace("levels.", "layers.")
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize(
    "build",
    [
        lambda: small(layer_scale=1e-5),
        lambda: small(DiNATs),
        lambda: IsotropicNAT(32, 8, 32, 2, 2, kernel_size=3, dilation=2, num_classes=5).eval(),
        lambda: IsotropicNAT(32, 8, 32, 2, 2, kernel_size=None, num_classes=5).eval(),
    ],
)
def test_published_names_load_and_give_the_same_logits(build) -> None:
    model, other = build(), build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    state = official(model)
    if isinstance(model, IsotropicNAT):
        state["layers.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
    other.load_official(state)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(other(x), model(x))
    state["head.extra"] = state.pop("norm.bias")
    with pytest.raises(CheckpointError, match=r"1 missing \(norm.bias\); 1 unexpected \(head.extra\)"):
        other.load_official(state)


def test_position_tables_of_another_kernel_size_are_interpolated() -> None:
    model, larger = small(), small(kernel_size=5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NeighborhoodAttention):
                module.relative_position_bias.fill_(2.0)  # type: ignore[union-attr]
    larger.load_official(model.state_dict())
    tables = [m.relative_position_bias for m in larger.modules() if isinstance(m, NeighborhoodAttention)]
    assert len(tables) == 3
    for table in tables:
        torch.testing.assert_close(table.data, torch.full((table.shape[0], 9, 9), 2.0))  # type: ignore[union-attr]


def test_full_attention_with_relative_bias_sees_everything_on_its_grid_and_on_smaller_ones() -> None:
    model = IsotropicNAT(32, 8, 32, 1, 2, kernel_size=None, num_classes=5).eval()
    for size in (32, 24):
        _, layer, x = model.attention_inputs(torch.randn(1, 3, size, size))[0]
        assert (layer.attention_map(x, (0, 0)) > 0).all()


def test_a_feature_extractor_taps_levels_before_their_downsampler_and_normalises_each() -> None:
    body = {"depths": (2, 1), "num_heads": (1, 2), "kernel_size": 3, "embed_dim": 16}
    maps = create_model("nat_mini", features_only=True, **body).eval()
    assert maps.feature_info.channels() == [16, 32]
    assert maps.feature_info.reduction() == [4, 8]
    outputs = maps(torch.randn(1, 3, 37, 40))
    assert [tuple(m.shape) for m in outputs] == [(1, 16, 10, 10), (1, 32, 5, 5)]
    for m in outputs:
        torch.testing.assert_close(m.mean(1), torch.zeros_like(m.mean(1)), atol=1e-4, rtol=0)
    state = official(create_model("nat_mini", **body)) | {
        f"norm{i}.{leaf}": torch.full((c,), 0.5) for i, c in ((0, 16), (1, 32)) for leaf in ("weight", "bias")
    }
    maps.load_official(state)
    assert (maps.norm1.weight == 0.5).all()
    assert torch.equal(maps.body.patch_embed.norm.weight, state["patch_embed.norm.weight"])


def test_position_tables_are_spared_from_weight_decay() -> None:
    names = small().no_weight_decay()
    assert len(names) == 3
    assert all(name.endswith("attn.relative_position_bias") for name in names)

"""Facts of the dual attention vision transformer."""

from typing import Any

import pytest
import timm
import torch
from timm.models.davit import DaVit

from gridattn.models import CheckpointError, DaViT, create_model, list_models

# Parameters with 1000 classes (the Florence towers have none), as counted from the published models.
PARAMETERS = {
    "davit_tiny": 28_360_168,
    "davit_small": 49_745_896,
    "davit_base": 87_954_408,
    "davit_large": 196_811_752,
    "davit_huge": 348_922_856,
    "davit_giant": 1_406_470_120,
    "davit_base_fl": 90_370_048,
    "davit_huge_fl": 360_636_416,
}
DENSE = {"davit_tiny": 27_592_512, "davit_small": 48_978_240, "davit_base": 86_931_200, "davit_large": 195_277_440}
SMALL: dict[str, Any] = {
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 1, 2, 1),
    "num_heads": (2, 2, 3, 4),
    "window_size": 5,
    "num_classes": 5,
}
FLORENCE = {"down_kernel_size": 3, "channel_attn_v2": True}


def count(name: str, **options) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, **options).parameters())


def randomised(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_model(name) -> None:
    assert count(name) == PARAMETERS[name]


@pytest.mark.parametrize("name", DENSE)
def test_a_feature_extractor_has_a_norm_for_each_map_and_no_head(name) -> None:
    assert count(name, features_only=True) == DENSE[name]


def test_every_variant_has_its_count_here() -> None:
    assert set(list_models("davit_*")) == set(PARAMETERS)


def test_any_image_size_gives_maps_of_rounded_up_size() -> None:
    model = DaViT(**SMALL).eval()
    maps = model.forward_maps(torch.randn(1, 3, 67, 101))
    assert [tuple(m.shape) for m in maps] == [(1, 17, 26, 8), (1, 9, 13, 16), (1, 5, 7, 24), (1, 3, 4, 32)]
    assert model(torch.randn(1, 3, 1, 1)).isfinite().all()


@pytest.mark.parametrize("options", [{}, FLORENCE])
@pytest.mark.parametrize("size", [(64, 64), (67, 101)])
def test_weights_of_timm_give_the_logits_of_timm(options, size) -> None:
    torch.manual_seed(0)
    other = randomised(DaVit(**SMALL, **options, named_blocks=bool(options)))
    model = DaViT(**SMALL, **options).eval()
    model.load_official(other.state_dict())
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x), atol=1e-5, rtol=1e-5)
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(pooled, other.forward_head(other.forward_features(x), pre_logits=True))


def test_names_of_florence_load_and_its_tower_has_no_final_norm() -> None:
    def theirs(name: str) -> str:
        for ours, florence in (
            ("stem.conv.", "convs.0.proj."),
            ("stem.norm.", "convs.0.norm."),
            ("spatial_block.norm1.", "spatial_block.window_attn.norm."),
            ("channel_block.norm1.", "channel_block.channel_attn.norm."),
            ("spatial_block.attn.", "spatial_block.window_attn.fn."),
            ("channel_block.attn.", "channel_block.channel_attn.fn."),
            (".norm2.", ".ffn.norm."),
            (".mlp.", ".ffn.fn.net."),
            (".cpe1.proj.", ".conv1.fn.dw."),
            (".cpe2.proj.", ".conv2.fn.dw."),
        ):
            name = name.replace(ours, florence)
        if name.startswith("stages."):
            _, stage, part, *rest = name.split(".")
            kind = "blocks" if part == "blocks" else "convs"
            rest = ["proj", *rest[1:]] if rest[0] == "conv" else rest
            name = ".".join([kind, stage, *rest])
        return f"vision_tower.{name}"

    tower = SMALL | FLORENCE | {"num_classes": 0}
    other = randomised(DaVit(**tower, named_blocks=True))
    model = DaViT(**tower).eval()
    state = {theirs(name): t for name, t in other.state_dict().items() if not name.startswith("head.")}
    assert "vision_tower.blocks.2.1.channel_block.ffn.fn.net.fc1.weight" in state
    model.load_official(state)
    x = torch.randn(1, 3, 40, 33)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x).movedim(-1, 1), other.forward_features(x))
    assert (model.norm.weight == 1).all()


def test_a_missing_name_is_refused() -> None:
    state = DaVit(**SMALL).state_dict()
    state["head.extra"] = state.pop("head.norm.weight")
    with pytest.raises(CheckpointError, match=r"1 missing \(norm.weight\); 1 unexpected \(head.extra\)"):
        DaViT(**SMALL).load_official(state)


def test_a_file_of_timm_fits_other_classes_and_the_feature_extractor(tmp_path) -> None:
    other = randomised(DaVit(**SMALL))
    torch.save(other.state_dict(), tmp_path / "davit.pth")
    x = torch.randn(1, 3, 40, 33)
    options = SMALL | {"num_classes": 7, "checkpoint": tmp_path / "davit.pth"}
    finetuned = create_model("davit_tiny", **options).eval()
    torch.testing.assert_close(finetuned.forward_features(x).movedim(-1, 1), other.forward_features(x))
    assert finetuned.head.out_features == 7
    features = create_model("davit_tiny", features_only=True, **(options | {"num_classes": 0})).eval()
    expected = other.forward_features(x).movedim(1, -1)
    torch.testing.assert_close(
        features(x)[-1].movedim(1, -1), torch.nn.functional.layer_norm(expected, expected.shape[-1:])
    )


def test_drop_path_grows_from_block_to_block_also_within_a_pair() -> None:
    with torch.device("meta"):
        model = create_model("davit_tiny")
    rates = [block.drop_path.probability for level in model.levels for block in level.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.1, 12))


def test_the_mean_is_taken_before_the_norm() -> None:
    model = randomised(DaViT(**SMALL))
    x = model.forward_features(torch.randn(1, 3, 64, 40))
    torch.testing.assert_close(model.forward_head(x), model.head(model.norm(x.mean((1, 2)))))
    assert not torch.allclose(model.forward_head(x), model.head(model.norm(x).mean((1, 2))))


def test_variants_are_those_of_timm() -> None:
    with torch.device("meta"):
        for name in ("davit_tiny", "davit_huge_fl"):
            theirs = sum(p.numel() for p in timm.create_model(name).parameters())
            assert count(name) == theirs

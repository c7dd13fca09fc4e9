"""Heads, the whole network on every kind of backbone, and weights to start from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gridattn.models import create_model, list_models, model_info
from gridattn.systems import recipe_names
from gridattn.systems.segment.convert import convert_heads, start_from
from gridattn.systems.segment.heads import FCNHead, SemanticFPNHead, UPerHead
from gridattn.systems.segment.model import build_segmenter
from gridattn.systems.settings import read_recipe

TINY: dict[str, Any] = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _tiny(**changes: Any) -> Any:
    options = {"model_options": TINY, "head_options": {"channels": 8}, "aux_channels": 4}
    return build_segmenter("grid_vit_4stage_micro", 5, **options | changes)


@pytest.mark.parametrize(
    ("widths", "head", "auxiliary"),
    [
        ((32, 64, 160, 256), 27_876_502, 407_702),  # VAN-B0
        ((64, 128, 320, 512), 29_711_510, 776_342),  # VAN-B1 to B4
        ((96, 192, 480, 768), 31_546_518, 1_144_982),  # VAN-B5
        ((96, 192, 384, 768), 31_497_366, 923_798),  # VAN-B6, DaViT-T, DaViT-S
        ((128, 256, 512, 1024), 33_315_990, 1_218_710),  # DaViT-B
    ],
)
def test_upernet_has_the_published_number_of_parameters(widths: tuple[int, ...], head: int, auxiliary: int) -> None:
    with torch.device("meta"):
        assert _count(UPerHead(widths, 150)) == head
        assert _count(FCNHead(widths[2], 150)) == auxiliary


@pytest.mark.parametrize(("widths", "neck"), [((32, 64, 160, 256), 2_492_416), ((64, 128, 320, 512), 2_623_488)])
def test_semantic_fpn_has_the_published_number_of_parameters(widths: tuple[int, ...], neck: int) -> None:
    with torch.device("meta"):
        head = SemanticFPNHead(widths, 150)
    assert _count(head.neck) == neck
    assert _count(head) - neck == 1_643_158


@pytest.mark.parametrize("name", ["upernet", "semantic_fpn"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size_are_scored_at_every_pixel(name: str, channels: int) -> None:
    model = _tiny(head=name, in_chans=channels).eval()
    for size in ((1, 1), (37, 70), (64, 32)):
        assert model(torch.randn(1, channels, *size)).shape == (1, 5, *size)


def test_the_scores_of_an_image_do_not_depend_on_its_batch() -> None:
    model = _tiny(head_options={"channels": 8, "norm": "layer"}).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    images = torch.randn(2, 3, 40, 24)
    assert torch.allclose(model(images)[:1], model(images[:1]), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "reductions"),
    [
        ("mobilenet_v2_100", {}, [4, 8, 16, 32]),  # five maps: the finest is left out
        ("tic_mini", {}, [2, 4]),
        ("nat_isotropic_small", {"depth": 1}, [16]),
        ("pose_simplebaseline_r50", {}, [4, 8, 16, 32]),  # its fifth map is finer again
    ],
)
@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_backbones_with_one_map_or_five_are_taken(
    name: str, options: dict[str, Any], reductions: list[int], head: str
) -> None:
    options = {key: value for key, value in options.items() if key in model_info(name).options}
    model = build_segmenter(name, 4, model_options=options, head=head, head_options={"channels": 8}, aux_channels=4)
    assert model.backbone.feature_info.reduction() == reductions
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 45, 66)).shape == (1, 4, 45, 66)


def test_every_weight_of_the_network_gets_a_gradient() -> None:
    model = _tiny().train()
    scores, aux = model.forward_with_aux(torch.randn(2, 3, 64, 64))
    (scores.square().sum() + aux.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_bfloat16_and_float32_agree() -> None:
    model = _tiny().eval()
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        expected, found = model(images), model.bfloat16()(images.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (expected - found.float()).abs().max() < 0.05 * expected.abs().max() + 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "unet"}, "head='unet' is not known; allowed: 'upernet', 'semantic_fpn'"),
        ({"head_options": {"chanels": 8}}, "chanels.*channels"),
        ({"head_options": {"channels": 0}}, "channels=0 is not allowed"),
        ({"head_options": {"norm": "group"}}, "norm='group' is not known; allowed: 'batch', 'layer'"),
        ({"out_indices": [2, 0]}, r"out_indices=\[2, 0\] gives maps of strides \[8, 2\]; finest first"),
        ({"out_indices": [7]}, r"out_indices=\[7\]"),
        ({"model": "nat_mimi"}, "nat_mini"),
    ],
)
def test_what_cannot_be_built_is_told(changes: dict[str, Any], message: str) -> None:
    arguments = {"model": "grid_vit_4stage_micro", "num_classes": 5, "model_options": TINY} | changes
    with pytest.raises(ValueError, match=message):
        build_segmenter(**arguments)


def _published(model: Any) -> dict[str, Tensor]:
    """The heads of a tiny network under the names that its authors' training program stores."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("backbone."):
            for part, theirs in (("head.", "decode_head."), ("aux_head.", "auxiliary_head.")):
                if name.startswith(part):
                    rest = name.removeprefix(part)
                    for ours, old in (
                        ("pooled.0.", "psp_modules.0.1."),
                        ("pooled.1.", "psp_modules.1.1."),
                        ("top.", "bottleneck."),
                        ("laterals.", "lateral_convs."),
                        ("smooths.", "fpn_convs."),
                        ("join.", "fpn_bottleneck."),
                        ("classifier.1.", "conv_seg."),
                    ):
                        rest = old + rest.removeprefix(ours) if rest.startswith(ours) else rest
                    if part == "aux_head." and rest.startswith("conv."):
                        rest = "convs.0." + rest.removeprefix("conv.")
                    if "conv_seg" not in rest:
                        head, kind, leaf = rest.rsplit(".", 2)
                        rest = f"{head}.{'conv' if kind == '0' else 'bn'}.{leaf}"
                    state[theirs + rest] = tensor
    return state


def test_heads_of_a_published_network_are_loaded_and_other_classifiers_stay(tmp_path: Path) -> None:
    options: dict[str, Any] = {"head_options": {"channels": 8, "pool_scales": [1, 2]}}
    source, target = _tiny(**options), _tiny(**options)
    state = _published(source)
    assert convert_heads(state).keys() == {n for n in source.state_dict() if not n.startswith("backbone.")}
    backbone = {f"backbone.{n}": t for n, t in source.backbone.state_dict().items()}
    save_file(
        state | {n.replace("backbone.body.", "backbone."): t for n, t in backbone.items()}, tmp_path / "x.safetensors"
    )
    start_from(target, tmp_path / "x.safetensors")
    assert all(torch.equal(t, target.state_dict()[n]) for n, t in source.state_dict().items())

    other = build_segmenter("grid_vit_4stage_micro", 3, model_options=TINY, aux_channels=4, **options)
    before = other.head.classifier[1].weight.clone()
    start_from(other, tmp_path / "x.safetensors")
    assert torch.equal(other.head.classifier[1].weight, before)
    assert torch.equal(other.head.join[0].weight, source.head.join[0].weight)


def test_a_classifier_of_the_backbone_is_a_start(tmp_path: Path) -> None:
    classifier = create_model("grid_vit_4stage_micro", num_classes=7, **TINY)
    save_file(classifier.state_dict(), tmp_path / "c.safetensors")
    model = _tiny()
    start_from(model, tmp_path / "c.safetensors")
    assert torch.equal(model.backbone.body.patch_embed.proj.weight, classifier.patch_embed.proj.weight)
    save_file({"something": torch.zeros(1)}, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match=r"weights='.*d\.safetensors'"):
        start_from(model, tmp_path / "d.safetensors")


def test_the_backbones_of_the_recipes_exist_and_take_their_options() -> None:
    names = recipe_names("segment")
    assert len(names) >= 9
    for name in names:
        recipe = read_recipe("segment", name)
        assert recipe["model"] in list_models()
        options = set(recipe.get("model_options", {})) | ({"attention"} if "attention" in recipe else set())
        assert options <= set(model_info(recipe["model"]).options)

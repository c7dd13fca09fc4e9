"""Facts of the polyline path masked attention networks."""

import re

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import gridattn.models.timm_names  # noqa: F401
from gridattn.models import PPMA, CheckpointError, create_model, list_models

# Parameters with 1000 classes and as a dense backbone, as counted from the published models, and the paper's 1e9
# multiply-accumulates at 224.
PUBLISHED = {
    "ppma_t": (14_335_272, 12_784_832, 2.7),
    "ppma_s": (26_969_472, 25_419_032, 4.9),
    "ppma_b": (54_158_524, 52_608_308, 10.6),
}
SMALL = {
    "embed_dims": (8, 16, 24, 32),
    "depths": (2, 1, 1, 1),
    "num_heads": (2, 2, 4, 4),
    "mlp_ratios": (2, 2, 1, 1),
    "decomposed": (True, True, False, False),
    "layer_scale": (None, None, 0.5, None),
    "projection": 20,
    "num_classes": 5,
}


def small(**options) -> PPMA:
    torch.manual_seed(0)
    return PPMA(**{**SMALL, **options}).eval()


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.2)
    return model


def official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of ours under the published names, with their constants."""
    published = {}
    for name, tensor in state.items():
        for ours, theirs in (
            (r"^norm\.proj\.", "proj."),
            (r"^norm\.norm\.", "norm."),
            (r"^norm(\d)\.", r"outnorm\1."),
            (r"^levels\.", "layers."),
            (r"(blocks\.\d+)\.norm1\.", r"\1.retention_layer_norm."),
            (r"(blocks\.\d+)\.norm2\.", r"\1.final_layer_norm."),
            (r"\.position\.", ".pos.conv."),
            (r"\.attn\.", ".retention."),
            (r"\.lepe\.", ".lepe.conv."),
            (r"\.mlp\.", ".ffn."),
            (r"\.dwconv\.", ".dwconv.conv."),
            (r"\.gamma(\d)$", r".gamma_\1"),
        ):
            name = re.sub(ours, theirs, name)
        published[name] = tensor.view(1, 1, 1, -1) if ".gamma_" in name else tensor
    return published | {f"layers.{i}.Relpos.angle": torch.ones(4) for i in range(4)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_cost_are_those_of_the_published_model(name) -> None:
    parameters, dense, macs = PUBLISHED[name]
    with torch.device("meta"):
        model, image = create_model(name).eval(), torch.empty(1, 3, 224, 224)
        features = create_model(name, features_only=True)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in features.parameters()) == dense
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    counted = counter.get_total_flops() / 2
    # Dense attention under two masks needs its two products once; two fused attentions compute each of them twice.
    tokens = {"levels.2": 14**2, "levels.3": 7**2}
    for path, layer in model.attention_layers():
        if not layer.decomposed:
            counted -= 2 * tokens[path[: len("levels.0")]] ** 2 * layer.dim
    assert counted / 1e9 == pytest.approx(macs, rel=0.01)


def test_every_variant_has_its_count_here() -> None:
    assert set(list_models("ppma_*")) == set(PUBLISHED)


def test_any_image_size_gives_maps_of_rounded_up_size() -> None:
    model = small()
    maps = model.forward_maps(torch.randn(2, 3, 45, 70))
    assert [tuple(m.shape) for m in maps] == [(2, 12, 18, 8), (2, 6, 9, 16), (2, 3, 5, 24), (2, 2, 3, 32)]
    assert model(torch.randn(1, 3, 1, 1)).isfinite().all()


def test_published_names_load_and_give_the_same_logits() -> None:
    model, other = randomised(small()), small()
    state = official(model.state_dict())
    assert {"layers.2.blocks.0.gamma_1", "layers.0.blocks.0.retention.lepe.conv.bias", "proj.bias"} <= set(state)
    other.load_official({name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")})
    x = torch.randn(1, 3, 40, 33)
    assert torch.equal(other(x), model(x))
    state["layers.9.bias"] = state.pop("head.bias")
    with pytest.raises(CheckpointError, match=r"1 missing \(head.bias\); 1 unexpected \(levels.9.bias"):
        other.load_official(state)


def test_a_file_of_a_classifier_fits_other_classes_and_keeps_its_projection(tmp_path) -> None:
    model = randomised(small())
    torch.save({"model": official(model.state_dict())}, tmp_path / "ppma.pth")
    x = torch.randn(1, 3, 40, 33)
    options = SMALL | {"checkpoint": tmp_path / "ppma.pth"}
    finetuned = create_model("ppma_t", **(options | {"num_classes": 7})).eval()
    torch.testing.assert_close(finetuned.forward_features(x), model.forward_features(x))
    assert finetuned(x).shape == (1, 7)
    features = create_model("ppma_t", features_only=True, **(options | {"num_classes": 0})).eval()
    for ours, expected in zip(features(x), model.forward_maps(x)):
        normalised = torch.nn.functional.layer_norm(expected, expected.shape[-1:])
        torch.testing.assert_close(ours.movedim(1, -1), normalised)


def test_a_file_of_a_dense_backbone_brings_the_norms_of_its_maps() -> None:
    body = {key: value for key, value in SMALL.items() if key not in ("num_classes", "projection")}
    dense = randomised(create_model("ppma_t", features_only=True, **body)).eval()
    state = official({name.removeprefix("body."): tensor for name, tensor in dense.state_dict().items()})
    assert "outnorm3.bias" in state
    assert not any(name.startswith(("proj.", "norm.", "head.")) for name in state)
    other = create_model("ppma_t", features_only=True, **body).eval()
    other.load_official(state)
    x = torch.randn(1, 3, 40, 33)
    for ours, expected in zip(other(x), dense(x)):
        assert torch.equal(ours, expected)


def test_the_head_projects_normalises_and_then_averages() -> None:
    model = randomised(small())
    x = torch.randn(1, 3, 64, 40)
    last = model.forward_maps(x)[-1]
    batch_norm = model.norm.norm
    projected = torch.nn.functional.silu(
        batch_norm(last.flatten(0, 2) @ model.norm.proj.weight.T + model.norm.proj.bias)
    )
    torch.testing.assert_close(model(x), model.head(projected.mean(0, keepdim=True)))


@pytest.mark.parametrize("mask", ["one_way", "shared", "manhattan", "none"])
def test_other_masks_are_other_networks_with_the_same_maps_of_channels(mask) -> None:
    model, other = randomised(small()).double(), small(mask=mask).double()
    shared = {name: t for name, t in model.state_dict().items() if ".path_embed." not in name or mask == "one_way"}
    missing, unexpected = other.load_state_dict(shared, strict=False)
    assert not unexpected
    assert all(".path_embed." in name for name in missing)
    assert bool(missing) == (mask == "shared")
    x = torch.randn(1, 3, 64, 40, dtype=torch.float64)
    assert (other(x) - model(x)).abs().max() > 1e-8


def test_settings_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(ValueError, match="decomposed has 2 entries but embed_dims has 4"):
        small(decomposed=(True, False))
    with pytest.raises(ValueError, match="mask='diagonal' is not known"):
        small(mask="diagonal")
    with pytest.raises(ValueError, match="projection=0 is not allowed"):
        small(projection=0)
    with pytest.raises(ValueError, match=r"embed_dims=\(9, 16, 24, 32\) is not allowed"):
        small(embed_dims=(9, 16, 24, 32), num_heads=(1, 2, 4, 4))
    with pytest.raises(ValueError, match=r"drop_path_rate=1.5 is not allowed"):
        small(drop_path_rate=1.5)


def test_the_classifier_is_replaced_and_dropout_acts_in_training_only() -> None:
    model = small(drop_rate=0.5, in_chans=4)
    x = torch.randn(2, 4, 64, 40)
    assert torch.equal(model(x), model(x))
    features = model.forward_features(x)
    model.head_drop.train()
    assert not torch.equal(model.forward_head(features), model.forward_head(features))
    model.eval().reset_classifier(0)
    torch.testing.assert_close(model(x), features.mean((1, 2)))
    model.reset_classifier(9)
    assert model(x).shape == (2, 9)
    groups = model.group_matcher()
    patterns = [groups["stem"], *(pattern for pattern, _ in groups["blocks"])]
    left = {name for name, _ in model.named_parameters() if not any(re.match(p, name) for p in patterns)}
    assert {name.split(".")[0] for name in left} == {"head"}
    rates = [block.drop_path.probability for level in small(drop_path_rate=0.4).levels for block in level.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.4, 5))


def test_recomputing_blocks_changes_no_gradient() -> None:
    x = torch.randn(2, 3, 65, 72)
    gradients = []
    for recompute in (False, True):
        model = small().train()
        model.set_grad_checkpointing(recompute)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


def test_compiles_as_one_graph_and_runs_in_bfloat16() -> None:
    two = {key: value[1:3] if isinstance(value, tuple) else value for key, value in SMALL.items()}
    model = small(**two, decay_spread=(4, 4)).eval()
    x = torch.randn(1, 3, 45, 70)
    with torch.no_grad():
        expected = model(x)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.1 * expected.abs().max()


def test_timm_builds_it_by_name() -> None:
    model = timm.create_model("gridattn_ppma_t", **SMALL).eval()
    assert model(torch.randn(1, 3, 64, 40)).shape == (1, 5)

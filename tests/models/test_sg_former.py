"""Facts of SG-Former."""

import re

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import gridattn.models.timm_names  # noqa: F401
from gridattn.layers.hybrid_scale import GuidedAttention, HybridScaleAttention, LepeAttention
from gridattn.models import CheckpointError, SGFormer, create_model, list_models
from gridattn.ops.sine_position import grid_code

# Parameters with 1000 classes, as counted from the published models, and the paper's 1e9 multiply-accumulates at 224.
PUBLISHED = {
    "sgformer_s": (22_545_981, 4.8),
    "sgformer_m": (38_689_316, 7.5),
    "sgformer_b": (77_950_293, 15.6),
}
SMALL = {
    "img_size": 64,
    "embed_dims": (8, 16, 24, 32),
    "num_heads": (2, 2, 4, 4),
    "mlp_ratios": (2, 2, 1, 1),
    "depths": (2, 2, 4, 1),
    "num_classes": 5,
}


def small(**options) -> SGFormer:
    torch.manual_seed(0)
    return SGFormer(**{**SMALL, **options}).eval()


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if ".aggregate." in name:  # equal weights: the order inside a group, open to rounding, does not matter
                parameter.fill_(0.1)
    return model


def official(model: SGFormer) -> dict[str, torch.Tensor]:
    """The state dict under the published names: projections of the two halves of the heads are separate there."""
    state = {}
    for name, t in model.state_dict().items():
        name = re.sub(r"^patch_embed\.convs\.(\d)\.0\.", r"patch_embed1.conv.\1.c.", name)
        name = re.sub(r"^patch_embed\.convs\.(\d)\.1\.", r"patch_embed1.conv.\1.bn.", name)
        name = re.sub(r"^patch_embed\.norm", "patch_embed1.norm", name)
        if match := re.match(r"levels\.(\d)\.downsample\.convs\.(\d)\.(\d)\.(.+)", name):
            level, conv, part, leaf = match.groups()
            name = f"patch_embed{int(level) + 2}.conv{int(conv) // 2 + 1}.{'c' if part == '0' else 'bn'}.{leaf}"
        name = re.sub(r"^levels\.(\d)\.norm", lambda m: f"norm{int(m[1]) + 1}", name)
        if match := re.match(r"levels\.(\d)\.blocks\.(\d+)\.(?:(hybrid|guided)\.)?(.+)", name):
            level, block, kind, leaf = match.groups()
            index = int(block) if kind is None else 2 * int(block) + (kind == "guided")
            name = f"block{int(level) + 1}.{index}.{leaf.replace('attn.attention.', 'attn.')}"
            for ours, theirs in (
                ("lepe.", "lepe_"),
                ("mlp.dwconv.", "mlp.dwconv.dwconv."),
                ("attn.patch_norm.", "attn.norm."),
                ("attn.patch.", "attn.sr."),
                ("kv_coarse", "kv1"),
                ("kv_local", "kv2"),
                ("aggregate.0", "f1"),
                ("aggregate.1", "f2"),
                ("aggregate.2", "f3"),
            ):
                name = name.replace(ours, theirs)
            if kind == "hybrid" and ".attn.q." in name:
                state |= {name.replace(".q.", f".q{i + 1}."): half for i, half in enumerate(t.chunk(2))}
                continue
            if kind == "guided" and ".attn.kv." in name:
                key1, key2, value1, value2 = t.chunk(4)
                state[name.replace(".kv.", ".kv1.")] = torch.cat([key1, value1])
                state[name.replace(".kv.", ".kv2.")] = torch.cat([key2, value2])
                continue
        state[name] = t.flatten(1, 2) if name == "pos_embed" else t
    return state


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_cost_are_those_of_the_published_model(name) -> None:
    parameters, macs = PUBLISHED[name]
    with torch.device("meta"):
        model, image = create_model(name).eval(), torch.empty(1, 3, 224, 224)
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, rel=0.02)


def test_every_variant_has_its_count_here() -> None:
    assert set(list_models("sgformer_*")) == set(PUBLISHED)
    with torch.device("meta"):
        model = create_model("sgformer_s")
    assert sum(p.numel() for p in model.parameters()) - model.pos_embed.numel() == 22_345_277


def test_any_image_size_gives_maps_of_rounded_up_size() -> None:
    model = small()
    maps = model.forward_maps(torch.randn(2, 3, 45, 70))
    assert [tuple(m.shape) for m in maps] == [(2, 12, 18, 8), (2, 6, 9, 16), (2, 3, 5, 24), (2, 2, 3, 32)]
    assert model(torch.randn(1, 3, 1, 1)).isfinite().all()


def test_hybrid_and_guided_blocks_take_turns_and_the_last_level_is_plain() -> None:
    model = small()
    for level in model.levels[:3]:
        for pair in level.blocks:
            assert isinstance(pair.hybrid.attn, HybridScaleAttention)
            assert isinstance(pair.guided.attn, GuidedAttention)
    assert [type(block.attn) for block in model.levels[3].blocks] == [LepeAttention]
    rates = [m.probability for m in small(drop_path_rate=0.4).modules() if hasattr(m, "probability")]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.4, 9))


def test_published_names_load_and_give_the_same_logits() -> None:
    model, other = randomised(small()), small()
    state = official(model)
    assert {"block1.0.attn.q2.bias", "block3.3.attn.f2.weight", "block4.0.attn.kv.weight"} <= set(state)
    assert state["block1.1.attn.f1.weight"].shape == (1, 196)
    other.load_official(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    state["block1.0.attn.sr.wrong"] = state.pop("norm2.bias")
    with pytest.raises(CheckpointError, match=r"1 missing \(levels.1.norm.bias\); 1 unexpected \(levels.0.bl"):
        other.load_official(state)


def test_a_file_of_a_classifier_fits_other_classes_sizes_and_the_feature_extractor(tmp_path) -> None:
    model = randomised(small())
    torch.save({"state_dict_ema": official(model)}, tmp_path / "sg.pth")
    x = torch.randn(1, 3, 64, 64)
    options = {key: value for key, value in SMALL.items() if key != "num_classes"} | {"checkpoint": tmp_path / "sg.pth"}
    finetuned = create_model("sgformer_s", num_classes=7, **options).eval()
    torch.testing.assert_close(finetuned.forward_features(x), model.forward_features(x))
    features = create_model("sgformer_s", features_only=True, **options).eval()
    for ours, expected in zip(features(x), model.forward_maps(x)):
        torch.testing.assert_close(ours.movedim(1, -1), expected)
    wide = create_model("sgformer_s", num_classes=7, **(options | {"img_size": (64, 96)}))
    assert wide.pos_embed.shape == (1, 16, 24, 8)
    torch.testing.assert_close(wide.pos_embed.mean(), model.pos_embed.mean(), atol=0.02, rtol=0)


def test_positions_start_as_sines_that_depend_on_the_column_then_on_the_row() -> None:
    table = small(img_size=(32, 48)).pos_embed[0]
    assert table.shape == (8, 12, 8)
    assert torch.equal(table[0, 0], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    column, row = table[..., :4], table[..., 4:]
    assert torch.equal(column, column[:1].expand_as(column))
    assert torch.equal(row, row[:, :1].expand_as(row))
    torch.testing.assert_close(table[2, 3, [0, 1, 4]], torch.tensor([3.0, 0.03, 2.0]).sin())
    with pytest.raises(ValueError, match="dim=6 is not allowed"):
        grid_code((2, 2), 6)


def test_the_official_sizes_are_those_that_fill_windows_and_groups() -> None:
    def model(size: int) -> SGFormer:
        with torch.device("meta"):
            return small(img_size=size, sizes="official")

    for size in (112, 192, 256, 336):
        with pytest.raises(ValueError, match="do not fit sizes='official'"):
            model(size)(torch.empty(1, 3, size, size, device="meta"))
    with torch.no_grad():
        for size in (224, 448):
            assert model(size)(torch.empty(1, 3, size, size, device="meta")).shape == (1, 5)
        assert model(224)(torch.empty(1, 3, 448, 112, device="meta")).shape == (1, 5)
    with pytest.raises(ValueError, match=r"position embedding of \(56, 56\)"):
        model(224)(torch.empty(1, 3, 448, 448, device="meta"))


def test_at_an_official_size_both_treatments_of_borders_agree() -> None:
    options = {"depths": (2, 2, 2, 1), "img_size": 224}
    model, strict = randomised(small(**options)), small(sizes="official", **options)
    strict.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(model(x), strict(x))


def test_significance_comes_from_every_pair_and_is_positive() -> None:
    model = randomised(small()).train()
    maps = model.significance_maps(torch.randn(2, 3, 56, 112))
    assert [tuple(m.shape) for m in maps] == [(2, 14, 28), (2, 7, 14), (2, 4, 7), (2, 4, 7)]
    assert all((m > 0).all() for m in maps)
    assert all(module.training for module in model.modules())
    # 8 windows, and every one of the 2 x 4 coarse keys stands for the positions of its patch.
    local = maps[0].sum((1, 2)) - 8
    assert ((local > 0) & (local < 64)).all()


def test_settings_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(ValueError, match=r"depths=\(2, 3, 4, 1\) has 3 blocks where they form pairs"):
        small(depths=(2, 3, 4, 1))
    with pytest.raises(ValueError, match="sr_ratios entry=3 is not known"):
        small(sr_ratios=(3, 4, 2, 1))
    with pytest.raises(ValueError, match="num_heads has 3 entries but embed_dims has 4"):
        small(num_heads=(2, 2, 4))
    with pytest.raises(ValueError, match="sizes='all' is not known"):
        small(sizes="all")
    with pytest.raises(ValueError, match="drop_rate=1 is not allowed"):
        small(drop_rate=1)


def test_the_classifier_is_replaced_and_dropout_acts_in_training_only() -> None:
    model = small(drop_rate=0.5, in_chans=4)
    x = torch.randn(2, 4, 32, 40)
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model.train()(x), model(x))
    model.eval().reset_classifier(0)
    torch.testing.assert_close(model(x), model.forward_features(x).mean((1, 2)))
    model.reset_classifier(9)
    assert model(x).shape == (2, 9)
    assert model.no_weight_decay() == set()  # the published training decays the position embedding
    groups = model.group_matcher()
    patterns = [groups["stem"], *(pattern for pattern, _ in groups["blocks"])]
    left = {name for name, _ in model.named_parameters() if not any(re.match(p, name) for p in patterns)}
    assert {name.split(".")[0] for name in left} == {"head"}


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


def test_compiles_as_one_graph_and_runs_in_bfloat16() -> None:
    two = {key: value[-2:] if isinstance(value, tuple) else value for key, value in SMALL.items()}
    model = small(**(two | {"depths": (2, 1)}), sr_ratios=(4, 1))
    x = torch.randn(1, 3, 45, 70)
    with torch.no_grad():
        expected = model(x)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.1 * expected.abs().max()


def test_timm_builds_it_by_name() -> None:
    model = timm.create_model("gridattn_sgformer_s", **SMALL)
    assert model(torch.randn(1, 3, 40, 40)).shape == (1, 5)

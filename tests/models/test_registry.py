"""Facts of the register of models."""

import re
import subprocess
import sys

import pytest
import torch

from gridattn.layers import GlobalAttention
from gridattn.models import create_model, list_models

MICRO = {"img_size": 32, "num_classes": 3}


def test_names_match_shell_patterns() -> None:
    assert list_models("nat_*_small") == ["nat_isotropic_small"]
    assert list_models() == sorted(list_models())


def test_an_unknown_name_offers_close_ones() -> None:
    with pytest.raises(ValueError, match=r"model='nat_minni' is not known; close to it: .*nat_mini"):
        create_model("nat_minni")


def test_an_unknown_option_lists_those_of_the_family() -> None:
    with pytest.raises(ValueError, match=r"has no option 'kernel'; allowed: .*kernel_size"):
        create_model("nat_mini", kernel=3)
    with pytest.raises(ValueError, match="in_chans=0 is not allowed"):
        create_model("grid_vit_micro", in_chans=0)
    with pytest.raises(ValueError, match=r"out_indices=\(0,\) is not allowed without features_only"):
        create_model("grid_vit_micro", out_indices=(0,))


def test_classes_and_channels_are_those_asked_for() -> None:
    model = create_model("grid_vit_micro", in_chans=5, **MICRO)
    assert model(torch.randn(2, 5, 32, 32)).shape == (2, 3)
    assert model.default_cfg["input_size"] == (5, 32, 32)
    with pytest.raises(ValueError, match=r"images has shape \(2, 3, 32, 32\); GridViT takes \(batch, 5 channels"):
        model(torch.randn(2, 3, 32, 32))


def test_without_classes_a_model_gives_pooled_features() -> None:
    model = create_model("grid_vit_micro", **MICRO).eval()
    x = torch.randn(1, 3, 32, 32)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(7)
    assert model(x).shape == (1, 7)
    assert model.config["num_classes"] == 7


def test_recomputing_blocks_changes_no_gradient() -> None:
    model = create_model("grid_vit_micro", **MICRO).train()
    x = torch.randn(1, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(recompute)
        model(x).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


def test_groups_cover_every_parameter_of_the_body() -> None:
    model = create_model("grid_vit_4stage_micro", **MICRO)
    for coarse in (True, False):
        groups = model.group_matcher(coarse)
        blocks = groups["blocks"] if isinstance(groups["blocks"], str) else [p for p, _ in groups["blocks"]]
        patterns = [groups["stem"], *([blocks] if isinstance(blocks, str) else blocks)]
        left = [n for n, _ in model.named_parameters() if not any(re.match(p, n) for p in patterns)]
        assert {name.split(".")[0] for name in left} <= {"norm", "head"}


def test_attention_inputs_are_what_each_layer_is_given() -> None:
    model = create_model("grid_vit_4stage_micro", attention="window+global", **MICRO).train()
    found = model.attention_inputs(torch.randn(2, 3, 32, 32))
    assert [name for name, *_ in found] == [name for name, _ in model.attention_layers()]
    assert [tuple(x.shape[1:]) for *_, x in found] == [(16, 16, 16), (8, 8, 32), (4, 4, 48), (4, 4, 48), (2, 2, 64)]
    assert isinstance(found[3].layer, GlobalAttention)
    assert found[0].layer.attention_map(found[0].x, (3, 5)).shape == (2, 1, 16, 16)
    assert model.training
    assert not any(layer._forward_pre_hooks for _, layer in model.attention_layers())


def test_importing_the_package_imports_no_room_and_no_torch() -> None:
    code = "import sys, gridattn; assert 'torch' not in sys.modules; assert gridattn.__version__; dir(gridattn)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Facts of converting published checkpoints."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gridattn.models import CheckpointError, create_model, load_model, model_info
from gridattn.models.convert import convert, convert_checkpoint, summary
from tests.models import (
    test_attnet,
    test_nat,
    test_polarized,
    test_ppma,
    test_sg_former,
    test_ulsam_mobilenet,
    test_van,
)
from tests.models.families import SIZE, small_options, small_variants

VARIANTS = list(small_variants().items())


def randomise(model: nn.Module) -> nn.Module:
    """Values far from the initial ones, so that none can be lost unseen."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.2 + 0.05)
    return model.eval()


def convit(**options: Any) -> nn.Module:
    return timm.create_model("convit_tiny", img_size=SIZE, depth=3, local_up_to_layer=2, num_classes=5, **options)


def prefixed(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_every_family_comes_back_from_a_wrapped_file(family: str, name: str, tmp_path: Path) -> None:
    options = small_options(name) | {"num_classes": 5}
    model = randomise(create_model(name, **options))
    torch.save(prefixed(model.state_dict()), tmp_path / "w.pth")
    done = convert_checkpoint(tmp_path / "w.pth", name, **options)
    assert done.used == {key: [key] for key in model.state_dict()}
    assert (done.resized, done.ignored, done.kept) == ({}, {}, [])
    assert all(torch.equal(t, done.model.state_dict()[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_a_tensor_that_is_missing_or_unknown_is_an_error(family: str, name: str, tmp_path: Path) -> None:
    options = small_options(name) | {"num_classes": 5}
    state = create_model(name, **options).state_dict()
    torch.save(state | {"wings.weight": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"wings\.weight"):
        convert_checkpoint(tmp_path / "w.pth", name, **options)
    lost = next(key for key in state if key.endswith(".weight"))
    torch.save({key: tensor for key, tensor in state.items() if key != lost}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="missing"):
        convert_checkpoint(tmp_path / "w.pth", name, **options)


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_a_head_for_other_classes_is_left_out_where_classes_are_asked_for(
    family: str, name: str, tmp_path: Path
) -> None:
    options = small_options(name)
    torch.save(create_model(name, num_classes=5, **options).state_dict(), tmp_path / "w.pth")
    own = model_info(name).config.get("num_classes", 1000)
    with pytest.raises(CheckpointError, match="give num_classes where only the head differs"):
        convert_checkpoint(tmp_path / "w.pth", name, **options)
    for classes in (0, own + 2):
        done = convert_checkpoint(tmp_path / "w.pth", name, num_classes=classes, **options)
        assert done.ignored
        assert all(key.startswith("head.") for key in done.ignored)
        assert (classes == 0) == (done.kept == [])


PUBLISHED: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "convit_tiny": lambda: (convit(), {"img_size": SIZE, "depth": 3, "local_up_to_layer": 2}),
    "davit_tiny": lambda: (
        timm.create_model("davit_tiny", depths=(1, 1, 1, 1), num_classes=5),
        {"depths": (1, 1, 1, 1)},
    ),
    "maxvit_pico_rw_256": lambda: (
        timm.create_model("maxvit_pico_rw_256", img_size=SIZE, num_classes=5),
        {"img_size": SIZE},
    ),
    "timm_halonet26t": lambda: (timm.create_model("halonet26t", num_classes=5), {}),
}
"""Networks of another library in the published layout, and our keywords for the same."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_gives_the_published_outputs(name: str, tmp_path: Path) -> None:
    other, options = PUBLISHED[name]()
    torch.save(other.eval().state_dict(), tmp_path / "w.pth")
    done = convert_checkpoint(tmp_path / "w.pth", name, num_classes=5, **options)
    assert set(done.used) == set(other.state_dict())
    assert (done.resized, done.ignored, done.kept) == ({}, {}, [])
    x = torch.randn(1, 3, *[256 if "halo" in name else SIZE] * 2)  # the other halo layer takes whole blocks alone
    with torch.no_grad():
        torch.testing.assert_close(done.model(x), other(x), rtol=1e-4, atol=1e-5)


LAYOUTS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "AttNet": test_attnet.official,
    "NAT": test_nat.official,
    "PPMA": lambda model: test_ppma.official(model.state_dict()),
    "PolarizedHRNet": test_polarized.official,
    "PolarizedResNet": test_polarized.official,
    "PoseHRNet": test_polarized.official,
    "PoseResNet": test_polarized.official,
    "SGFormer": test_sg_former.official,
    "SubspaceMobileNetV1": lambda model: test_ulsam_mobilenet.usual_layout(model, "model", "fc"),
    "SubspaceMobileNetV2": lambda model: test_ulsam_mobilenet.usual_layout(model, "features", "classifier.1"),
    "VAN": test_van.official,
}
"""Our state dict under the published names, for families that no installed library has."""


@pytest.mark.parametrize("family", LAYOUTS)
def test_published_names_come_back_as_our_weights(family: str, tmp_path: Path) -> None:
    name = small_variants()[family]
    options = small_options(name) | {"num_classes": 5}
    model = randomise(create_model(name, **options))
    state = LAYOUTS[family](model)
    torch.save(prefixed(state), tmp_path / "w.pth")
    done = convert_checkpoint(tmp_path / "w.pth", name, **options)
    assert set(done.used) | set(done.ignored) == set(state)
    assert all(key.endswith("num_batches_tracked") for key in done.kept)
    for key, tensor in model.state_dict().items():
        assert key in done.kept or torch.equal(done.model.state_dict()[key], tensor), key


def test_tables_of_positions_are_resized_and_named(tmp_path: Path) -> None:
    torch.save(convit().state_dict(), tmp_path / "w.pth")
    options = {"depth": 3, "local_up_to_layer": 2, "num_classes": 5}
    done = convert_checkpoint(tmp_path / "w.pth", "convit_tiny", img_size=(SIZE, 96), **options)
    assert done.resized == {"pos_embed": ([(1, 16, 192)], (1, 4, 6, 192))}
    assert "resized: pos_embed (1, 16, 192) -> (1, 4, 6, 192)" in summary(done)

    maxvit = timm.create_model("maxvit_pico_rw_256", img_size=64, num_classes=5)
    torch.save(maxvit.state_dict(), tmp_path / "w.pth")
    done = convert_checkpoint(tmp_path / "w.pth", "maxvit_pico_rw_256", img_size=96, num_classes=5)
    assert len(done.resized) == sum(key.endswith("relative_position_bias_table") for key in maxvit.state_dict())
    assert {new for _, new in done.resized.values()} == {(heads, 5, 5) for heads in (1, 2, 4, 8)}


def test_constants_of_published_files_are_ignored_for_a_stated_reason(tmp_path: Path) -> None:
    state = convit().state_dict() | {"blocks.0.attn.rel_indices": torch.zeros(1, 16, 16, 3)}
    torch.save(state, tmp_path / "w.pth")
    options = {"img_size": SIZE, "depth": 3, "local_up_to_layer": 2, "num_classes": 5}
    done = convert_checkpoint(tmp_path / "w.pth", "convit_tiny", **options)
    assert list(done.ignored) == ["blocks.0.attn.rel_indices"]
    assert "computed for every grid" in done.ignored["blocks.0.attn.rel_indices"]


def test_a_tensor_that_a_key_map_drops_in_silence_is_an_error(tmp_path: Path, monkeypatch) -> None:
    model = create_model("grid_vit_micro", num_classes=5)
    cls = type(model)
    monkeypatch.setattr(cls, "from_official", lambda self, state: {k: t for k, t in state.items() if k != "extra"})
    torch.save(model.state_dict() | {"extra": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"GridViT neither uses nor ignores 1 \(extra\) for a reason"):
        convert_checkpoint(tmp_path / "w.pth", "grid_vit_micro", num_classes=5)


def test_what_is_written_loads_again_and_a_mistake_writes_nothing(tmp_path: Path) -> None:
    model = randomise(create_model("grid_vit_micro", num_classes=5))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    convert(tmp_path / "w.pth", "grid_vit_micro", tmp_path / "out" / "ours.safetensors", num_classes=5)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load_model(tmp_path / "out" / "ours.safetensors")(x), model(x))
    assert sorted(os.listdir(tmp_path / "out")) == ["ours.json", "ours.safetensors"]
    before = load_file(tmp_path / "out" / "ours.safetensors")

    with pytest.raises(ValueError, match=r"a file \*\.safetensors is"):
        convert(tmp_path / "w.pth", "grid_vit_micro", tmp_path / "bad.pt", num_classes=5)
    ours = tmp_path / "out" / "ours.safetensors"
    with pytest.raises(ValueError, match="is the checkpoint that is read"):
        convert(ours, "grid_vit_micro", ours, num_classes=5)
    with pytest.raises(CheckpointError, match="does not fit"):
        convert(tmp_path / "w.pth", "tic_mini", tmp_path / "bad.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["out", "w.pth"]
    assert load_file(tmp_path / "out" / "ours.safetensors").keys() == before.keys()


@pytest.mark.parametrize("name", ["resnet50_psa_s", "timm_halonet26t", "maxvit_pico_rw_256"])
def test_a_file_that_a_key_map_cannot_handle_is_named(name: str, tmp_path: Path) -> None:
    torch.save(
        {"layer1.0.deattn.wings.weight": torch.ones(2, 2), "stages.0.0.self_attn.q.wings": torch.ones(2)},
        tmp_path / "w.pth",
    )
    with pytest.raises(CheckpointError, match=r"w\.pth.*state dict"):
        convert_checkpoint(tmp_path / "w.pth", name)

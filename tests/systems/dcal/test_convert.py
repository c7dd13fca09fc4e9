"""Pre-trained weights under timm's and Google's names."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from gridattn.models.state import CheckpointError, load_strict
from gridattn.systems.dcal import DCAL, build_dcal
from gridattn.systems.dcal.backbone import ResNetStem
from gridattn.systems.dcal.convert import backbone_state, google_state, start_from
from gridattn.systems.trained import Trained, save_trained

SIZES: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
NETWORK: dict[str, Any] = {"model": "micro", "num_classes": 4, "img_size": [32, 32], **SIZES, "mlp_ratio": 4.0}


def theirs() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, num_classes=7, **SIZES).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def ours(size: tuple[int, int] = (32, 32)) -> DCAL:
    return DCAL(4, size, **SIZES).eval()


def test_a_timm_checkpoint_gives_the_same_features_and_starts_the_local_branch(tmp_path: Path) -> None:
    model, other = ours(), theirs()
    torch.save({"model": other.state_dict()}, tmp_path / "vit.pth")
    start_from(model, tmp_path / "vit.pth")
    images = torch.randn(2, 3, 32, 32)
    features = model(images).features
    torch.testing.assert_close(features["sa"], other.forward_features(images)[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(features["glca"], features["sa"], atol=1e-5, rtol=1e-4)


def test_positions_are_interpolated_to_a_grid_that_is_not_square_and_the_class_token_keeps_its_own() -> None:
    state = theirs().state_dict()
    table = backbone_state(state, ours((16, 56)).backbone)["pos_embed"]
    assert torch.equal(table[:, 0], state["pos_embed"][:, 0])
    square = state["pos_embed"][0, 1:].view(4, 4, 24).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(square, size=(2, 7), mode="bicubic", align_corners=False)
    torch.testing.assert_close(table[0, 1:], expected[0].flatten(1).T)


def test_the_distillation_token_of_deit_goes_with_its_position() -> None:
    state = theirs().state_dict()
    table = state["pos_embed"]
    distilled = {**state, "dist_token": torch.ones(1, 1, 24), "head_dist.weight": torch.ones(7, 24)}
    distilled["pos_embed"] = torch.cat([table[:, :1], torch.full((1, 1, 24), 9.0), table[:, 1:]], dim=1)
    found = backbone_state(distilled, ours().backbone)
    assert torch.equal(found["pos_embed"], table)
    load_strict(ours().backbone, found)


def google_arrays(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """A state of timm's plain vision transformer in Google's layout, three heads."""
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for i in range(3):
        block, prefix = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        for part, weight, bias in zip(
            ("query", "key", "value"),
            state[f"{block}attn.qkv.weight"].chunk(3),
            state[f"{block}attn.qkv.bias"].chunk(3),
        ):
            arrays[f"{prefix}MultiHeadDotProductAttention_1/{part}/kernel"] = weight.T.reshape(24, 3, 8)
            arrays[f"{prefix}MultiHeadDotProductAttention_1/{part}/bias"] = bias.reshape(3, 8)
        arrays[f"{prefix}MultiHeadDotProductAttention_1/out/kernel"] = state[f"{block}attn.proj.weight"].T.reshape(
            3, 8, 24
        )
        arrays[f"{prefix}MultiHeadDotProductAttention_1/out/bias"] = state[f"{block}attn.proj.bias"]
        for number, norm in (("0", "norm1"), ("2", "norm2")):
            arrays[f"{prefix}LayerNorm_{number}/scale"] = state[f"{block}{norm}.weight"]
            arrays[f"{prefix}LayerNorm_{number}/bias"] = state[f"{block}{norm}.bias"]
        for number, layer in (("0", "fc1"), ("1", "fc2")):
            arrays[f"{prefix}MlpBlock_3/Dense_{number}/kernel"] = state[f"{block}mlp.{layer}.weight"].T
            arrays[f"{prefix}MlpBlock_3/Dense_{number}/bias"] = state[f"{block}mlp.{layer}.bias"]
    return {name: tensor.contiguous().numpy() for name, tensor in arrays.items()}


def test_a_google_file_is_the_timm_state_in_another_layout(tmp_path: Path) -> None:
    other = theirs()
    state = other.state_dict()
    np.savez(tmp_path / "vit.npz", **google_arrays(state))  # pyright: ignore[reportArgumentType]
    model = ours()
    start_from(model, tmp_path / "vit.npz")
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_the_arrays_of_a_google_hybrid_fill_the_stem() -> None:
    wanted = ResNetStem(24).state_dict()
    arrays = {"embedding/kernel": wanted["proj.weight"].permute(2, 3, 1, 0), "embedding/bias": wanted["proj.bias"]}
    for name, tensor in wanted.items():
        if name.startswith("proj."):
            continue
        *path, layer, entry = name.split(".")
        prefix = ""
        if path[1] == "stages":
            prefix = f"block{int(path[2]) + 1}/unit{int(path[4]) + 1}/"
        number = "_root" if path[1] == "stem" else "_proj" if path[-1] == "downsample" else layer[-1]
        kind = "conv" if layer.startswith("conv") else "gn"
        leaf = "kernel" if kind == "conv" else {"weight": "scale", "bias": "bias"}[entry]
        arrays[f"{prefix}{kind}{number}/{leaf}"] = tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor
    found = google_state({name: tensor.numpy() for name, tensor in arrays.items()})
    found = {name.removeprefix("patch_embed."): tensor for name, tensor in found.items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_trained_network_starts_another_with_its_heads_where_the_classes_are_as_many(tmp_path: Path) -> None:
    first = build_dcal(**NETWORK)
    save_trained(Trained("dcal", first, NETWORK), tmp_path / "run")
    same, other = build_dcal(**NETWORK), build_dcal(**NETWORK | {"num_classes": 6, "img_size": [16, 40]})
    plain = build_dcal(**NETWORK | {"glca_depth": 0, "neck": True})
    for model in (same, other, plain):
        start_from(model, tmp_path / "run")
    state = first.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in same.state_dict().items())
    assert torch.equal(other.glca[0].attn.qkv.weight, first.glca[0].attn.qkv.weight)  # pyright: ignore
    assert other.head.weight.shape[0] == 6
    assert torch.equal(plain.backbone.cls_token, first.backbone.cls_token)


def test_what_cannot_be_taken_over_is_named(tmp_path: Path) -> None:
    state = theirs().state_dict()
    cases = {
        "odd": {**state, "pos_embed": torch.zeros(1, 12, 24)},
        "short": {name: tensor for name, tensor in state.items() if name != "norm.weight"},
    }
    for name, content in cases.items():
        save_file(content, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"odd.*pos_embed of length 12"):
        start_from(ours(), tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"short.*norm\.weight"):
        start_from(ours(), tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match=r"nowhere\.npz' is missing"):
        start_from(ours(), tmp_path / "nowhere.npz")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(CheckpointError, match=r"cut\.npz' cannot be read"):
        start_from(ours(), tmp_path / "cut.npz")
    np.savez(tmp_path / "other.npz", mystery=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"other\.npz.*'mystery' has no counterpart"):
        start_from(ours(), tmp_path / "other.npz")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"x": Path("y")}))
    with pytest.raises(CheckpointError, match=r"code\.pth"):
        start_from(ours(), tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="lacks one of"):
        google_state({"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/bias": np.zeros((3, 8))})

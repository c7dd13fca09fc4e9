"""Facts of saving and loading."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gridattn.models import CheckpointError, create_model, load_checkpoint, load_model, save_model
from gridattn.models import checkpoint as checkpoint_module

OPTIONS = {"img_size": 32, "num_classes": 3, "depths": 1}


def micro(**options):
    return create_model("grid_vit_micro", **{"attention": "window", **OPTIONS, **options}).eval()


@pytest.mark.parametrize("name", ["run", "weights.safetensors"])
def test_a_saved_model_comes_back_with_its_options_and_weights(tmp_path: Path, name: str) -> None:
    model = micro(attention_options={"window_size": 3})
    save_model(model, tmp_path / name)
    loaded = load_model(tmp_path / name)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    assert loaded.attention_layers()[0][1].window_size == (3, 3)
    assert not loaded.training


def test_a_feature_extractor_comes_back(tmp_path: Path) -> None:
    maps = create_model("grid_vit_4stage_micro", features_only=True, out_indices=(1, 3), img_size=32).eval()
    save_model(maps, tmp_path)
    x = torch.randn(1, 3, 32, 32)
    for ours, theirs in zip(load_model(tmp_path)(x), maps(x), strict=True):
        assert torch.equal(ours, theirs)


def test_an_interrupted_save_leaves_the_old_files(tmp_path: Path, monkeypatch) -> None:
    model = micro()
    save_model(model, tmp_path)

    def broken(state, path, metadata) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        save_model(micro(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert torch.equal(load_model(tmp_path).head.weight, model.head.weight)


def test_only_models_with_a_recorded_call_are_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model of class Linear has no config"):
        save_model(torch.nn.Linear(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_pickled_weights_are_unwrapped(tmp_path: Path, wrap, prefix) -> None:
    state = {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(2)}
    torch.save(wrap({prefix + name: tensor for name, tensor in state.items()}), tmp_path / "w.pt")
    loaded = load_checkpoint(tmp_path / "w.pt")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(2), "bomb": Bomb()}, "bomb.pt")
    assert "mkdir, which could run code" in refused(Path("bomb.pt"))
    assert not Path("exploded").exists()


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    save_file({"w": torch.randn(100)}, tmp_path / "w.safetensors")
    torch.save({"w": torch.randn(100)}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        whole = (tmp_path / name).read_bytes()
        for length in (0, 5, len(whole) // 2, len(whole) - 20):
            (tmp_path / name).write_bytes(whole[:length])
            assert "is damaged or no" in refused(tmp_path / name)
    assert "is missing" in refused(tmp_path / "none.pt")
    assert "is a folder" in refused(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds no state dict" in refused(tmp_path / "list.pt")


def test_weights_of_another_model_are_summarised_in_one_line(tmp_path: Path) -> None:
    path = save_model(micro(), tmp_path)
    with pytest.raises(CheckpointError, match=r"state dict does not fit NAT: \d+ missing .*; \d+ unexpected") as error:
        create_model("nat_mini", depths=(1, 1, 1, 1), checkpoint=path)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"of another shape \(patch_embed.proj.weight \(48, 3, 4, 4\) instead"):
        micro(in_chans=1, checkpoint=path)
    with pytest.raises(CheckpointError, match="is missing; a file is needed"):
        micro(checkpoint=tmp_path / "none.safetensors")


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    save_model(micro(), tmp_path)
    config = tmp_path / "config.json"
    good = json.loads(config.read_text())
    for text, message in (
        ("{", "builds no model"),
        ("[1]", "an object with the model's name is needed"),
        (json.dumps(good | {"name": "grid_vit_mikro"}), "close to it: grid_vit_micro"),
        (json.dumps(good | {"wings": 2}), "has no option 'wings'"),
        (json.dumps(good | {"depths": 2}), r"missing .*weights"),
    ):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"config .* is missing"):
        load_model(tmp_path)


def test_a_head_for_other_classes_is_left_out_only_where_classes_are_asked_for(tmp_path: Path) -> None:
    trained = micro()
    path = save_model(trained, tmp_path)
    tuned = micro(num_classes=7, checkpoint=path)
    assert torch.equal(tuned.levels[0].blocks[0].attn.qkv.weight, trained.levels[0].blocks[0].attn.qkv.weight)
    assert tuned.head.weight.shape == (7, 48)
    same = micro(checkpoint=path)
    assert torch.equal(same.head.weight, trained.head.weight)
    with pytest.raises(CheckpointError, match="of another shape"):
        create_model("grid_vit_micro", img_size=32, depths=1, attention="window", checkpoint=path)

"""Procedural light fields have the disparities they claim; files are read in every layout they come in."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from gridattn.systems.epit import load_light_fields, read_light_field
from gridattn.systems.epit.data import Degradation, Patches, WholeScenes, augment
from gridattn.systems.epit.fields import bicubic_down, rgb_to_ycbcr
from gridattn.systems.epit.files import read_patch, read_shape
from gridattn.systems.epit.scenes import draw_scene, stereo_pair

Array = NDArray[Any]


def _light_field(views: int = 3, height: int = 20, width: int = 24, seed: int = 0) -> Array:
    """(3, U, V, H, W)."""
    return np.random.default_rng(seed).random((3, views, views, height, width))


def _write_v73(path: Path, field: Array) -> None:
    """As MATLAB does: HDF5 after a block of 512 bytes, axes reversed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=512) as file:
        file["LF"] = np.moveaxis(field, 0, -1).transpose()
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512))


def _write_mat(path: Path, field: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = np.ones((1, *field.shape[1:]))  # a fourth channel, as Lytro files have
    savemat(path, {"LF": np.moveaxis(np.concatenate([field, weights]), 0, -1)})


def _write_prepared(path: Path, field: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["LF"] = field.astype(np.float32)


def _write_toolbox(path: Path, field: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    luma = rgb_to_ycbcr(torch.from_numpy(field))
    low = bicubic_down(luma, 2)
    with h5py.File(path, "w") as file:
        for name, y in (("Hr_SAI_y", luma[0]), ("Lr_SAI_y", low[0])):
            u, v, h, w = y.shape
            file[name] = y.permute(1, 3, 0, 2).reshape(v * w, u * h).float().numpy()


@pytest.mark.parametrize("texture", ["photographs", "sinusoids"])
def test_a_layer_moves_by_its_disparity_from_view_to_view(texture: str) -> None:
    scene = draw_scene(np.random.default_rng(3), texture, held_out=True)
    scene = type(scene)(scene.textures, (2.0, -1.0), (0.0, 0.0), 8.0)
    field, disparity = scene.render(3, 32), scene.disparity(3, 32)
    assert disparity.shape == (3, 3, 32, 32)
    assert sorted(np.unique(disparity)) == [-1, 2]
    # Background (the upper rows): a step of the view is a step of two pixels.
    assert np.allclose(field[:, 1, 2, :4, :-2], field[:, 1, 1, :4, 2:], atol=2e-3)
    assert np.allclose(field[:, 2, 1, :2, :4], field[:, 1, 1, 2:4, :4], atol=2e-3)
    # Foreground (the middle): one pixel the other way.
    assert np.allclose(field[:, 1, 2, 16, 14:18], field[:, 1, 1, 16, 13:17], atol=2e-3)


def test_a_sheared_scene_is_the_scene_with_every_disparity_larger() -> None:
    scene = draw_scene(np.random.default_rng(0), "sinusoids")
    assert scene.sheared(2).disparities == pytest.approx([d + 2 for d in scene.disparities])
    middle = scene.render(3, 32)[:, 1, 1]
    assert np.array_equal(scene.sheared(2).render(3, 32)[:, 1, 1], middle)
    assert not np.allclose(scene.sheared(2).render(3, 32)[:, 1, 2], scene.render(3, 32)[:, 1, 2], atol=1e-2)


def test_training_and_validation_see_different_parts_of_the_photographs() -> None:
    data = load_light_fields("photographs", ang_res=3)
    assert torch.equal(data.scene(3, 0.0), data.scene(3, 0.0))
    assert not torch.equal(data.scene(3, 0.0), data.scene(4, 0.0))
    torch.manual_seed(0)
    first = data.patch(0, 32)
    assert not torch.equal(data.patch(0, 32), first)
    torch.manual_seed(0)
    assert torch.equal(data.patch(0, 32), first)


def test_augmentation_keeps_disparities() -> None:
    # Disparity 2 along both axes: view (u, v) shows the texture at (y + 2u, x + 2v).
    texture = np.random.default_rng(0).random((40, 40))
    views = [[texture[2 * u : 2 * u + 30, 2 * v : 2 * v + 30] for v in range(3)] for u in range(3)]
    field = torch.tensor(np.array(views))[None]
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        turned = augment(field)
        seen.add(float(turned[0, 0, 0, 0, 0]) * 1000 + float(turned[0, 0, 0, 0, 1]))
        assert torch.equal(turned[0, :, :-1, :, 2:], turned[0, :, 1:, :, :-2])
        assert torch.equal(turned[0, :-1, :, 2:], turned[0, 1:, :, :-2])
    assert len(seen) == 8


def test_every_view_flickers_by_itself_and_the_target_does_not() -> None:
    data = load_light_fields("sinusoids", ang_res=3)
    low, high, group = WholeScenes(data, Degradation(2, (0.8, 1.2)))[1]
    assert group == 0
    gains = (low / bicubic_down(high, 2)).mean((0, 3, 4))
    assert gains.min() >= 0.8
    assert gains.max() <= 1.2
    assert len(gains.unique()) == 9
    again = WholeScenes(data, Degradation(2, (0.8, 1.2)))[1]
    assert torch.equal(low, again[0])
    noisy, _, _ = WholeScenes(data, Degradation(2, None, 20.0))[1]
    assert 0 < (noisy - bicubic_down(high, 2)).std() < 20 / 255


def test_patches_are_pairs_by_draw_number() -> None:
    samples = Patches(load_light_fields("photographs", ang_res=2), Degradation(4), 6, True, seed=1)
    low, high = samples[125]
    assert (low.shape, high.shape) == ((3, 2, 2, 6, 6), (3, 2, 2, 24, 24))
    assert torch.equal(samples[125][1], high)
    assert torch.allclose(low, bicubic_down(high, 4))


def test_the_stereo_pair_is_a_light_field_of_two_views() -> None:
    pair = stereo_pair()
    assert pair.shape == (3, 1, 2, 120, 180)
    assert 0 <= pair.min() < pair.max() <= 1
    data = load_light_fields("motorcycle")
    assert data.scene(0, 0).shape == (3, 1, 2, 120, 180)
    assert data.scene(0, 2).shape == (3, 1, 2, 120, 178)


@pytest.mark.parametrize("write", [_write_v73, _write_mat])
def test_source_files_of_both_matlab_formats_are_read(write: Any, tmp_path: Path) -> None:
    field = _light_field()
    write(tmp_path / "scene.mat", field)
    found = read_light_field(tmp_path / "scene.mat")
    assert found.dtype == np.float32
    assert np.allclose(found, field, atol=1e-6)
    assert read_shape(tmp_path / "scene.mat") == (3, 3, 20, 24)
    assert np.array_equal(read_patch(tmp_path / "scene.mat", 2, 5, 8), found[..., 2:10, 5:13])


def test_whole_numbers_are_scaled(tmp_path: Path) -> None:
    savemat(tmp_path / "a.mat", {"LF": np.full((1, 1, 4, 4, 3), 51, np.uint8)})
    assert np.allclose(read_light_field(tmp_path / "a.mat"), 0.2)


def test_prepared_files_and_mosaics_are_read(tmp_path: Path) -> None:
    field = _light_field()
    _write_prepared(tmp_path / "a.h5", field)
    assert np.allclose(read_light_field(tmp_path / "a.h5"), field, atol=1e-6)
    mosaic = tmp_path / "SR_3x3_2x" / "EPFL" / "000001.h5"
    _write_toolbox(mosaic, field)
    assert read_shape(mosaic) == (3, 3, 20, 24)
    found = torch.from_numpy(read_light_field(mosaic))
    expected = rgb_to_ycbcr(torch.from_numpy(field))[0].float()
    assert torch.allclose(rgb_to_ycbcr(found)[0], expected, atol=1e-5)
    assert torch.allclose(rgb_to_ycbcr(found)[1:], torch.tensor(128 / 255), atol=1e-5)


def test_folders_of_views_are_ordered_by_their_numbers(tmp_path: Path) -> None:
    field = (_light_field(height=6, width=7) * 255).round().astype(np.uint8)
    for u in range(3):
        for v in range(3):
            view = field[:, u, v].transpose(1, 2, 0)
            for folder, name in (("pairs", f"view_{u}_{v + 9}.png"), ("plain", f"{3 * u + v:03d}.png")):
                (tmp_path / folder).mkdir(exist_ok=True)
                Image.fromarray(view).save(tmp_path / folder / name)
    for folder in ("pairs", "plain"):
        assert np.allclose(read_light_field(tmp_path / folder), field / 255, atol=1e-6)
    (tmp_path / "plain" / "008.png").unlink()
    with pytest.raises(ValueError, match="8 views"):
        read_light_field(tmp_path / "plain")
    Image.new("RGB", (7, 5)).save(tmp_path / "plain" / "008.png")
    with pytest.raises(ValueError, match=r"008\.png' has 5 x 7 pixels"):
        read_light_field(tmp_path / "plain")


def test_the_five_datasets_as_they_come_and_as_prepared(tmp_path: Path) -> None:
    source, prepared = tmp_path / "source", tmp_path / "prepared"
    for i, name in enumerate(("EPFL", "HCI_new", "HCI_old", "INRIA_Lytro", "Stanford_Gantry")):
        for part in ("training", "test"):
            write = _write_v73 if i % 2 else _write_mat
            write(source / name / part / "scene.mat", _light_field(5, 22, 25, i))
            base = prepared / f"data_for_{part}"
            _write_prepared(base / "SSR_9x9" / name / "scene.h5", _light_field(5, 22, 25, i))
    _write_toolbox(prepared / "data_for_training" / "SR_3x3_4x" / "EPFL" / "000001.h5", _light_field())
    for root in (source, prepared):
        data = load_light_fields(f"folder:{root}", ang_res=3, scale=2, side=8)
        assert data.groups == ("EPFL", "HCI_new", "HCI_old", "INRIA_Lytro", "Stanford_Gantry")
        assert data.patches == 5
        assert data.members == (0, 1, 2, 3, 4)
        whole = torch.from_numpy(_light_field(5, 22, 25, 2)).float()
        assert torch.allclose(data.scene(2, 0), whole[:, 1:4, 1:4], atol=1e-6)
        low, high = Patches(data, Degradation(2), 8, True, seed=0)[7]
        assert (low.shape, high.shape) == ((3, 3, 3, 8, 8), (3, 3, 3, 16, 16))
        low, high, group = WholeScenes(data, Degradation(2))[4]
        assert (low.shape[-2:], high.shape[-2:], group) == ((11, 12), (22, 24), 4)
        assert WholeScenes(data, Degradation(2), 1)[0][1].shape == (3, 3, 3, 20, 22)


def test_large_training_scenes_are_cut_into_overlapping_patches(tmp_path: Path) -> None:
    for part in ("training", "test"):
        _write_prepared(tmp_path / f"data_for_{part}" / "SSR_9x9" / "EPFL" / "a.h5", _light_field(1, 210, 150))
    assert load_light_fields(f"folder:{tmp_path}", ang_res=1, side=32).patches == 2


def test_what_is_no_dataset_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data='lytro' is not known"):
        load_light_fields("lytro")
    with pytest.raises(ValueError, match="does not exist"):
        load_light_fields(f"folder:{tmp_path}/none")
    with pytest.raises(ValueError, match="no training light fields"):
        load_light_fields(f"folder:{tmp_path}")
    _write_mat(tmp_path / "EPFL" / "training" / "a.mat", _light_field(2))
    _write_mat(tmp_path / "EPFL" / "test" / "a.mat", _light_field(2))
    with pytest.raises(ValueError, match="has 2 x 2 views of 20 x 24 pixels; at least 3 x 3 of 16 x 16"):
        load_light_fields(f"folder:{tmp_path}", ang_res=3, side=8)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    _write_v73(tmp_path / "v73.mat", _light_field())
    _write_mat(tmp_path / "old.mat", _light_field())
    _write_prepared(tmp_path / "a.h5", _light_field())
    for name in ("v73.mat", "old.mat", "a.h5"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=rf"{name}' is damaged"):
            read_light_field(tmp_path / name)
    (tmp_path / "empty.h5").write_bytes(b"")
    (tmp_path / "empty.mat").write_bytes(b"")
    for name in ("empty.h5", "empty.mat"):
        with pytest.raises(ValueError, match=f"{name}' is damaged or no"):
            read_light_field(tmp_path / name)
    savemat(tmp_path / "other.mat", {"depth": np.ones(3)})
    savemat(tmp_path / "flat.mat", {"LF": np.ones((3, 3, 8))})
    savemat(tmp_path / "nan.mat", {"LF": np.full((1, 1, 4, 4, 3), np.nan)})
    for name, message in (("other", "no variable 'LF'"), ("flat", r"shape \(3, 3, 8\)"), ("nan", "not finite")):
        with pytest.raises(ValueError, match=message):
            read_light_field(tmp_path / f"{name}.mat")
    _write_toolbox(tmp_path / "mosaic.h5", _light_field())
    with pytest.raises(ValueError, match="SR_5x5_2x"):
        read_light_field(tmp_path / "mosaic.h5")
    with pytest.raises(ValueError, match="does not exist"):
        read_light_field(tmp_path / "none.mat")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="not a folder of views"):
        read_light_field(tmp_path / "a.txt")

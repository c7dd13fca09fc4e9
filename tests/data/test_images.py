"""Image files of every kind become 8-bit RGB, and damaged ones are told by name."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gridattn.data import find_images, read_image, usable_images


def _pixel(image: Image.Image, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    pixel = image.getpixel(at)
    assert isinstance(pixel, tuple)
    return pixel


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (Image.new("L", (4, 3), 90), ".png", (90, 90, 90)),
        (Image.new("1", (4, 3), 1), ".png", (255, 255, 255)),
        (Image.new("RGBA", (4, 3), (10, 20, 30, 255)), ".png", (10, 20, 30)),
        (Image.new("RGBA", (4, 3), (10, 20, 30, 0)), ".png", (255, 255, 255)),
        (Image.new("LA", (4, 3), (50, 0)), ".png", (255, 255, 255)),
        (Image.new("CMYK", (4, 3), (0, 255, 255, 0)), ".tif", (255, 0, 0)),
        (Image.new("RGB", (4, 3), (1, 2, 3)).quantize(4), ".gif", (1, 2, 3)),
        (Image.fromarray(np.full((3, 4), 40000, np.uint16)), ".png", (155, 155, 155)),
        (Image.fromarray(np.full((3, 4), 40000, np.uint16)), ".tif", (155, 155, 155)),
    ],
    ids=["grey", "binary", "opaque", "transparent", "grey-alpha", "cmyk", "palette", "16-bit-png", "16-bit-tiff"],
)
def test_every_mode_becomes_rgb(tmp_path: Path, image: Image.Image, suffix: str, expected: tuple[int, ...]) -> None:
    path = tmp_path / f"x{suffix}"
    image.save(path)
    read = read_image(path)
    assert read.mode == "RGB"
    assert read.size == (4, 3)
    assert _pixel(read) == expected


def test_floating_point_values_are_stretched_to_the_whole_range(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    Image.fromarray(np.array([[-2.0, 0.0, 2.0]], np.float32)).save(path)
    assert [_pixel(read_image(path), (x, 0))[0] for x in range(3)] == [0, 127, 255]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (8, 4)).save(path, exif=exif)
    assert read_image(path).size == (4, 8)


def test_damaged_files_are_named_counted_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = tmp_path / "good.jpg"
    Image.effect_noise((64, 64), 50).save(good)
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[:-400])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    with caplog.at_level(logging.WARNING, "gridattn"):
        usable = usable_images(find_images(tmp_path))
    assert usable == [good]
    assert "3 of 4 images are skipped" in caplog.text
    assert all(name in caplog.text for name in ("cut.jpg", "text.png", "empty.png"))


def test_images_are_found_in_nested_folders_and_hidden_ones_are_not(tmp_path: Path) -> None:
    for name in ("b.png", "a/deep/er.JPG", ".hidden/c.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [path.name for path in find_images(tmp_path)] == ["er.JPG", "b.png"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.png' does not exist"):
        read_image(tmp_path / "nowhere.png")

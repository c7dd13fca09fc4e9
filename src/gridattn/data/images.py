"""Image files: finding them, reading any of them as 8-bit RGB, and sorting out the damaged ones before work starts."""

import logging
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

log = logging.getLogger("gridattn")


def read_image(path: str | Path) -> Image.Image:
    """Reads an image file as 8-bit RGB.

    Any format and mode that Pillow opens: grey, palette and CMYK are converted, transparency is laid over white, 16-bit
    values are divided by 257, floating-point values are stretched from their own range to 0..255, the EXIF orientation
    is applied, and of several frames the first is taken.

    Raises:
        ValueError: a file that is missing, or cannot be decoded whole.

    Example:
        >>> import skimage, os
        >>> read_image(os.path.join(skimage.data_dir, "brick.png")).size
        (512, 512)
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"image {str(path)!r} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    # Pillow's plugins raise many kinds of errors on damaged files (SyntaxError, struct.error, EOFError ... among them).
    except Exception as error:
        raise ValueError(f"image {str(path)!r} cannot be read: {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        span = max(float(values.max() - values.min()), np.finfo(np.float64).tiny)
        return Image.fromarray(((values - values.min()) / span * 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def find_images(folder: str | Path) -> list[Path]:
    """Image files below `folder`, nested ones included, in alphabetical order.

    A file counts as an image by its suffix, one of those that Pillow opens; hidden files and folders are passed over.
    """
    folder = Path(folder)
    Image.init()
    readable = {suffix for suffix, name in Image.EXTENSION.items() if name in Image.OPEN}
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in readable
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def listed_images(names: Sequence[str]) -> list[Path]:
    """Files that `names` stand for: image files as they are, folders with all images below them.

    Raises:
        ValueError: no name, a path that does not exist, or a folder without images.
    """
    if not names:
        raise ValueError("images is empty; name picture files or folders of them")
    files: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        found = find_images(path) if path.is_dir() else [path]
        if not path.exists():
            raise ValueError(f"image {str(path)!r} does not exist")
        if not found:
            raise ValueError(f"folder {str(path)!r} holds no images")
        files += found
    return files


def usable_images(paths: Sequence[Path]) -> list[Path]:
    """The files of `paths` that decode whole; the others are named in one logged warning with their count."""

    def problem(path: Path) -> str | None:
        try:
            read_image(path)
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(problem, paths))
    broken = [text for text in problems if text is not None]
    if broken:
        log.warning("%d of %d images are skipped: %s", len(broken), len(paths), "; ".join(broken))
    return [path for path, text in zip(paths, problems) if text is None]

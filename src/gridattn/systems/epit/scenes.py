"""Embedded light fields: two layers at known disparities, rendered exactly from continuous textures.

The background fills the view; the foreground is a soft disc that moves with its own disparity. View (u, v) shows a
layer of disparity d at (y + d (u - uc), x + d (v - vc)), so that sheared light fields (d + a for every d) are rendered
again, not resampled. The textures are photographs of scikit-image, interpolated by cubic splines, of which the right
30 % are for validation alone; or sums of sinusoids.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Texture = Callable[[NDArray[np.float64], NDArray[np.float64]], Array]
"""Colours (3, ...) in about 0..1 at rows and columns of any shape."""

PHOTOGRAPHS = ("astronaut", "brick", "chelsea", "coffee", "grass", "gravel", "immunohistochemistry", "rocket")
_TRAIN_PART = 0.7
_DISC_SOFTNESS = 0.7  # pixels
_WAVES = 40


@dataclass(frozen=True)
class Scene:
    """Two fronto-parallel layers.

    Attributes:
        textures: of the background and of the foreground.
        disparities: of the same, pixels per view.
        centre: row and column of the disc, pixels from the middle of the views.
        radius: of the disc, pixels.
    """

    textures: tuple[Texture, Texture]
    disparities: tuple[float, float]
    centre: tuple[float, float]
    radius: float

    def sheared(self, pixels: float) -> "Scene":
        """The scene with `pixels` added to both disparities."""
        return replace(self, disparities=tuple(d + pixels for d in self.disparities))

    def render(self, views: int, size: int) -> Array:
        """Renders views x views views of size x size pixels: (3, U, V, H, W), float32, RGB.

        Example:
            >>> draw_scene(np.random.default_rng(0), "sinusoids").render(3, 32).shape
            (3, 3, 3, 32, 32)
        """
        u, v, y, x = self._axes(views, size)
        background, foreground = (
            texture(*np.broadcast_arrays(y + d * u, x + d * v)) for texture, d in zip(self.textures, self.disparities)
        )
        cover = self._cover(views, size)
        return (background + cover * (foreground - background)).astype(np.float32)

    def disparity(self, views: int, size: int) -> Array:
        """The disparity of the layer that is seen: (U, V, H, W)."""
        return np.where(self._cover(views, size) > 0.5, *reversed(self.disparities)).astype(np.float32)

    def _cover(self, views: int, size: int) -> Array:
        u, v, y, x = self._axes(views, size)
        d = self.disparities[1]
        distance = np.hypot(y + d * u - self.centre[0], x + d * v - self.centre[1])
        return (1 / (1 + np.exp((distance - self.radius) / _DISC_SOFTNESS))).astype(np.float32)

    @staticmethod
    def _axes(views: int, size: int) -> tuple[NDArray[Any], ...]:
        """u, v, y, x from the middle, to be broadcast."""
        view, pixel = np.arange(views) - (views - 1) / 2, np.arange(size) - (size - 1) / 2
        return view[:, None, None, None], view[:, None, None], pixel[:, None], pixel


def draw_scene(rng: np.random.Generator, texture: str, *, size: int = 32, held_out: bool = False) -> Scene:
    """Draws one scene: disparities from U(-2, 2), a disc of U(0.15, 0.35) times the view, gains of the colours.

    Args:
        rng: every random choice comes from it.
        texture: "photographs" or "sinusoids".
        size: height and width of the views to be rendered.
        held_out: takes the photographs' right parts, which are for validation.
    """
    draw = {"photographs": _photograph, "sinusoids": _sinusoids}[texture]
    textures = draw(rng, held_out), draw(rng, held_out)
    near, far = rng.uniform(-2, 2, 2).tolist()
    row, column = (rng.uniform(-0.25, 0.25, 2) * size).tolist()
    return Scene(textures, (near, far), (row, column), float(rng.uniform(0.15, 0.35) * size))


def _sinusoids(rng: np.random.Generator, held_out: bool) -> Texture:
    """40 waves of 0.02 to 0.45 cycles per pixel with amplitudes ~ f^-0.6, deviation 0.14 around 0.5."""
    frequency = rng.uniform(0.02, 0.45, _WAVES)
    angle, phase = rng.uniform(0, np.pi, _WAVES), rng.uniform(0, 2 * np.pi, _WAVES)
    amplitude = frequency**-0.6
    amplitude *= 0.14 / np.sqrt((amplitude**2).sum() / 2)
    gains = rng.uniform(0.7, 1, 3)

    def texture(y: NDArray[np.float64], x: NDArray[np.float64]) -> Array:
        grey = np.full(y.shape, 0.5)
        for f, a, p, height in zip(frequency, angle, phase, amplitude):
            grey += height * np.sin(2 * np.pi * f * (np.sin(a) * y + np.cos(a) * x) + p)
        return (gains.reshape(-1, *(1,) * y.ndim) * grey).astype(np.float32)

    return texture


@cache
def _splines(name: str, held_out: bool) -> NDArray[np.float32]:
    """Spline coefficients of one part of a photograph, (3, H, W)."""
    from scipy.ndimage import spline_filter
    from skimage import data

    picture = np.asarray(getattr(data, name)(), np.float32) / 255
    colours = np.stack([picture] * 3) if picture.ndim == 2 else np.moveaxis(picture[..., :3], -1, 0)
    edge = round(_TRAIN_PART * colours.shape[2])
    part = colours[..., edge:] if held_out else colours[..., :edge]
    return np.stack([spline_filter(colour, order=3, mode="mirror") for colour in part]).astype(np.float32)


def _photograph(rng: np.random.Generator, held_out: bool) -> Texture:
    """A photograph around a random place, in a random direction, with gains of the colours."""
    from scipy.ndimage import map_coordinates

    splines = _splines(PHOTOGRAPHS[rng.integers(len(PHOTOGRAPHS))], held_out)
    origin = rng.uniform(0.25, 0.75, 2) * splines.shape[1:]
    turn = rng.choice((-1.0, 1.0), 2)
    gains = rng.uniform(0.7, 1, 3)

    def texture(y: NDArray[np.float64], x: NDArray[np.float64]) -> Array:
        places = np.stack([origin[0] + turn[0] * y, origin[1] + turn[1] * x])
        colours: list[Any] = [
            gain * np.asarray(map_coordinates(spline, places, order=3, mode="mirror", prefilter=False))
            for gain, spline in zip(gains, splines)
        ]
        return np.stack(colours).astype(np.float32)

    return texture


@cache
def stereo_pair() -> Array:
    """A real light field of 1 x 2 views: scikit-image's rectified pair `stereo_motorcycle`, reduced to 120 x 180.

    Returns:
        (3, 1, 2, 120, 180), float32, RGB in 0..1.
    """
    from skimage import data
    from skimage.transform import resize

    views = [resize(view / 255.0, (120, 180), anti_aliasing=True) for view in data.stereo_motorcycle()[:2]]
    return np.moveaxis(np.stack([np.asarray(view) for view in views])[None], -1, 0).astype(np.float32)

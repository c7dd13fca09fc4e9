"""Where does this point look? The attention of one query point, drawn over an image, for any registered mechanism."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from gridattn.data import Preprocess, read_image, seeded
from gridattn.lab.pictures import HEAT, colour_bar, heat_axes, kind_of_map
from gridattn.lab.selection import check_options, select_attentions
from gridattn.models import create_model
from gridattn.models.common import Backbone

HOST = "grid_vit_micro"
IMAGE_SIZE = 128
PHOTOGRAPHS = ("astronaut", "brick", "chelsea", "coffee", "grass", "gravel", "rocket")


@dataclass(frozen=True)
class View:
    """What one query point of one network sees.

    Attributes:
        attention: the mechanism.
        weights: (rows, columns) of the attention grid; mean over heads, summing to one where anything is seen.
        exact: True for the mechanism's own weights, False for gradients.
        query: (row, column) of the query in the attention grid.
        layer: number of the layer, from 0.
        trained: whether the network's weights come from a checkpoint.
    """

    attention: str
    weights: NDArray[np.floating]
    exact: bool
    query: tuple[int, int]
    layer: int
    trained: bool

    def record(self) -> dict[str, Any]:
        """The numbers as plain values for JSON."""
        return {
            "attention": self.attention,
            "layer": self.layer,
            "trained": self.trained,
            "exact": self.exact,
            "query": list(self.query),
            "grid": list(self.weights.shape),
            "reached": int((self.weights > 0).sum()),
            "weights": self.weights.astype(float).round(8).tolist(),
        }


@dataclass(frozen=True)
class Shown:
    """The picture and the numbers behind it.

    Attributes:
        image: (H, W, 3) uint8.
        views: one for each mechanism.
        figure: the panel; `figure.savefig(path)` writes it.
    """

    image: NDArray[np.uint8]
    views: tuple[View, ...]
    figure: Figure


def show(
    image: str | Path | Image.Image,
    attention: str | Sequence[str] | None = None,
    *,
    checkpoint: str | Path | None = None,
    query: tuple[float, float] = (0.5, 0.5),
    layer: int = -1,
    image_size: int | None = None,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Shown:
    """Draws what one point of an image attends to.

    Args:
        image: an image file, the name of an embedded photograph (`PHOTOGRAPHS`), or a picture.
        attention: names or patterns (`select_attentions`). With a checkpoint it may be left out, and must otherwise be
            what the checkpoint holds.
        checkpoint: a run of `gridattn train`, or the folder of a `gridattn compare`, which holds one a mechanism.
            Without one, a network with random weights shows what each mechanism can reach.
        query: (row, column); floats are fractions of the image's height and width, ints are pixels.
        layer: number of the layer; negative ones count from the end.
        image_size: shorter side that the image is scaled to; the checkpoint's own where there is one, else 128.
        seed: of the random weights.
        options: keywords of single mechanisms, by name, for networks without a checkpoint.

    Returns:
        The picture, the views and the image.

    Raises:
        ValueError: an unknown name, file or layer, or a query outside the image.

    Example:
        >>> shown = show("astronaut", "neighborhood", image_size=32)
        >>> shown.views[0].exact
        True
    """
    picture = image if isinstance(image, Image.Image) else open_image(image)
    at = query_fractions(query, picture.size)
    check_options(options or {})
    if checkpoint is None:
        networks = _untrained(attention, image_size or IMAGE_SIZE, seed, options or {})
    else:
        networks = _trained(attention, Path(checkpoint))
    views = []
    for name, network, preprocess in networks:
        scaled = scale_image(picture, image_size or preprocess.image_size, network)
        views.append(look(network, name, scaled, preprocess, at, layer, trained=checkpoint is not None))
    pixels = np.asarray(picture.convert("RGB"))
    return Shown(pixels, tuple(views), draw_views(pixels, views))


def open_image(source: str | Path) -> Image.Image:
    """An embedded photograph by name, or an image file.

    Raises:
        ValueError: neither one of `PHOTOGRAPHS` nor a readable image file.
    """
    if str(source) in PHOTOGRAPHS:
        from skimage import data

        return Image.fromarray(getattr(data, str(source))()).convert("RGB")
    if not Path(source).exists():
        raise ValueError(f"image={str(source)!r} is neither a file nor one of the photographs {', '.join(PHOTOGRAPHS)}")
    return read_image(source)


def query_fractions(query: tuple[float, float], size: tuple[int, int]) -> tuple[float, float]:
    """A query point as fractions of an image's height and width, in [0, 1).

    Args:
        query: (row, column); two ints are pixels, floats are fractions already.
        size: (width, height) of the image, pixels.

    Raises:
        ValueError: a point outside the image.

    Example:
        >>> query_fractions((10, 30), (40, 20))
        (0.5, 0.75)
    """
    width, height = size
    pixels = all(isinstance(value, int) for value in query)
    row, column = (query[0] / height, query[1] / width) if pixels else query
    if not (0 <= row < 1 and 0 <= column < 1):
        allowed = f"0 to {height - 1} and 0 to {width - 1} in pixels" if pixels else "fractions from 0 to below 1"
        raise ValueError(f"query={','.join(map(str, query))} lies outside the image; allowed: {allowed}")
    return row, column


def save(shown: Shown, picture: Path, numbers: Path | None = None) -> None:
    """Writes the figure, in the format of the file's suffix, and on demand the numbers as JSON.

    Raises:
        ValueError: a suffix that matplotlib does not know.
    """
    picture.parent.mkdir(parents=True, exist_ok=True)
    shown.figure.savefig(picture)
    if numbers is not None:
        numbers.parent.mkdir(parents=True, exist_ok=True)
        numbers.write_text(json.dumps({"views": [view.record() for view in shown.views]}), encoding="utf-8")


def scale_image(picture: Image.Image, size: int, network: Backbone) -> Image.Image:
    """Scales so that the shorter side is `size`, both sides rounded to what the network's coarsest map divides."""
    multiple = max(info["reduction"] for info in network.feature_info)
    if size < multiple:
        raise ValueError(f"image_size={size} is smaller than one position of the network, {multiple} pixels")
    factor = size / min(picture.size)
    width, height = (round(side * factor / multiple) * multiple for side in picture.size)
    return picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def look(
    network: Backbone,
    name: str,
    picture: Image.Image,
    preprocess: Preprocess,
    at: tuple[float, float],
    layer: int = -1,
    *,
    trained: bool,
) -> View:
    """The view of one network at one point.

    Args:
        network: any backbone with attention layers.
        name: what the view is called.
        picture: what the network sees.
        preprocess: its normalisation.
        at: (row, column) as fractions in [0, 1).
        layer: number of the layer; negative ones count from the end.
        trained: noted in the view.

    Raises:
        ValueError: a layer that the network does not have.
    """
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocess.mean, preprocess.std))
    network.eval()
    device = next(network.parameters()).device
    inputs = network.attention_inputs(((pixels - mean) / std).to(device))
    if not -len(inputs) <= layer < len(inputs):
        raise ValueError(f"layer={layer} does not exist; the network has {len(inputs)} layers, 0 to {len(inputs) - 1}")
    number = layer % len(inputs)
    _, attention, tokens = inputs[number]
    rows, columns = tokens.shape[1:-1]
    query = int(at[0] * rows), int(at[1] * columns)
    weights = attention.attention_map(tokens, query).detach().float().mean((0, 1)).cpu().numpy()
    weights = weights / max(weights.sum(), np.finfo(np.float32).tiny)
    return View(name, weights, attention.exact_map, query, number, trained)


def draw_views(image: NDArray[np.uint8], views: Sequence[View]) -> Figure:
    """The image with its query point, and beside it each view over the image, on one colour scale."""
    columns = min(4, len(views) + 1)
    rows = -(-(len(views) + 1) // columns)
    aspect = image.shape[0] / image.shape[1]
    figure = Figure(figsize=(3.2 * columns + 0.8, rows * (3.2 * aspect + 0.55)), layout="constrained", dpi=120)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    nothing = np.zeros_like(views[0].weights)
    heat_axes(axes[0], image, nothing, views[0].query)
    axes[0].set_title("query point", fontsize=10)
    for panel, view in zip(axes[1:], views):
        heat_axes(panel, image, view.weights, view.query)
        panel.set_title(f"{view.attention}\n{caption(view)}", fontsize=8.5)
    for panel in axes[len(views) + 1 :]:
        panel.remove()
    colour_bar(figure, axes[:columns], HEAT)
    return figure


def caption(view: View) -> str:
    """One line below the name: which layer, what is drawn, trained or not."""
    return f"{'' if view.trained else 'untrained, '}layer {view.layer}: {kind_of_map(view.exact)}"


def _trained(attention: str | Sequence[str] | None, path: Path) -> list[tuple[str, Backbone, Preprocess]]:
    if (path / "models").is_dir():
        held = sorted(folder.name for folder in (path / "models").iterdir() if folder.is_dir())
        names = held if attention is None else select_attentions(attention)
        for name in names:
            if name not in held:
                raise ValueError(f"checkpoint={str(path)!r} holds no model with attention {name!r}; it holds {held}")
        return [network for name in names for network in _trained(None, path / "models" / name)]
    from gridattn.systems.classify import load_classifier  # slow to import, and not needed without a checkpoint

    classifier = load_classifier(path)
    model = classifier.model
    if not isinstance(model, Backbone) or not model.attention_layers():
        raise ValueError(f"checkpoint={str(path)!r} holds a model without attention layers")
    name = model.config.get("attention", model.config["name"])
    if attention is not None and select_attentions(attention) != [name]:
        raise ValueError(f"checkpoint={str(path)!r} holds a model with attention {name!r}, not {attention!r}")
    return [(name, model, classifier.preprocess)]


def _untrained(
    attention: str | Sequence[str] | None, image_size: int, seed: int, options: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, Backbone, Preprocess]]:
    if attention is None:
        raise ValueError("attention is missing; name a mechanism, or give a checkpoint")
    networks = []
    for name in select_attentions(attention):
        with seeded(seed):
            network = create_model(
                HOST, attention=name, attention_options=dict(options.get(name, {})), img_size=image_size
            )
        networks.append((name, network, Preprocess(image_size)))
    return networks

"""Sorts of the user's own pictures, or the gallery ranked for each of them: JSON, and where the network looks."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gridattn.data.images import listed_images, read_image
from gridattn.systems.base import pick_device
from gridattn.systems.dcal.data import IdentityData, load_data, picture_of
from gridattn.systems.dcal.evaluate import TrainedDual, load_network
from gridattn.systems.dcal.files import Sighting
from gridattn.systems.dcal.metrics import euclidean
from gridattn.systems.dcal.pictures import SHOWN, Found, Look, draw_looks, draw_rankings
from gridattn.systems.output import write_json
from gridattn.systems.settings import check_least

log = logging.getLogger("gridattn")

SAMPLES = 8
UNKNOWN = -1

Named = list[tuple[str, Any]]
"""Names and what `picture_of` opens."""


def predict_dcal(
    images: list[str] | None = None,
    checkpoint: str = "runs/latest",
    output: str = "predictions",
    *,
    gallery: str | None = None,
    top: int = 5,
    batch_size: int = 32,
    device: str | None = None,
) -> dict[str, Any]:
    """Tells sorts, or ranks a gallery, and shows where the class token looks; writes predictions.json and .png.

    Args:
        images: picture files, and folders of them, nested or not; none takes 8 test pictures, or queries, of the
            dataset that the network was trained on.
        checkpoint: run folder, or folder of an exported network.
        output: folder to write to.
        gallery: for a network by identity: a folder of pictures, or a dataset by identity as `load_data` takes it, to
            look for the images in; None takes the dataset that the network was trained on.
        top: how many sorts, or items of the gallery, to give for each picture, the best first.
        batch_size: pictures per step.
        device: such as "cpu" or "cuda:0"; None takes the accelerator where there is one.

    Returns:
        `predictions`: for each picture `image`, `rollout` (rows of what the class token owes to each patch) and
        `selected` (row and column of the patches that the global-local branch takes, most responsive first); by sort
        also `top`, a list of `class` and `probability`, and `branches`, what SA and GLCA say alone; by identity also
        `ranking`, a list of `image` and `distance`, with `identity` and `camera` where they are known, without items of
        the query's own identity and camera. `skipped`: damaged files with the `reason`; `output`: the folder. The
        picture shows the first 12.

    Raises:
        ValueError: a path that does not exist, nothing readable, or a checkpoint, dataset or gallery that cannot be
            used.
    """
    check_least("top", top, 1)
    check_least("batch_size", batch_size, 1)
    files = listed_images(images) if images else []
    loaded = load_network(checkpoint)
    where = pick_device(device)
    loaded.network.to(where)
    if loaded.classes is not None and gallery is not None:
        raise ValueError(f"gallery={gallery!r} is for a network by identity; this one tells sorts")
    skipped: list[dict[str, str]] = []
    named: Named = [(str(file), file) for file in files if _readable(file, skipped)]
    if files and not named:
        raise ValueError(f"none of the {len(files)} images can be read; the first: {skipped[0]['reason']}")
    if skipped:
        reasons = "; ".join(entry["reason"] for entry in skipped)
        log.warning("%d of %d images are skipped: %s", len(skipped), len(files), reasons)
    if loaded.classes is not None:
        predictions, draw = _by_sort(loaded, named or _test_pictures(loaded), top, batch_size, where)
    else:
        predictions, draw = _by_identity(loaded, named, gallery, top, batch_size, where, skipped)
    result = {"checkpoint": checkpoint, "output": output, "predictions": predictions, "skipped": skipped}
    write_json(Path(output) / "predictions.json", result)
    draw(Path(output) / "predictions.png")
    return result


def _readable(file: Path, skipped: list[dict[str, str]]) -> bool:
    try:
        read_image(file)
    except ValueError as error:
        skipped.append({"image": str(file), "reason": str(error)})
        return False
    return True


def _test_pictures(loaded: TrainedDual) -> Named:
    data = load_data(loaded.data)
    if isinstance(data, IdentityData):
        raise ValueError(f"data={loaded.data!r} of the checkpoint is by identity, its network by sort; name images")
    chosen = np.linspace(0, len(data.val) - 1, min(SAMPLES, len(data.val))).round().astype(int).tolist()
    names = [f"{loaded.data} {i} ({data.classes[data.val.labels[i]]})" for i in chosen]
    return [(name, data.val.pictures[i]) for name, i in zip(names, chosen)]


def _by_sort(
    loaded: TrainedDual, named: Named, top: int, batch: int, device: torch.device
) -> tuple[list[dict[str, Any]], Any]:
    assert loaded.classes is not None
    classes, predictions, looks = loaded.classes, [], []
    for first in range(0, len(named), batch):
        part = named[first : first + batch]
        pictures = [picture_of(picture) for _, picture in part]
        tensor = _tensor(loaded, pictures, device)
        with torch.inference_mode():
            each = {name: y.float().softmax(1).cpu() for name, y in loaded.network(tensor).logits.items()}
        seen = _looks(loaded, pictures, tensor)
        values, labels = torch.stack(list(each.values())).mean(0).topk(min(top, len(classes)))
        for i, ((name, _), look) in enumerate(zip(part, seen)):
            best = [
                {"class": classes[label], "probability": round(p, 6)}
                for p, label in zip(values[i].tolist(), labels[i].tolist())
            ]
            alone = {branch: classes[int(p[i].argmax())] for branch, p in each.items()}
            predictions.append({"image": name, "top": best, "branches": alone, **_described(look)})
            if len(looks) < SHOWN:
                title = f"{best[0]['class']} {best[0]['probability']:.0%}\n{_short(name)}"
                looks.append(Look(look.picture, look.response, look.selected, title))
    return predictions, lambda path: draw_looks(looks, path)


def _by_identity(
    loaded: TrainedDual,
    named: Named,
    gallery: str | None,
    top: int,
    batch: int,
    device: torch.device,
    skipped: list[dict[str, str]],
) -> tuple[list[dict[str, Any]], Any]:
    queries, items = _queries_and_gallery(loaded, named, gallery, skipped)
    features = [_embedded(loaded, [seen.picture for _, seen in part], batch, device) for part in (queries, items)]
    order = euclidean(*features).sort(dim=1, stable=True)
    predictions, rankings = [], []
    for number, (name, query) in enumerate(queries):
        picture = picture_of(query.picture)
        (look,) = _looks(loaded, [picture], _tensor(loaded, [picture], device))
        ranking: list[dict[str, Any]] = []
        found: list[Found] = []
        for distance, index in zip(order.values[number].tolist(), order.indices[number].tolist()):
            item_name, item = items[index]
            known = query.identity != UNKNOWN and item.identity != UNKNOWN
            right = item.identity == query.identity if known else None
            if right and item.camera == query.camera:
                continue
            about = {} if item.identity == UNKNOWN else {"identity": item.identity, "camera": item.camera}
            ranking.append({"image": item_name, "distance": round(distance, 6), **about})
            if number < SHOWN:
                cut = loaded.views.show(picture_of(item.picture))
                found.append(Found(cut, f"{len(ranking)}: {distance:.3f}", right))
            if len(ranking) == top:
                break
        predictions.append({"image": name, "ranking": ranking, **_described(look)})
        if number < SHOWN:
            rankings.append((Look(look.picture, look.response, look.selected, _short(name, 20)), found))
    return predictions, lambda path: draw_rankings(rankings, path)


def _queries_and_gallery(
    loaded: TrainedDual, named: Named, gallery: str | None, skipped: list[dict[str, str]]
) -> tuple[list[tuple[str, Sighting]], list[tuple[str, Sighting]]]:
    """Queries and gallery with their names; identities of the user's own pictures are not known."""
    queries = [(name, Sighting(picture, UNKNOWN, UNKNOWN)) for name, picture in named]
    if gallery is not None and Path(gallery).is_dir():
        files = [file for file in listed_images([gallery]) if _readable(file, skipped)]
        if not files:
            raise ValueError(f"gallery={gallery!r} holds no readable picture")
        if not queries:
            raise ValueError(f"images is empty; name pictures to look for in gallery={gallery!r}")
        return queries, [(str(file), Sighting(file, UNKNOWN, UNKNOWN)) for file in files]
    spec = gallery or loaded.data
    data = load_data(spec)
    if not isinstance(data, IdentityData):
        raise ValueError(f"gallery={spec!r} is by sort; a dataset by identity or a folder of pictures is needed")
    if not queries:
        chosen = np.linspace(0, len(data.query) - 1, min(SAMPLES, len(data.query))).round().astype(int).tolist()
        queries = [(_named(spec, "query", i, data.query[i]), data.query[i]) for i in chosen]
    return queries, [(_named(spec, "gallery", i, seen), seen) for i, seen in enumerate(data.gallery)]


def _named(spec: str, part: str, number: int, seen: Sighting) -> str:
    if isinstance(seen.picture, Path):
        return str(seen.picture)
    return f"{spec} {part} {number} (identity {seen.identity}, camera {seen.camera})"


def _embedded(loaded: TrainedDual, pictures: Sequence[Any], batch: int, device: torch.device) -> Tensor:
    with torch.inference_mode():
        parts = [
            loaded.network.embedding(_tensor(loaded, [picture_of(p) for p in pictures[i : i + batch]], device)).cpu()
            for i in range(0, len(pictures), batch)
        ]
    return torch.cat(parts)


def _tensor(loaded: TrainedDual, pictures: Sequence[Image.Image], device: torch.device) -> Tensor:
    transform = loaded.views.fixed()
    return torch.stack([transform(picture) for picture in pictures]).to(device)


def _looks(loaded: TrainedDual, pictures: Sequence[Image.Image], tensor: Tensor) -> list[Look]:
    response, index, _ = loaded.network.selection(tensor)
    columns = response.shape[2]
    patches = (index[:, 1:] - 1).cpu()
    places = torch.stack([patches // columns, patches % columns], dim=-1).numpy()
    maps = response.float().cpu().numpy()
    return [Look(loaded.views.show(p), r, s) for p, r, s in zip(pictures, maps, places)]


def _described(look: Look) -> dict[str, Any]:
    rows = [[round(float(value), 7) for value in row] for row in look.response]
    return {"rollout": rows, "selected": look.selected.tolist()}


def _short(name: str, length: int = 30) -> str:
    last = Path(name).name
    return last if len(last) <= length else f"{last[: length - 10]}…{last[-9:]}"

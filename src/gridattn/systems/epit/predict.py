"""Super-resolution of the user's own light fields: views, the centre view before and after, an epipolar plane."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gridattn.systems.base import pick_device
from gridattn.systems.epit.data import Degradation, WholeScenes, is_embedded, load_light_fields
from gridattn.systems.epit.evaluate import load_epit, tiling
from gridattn.systems.epit.fields import bicubic_up, central_views
from gridattn.systems.epit.files import read_light_field
from gridattn.systems.epit.metrics import scene_scores
from gridattn.systems.epit.pictures import (
    centre_view,
    draw_comparison,
    epipolar_strip,
    to_bytes,
    write_image,
)
from gridattn.systems.epit.tiles import super_resolve
from gridattn.systems.output import write_json
from gridattn.systems.trained import Trained


@dataclass(frozen=True)
class _Input:
    name: str
    stem: str
    low: Tensor
    high: Tensor | None = None


def predict_views(
    light_fields: list[str] | None = None,
    *,
    checkpoint: str,
    output: str = "predictions",
    ang_res: int | None = None,
    tile: int | None = None,
    stride: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Super-resolves light fields; writes predictions.json and, for each, a folder NAME of pictures.

    NAME holds view_UU_VV.png for every view, before.png and after.png (the centre view, bicubic and super-resolved),
    epi.png (an epipolar plane of the result) and comparison.png (all of it side by side).

    Args:
        light_fields: each a folder of views, a .mat or an .h5 file, as `read_light_field` takes it, of low resolution;
            none takes a held-out scene of the embedded dataset that the network was trained on.
        checkpoint: run folder, or folder of an exported network.
        output: folder to write to.
        ang_res: views along each axis that are used, those in the middle; None takes all.
        tile: height and width of the tiles that light fields are cut into; 0 shows them whole; None as in training.
        stride: step between tiles; None takes half a given tile.
        device: such as "cpu" or "cuda:0"; None takes the accelerator where there is one.

    Returns:
        `predictions`: for each light field `light_field`, `folder`, `views` ([U, V]), `size_before` and `size`
        ([H, W] of a view) and, for the embedded scene, `psnr`, `ssim`, `bicubic_psnr` and `bicubic_ssim`; `output`: the
        folder; `scale`.

    Raises:
        ValueError: a path that does not exist, a light field that cannot be read, or a checkpoint that cannot be used.
    """
    trained = load_epit(checkpoint)
    view = tiling(trained, tile, stride)
    where = pick_device(device)
    scale, network, folder = trained.network["scale"], trained.model.to(where), Path(output)
    # All are read before the first is written, so that a damaged one leaves nothing half done.
    inputs = list(_given(light_fields, ang_res) if light_fields else _held_out(trained, ang_res))
    predictions = []
    for item in inputs:
        with torch.inference_mode():
            ours = super_resolve(network, item.low.to(where), scale, **view).cpu()
        predictions.append(_write(item, ours, bicubic_up(item.low, scale), folder / item.stem))
    result = {"checkpoint": checkpoint, "output": output, "scale": scale, "predictions": predictions}
    write_json(folder / "predictions.json", result)
    return result


def _given(paths: list[str], ang_res: int | None) -> Iterator[_Input]:
    taken: set[str] = set()
    for path in paths:
        field = torch.from_numpy(read_light_field(path))
        stem, number = Path(path).stem or "light-field", 1
        while stem in taken:
            number += 1
            stem = f"{Path(path).stem}-{number}"
        taken.add(stem)
        yield _Input(path, stem, field if ang_res is None else central_views(field, ang_res))


def _held_out(trained: Trained, ang_res: int | None) -> Iterator[_Input]:
    about, scale = trained.about, trained.network["scale"]
    if not is_embedded(about["data"]):
        raise ValueError("light_fields is empty; name folders of views, .mat or .h5 files")
    data = load_light_fields(about["data"], ang_res=about["ang_res"] if ang_res is None else ang_res)
    flicker = tuple(about["flicker"]) if about["flicker"] else None
    samples = WholeScenes(data, Degradation(scale, flicker, about["noise"]))  # pyright: ignore[reportArgumentType]
    index = len(samples) // 2
    low, high, _ = samples[index]
    yield _Input(data.names[index], data.names[index], low, high)


def _write(item: _Input, ours: Tensor, bicubic: Tensor, folder: Path) -> dict[str, Any]:
    for u in range(ours.shape[1]):
        for v in range(ours.shape[2]):
            write_image(to_bytes(ours[:, u, v]), folder / f"view_{u:02d}_{v:02d}.png")
    write_image(centre_view(bicubic), folder / "before.png")
    write_image(centre_view(ours), folder / "after.png")
    write_image(epipolar_strip(ours), folder / "epi.png")
    fields = {"bicubic": bicubic, "super-resolved": ours}
    described: dict[str, Any] = {
        "light_field": item.name,
        "folder": str(folder),
        "views": list(ours.shape[1:3]),
        "size_before": list(item.low.shape[-2:]),
        "size": list(ours.shape[-2:]),
    }
    if item.high is not None:
        for prefix, field in (("", ours), ("bicubic_", bicubic)):
            scores = scene_scores(field, item.high)
            described |= {prefix + name: round(scores[name], 6) for name in ("psnr", "ssim")}
        fields = {
            f"bicubic, {described['bicubic_psnr']:.2f} dB": bicubic,
            f"super-resolved, {described['psnr']:.2f} dB": ours,
            "truth": item.high,
        }
    draw_comparison(fields, folder / "comparison.png")
    return described

"""Measuring a trained network on whole light fields, also against growing disparity."""

from pathlib import Path
from typing import Any

import torch

from gridattn.systems.base import pick_device
from gridattn.systems.epit.data import Degradation, LightFields, WholeScenes, load_light_fields
from gridattn.systems.epit.fields import bicubic_up
from gridattn.systems.epit.metrics import SceneMeans, scene_scores
from gridattn.systems.epit.model import build_epit
from gridattn.systems.epit.pictures import draw_shears
from gridattn.systems.epit.tiles import check_tiling, super_resolve
from gridattn.systems.output import write_json
from gridattn.systems.settings import check_least
from gridattn.systems.trained import Trained, load_trained

_ABOUT = ("data", "ang_res", "flicker", "noise", "tile", "stride")


def load_epit(checkpoint: str) -> Trained:
    """Loads a run folder or an exported network.

    Raises:
        ValueError: a path without a trained network of this system, or damaged files.
    """
    trained = load_trained(checkpoint, "epit", build_epit)
    missing = [name for name in _ABOUT if name not in trained.about]
    if missing:
        raise ValueError(f"checkpoint={checkpoint!r} is damaged: it lacks {', '.join(missing)}")
    return trained


def tiling(trained: Trained, tile: int | None, stride: int | None) -> dict[str, int]:
    """Keywords of `super_resolve`: what is given, else what the training validated with.

    Raises:
        ValueError: tiles that leave gaps.
    """
    stored = trained.about
    side: int = stored["tile"] if tile is None else tile
    check_least("tile", side, 0)
    default: int = stored["stride"] if side == stored["tile"] else max(1, side // 2)
    step = default if stride is None else stride
    if side:
        check_tiling(side, step)
    return {"tile": side, "stride": step}


def evaluate_epit(
    checkpoint: str,
    data: str | None = None,
    *,
    ang_res: int | None = None,
    tile: int | None = None,
    stride: int | None = None,
    shears: list[float] | None = None,
    device: str | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """PSNR and SSIM of Y of a trained network and of bicubic upsampling, per scene, per set and in all.

    Args:
        checkpoint: run folder, or folder of an exported network.
        data: dataset, as `load_light_fields` takes it; None takes the one it was trained on.
        ang_res: views along each axis; None takes as many as in training.
        tile: height and width of the tiles that scenes are cut into; 0 shows them whole; None does as the training did.
        stride: step between tiles; None takes half a given tile.
        shears: disparities, pixels of high resolution per view, that are added to all scenes for a further measurement
            each. Embedded scenes are rendered anew; files take whole numbers, whose borders are cut.
        device: such as "cpu" or "cuda:0"; None takes the accelerator where there is one.
        output: file for the metrics, JSON, beside which NAME.shear.png shows PSNR against shear; None writes none.

    Returns:
        `psnr` (dB), `ssim` (data range 2, as published), `ssim_range1`, `centre_psnr`, and the same of bicubic
        upsampling with `bicubic_` before their names; `sets`: these by set; `scenes`: by scene; `data`; with `shears`:
        rows of `shear`, `psnr`, `centre_psnr`, `bicubic_psnr`, `bicubic_centre_psnr`.

    Raises:
        ValueError: a checkpoint or dataset that cannot be used, or shears that are not possible.
    """
    trained = load_epit(checkpoint)
    about = trained.about
    view = tiling(trained, tile, stride)
    where = pick_device(device)
    spec, scale = data or about["data"], trained.network["scale"]
    found = load_light_fields(spec, ang_res=about["ang_res"] if ang_res is None else ang_res, scale=scale, side=1)
    degrade = Degradation(scale, tuple(about["flicker"]) if about["flicker"] else None, about["noise"])  # pyright: ignore
    network = trained.model.to(where)
    report: dict[str, Any] = {"data": spec, **_measure(network, found, degrade, view, where, 0.0)}
    if shears:
        names = ("psnr", "centre_psnr", "bicubic_psnr", "bicubic_centre_psnr")
        sheared = {s: report if s == 0 else _measure(network, found, degrade, view, where, s) for s in shears}
        report["shears"] = [{"shear": s, **{name: row[name] for name in names}} for s, row in sheared.items()]
    if output is not None:
        write_json(output, report)
        if shears:
            draw_shears(report["shears"], Path(output).with_suffix(".shear.png"))
    return report


def _measure(
    network: Any, data: LightFields, degrade: Degradation, view: dict[str, int], where: torch.device, sheared: float
) -> dict[str, Any]:
    samples = WholeScenes(data, degrade, sheared)
    totals = {prefix: SceneMeans(len(data.groups)) for prefix in ("", "bicubic_")}
    scenes = []
    for index, name in enumerate(data.names):
        low, high, group = samples[index]
        with torch.inference_mode():
            ours = super_resolve(network, low.to(where), degrade.scale, **view).cpu()
        scores = {"": scene_scores(ours, high), "bicubic_": scene_scores(bicubic_up(low, degrade.scale), high)}
        for prefix, total in totals.items():
            total.update(scores[prefix], group)
        rows = {prefix + key: value for prefix, row in scores.items() for key, value in row.items()}
        scenes.append({"scene": name, "set": data.groups[group], **rows})
    overall = {prefix + key: value for prefix, total in totals.items() for key, value in total.compute().items()}
    tables = {prefix: total.per_group().tolist() for prefix, total in totals.items()}
    sets = {
        group: {prefix + key: tables[prefix][i][j] for prefix in totals for j, key in enumerate(SceneMeans.names)}
        for i, group in enumerate(data.groups)
    }
    return {**overall, "sets": sets, "scenes": scenes}

"""Runs what the demos of the systems claim: each reaches its threshold, and falls short without its mechanism."""

from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic
from typing import Any

from gridattn.systems import get_system, list_systems
from gridattn.systems.base import Demo
from gridattn.systems.output import write_json
from gridattn.systems.settings import read_recipe


def run_demos(
    slugs: Iterable[str] | None = None,
    out: str | Path = "runs/systems",
    *,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Trains the demo recipe of systems and, where they have one, its ablation.

    Args:
        slugs: systems; None takes all that have a demo.
        out: folder of the runs, `<slug>/demo` and `<slug>/ablation`, replaced where they exist, and of demos.json.
        seed: of the trainings.
        log: is told what begins.

    Returns:
        One row a system: `system`, `metric`, `reached`, `threshold`, `baseline`, `ablated` and `margin` (None without
        an ablation), `seconds` of the demo, and `holds`.

    Raises:
        ValueError: an unknown system, or one without a demo.
    """
    chosen = list_systems() if slugs is None else list(slugs)
    demos = {slug: get_system(slug).demo for slug in chosen}
    for slug, demo in demos.items():
        if demo is None and slugs is not None:
            raise ValueError(f"system {slug!r} has no demo")
    rows = []
    for slug, demo in demos.items():
        if demo is None:
            continue
        log(f"{slug}: demo")
        started = monotonic()
        reached = _train(slug, Path(out) / slug / "demo", seed, {})[demo.metric]
        seconds = round(monotonic() - started, 1)
        ablated = None
        if demo.ablation:
            log(f"{slug}: ablation {dict(demo.ablation)}")
            ablated = _train(slug, Path(out) / slug / "ablation", seed, dict(demo.ablation))[demo.metric]
        rows.append(demo_row(slug, demo, reached, ablated, seconds))
        write_json(Path(out) / "demos.json", rows)
    return rows


def demo_row(slug: str, demo: Demo, reached: float, ablated: float | None, seconds: float) -> dict[str, Any]:
    """What a demo reached, beside what it claims."""
    sign = 1 if demo.higher_is_better else -1
    holds = sign * (reached - demo.threshold) >= 0
    if ablated is not None:
        holds = holds and sign * (reached - ablated) >= demo.margin
    return {
        "system": slug,
        "metric": demo.metric,
        "reached": reached,
        "threshold": demo.threshold,
        "baseline": demo.baseline,
        "ablated": ablated,
        "margin": demo.margin if demo.ablation else None,
        "seconds": seconds,
        "holds": holds,
    }


def _train(slug: str, output: Path, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    system = get_system(slug)
    values = read_recipe(slug, "demo") | changes | {"output": str(output), "seed": seed, "overwrite": True}
    return system.train(system.settings(**values))

"""The HTML report of a comparison: one file that needs no other, readable on a phone, in light and in dark."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from gridattn.lab.charts import Line, Point, line_chart, scatter_chart, series_colour


@dataclass(frozen=True)
class Column:
    """One column of the results table: its heading, the number in an entry, how it prints, and which end is good."""

    heading: str
    key: str
    text: Callable[[dict[str, Any]], str]
    best: Callable[[Sequence[float]], float]


def human(number: float) -> str:
    """Three significant digits with a unit letter.

    Example:
        >>> human(1234567), human(12)
        ('1.23 M', '12')
    """
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def accuracy_text(entry: dict[str, Any]) -> str:
    """Mean accuracy in percent, with the standard deviation where there are several seeds."""
    mean = f"{100 * entry['accuracy_mean']:.1f} %"
    return mean if len(entry["runs"]) == 1 else f"{mean} ± {100 * entry['accuracy_std']:.1f}"


COLUMNS = (
    Column("accuracy", "accuracy_mean", accuracy_text, best=max),
    Column("parameters", "parameters", lambda e: human(e["parameters"]), best=min),
    Column("MACs / image", "macs", lambda e: human(e["macs"]), best=min),
    Column("ms / image", "latency_ms", lambda e: f"{e['latency_ms']:.2f}", best=min),
    Column("memory / step", "memory_bytes", lambda e: f"{e['memory_bytes'] / 2**20:.0f} MiB", best=min),
    Column("training", "train_seconds", lambda e: f"{e['train_seconds']:.0f} s", best=min),
)


def render_report(results: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The report as one HTML page.

    Args:
        results: what `compare` writes as results.json.
        pictures: PNG bytes by name; "image" is the picture without heat.

    Returns:
        HTML with all styles and pictures inside.
    """
    entries = sorted(results["attentions"], key=lambda e: -e.get("accuracy_mean", -1.0))
    good = [entry for entry in entries if "error" not in entry]
    colours = {entry["name"]: series_colour(i) for i, entry in enumerate(good)}
    page = Template(files("gridattn.lab").joinpath("report.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(f"Attention compared on {results['data']['name']}"),
        headline=_headline(results, good, len(entries)),
        table=_table(entries, good, colours, results),
        scatter=scatter_chart(
            [Point(e["name"], e["latency_ms"], 100 * e["accuracy_mean"], colours[e["name"]]) for e in good],
            "ms per image",
            "accuracy, %",
        ),
        curves=line_chart([_curve(e, colours[e["name"]]) for e in good], "epoch", "accuracy, %"),
        curves_note="Validation accuracy after each epoch, mean over seeds. Colours as in the table.",
        pictures="".join(_picture(name, png, entries) for name, png in pictures.items()),
        pictures_note=escape(results["pictures_note"]),
        facts="".join(f"<dt>{escape(key)}</dt><dd>{value}</dd>" for key, value in _facts(results).items()),
    )


def _headline(results: dict[str, Any], good: Sequence[dict[str, Any]], total: int) -> str:
    if not good:
        return f"None of the {total} mechanisms could be trained; the table says why."
    best, fastest = good[0], min(good, key=lambda e: e["latency_ms"])
    same = best is fastest
    text = (
        f"Of {total} mechanisms in the same network, trained on the same images for the same number of steps, "
        f"<b>{escape(best['name'])}</b> is the most accurate ({accuracy_text(best)})"
    )
    text += " and also the fastest" if same else f" and <b>{escape(fastest['name'])}</b> the fastest"
    return f"{text} ({fastest['latency_ms']:.2f} ms an image). Chance is {100 / results['data']['classes']:.1f} %."


def _table(
    entries: Sequence[dict[str, Any]],
    good: Sequence[dict[str, Any]],
    colours: dict[str, str],
    results: dict[str, Any],
) -> str:
    best = {c.key: c.best([e[c.key] for e in good]) for c in COLUMNS if len(good) > 1}
    heads = "".join(f"<th>{escape(text)}</th>" for text in ("attention", *(column.heading for column in COLUMNS)))
    rows = []
    for entry in entries:
        name = f'<td data-key="{escape(entry["name"])}" title="{escape(entry["summary"])}">'
        if "error" in entry:
            rows.append(
                f'<tr>{name}{escape(entry["name"])}</td><td class="error" colspan="{len(COLUMNS)}">'
                f"failed: {escape(entry['error'])}</td></tr>"
            )
            continue
        cells = "".join(_cell(column, entry, best.get(column.key)) for column in COLUMNS)
        dot = f'<span class="dot" style="background:{colours[entry["name"]]}"></span>'
        rows.append(f"<tr>{name}{dot}{escape(entry['name'])}</td>{cells}</tr>")
    seeds = len(results["settings"]["seeds"])
    caption = (
        f"{f'Mean ± standard deviation over {seeds} seeds' if seeds > 1 else 'One seed'}. Time: median forward pass, "
        f"batch of {results['batch']}. Memory: {escape(results['memory_method'])}; batch of "
        f"{results['batch']}. Green is best in its column; press a heading to sort."
    )
    return f"<table><caption>{caption}</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(column: Column, entry: dict[str, Any], best: float | None) -> str:
    value = entry[column.key]
    mark = ' class="best"' if value == best else ""
    return f'<td{mark} data-key="{value}">{escape(column.text(entry))}</td>'


def _curve(entry: dict[str, Any], colour: str) -> Line:
    epochs = zip(*(run["curve"] for run in entry["runs"]))
    means = [sum(point["accuracy"] for point in epoch) / len(epoch) for epoch in epochs]
    return Line(entry["name"], [(i + 1.0, 100 * value) for i, value in enumerate(means)], colour)


def _picture(name: str, png: bytes, entries: Sequence[dict[str, Any]]) -> str:
    entry = next((entry for entry in entries if entry["name"] == name), None)
    summary = "the image and the query point" if entry is None else entry["summary"]
    if entry is not None and not entry["exact_map"]:
        summary += " (drawn: gradients of its output, as it has no attention weights)"
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure class="card"><img alt="{escape(name)}" src="data:image/png;base64,{data}">'
        f"<figcaption><b>{escape(name)}</b><br>{escape(summary)}</figcaption></figure>"
    )


def _facts(results: dict[str, Any]) -> dict[str, str]:
    settings, data, machine = results["settings"], results["data"], results["machine"]
    return {
        "data": escape(data["description"]),
        "network": escape(results["network"]),
        "budget": escape(results["budget"]),
        "seeds": escape(", ".join(map(str, settings["seeds"]))),
        "machine": escape(f"{machine['cpu']}, threads {machine['threads']}, accelerator: {machine['accelerator']}"),
        "versions": escape(
            f"gridattn {machine['gridattn']}, torch {machine['torch']}, Python {machine['python']}, {machine['system']}"
        ),
        "measured": escape(results["finished"]),
        "command": f"<code>{escape(results['command'])}</code>",
    }

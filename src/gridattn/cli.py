"""The command `gridattn`. Each command calls one function of the rooms; heavy imports happen inside the commands."""

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

USER_ERRORS = (ValueError, OSError, ModuleNotFoundError)
JSON_ONLY = ("options", "title", "year")  # too wide for a table
PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

SystemName = Annotated[str, typer.Argument(help="One of `gridattn list --systems`.")]


class _Commands(TyperGroup):
    """Turns what a user got wrong into one line on stderr; anything else is a defect and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        debug = ctx.params.get("debug") or os.environ.get("GRIDATTN_DEBUG", "0") not in ("", "0")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None
        except USER_ERRORS as error:
            if debug:
                raise
            print(f"error: {_one_line(error)}", file=sys.stderr)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    name="gridattn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the command `gridattn`."""
    app()


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _version(wanted: bool) -> None:
    if wanted:
        import gridattn

        print(gridattn.__version__)
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; so does GRIDATTN_DEBUG=1.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Attention for data on grids: list, train, compare and look at it."""


@app.command("list", epilog="Example: `gridattn list --attentions 'neigh*'`")
def list_(
    pattern: Annotated[str, typer.Argument(help="Shell pattern of names.")] = "*",
    attentions: Annotated[bool, typer.Option("--attentions", help="Attention mechanisms.")] = False,
    models: Annotated[bool, typer.Option("--models", help="Backbones.")] = False,
    systems: Annotated[bool, typer.Option("--systems", help="Task systems that can be trained.")] = False,
    datasets: Annotated[bool, typer.Option("--datasets", help="Labelled images.")] = False,
    papers: Annotated[bool, typer.Option("--papers", help="Papers, and what of each is here.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what there is; without an option, everything but the papers."""
    from gridattn.lab.listing import listing

    kinds = {"attentions": attentions, "models": models, "systems": systems, "datasets": datasets, "papers": papers}
    rows = listing([kind for kind, wanted in kinds.items() if wanted] or list(kinds)[:-1], pattern)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for kind, found in rows.items():
        narrow = [{key: value for key, value in row.items() if key not in JSON_ONLY} for row in found]
        _print_table(f"{kind} ({len(found)})", narrow)


@app.command(context_settings=PASS_THROUGH, epilog="Example: `gridattn train classify --recipe demo --epochs 3`")
def train(ctx: typer.Context, system: SystemName) -> None:
    """Train a system; `gridattn train classify --help` lists its settings."""
    record = _system(ctx, system)
    metrics = record.train(record.parse(ctx.args))
    if metrics:  # of several processes only the first one reports
        _print_json(metrics)


@app.command(
    context_settings=PASS_THROUGH,
    epilog="Example: `gridattn evaluate classify --checkpoint runs/latest --data textures`",
)
def evaluate(ctx: typer.Context, system: SystemName) -> None:
    """Measure a trained model on labelled data; `gridattn evaluate classify --help` lists its settings."""
    record = _system(ctx, system)
    from gridattn.lab.arguments import call

    _print_json(call(record.evaluate, ctx.args, f"gridattn evaluate {system}"))


@app.command(
    context_settings=PASS_THROUGH,
    epilog="Example: `gridattn predict classify photo.jpg --checkpoint runs/latest --out predictions`",
)
def predict(
    ctx: typer.Context,
    system: SystemName,
    checkpoint: Annotated[Path | None, typer.Option(help="Run folder, or folder of an exported model.")] = None,
    out: Annotated[Path, typer.Option("--out", "--output", help="Folder for JSON, CSV and pictures.")] = Path(
        "predictions"
    ),
    unseen: Annotated[
        str | None, typer.Option(help="Instead of files: one validation image of every class of this dataset.")
    ] = None,
) -> None:
    """Run a trained model on new data; `gridattn predict classify --help` lists its settings."""
    record = _system(ctx, system)
    from gridattn.lab.arguments import call
    from gridattn.lab.samples import write_unseen

    arguments = [*ctx.args, "--output", str(out)]
    if checkpoint is not None:
        arguments += ["--checkpoint", str(checkpoint)]
    if unseen is not None and checkpoint is not None:
        arguments = [*map(str, write_unseen(unseen, checkpoint, out / "unseen")), *arguments]
    _print_json(call(record.predict, arguments, f"gridattn predict {system}"))


@app.command(epilog="Example: `gridattn compare --attention neighborhood,window,global --data textures --epochs 5`")
def compare(
    attention: Annotated[str | None, typer.Option(help="Names with commas between, patterns, or 'all'.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Settings to start from: a name such as demo, or a YAML file.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="One of `gridattn list --datasets`.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width of the images, pixels.")] = None,
    host: Annotated[str | None, typer.Option(help="Backbone whose attention is exchanged.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds with commas between; one training each.")] = None,
    limit_batches: Annotated[int | None, typer.Option(help="At most so many batches in each epoch.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME.KEY=VALUE for one mechanism; may be repeated.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE, any setting of `gridattn train classify`; may be repeated."),
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Picture for the attention maps: a file or a photograph's name.")
    ] = None,
    query: Annotated[str | None, typer.Option(help="ROW,COLUMN of the query point, in fractions or pixels.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the results.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Reuse finished trainings with the same settings.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results that the folder holds.")] = False,
) -> None:
    """Train several attentions in the same network and write a report: accuracy, cost, curves, pictures."""
    from gridattn.lab.selection import parse_ints, parse_options, parse_query, parse_values

    given = {
        "attention": attention and [attention],
        "data": data,
        "image_size": image_size,
        "host": host,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seeds": parse_ints("seeds", seeds) if seeds is not None else None,
        "limit_batches": limit_batches,
        "options": parse_options(option or []) or None,
        "train": parse_values(set_ or []) or None,
        "image": image,
        "query": query and parse_query(query),
        "out": out,
        "resume": resume or None,
        "overwrite": overwrite or None,
    }
    from gridattn.lab import compare as lab
    from gridattn.lab.compare_settings import read_settings

    settings = read_settings(recipe, given)
    results = lab.compare(settings, command=" ".join(["gridattn", *sys.argv[1:]]), log=_say)
    _print_table(f"{len(results['attentions'])} attentions on {settings.data}", lab.summary_rows(results))
    print(f"report: {Path(settings.out) / 'report.html'}")
    failed = [entry["name"] for entry in results["attentions"] if "error" in entry]
    if failed:
        raise ValueError(f"{len(failed)} of {len(results['attentions'])} attentions failed: {', '.join(failed)}")


@app.command(
    epilog="Example: `gridattn show --image astronaut --attention neighborhood,window --query 0.3,0.45 --out look.png`"
)
def show(
    out: Annotated[Path, typer.Option(help="PNG, PDF or SVG file for the picture.")],
    image: Annotated[
        str, typer.Option(help="An image file, or an embedded photograph such as astronaut or coffee.")
    ] = "astronaut",
    attention: Annotated[str | None, typer.Option(help="Names with commas between, patterns, or 'all'.")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A run of train or compare; without it the weights are random and show the reach."),
    ] = None,
    query: Annotated[
        str, typer.Option(help="ROW,COLUMN: fractions such as 0.5,0.25, or pixels such as 120,80.")
    ] = "0.5,0.5",
    layer: Annotated[int, typer.Option(help="Number of the attention layer; negative ones count from the end.")] = -1,
    image_size: Annotated[int | None, typer.Option(help="Shorter side that the image is scaled to, pixels.")] = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    option: Annotated[list[str] | None, typer.Option(help="NAME.KEY=VALUE for one mechanism; may be repeated.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="File for the numbers.")] = None,
) -> None:
    """Draw where one point of an image looks, for one attention or several side by side."""
    from gridattn.lab.selection import parse_options, parse_query

    point, options = parse_query(query), parse_options(option or [])
    from gridattn.lab import show as lab

    shown = lab.show(
        image,
        attention,
        checkpoint=checkpoint,
        query=point,
        layer=layer,
        image_size=image_size,
        seed=seed,
        options=options,
    )
    lab.save(shown, out, json_out)
    print(out)


@app.command(
    epilog="Example: `gridattn simulate --grid 30x48x80 --kernel 18x24x24 --tile-q 4x8x8 --tile-kv 2x8x8 --sweep`"
)
def simulate(
    grid: Annotated[str | None, typer.Option(help="Tokens per axis, such as 30x48x80.")] = None,
    kernel: Annotated[
        str | None, typer.Option(help="Window per axis; one number serves all axes. A sweep without it tries many.")
    ] = None,
    tile_q: Annotated[str | None, typer.Option(help="Queries per tile and axis.")] = None,
    tile_kv: Annotated[str | None, typer.Option(help="Keys per tile and axis.")] = None,
    tiles: Annotated[
        str | None,
        typer.Option(help="Instead of both: all tiles of hopper, hopper-64, hopper-256, blackwell or flex kernels."),
    ] = None,
    stride: Annotated[str, typer.Option(help="Queries per axis that share a window.")] = "1",
    dilation: Annotated[str, typer.Option(help="Step between the keys of a window.")] = "1",
    causal: Annotated[str, typer.Option(help="Axes that see no later key, such as 1x0x0.")] = "0",
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Key tiles start at the first key needed.")] = False,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="List the strides worth trying, slowest first; without --kernel, the windows."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="PNG, PDF or SVG file for a picture of the sweep; CSV and JSON beside it.")
    ] = None,
    attention_share: Annotated[
        float, typer.Option(help="Share of the model's run time that is self-attention, for the last column.")
    ] = 1.0,
    preset: Annotated[str | None, typer.Option(help="A published setting, or 'all'; prints ours beside it.")] = None,
) -> None:
    """How much faster than dense attention a tiled kernel can be, counted in tiles, without running anything."""
    from gridattn.lab import simulate_rows as lab

    if preset is not None:
        _print_table("published end-to-end speed-ups and ours", lab.preset_rows(preset))
        return
    if out is not None and not sweep:
        raise ValueError(f"--out {str(out)!r} is for the picture of a sweep; add --sweep")
    sizes = {"grid": grid, "kernel": kernel, "tile-q": tile_q, "tile-kv": tile_kv}
    sizes |= {"stride": stride, "dilation": dilation, "causal": causal}
    setting = lab.read_setting(sizes, tiles, dynamic=dynamic, sweep=sweep, attention_share=attention_share)
    rows = lab.sweep_rows(setting, out) if sweep else lab.setting_rows(setting)
    _print_table("tiles and speed-up bounds", rows)
    if out is not None:
        print(f"written: {out}, {out.with_suffix('.csv')} and {out.with_suffix('.json')}")


@app.command(epilog="Example: `gridattn demos classify segment --out runs/systems`")
def demos(
    systems: Annotated[list[str] | None, typer.Argument(help="Systems; all of them without.")] = None,
    out: Annotated[str, typer.Option(help="Folder of the runs, replaced where they exist.")] = "runs/systems",
    seed: Annotated[int, typer.Option(help="Of the trainings.")] = 0,
) -> None:
    """Train the demo of every system, with and without its mechanism, and say whether what it claims holds."""
    from gridattn.lab.demos import run_demos

    rows = run_demos(systems or None, out, seed=seed, log=_say)
    _print_table("demos: reached, and without the mechanism", rows)
    missed = [row["system"] for row in rows if not row["holds"]]
    if missed:
        raise ValueError(f"{len(missed)} of {len(rows)} demos fall short: {', '.join(missed)}")


@app.command(epilog="Example: `gridattn convert convit_tiny.pth --model convit_tiny -o convit_tiny.safetensors`")
def convert(
    official: Annotated[Path, typer.Argument(help="Weight file as its authors publish it, or one of ours.")],
    model: Annotated[str, typer.Option(help="One of `gridattn list --models`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File *.safetensors; its *.json is put beside it.")],
    img_size: Annotated[
        str | None, typer.Option(help="Nominal image size, such as 384 or 256x192; tables of positions are resized.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Classes; where the file has another number, the head stays as initialised.")
    ] = None,
) -> None:
    """Turn a published checkpoint into one that `load_model` reads; every tensor is used or ignored for a reason."""
    from gridattn.lab.simulate_rows import parse_sizes

    size = None if img_size is None else parse_sizes("img-size", img_size)
    from gridattn.models import convert as models

    done = models.convert(official, model, out, img_size=size, num_classes=num_classes)
    print("\n".join([*models.summary(done), f"written: {out} and {out.with_suffix('.json')}"]))


@app.command(epilog="Example: `gridattn export nat_mini --format onnx --checkpoint nat.safetensors -o nat.onnx`")
def export(
    name: Annotated[str, typer.Argument(help="One of `gridattn list --models`.")],
    format_: Annotated[str, typer.Option("--format", help="onnx or torch-export.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File *.onnx or *.pt2.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights; random ones without.")] = None,
    img_size: Annotated[str | None, typer.Option(help="Image size, such as 384 or 256x192.")] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="One file for any image size and batch.")] = False,
) -> None:
    """Write a backbone as an ONNX file or a torch.export program, and check it against the backbone itself."""
    from gridattn.lab.simulate_rows import parse_sizes

    size = None if img_size is None else parse_sizes("img-size", img_size)
    from gridattn.lab.export import export_model

    done = export_model(name, format_, out, checkpoint=checkpoint, img_size=size, dynamic=dynamic)
    for shape, error in done.errors.items():
        print(f"relative error at {'x'.join(map(str, shape))}: {error:.1e}")
    print(f"written: {done.path}")


def _system(ctx: typer.Context, slug: str) -> Any:
    """The record of a system; prints the command's own help where no system is named."""
    if slug in ("-h", "--help"):
        print(ctx.get_help())
        raise typer.Exit
    from gridattn.systems import get_system

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("gridattn").setLevel(logging.INFO)
    return get_system(slug)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One column a key; narrow terminals wrap, pipes get full lines."""
    console = Console() if sys.stdout.isatty() else Console(width=200)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for key in rows[0] if rows else ():
        table.add_column(key.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

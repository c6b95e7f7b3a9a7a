"""The command line. Results go to standard output, progress and errors to standard error.

Exit codes: 0 ok, 2 usage or bad input, 3 a budget or gate failed, 4 a target is unreachable, 5 integrity, 130 stopped
by Ctrl-C. Heavy libraries are imported inside the commands that need them, so that ``--help`` is instant.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from pipeline.cli import checkpoints, devices
from pipeline.cli.console import AsJson, guarded, json_line, print_json, quieten_libraries
from pipeline.cli.running import run_and_show
from runtimes.errors import BadInput

RECIPES = Path(__file__).parent.parent / "recipes"
PRESETS = sorted(path.stem for path in RECIPES.glob("*.toml"))

app = typer.Typer(
    name="pocketbert", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Compress a BERT into a bundle for phones, boards and plain CPUs: ONNX and TFLite, proven and measured.",
)  # fmt: skip
cache_app = typer.Typer(help="Look at the cache of finished stages, remove entries, or empty it.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

CacheFolder = Annotated[Optional[Path], typer.Option("--cache", help="Cache folder; POCKETBERT_CACHE or ~/.cache/pocketbert otherwise.")]
BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder, or the folder a run published into.")]


@app.command()
@guarded
def run(
    recipe: Annotated[str, typer.Argument(help=f"A TOML file, or a preset: {', '.join(PRESETS)}.")],
    out: Annotated[Optional[Path], typer.Option("--out", help="Where the ledger, the report and the bundle go; out/NAME otherwise.")] = None,
    overrides: Annotated[
        Optional[list[str]], typer.Option("--set", metavar="KEY=VALUE", help="Change a key: stage.2.layers=6, finetune.epochs=3, task.max_length=32.")
    ] = None,
    model: Annotated[Optional[str], typer.Option("--model", help="Hub id or folder to start from, in place of the recipe's.")] = None,
    data: Annotated[Optional[str], typer.Option("--data", help="Data folder, in place of the recipe's.")] = None,
    cache: CacheFolder = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Run a recipe: from a pretrained model to a verified bundle, with a table of what every stage cost and bought."""
    quieten_libraries()
    run_and_show(recipe, out, overrides or [], model, data, cache, as_json, quiet)


@app.command()
@guarded
def verify(bundle: BundleFolder, as_json: AsJson = False) -> None:
    """Check a bundle: checksums, then golden cases on every runtime that is installed here."""
    from dataclasses import asdict

    from runtimes.verify import verify as verify_bundle

    files, checks = verify_bundle(bundle)
    if as_json:
        print_json({"files": files, "models": [asdict(check) for check in checks]})
        return
    print(f"{files} files match their checksums")
    for check in checks:
        if check.runtime is None:
            print(f"{check.file}: not run, no runtime for it is installed here")
        else:
            print(f"{check.file}: {check.cases} golden cases agree on {check.runtime}, worst {check.worst:.2g} of {check.tolerance:.2g} allowed")
    if all(check.runtime is None for check in checks):
        raise BadInput("no runtime is installed, so no golden case was run; pip install 'pocketbert[onnx]' or 'pocketbert[tflite]'")


@app.command()
@guarded
def predict(
    bundle: BundleFolder,
    text: Annotated[Optional[str], typer.Argument(help="A text, or a question; lines of standard input if left out.")] = None,
    pair: Annotated[
        Optional[str], typer.Option("--pair", metavar="TEXT", help="The second text, or the context of a question, where the task takes two.")
    ] = None,
    file: Annotated[Optional[str], typer.Option("--file", help="Which model file of the bundle; its first that runs here otherwise.")] = None,
    threads: Annotated[Optional[int], typer.Option("--threads", min=1, help="What the bundle recommends if left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer a text, a pair of texts, or every line of standard input; on a line a tab stands between the two texts of a pair."""
    from dataclasses import asdict

    from pipeline.cli.examples import example_of_arguments, example_of_line, lines_of
    from runtimes.predictor import Predictor

    if text is None and pair is not None:
        raise BadInput("--pair goes with a text on the command line; on standard input put a tab between the two texts")
    predictor = Predictor(bundle, file, threads)
    decoder = predictor.decoder
    if text is not None:
        examples = iter([example_of_arguments(decoder, text, pair)])
    else:
        examples = (example_of_line(decoder, line, place) for place, line in lines_of(sys.stdin.buffer, "standard input"))
    cut = 0
    for example in examples:
        result = predictor.predict(example)
        cut += result.truncated
        print(json_line(asdict(result)) if as_json else decoder.line(result.answer), flush=True)
    if cut:
        print(f"{cut} texts were longer than {predictor.bundle.max_length} tokens and were cut", file=sys.stderr)


@app.command()
@guarded
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run or a bundle, a ledger.json, or what bench --out wrote.")],
    html: Annotated[Optional[Path], typer.Option("--html", help="Write the page here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the ledger of a run, or the measurements of a bench, as a table, or write them as one HTML page."""
    places = [folder, folder / "ledger.json", folder / "report" / "ledger.json"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise BadInput(f"{folder}: no ledger.json there")
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput(f"{path}: not JSON: {error}") from error
    if isinstance(document, dict) and str(document.get("format")).startswith("pocketbert bench"):
        from device_bench.comparison import read_bench
        from pipeline.reports.bench_report import print_bench as print_table
        from pipeline.reports.bench_report import write_bench_report as write_report

        document = read_bench(path)
    elif isinstance(document, dict) and "stages" in document:
        from pipeline.reports.results import check_ledger
        from pipeline.reports.run_report import write_report
        from pipeline.reports.run_table import print_table

        check_ledger(document, str(path))
    else:
        raise BadInput(f"{path}: neither a ledger nor measurements of pocketbert bench")
    if html is not None:
        write_report(document, html)
    if as_json:
        print_json(document)
    else:
        print_table(document)


@app.command()
@guarded
def methods(name: Annotated[Optional[str], typer.Argument(help="Show one in full.")] = None, as_json: AsJson = False) -> None:
    """List the stages that a recipe can use, with paper, options and what they do to size and speed."""
    quieten_libraries()
    from pipeline.flow.registry import STAGES
    from pipeline.reports.catalogue import describe_stage, stage_text

    _show_catalogue("methods", "stage", name, STAGES, describe_stage, stage_text, as_json)


@app.command()
@guarded
def tasks(name: Annotated[Optional[str], typer.Argument(help="Show one in full.")] = None, as_json: AsJson = False) -> None:
    """List what a model can be compressed for, with columns, metrics and options."""
    quieten_libraries()
    from pipeline.reports.catalogue import describe_task, task_text
    from pipeline.tasks import TASKS

    _show_catalogue("tasks", "kind of task", name, TASKS, describe_task, task_text, as_json)


def _show_catalogue(
    command: str, what: str, name: str | None, known: Mapping[str, type[Any]], describe: Callable[[type[Any]], dict[str, Any]],
    full_text: Callable[[dict[str, Any]], str], as_json: bool,
) -> None:  # fmt: skip
    """One entry in full if it is named, else a line for each."""
    if name is not None and name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise BadInput(f"{command}: unknown {what} {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"))
    shown = [describe(known[one]) for one in (known if name is None else [name])]
    if as_json:
        print_json(shown)
    elif name is None:
        for one in shown:
            print(f"{one['name']:<22} {one['summary']}")
    else:
        print(full_text(shown[0]))


@app.command()
@guarded
def init(
    path: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.toml"),
    preset: Annotated[str, typer.Option("--preset", help=f"The preset to start from: {', '.join(PRESETS)}.")] = "clinc150",
) -> None:
    """Write a recipe to start from."""
    if preset not in PRESETS:
        raise BadInput(f"--preset {preset!r}: known are {', '.join(PRESETS)}")
    if path.exists():
        raise BadInput(f"{path}: exists already; nothing was written")
    text = (RECIPES / f"{preset}.toml").read_text(encoding="utf-8").replace(f'name = "{preset}"', f'name = "{path.stem}"')
    path.write_text(text, encoding="utf-8")
    print(f"{path} written. Point it at a model and data: pocketbert run {path} --model MODEL --data FOLDER")


@cache_app.command("list")
@guarded
def cache_list(cache: CacheFolder = None, as_json: AsJson = False) -> None:
    """List finished stages and shared work, that which was not used for longest first."""
    from pipeline.flow.cache import Cache

    entries = Cache(cache).entries()
    if as_json:
        print_json(entries)
        return
    for entry in entries:
        print(
            f"{entry['key'][:12]}  {entry['stage']:<22} {entry['seconds']:8.1f} s  {entry['bytes'] / 1e6:8.1f} MB  "
            f"{entry['unused_days']:6.1f} days unused"
        )
    print(f"{len(entries)} entries, {sum(e['bytes'] for e in entries) / 1e6:.1f} MB, in {Cache(cache).root}")


@cache_app.command("remove")
@guarded
def cache_remove(
    keys: Annotated[Optional[list[str]], typer.Argument(metavar="[KEY]...", help="Entries to remove, by the beginning of their keys.")] = None,
    older_than_days: Annotated[Optional[float], typer.Option("--older-than-days", min=0, help="Remove what was not used for so long.")] = None,
    down_to_mb: Annotated[
        Optional[float], typer.Option("--down-to-mb", min=0, help="Remove what was not used for longest until the rest has so many megabytes.")
    ] = None,
    cache: CacheFolder = None,
    as_json: AsJson = False,
) -> None:
    """Remove entries one by one, by age, or by size."""
    from pipeline.flow.cache import Cache

    if not keys and older_than_days is None and down_to_mb is None:
        raise BadInput("cache remove: nothing is named; give keys, --older-than-days or --down-to-mb, or use pocketbert cache clear")
    folder = Cache(cache)
    gone = {entry["key"]: entry for entry in [*(folder.find(key) for key in keys or []), *folder.unneeded(older_than_days, down_to_mb)]}
    for key in gone:
        folder.remove(key)
    if as_json:
        print_json(list(gone.values()))
        return
    print(f"{len(gone)} entries removed, {sum(entry['bytes'] for entry in gone.values()) / 1e6:.1f} MB freed")


@cache_app.command("clear")
@guarded
def cache_clear(cache: CacheFolder = None) -> None:
    """Remove everything from the cache."""
    from pipeline.flow.cache import Cache

    print(f"{Cache(cache).clear() / 1e6:.1f} MB freed")


checkpoints.register(app)
devices.register(app)

if __name__ == "__main__":
    app()

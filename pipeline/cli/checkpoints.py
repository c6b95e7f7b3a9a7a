"""The commands that take a checkpoint which is trained for its task already: ``convert`` makes a bundle of it, ``check`` holds files against it.

``convert`` writes a recipe, which it prints and runs; it is a start for more.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from pipeline.cli.console import AsJson, guarded, print_json, quieten_libraries
from pipeline.cli.running import run_and_show
from runtimes.errors import BadInput

LONGEST = {"question-answering": 384}
USUAL_LONGEST = 128
DROPS = {"agreement": 2.0, "divergence": 0.01}
"""Points that shipped files may lose where nothing else is asked for, by metric; of metrics against labels 1."""
MOST_DIVERGENCE = 0.1
"""Nats that answers of shipped files may be away from the model's, for tasks that decide; of others it is the metric itself."""
STAGES = """
[[stage]]
use = "adopt"

[[stage]]
use = "export"

[[stage]]
use = "quantize"
metric_drop = {drop:g}

[[stage]]
use = "bench"
texts = 100
rounds = 3
min_seconds = 0.3
lengths = [32, 128]

[[stage]]
use = "pack"
examples = "generated"         # so that no text of yours ships with the bundle
"""


Labelled = Annotated[Optional[Path], typer.Option("--data", help="Labelled rows: a folder with train and test files, or one file.")]
Unlabelled = Annotated[
    Optional[Path], typer.Option("--texts", help="Texts without labels, one a line; files are compared with the model's own answers.")
]
Kind = Annotated[Optional[str], typer.Option("--task", metavar="KIND", help="What it is for, where its files do not tell.")]
Pair = Annotated[bool, typer.Option("--pair", help="It reads two texts at once: column text_pair, or a tab on each line.")]
MaxLength = Annotated[Optional[int], typer.Option("--max-length", min=4, max=512, help="Longest input in tokens; 128, or 384.")]
Rows = Annotated[int, typer.Option("--rows", min=2, help="Most rows to measure on, of validation and of test each.")]
MetricDrop = Annotated[Optional[float], typer.Option("--metric-drop", min=0, help="Points that a file may lose: 1, or 2 of agreement.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(convert)
    app.command()(check)


@guarded
def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a fine-tuned checkpoint, or its hub id if it is in the local cache.")],
    data: Labelled = None,
    texts: Unlabelled = None,
    task: Kind = None,
    pair: Pair = False,
    max_length: MaxLength = None,
    rows: Rows = 500,
    metric_drop: MetricDrop = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="Where recipe, ledger, report and bundle go; out/NAME otherwise.")] = None,
    overrides: Annotated[Optional[list[str]], typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")] = None,
    cache: Annotated[Optional[Path], typer.Option("--cache", help="Cache folder; POCKETBERT_CACHE or ~/.cache/pocketbert otherwise.")] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Make a bundle of a fine-tuned checkpoint without training: ONNX and TFLite, int8 held to a gate, proven and measured."""
    quieten_libraries()
    table = task_table(model, data, texts, task, pair, max_length, rows)
    name = _name_of(model)
    target = out or Path("out") / name
    given = data or texts
    recipe = write_recipe(target, name, model, table, given is not None, metric_drop)
    if not as_json:
        print(recipe.read_text(encoding="utf-8"))
        again = f"pocketbert run {recipe} --model {model}" + ("" if given is None else f" --data {given}")
        print(f"This is {recipe}, a start for more: {again}\n", flush=True)
    run_and_show(str(recipe), target, overrides or [], model, None if given is None else str(given.resolve()), cache, as_json, quiet)


@guarded
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An .onnx or .tflite file, a bundle, or a folder of the hub with such files.")],
    against: Annotated[str, typer.Option("--against", metavar="MODEL", help="The model it was made from: a folder, or a hub id in the local cache.")],
    data: Labelled = None,
    texts: Unlabelled = None,
    task: Kind = None,
    pair: Pair = False,
    max_length: MaxLength = None,
    rows: Rows = 500,
    metric_drop: MetricDrop = None,
    as_json: AsJson = False,
) -> None:
    """Is somebody's model file still right? Metric, agreement and worst operator against its model; exit 3 if a file is broken."""
    quieten_libraries()
    from pipeline.flow.recipe import Recipe
    from pipeline.flow.registry import STAGES as KNOWN_STAGES
    from pipeline.flow.source_data import load_data
    from pipeline.models.source import find_source
    from pipeline.stages.file_check import FileCheck, files_of, refuse_broken
    from pipeline.tasks import TASKS

    files = files_of(file)
    table = task_table(against, data, texts, task, pair, max_length, rows) | {"data": str(data or texts or "builtin:vocabulary")}
    kind = table.pop("kind")
    recipe = Recipe(name="check", model={"source": against}, task=TASKS[kind](**table), stages=[KNOWN_STAGES["adopt"]()])
    source = find_source(against)
    loaded = load_data(recipe, source, None)
    for note in loaded.notes:
        print(note, file=sys.stderr)
    checked = FileCheck(source, recipe.task, loaded, _allowed(recipe.task.metric, metric_drop))
    verdicts = [checked.check(path, name) for name, path in files]
    if as_json:
        print_json({"rows": len(loaded.test), "model": checked.reference, "files": [asdict(one) for one in verdicts]})
    else:
        for one in verdicts:
            told = ", ".join(f"{name} {value:g} ({checked.reference[name]:g})" for name, value in one.metrics.items())
            worst = "" if one.worst is None else f"; leaves the model most at {one.worst[0]} ({100 * one.worst[1]:.2g} % off)"
            print(f"{'broken' if one.broken else 'ok':<7} {one.file}  {one.size_bytes / 1e6:.1f} MB  {told}{worst}")
    refuse_broken(verdicts)


def task_table(
    model: str, data: Path | None, texts: Path | None, kind: str | None, pair: bool, max_length: int | None, rows: int
) -> dict[str, Any]:
    """The ``[task]`` table but for its data: from the files of the model, and from the command line."""
    from pipeline.models.own_task import longest_input, own_task
    from pipeline.models.source import find_source
    from pipeline.tasks import TASKS

    if data is not None and texts is not None:
        raise BadInput("--data and --texts: give one; labelled rows are measured against their labels, texts against the model's own answers")
    folder = find_source(model)
    if kind is not None and kind not in TASKS:
        raise BadInput(f"--task {kind!r}: known are {', '.join(TASKS)}")
    table = own_task(folder) if kind is None else {"kind": kind}
    kind = table["kind"]
    if pair and kind not in ("text-classification", "text-regression"):
        raise BadInput(f"--pair: {kind} has its own columns; --pair is for text-classification and text-regression")
    if data is None:
        table["metric"] = "agreement" if TASKS[kind].decides else "divergence"
    longest = max_length or min(longest_input(folder), LONGEST.get(kind, USUAL_LONGEST))
    further = {"pair_column": "text_pair"} if pair else {"stride": min(128, longest // 4)} if kind == "question-answering" else {}
    return table | further | {"max_length": longest, "evaluation_rows": rows}


def _allowed(metric: str | None, metric_drop: float | None) -> float:
    """Points of the metric that decides which a file may lose."""
    return DROPS.get(metric or "", 1.0) if metric_drop is None else metric_drop


def write_recipe(folder: Path, name: str, model: str, table: dict[str, Any], texts: bool, metric_drop: float | None) -> Path:
    """``folder/recipe.toml``. Paths that lie elsewhere do not stand in it; the command line gives them."""
    from pipeline.flow.recipe import toml_pairs
    from pipeline.tasks import TASKS

    source, rest = "given" if Path(model).exists() else model, {key: value for key, value in table.items() if key != "kind"}
    lines = [f"# {name}: made by pocketbert convert", f'name = "{name}"', "", "[model]", *toml_pairs({"source": source})]
    lines += ["", "[task]", *toml_pairs({"kind": table["kind"], "data": "given" if texts else "builtin:vocabulary"} | rest)]
    drop = _allowed(table.get("metric"), metric_drop)
    lines += ["", "[budget]", f"metric_drop = {drop:g}", *([f"divergence = {MOST_DIVERGENCE:g}"] if TASKS[table["kind"]].decides else [])]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.toml"
    path.write_text("\n".join(lines) + "\n" + STAGES.format(drop=drop), encoding="utf-8")
    return path


def _name_of(model: str) -> str:
    """The last part of a hub id or a path, as a name that a recipe may have."""
    last = Path(model.rstrip("/")).name if Path(model).exists() else model.split("/")[-1]
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in last).strip("._-")
    return kept or "model"

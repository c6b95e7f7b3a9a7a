"""Run a recipe and show what came of it, for ``run`` and ``convert``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.console import print_json


def run_and_show(
    recipe: str, out: Path | None, overrides: Sequence[str], model: str | None, data: str | None, cache: Path | None, as_json: bool, quiet: bool
) -> None:
    """Run ``recipe`` into ``out``, ``out/NAME`` if None, and print its table, or its ledger as JSON."""
    from pipeline.flow.recipe import load_recipe

    loaded = load_recipe(recipe, overrides, model, data)  # before the engine is imported, and torch with it
    from pipeline.flow import processes
    from pipeline.flow.cache import Cache
    from pipeline.flow.engine import run
    from pipeline.flow.progress import Progress
    from pipeline.reports.run_report import write_report
    from pipeline.reports.run_table import print_table

    folder = Path(recipe).parent if Path(recipe).is_file() else None
    target = out or Path("out") / loaded.name
    ledger = run(loaded, target, Cache(cache), Progress(quiet), write_report, folder)
    if processes.rank() > 0:
        return
    if as_json:
        print_json(ledger.as_dict())
        return
    print_table(ledger.as_dict())
    print(f"\nreport  {target / 'report.html'}")
    if (target / "bundle").is_dir() and ledger.outcome == "published":
        print(f"bundle  {target / 'bundle'}")
        first, *others = (f'"your {column.replace("_", " ")}"' for column in loaded.task.columns)
        print(f"try     pocketbert predict {target / 'bundle'} {first}" + "".join(f" --pair {other}" for other in others))

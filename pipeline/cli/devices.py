"""The commands that measure where a bundle will run: ``bench``, ``compare``, ``devices``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from pipeline.cli.console import AsJson, guarded, print_json
from runtimes.errors import BadInput, GateFailed

devices_app = typer.Typer(help="What can be measured on, and setting it up.", no_args_is_help=True)

MOST_MINUTES = 24 * 60
MOST_MB = 1e8
MOST_THREADS, MOST_CORE, MOST_TOKENS = 1024, 4095, 100_000
"""Larger values on the command line are slips."""

Junit = Annotated[Optional[Path], typer.Option("--junit", help="Write the comparison as JUnit XML, for CI.")]
Markdown = Annotated[Optional[Path], typer.Option("--markdown", help="Write the comparison as a Markdown table.")]
MaxRegression = Annotated[str, typer.Option("--max-regression", metavar="PERCENT", help="Fail (exit 3) where something got slower by more: 5%.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(bench)
    app.command()(compare)
    app.add_typer(devices_app, name="devices")


@guarded
def bench(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder, or the folder a run published into.")],
    on: Annotated[
        str, typer.Option("--on", metavar="TARGETS", help="local, ssh:USER@HOST[:PORT], adb[:SERIAL], qemu:CPU, @lab.toml; several with commas.")
    ] = "local",
    tier: Annotated[str, typer.Option("--tier", help="How long: rapid, quick or normal (6, 10 or 60 seconds a file and case).")] = "quick",
    files: Annotated[Optional[list[str]], typer.Option("--file", help="A file of the bundle; may be repeated. All of them otherwise.")] = None,
    texts: Annotated[
        Optional[Path],
        typer.Option("--texts", help="Examples to run: .txt with one a line, .jsonl, .csv, .tsv, or the recipe's data. The golden cases otherwise."),
    ] = None,
    most_texts: Annotated[int, typer.Option("--most-texts", min=1, help="Take at most so many of them, drawn at random but always the same.")] = 1000,
    threads: Annotated[Optional[str], typer.Option("--threads", metavar="1,4", help="Thread counts; one and all strong cores otherwise.")] = None,
    cores: Annotated[Optional[str], typer.Option("--cores", metavar="CORES", help="Pin to these: 0,2 or big or little.")] = None,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="16,32", help="Fixed lengths in tokens beside the texts; an empty one for none.")
    ] = "16,32,64",
    sustained: Annotated[float, typer.Option("--sustained", metavar="MINUTES", min=0, help="Run the first file so long without a pause.")] = 0.0,
    provision: Annotated[bool, typer.Option("--provision", help="Make a private environment with the runtimes on boards behind ssh.")] = False,
    memory_cap: Annotated[Optional[float], typer.Option("--memory-cap", metavar="MB", help="Most memory of a job on this machine.")] = None,
    out: Annotated[Optional[Path], typer.Option("--out", metavar="FILE", help="Keep the measurements here, for compare and report.")] = None,
    baseline: Annotated[Optional[Path], typer.Option("--baseline", metavar="FILE", help="Compare with these earlier measurements.")] = None,
    max_regression: MaxRegression = "5%",
    junit: Junit = None,
    markdown: Markdown = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Measure a bundle where it will run: latency, memory and agreement on every target, in one table."""
    from device_bench.bench import Plan
    from device_bench.bench import bench as run_bench
    from device_bench.comparison import read_bench
    from device_bench.lab import parse_places
    from pipeline.cli.examples import read_examples
    from pipeline.flow.progress import Progress
    from pipeline.reports.bench_report import print_bench
    from runtimes.bundle import open_bundle

    allowed = _percent(max_regression)
    if not 0 <= sustained <= MOST_MINUTES:
        raise BadInput(f"--sustained {sustained:g}: minutes from 0 to {MOST_MINUTES} are needed")
    if memory_cap is not None and not 0 < memory_cap <= MOST_MB:
        raise BadInput(f"--memory-cap {memory_cap:g}: megabytes above 0, up to {MOST_MB:g}, are needed")
    for option, path in (("--out", out), ("--junit", junit), ("--markdown", markdown)):
        _check_writable(option, path)
    opened = open_bundle(bundle)
    before = None if baseline is None else read_bench(baseline)
    places = parse_places(on, provision=provision, cores=_cores(cores), **({} if memory_cap is None else {"memory_cap_mb": memory_cap}))
    progress = Progress(quiet)
    examples, score = ([], None) if texts is None else read_examples(opened, texts, most_texts, progress.say)
    plan = Plan(
        tier=tier, files=files or [], examples=examples, score=score, threads=_numbers("--threads", threads or "", MOST_THREADS),
        lengths=_numbers("--lengths", lengths, MOST_TOKENS), sustained_minutes=sustained,
    )  # fmt: skip
    document = run_bench(opened, places, plan, progress.say)
    if out is not None:
        out.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    if as_json:
        print_json(document)
    else:
        print_bench(document)
    code = _tell_failures(document)
    if before is not None:
        _compare(before, document, allowed, junit, markdown, quiet=as_json)
    if code:
        raise typer.Exit(code)


@guarded
def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="Earlier measurements, of bench --out.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="Later ones.")],
    max_regression: MaxRegression = "5%",
    junit: Junit = None,
    markdown: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Say what got faster or slower between two measurements, and what cannot be told from noise."""
    from device_bench.comparison import read_bench

    for option, path in (("--junit", junit), ("--markdown", markdown)):
        _check_writable(option, path)
    _compare(read_bench(before), read_bench(after), _percent(max_regression), junit, markdown, as_json=as_json)


@devices_app.command("list")
@guarded
def devices_list(as_json: AsJson = False) -> None:
    """List this machine, phones that ADB sees, and emulated processors; say what is missing for each."""
    from device_bench.discovery import discover

    found = discover()
    if as_json:
        print_json(found)
        return
    for device in found:
        print(f"{device['on']:<24} {device['what']}")


@devices_app.command("info")
@guarded
def devices_info(
    on: Annotated[str, typer.Argument(metavar="TARGET", help="local, ssh:USER@HOST[:PORT], adb[:SERIAL], qemu:CPU or @lab.toml.")],
) -> None:
    """Show what a target says of itself: processor, clocks, temperatures, runtimes; as JSON."""
    from device_bench.lab import open_target, parse_places

    for place in parse_places(on):
        with open_target(place) as target:
            print_json({"on": place.on, "name": place.label, **target.info()})


@devices_app.command("setup")
@guarded
def devices_setup(
    what: Annotated[str, typer.Argument(help="qemu: emulated aarch64. qemu-armv7: emulated 32-bit ARM.")],
) -> None:
    """Download and build what a kind of target needs, once, into the cache. Opens network connections, as no other command does."""
    from device_bench.emulator import SETUP_NAMES, setup

    known = {name: architecture for architecture, name in SETUP_NAMES.items()}
    if what not in known:
        raise BadInput(f"devices setup: unknown {what!r}; known are {', '.join(known)}")
    setup(known[what], _say)
    print(f"{what} is ready: pocketbert bench BUNDLE --on qemu:{'cortex-a76' if what == 'qemu' else 'cortex-a7'}")


@devices_app.command("clean")
@guarded
def devices_clean(
    what: Annotated[str, typer.Argument(metavar="TARGET", help="ssh:USER@HOST[:PORT]: what --provision left there. qemu: all that was set up here.")],
) -> None:
    """Delete what was set up for a target, there or in the cache here."""
    if what == "qemu":
        from device_bench.board_cache import clear

        print(f"freed {clear() / 1e6:.0f} MB")
        return
    from device_bench.lab import open_target, parse_places
    from device_bench.provision import unprovision

    for place in parse_places(what):
        if place.kind != "ssh":
            raise BadInput(f"devices clean: nothing stays behind on {place.on}; ssh:USER@HOST and qemu can be cleaned")
        with open_target(place) as target:
            unprovision(target)
        print(f"{place.label}: clean")


@devices_app.command("build-runner")
@guarded
def devices_build_runner(
    abi: Annotated[str, typer.Argument(help="x86_64, aarch64, armv7 or arm64-v8a (Android, needs ANDROID_NDK_HOME).")],
    compiler: Annotated[Optional[str], typer.Option("--compiler", help="The C compiler; the usual one for the processor otherwise.")] = None,
) -> None:
    """Build the runner that measures where there is no Python, and print where it is."""
    from device_bench.runner_build import build_runner

    print(build_runner(abi, compiler))


def _compare(before: dict[str, Any], after: dict[str, Any], allowed: float, junit: Path | None, markdown: Path | None, as_json: bool = False,
             quiet: bool = False) -> None:  # fmt: skip
    from dataclasses import asdict

    from device_bench.comparison import as_junit, as_markdown, as_table, gate, ungated
    from device_bench.comparison import compare as compare_documents

    comparisons = compare_documents(before, after)
    slower = gate(comparisons, allowed)
    if junit is not None:
        junit.write_text(as_junit(comparisons, allowed), encoding="utf-8")
    if markdown is not None:
        markdown.write_text(as_markdown(comparisons), encoding="utf-8")
    if as_json:
        print_json([asdict(comparison) for comparison in comparisons])
    elif not quiet:
        print(as_table(comparisons))
    unsure = [one for one in ungated(comparisons, allowed) if one not in slower]
    if unsure:
        print(f"{len(unsure)} of {len(comparisons)} could not be held to {100 * allowed:g} %: not compared, or too noisy", file=sys.stderr)
    if slower:
        raise GateFailed(f"{len(slower)} of {len(comparisons)} got slower by more than {100 * allowed:g} %: {slower[0].described}")


def _tell_failures(document: dict[str, Any]) -> int:
    """Print what went wrong on any target; the exit code for it, 0 if nothing did."""
    from device_bench.bench import failed

    failures = failed(document)
    for failure in failures:
        print(f"error: {failure['name']}: {failure['message'].removeprefix(failure['name'] + ': ')}", file=sys.stderr)
    return max((failure["exit_code"] for failure in failures), default=0)


def _percent(text: str) -> float:
    """"5%" or "5" -> 0.05."""
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < 1000:
        raise BadInput(f"--max-regression {text!r}: a percentage such as 5% is needed")
    return value / 100


def _numbers(option: str, text: str, most: int, least: int = 1) -> list[int]:
    """Whole numbers with commas between them, none twice: a row of a measurement would be measured, and waited for, twice."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    fit = all(part.isascii() and part.isdigit() and len(part) < 10 and least <= int(part) <= most for part in parts)
    if not fit or len({int(part) for part in parts}) < len(parts):
        wanted = f"whole numbers from {least} to {most} with commas between them, none twice, are needed, such as 1,4"
        named = "big, little, or " if option == "--cores" else ""
        raise BadInput(f"{option} {text[:200]!r}: {named}{wanted}")
    return [int(part) for part in parts]


def _check_writable(option: str, path: Path | None) -> None:
    """Before anything is measured: a file that cannot be written would lose it all."""
    if path is None:
        return
    try:
        bad = path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)
    except (OSError, ValueError):
        bad = True
    if bad or path.resolve().is_relative_to("/proc"):
        raise BadInput(f"{option} {str(path)[:200]!r}: cannot be written; name a file in a folder that is there")


def _cores(text: str | None) -> tuple[int, ...] | str | None:
    if text is None or text in ("big", "little"):
        return text
    found = tuple(_numbers("--cores", text, MOST_CORE, least=0))
    if not found:
        raise BadInput("--cores '': big, little, or core numbers with commas between them, such as 0,2")
    return found


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)

"""Run a recipe: stage after stage, each from the cache where it can be, gates after each, publish at the end.

Data flows one way: artifacts by role into a stage, artifacts by role out. The ledger is written after every stage,
so that whatever happens, what is known is on disk.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.flow import processes
from pipeline.flow.cache import Cache, digest, library_versions, tree_sha256
from pipeline.flow.ledger import Ledger
from pipeline.flow.progress import Progress, clock
from pipeline.flow.recipe import Recipe, check_order
from pipeline.flow.stage import QUATERNIONS, SHARED_LAYERS, THIN_MATRICES, UNEQUAL_LAYERS, Artifact, Context, Stage
from pipeline.models.config import EncoderConfig
from pipeline.models.hub import config_fields, read_config
from pipeline.models.source import find_source, source_sha256
from pipeline.reports.run_report import write_report
from pipeline.tasks import load_data
from runtimes.bundle import MANIFEST, REPORT, write_sums
from runtimes.errors import BadInput, PocketbertError


def run(recipe: Recipe, out: Path, cache: Cache, progress: Progress, recipe_folder: Path | None = None) -> Ledger:
    """Run ``recipe`` and publish its bundle to ``out/bundle``.

    Args:
        out: gets ``ledger.json`` and ``report.html`` always, ``bundle/`` only when every gate held.
        recipe_folder: where relative paths of the recipe are looked up first.

    Raises:
        BadInput, GateFailed: the ledger is written all the same.
    """
    if processes.rank() == 0:
        return _run(recipe, out, cache, progress, recipe_folder)
    with TemporaryDirectory(prefix="pocketbert-") as folder:  # the first process writes what the user sees
        return _run(recipe, Path(folder), cache, Progress(quiet=True), recipe_folder)


def _run(recipe: Recipe, out: Path, cache: Cache, progress: Progress, recipe_folder: Path | None) -> Ledger:
    _check_writable(out)
    source = find_source(recipe.model.source, recipe_folder)
    data = load_data(recipe.task, recipe_folder)
    check_order(recipe.stages, recipe.name, structure_traits(source))
    for note in data.notes:
        progress.say(note)
    ledger = Ledger(recipe, [len(data.train), len(data.validation), len(data.test)])
    available: dict[str, Artifact] = {"source": Artifact(source, source_sha256(source))}
    try:
        for number, stage in enumerate(recipe.stages, start=1):
            progress.say(f"[{number}/{len(recipe.stages)}] {stage.use}")
            record, made = _run_stage(recipe, stage, source, data, available, cache, progress, ledger)
            available |= made
            ledger.add(record)
            state = "cached" if record["cached"] else "done"
            progress.say(f"[{number}/{len(recipe.stages)}] {stage.use}: {state} in {clock(record['seconds'])}")
            ledger.check_gates(stage)
            ledger.write(out)
    except PocketbertError as error:
        ledger.outcome = f"failed: {error}"
        ledger.write(out)
        write_report(ledger.as_dict(), out / "report.html")
        if (out / "bundle").exists():
            progress.say(f"{out / 'bundle'} is that of an earlier run; this run published none")
        raise
    ledger.outcome = "ok"
    if "bundle" in available:
        _publish(available["bundle"].folder, out, ledger)
        ledger.outcome = "published"
    ledger.write(out)
    write_report(ledger.as_dict(), out / "report.html")
    return ledger


def structure_traits(source: Path) -> list[str]:
    """What of the things that a stage may refuse (:attr:`Stage.refuses`) the model in ``source`` has, by its config."""
    raw = read_config(source)
    config = EncoderConfig(**(raw if raw["model_type"] == EncoderConfig.model_type else config_fields(raw)))
    shapes = [layer | {"ranks": None} for layer in config.layers]
    found = {
        SHARED_LAYERS: config.shares, QUATERNIONS: config.quaternion, THIN_MATRICES: any(layer.get("ranks") for layer in config.layers),
        UNEQUAL_LAYERS: any(shape != shapes[0] for shape in shapes),
    }  # fmt: skip
    return [trait for trait, has in found.items() if has]


def _run_stage(
    recipe: Recipe, stage: Stage, source: Path, data: Any, available: dict[str, Artifact], cache: Cache, progress: Progress, ledger: Ledger
) -> tuple[dict[str, Any], dict[str, Artifact]]:
    inputs = {role: available[role] for role in (*stage.needs, *stage.uses) if role in available}
    key = digest({
        "stage": stage.use, "version": stage.version, "config": stage.model_dump(mode="json"),
        "inputs": {role: artifact.sha256 for role, artifact in inputs.items()},
        "data": data.fingerprint, "task": recipe.task.model_dump(exclude={"data"}), "seed": recipe.seed,
        "libraries": library_versions(),
        "whole": ledger.fingerprint() if stage.reads_ledger else None,
    })  # fmt: skip
    if processes.rank() > 0:
        return _help(stage, key, lambda output: Context(recipe, source, data, inputs, output, cache.work(key), progress, ledger.records, cache))
    with cache.lock(key):
        record = cache.record(key)
        processes.told(record is not None)
        if record is not None:
            return record | {"cached": True}, cache.artifacts(key, record)
        work = cache.work(key)
        output = work / "output"
        shutil.rmtree(output, ignore_errors=True)  # half-written by a run that was killed; checkpoints lie beside it
        output.mkdir()
        context = Context(recipe, source, data, inputs, output, work, progress, ledger.records, cache)
        started = time.monotonic()
        stage.run(context)
        folders = {role: role for role in stage.gives if (output / role).is_dir()} | context.aliases
        missing = set(stage.gives) - set(folders)
        if missing:
            raise BadInput(f"stage {stage.use}: did not write {', '.join(sorted(missing))}, which it declares")
        hashes = {folder: tree_sha256(output / folder) for folder in set(folders.values())}
        record = {
            "stage": stage.use, "key": key, "seconds": round(time.monotonic() - started, 2), "notes": context.notes,
            "subjects": [asdict(subject) for subject in context.subjects], "measurements": context.measurements,
            "artifacts": {role: {"folder": f, "sha256": hashes[f]} for role, f in sorted(folders.items())},
        }  # fmt: skip
        cache.publish(key, output, record)
        processes.wait()
        return record | {"cached": False}, cache.artifacts(key, record)


def _help(stage: Stage, key: str, context: Callable[[Path], Context]) -> tuple[dict[str, Any], dict[str, Artifact]]:
    """What the other processes of a run do: train with the first, whose result they then take from the cache."""
    cached = processes.told(None)
    if not cached and stage.trains:
        with TemporaryDirectory(prefix="pocketbert-") as folder:
            made = context(Path(folder))
            stage.run(made)
    else:
        made = context(Path())
    if not cached:
        processes.wait()
    record = made.cache.record(key)
    return record | {"cached": cached}, made.cache.artifacts(key, record)


def _publish(bundle: Path, out: Path, ledger: Ledger) -> None:
    """Copy the bundle to ``out/bundle`` with its report; it appears whole or not at all."""
    staging, final, old = out / ".bundle.partial", out / "bundle", out / ".bundle.old"
    for leftover in (staging, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        for file in sorted(p for p in bundle.rglob("*") if p.is_file()):
            target = staging / file.relative_to(bundle)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        (staging / REPORT).mkdir()
        ledger.outcome = "published"
        ledger.write(staging / REPORT)
        write_report(ledger.as_dict(), staging / REPORT / "index.html")
        write_sums(staging / REPORT)
    except BaseException:  # a full disk, Ctrl-C: leave no half of a bundle behind
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if final.exists():
        os.replace(final, old)
    os.replace(staging, final)
    shutil.rmtree(old, ignore_errors=True)


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written: {error.strerror}") from error
    if (out / "bundle").exists() and not (out / "bundle" / MANIFEST).is_file():
        raise BadInput(f"--out {out}: holds a 'bundle' that is none of ours, and it would be replaced; choose another folder")



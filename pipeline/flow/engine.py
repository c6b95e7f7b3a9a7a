"""Run a recipe: stage after stage, each from the cache where it can be, gates after each, publish at the end.

Data flows one way: artifacts by role into a stage, artifacts by role out. The ledger is written after every stage,
so that whatever happens, what is known is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.flow import processes
from pipeline.flow.cache import Artifact, Cache, digest, library_versions, tree_sha256
from pipeline.flow.code import code_digest, task_code
from pipeline.flow.ledger import FEWEST_ROWS_OF_A_CLASS, GATE_SPLIT, Ledger
from pipeline.flow.progress import Progress, clock
from pipeline.flow.recipe import Recipe, check_order, lock_text, public_name
from pipeline.flow.source_data import load_data
from pipeline.flow.stage import QUATERNIONS, SHARED_LAYERS, THIN_MATRICES, UNEQUAL_LAYERS, Context, Stage
from pipeline.models.hub_fields import read_encoder_config
from pipeline.models.source import find_source, source_sha256
from pipeline.tasks.base import SPLITS, Data
from runtimes.bundle import MANIFEST, REPORT, write_sums
from runtimes.errors import BadInput, PocketbertError

Report = Callable[[dict[str, Any], Path], None]
"""(content of a ledger, file) -> writes the page that people read."""


def run(recipe: Recipe, out: Path, cache: Cache, progress: Progress, report: Report, recipe_folder: Path | None = None) -> Ledger:
    """Run ``recipe`` and publish its bundle to ``out/bundle``.

    Args:
        out: gets ``ledger.json`` and ``report.html`` always, ``bundle/`` only when every gate held.
        report: writes the page.
        recipe_folder: where relative paths of the recipe are looked up first.

    Raises:
        BadInput, GateFailed: the ledger is written all the same, as it is whatever else ends the run.
    """
    if processes.rank() == 0:
        return _Run(recipe, out, cache, progress, report).run(recipe_folder)
    with TemporaryDirectory(prefix="pocketbert-") as folder:  # the first process writes what the user sees
        return _Run(recipe, Path(folder), cache, Progress(quiet=True), report).run(recipe_folder)


@dataclass
class _Run:
    """One run of a recipe: its data, and the artifacts that there are by role."""

    recipe: Recipe
    out: Path
    cache: Cache
    progress: Progress
    report: Report
    available: dict[str, Artifact] = field(default_factory=dict)

    def run(self, recipe_folder: Path | None) -> Ledger:
        check_writable("--out", self.out)
        if (self.out / "bundle").exists() and not (self.out / "bundle" / MANIFEST).is_file():
            raise BadInput(f"--out {self.out}: holds a 'bundle' that is none of ours, and it would be replaced; choose another folder")
        check_writable("--cache", self.cache.root)
        recipe, progress = self.recipe, self.progress
        source = find_source(recipe.model.source, recipe_folder)
        self.data = load_data(recipe, source, recipe_folder)
        check_order(recipe.stages, recipe.name, structure_traits(source))
        _check_labels(recipe, self.data)
        for note in self.data.notes:
            progress.say(note)
        judged = self._judged_classes()
        self.ledger = Ledger(recipe, {split: len(self.data.split(split)) for split in (*SPLITS, "unlabeled")}, judged)
        self.available["source"] = Artifact(source, source_sha256(source))
        try:
            self.ledger.floor = self._floor()
            for number, stage in enumerate(recipe.stages, start=1):
                progress.say(f"[{number}/{len(recipe.stages)}] {stage.use}")
                record = self._stage(stage)
                self.ledger.add(record)
                state = "cached" if record["cached"] else "done"
                progress.say(f"[{number}/{len(recipe.stages)}] {stage.use}: {state} in {clock(record['seconds'])}")
                self.ledger.check_gates(stage)
                self.ledger.write(self.out)
            if "bundle" in self.available:
                self._publish(self.available["bundle"].folder)
        except BaseException as error:  # whatever ends a run, Ctrl-C included: no ledger says for ever that it is running
            self.ledger.outcome = outcome_of(error)
            self._tell(self.out / "report.html")
            if (self.out / "bundle").exists():
                progress.say(f"{self.out / 'bundle'} is that of an earlier run; this run published none")
            raise
        if "bundle" not in self.available:
            self.ledger.outcome = "ok"
        self._tell(self.out / "report.html")
        return self.ledger

    def _judged_classes(self) -> list[str]:
        """Classes that ``budget.recall_drop`` is held for."""
        if self.recipe.budget.recall_drop is None:
            return []
        rows = self.recipe.task.rows_by_class(self.data.split(GATE_SPLIT))
        judged = sorted(label for label, count in rows.items() if count >= FEWEST_ROWS_OF_A_CLASS)
        if not judged:
            raise BadInput(
                f"budget.recall_drop: no class has {FEWEST_ROWS_OF_A_CLASS} validation rows, the largest has {max(rows.values(), default=0)}; "
                "give more validation rows, or leave it out"
            )
        return judged

    def _tell(self, page: Path) -> None:
        self.ledger.write(page.parent)
        self.report(self.ledger.as_dict(), page)

    def _floor(self) -> dict[str, Any] | None:
        """What a model without a BERT scores; kept beside the cache's shared work, since it costs seconds."""
        task = self.recipe.task
        if not task.needs_labels or processes.rank() > 0:
            return None
        key = digest(["floor", task.kind, task.model_dump(exclude={"data"}), self.data.fingerprint, *task_code(task), library_versions()])

        def make(folder: Path) -> None:
            started = time.monotonic()
            floor = task.floor(self.data)
            if floor is not None:
                floor["seconds"] = round(time.monotonic() - started, 2)
            folder.mkdir()
            (folder / "floor.json").write_text(json.dumps(floor) + "\n", encoding="utf-8")

        return json.loads((self.cache.shared(key, "floor", make) / "floor.json").read_text(encoding="utf-8"))

    def _stage(self, stage: Stage) -> dict[str, Any]:
        """The record of one stage, from the cache or from work; what it gives becomes available."""
        recipe, cache = self.recipe, self.cache
        given = {role: stage.reads.get(role, role) for role in (*stage.needs, *stage.uses)}
        inputs = {role: self.available[name] for role, name in given.items() if name in self.available}
        key = digest({
            "stage": stage.use, "version": stage.version, "code": code_digest(type(stage).__module__), "config": stage.model_dump(mode="json"),
            "inputs": {role: artifact.sha256 for role, artifact in inputs.items()}, "data": self.data.fingerprint,
            "task": [recipe.task.kind, recipe.task.model_dump(exclude={"data"}), *task_code(recipe.task)],
            "seed": recipe.seed, "libraries": library_versions(),
            **self._machine(stage), "whole": self.ledger.fingerprint() if stage.reads_ledger else None,
        })  # fmt: skip

        def context(output: Path) -> Context:
            return Context(
                recipe.name, recipe.seed, recipe.task, self.data, public_name(recipe.model.source), lock_text(recipe), inputs, output,
                cache.work(key), self.progress, self.ledger.records, cache, recipe.train,
            )  # fmt: skip

        record = _help(stage, key, cache, context) if processes.rank() > 0 else _lead(stage, key, cache, context)
        made = cache.artifacts(key, record)
        self.available |= {stage.writes.get(role, role): artifact for role, artifact in made.items()}
        return record

    def _machine(self, stage: Stage) -> dict[str, Any]:
        """What of the machine decides a stage's result: its GPU, where one trains. Nothing on a CPU with the usual [train] section."""
        if not stage.trains:
            return {}
        from pipeline.models.device import choose, hardware

        options = self.recipe.train.model_dump(exclude_defaults=True, exclude={"device"})
        kind = hardware(choose(self.recipe.train.device, processes.count()))
        return ({"train": options} if options else {}) | ({"hardware": kind} if kind else {})

    def _publish(self, bundle: Path) -> None:
        """Copy the bundle to ``out/bundle`` with its report; it appears whole or not at all."""
        staging, final, old = self.out / ".bundle.partial", self.out / "bundle", self.out / ".bundle.old"
        for leftover in (staging, old):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            for file in sorted(p for p in bundle.rglob("*") if p.is_file()):
                target = staging / file.relative_to(bundle)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
            (staging / REPORT).mkdir()
            self.ledger.outcome = "published"
            self._tell(staging / REPORT / "index.html")
            write_sums(staging / REPORT)
        except BaseException:  # a full disk, Ctrl-C: leave no half of a bundle behind
            shutil.rmtree(staging, ignore_errors=True)
            raise
        if final.exists():
            os.replace(final, old)
        os.replace(staging, final)
        shutil.rmtree(old, ignore_errors=True)


def _check_labels(recipe: Recipe, data: Data) -> None:
    """Refuse, before any work, a stage that learns from labels which training rows do not have."""
    if recipe.task.labelled(data):
        return
    for number, stage in enumerate(recipe.stages, start=1):
        if stage.without_labels:
            raise BadInput(f"{recipe.name}: stage[{number}].{stage.use}: learns from labels, and the training rows have none; {stage.without_labels}")


def outcome_of(error: BaseException) -> str:
    """What the ledger says of a run that ``error`` ended."""
    if isinstance(error, KeyboardInterrupt):
        return "failed: stopped by Ctrl-C; the same command goes on from there"
    if isinstance(error, PocketbertError):
        return f"failed: {error}"
    return f"failed: {type(error).__name__}: {error}"


def structure_traits(source: Path) -> list[str]:
    """What of the things that a stage may refuse (:attr:`Stage.refuses`) the model in ``source`` has, by its config."""
    config = read_encoder_config(source)
    shapes = [layer | {"ranks": None} for layer in config.layers]
    found = {
        SHARED_LAYERS: config.shares, QUATERNIONS: config.quaternion, THIN_MATRICES: any(layer.get("ranks") for layer in config.layers),
        UNEQUAL_LAYERS: any(shape != shapes[0] for shape in shapes),
    }  # fmt: skip
    return [trait for trait, has in found.items() if has]


def _lead(stage: Stage, key: str, cache: Cache, make: Callable[[Path], Context]) -> dict[str, Any]:
    """What the first process of a run does: take the stage from the cache, or run it."""
    with cache.lock(key):
        record = cache.record(key)
        processes.told(record is not None)
        if record is not None:
            return record | {"cached": True}
        output = cache.work(key) / "output"
        shutil.rmtree(output, ignore_errors=True)  # half-written by a run that was killed; checkpoints lie beside it
        output.mkdir()
        context = make(output)
        started = time.monotonic()
        context.progress.taken()
        stage.run(context)
        folders = {role: role for role in stage.gives if (output / role).is_dir()} | context.aliases
        missing = set(stage.gives) - set(folders)
        if missing:
            raise BadInput(f"stage {stage.use}: did not write {', '.join(sorted(missing))}, which it declares")
        hashes = {folder: tree_sha256(output / folder) for folder in set(folders.values())}
        record = {
            "stage": stage.use, "key": key, "seconds": round(time.monotonic() - started, 2), "notes": context.notes,
            "subjects": [asdict(subject) for subject in context.subjects], "measurements": context.measurements, "training": context.progress.taken(),
            "artifacts": {role: {"folder": f, "sha256": hashes[f]} for role, f in sorted(folders.items())},
        }  # fmt: skip
        cache.publish(key, output, record)
        processes.wait()
        return record | {"cached": False}


def _help(stage: Stage, key: str, cache: Cache, make: Callable[[Path], Context]) -> dict[str, Any]:
    """What the other processes of a run do: train with the first, whose result they then take from the cache."""
    cached = processes.told(None)
    if not cached and stage.trains:
        with TemporaryDirectory(prefix="pocketbert-") as folder:
            stage.run(make(Path(folder)))
    if not cached:
        processes.wait()
    return cache.record(key) | {"cached": cached}


def check_writable(option: str, folder: Path) -> None:
    """Refuse, before any work, a folder that nothing can be written into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(f"{option} {str(folder)[:200]}: cannot be written: {error.strerror}; give another folder") from error



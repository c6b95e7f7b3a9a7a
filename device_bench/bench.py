"""Measure the files of a bundle on many places at once and keep it all in one document.

This machine is measured alone; then boards and phones, each in its own thread, beside the emulators, which share what
processors this machine has. A place that fails says why in the document and never stops the others; what it gave before it
failed is kept.

The document, ``{"format": "pocketbert bench 1", ...}``: ``bundle`` (name, files with precision, size_bytes, sha256), ``tier``,
``rounds``, ``texts`` (how many), ``texts_sha256``, ``texts_from``, and ``targets``, one object per place: ``name``, ``on``, ``emulated``,
``error`` (null, or kind, message, exit_code), ``conditions`` and ``formats`` (of the agent's mode info), ``measurements``
(rows of :func:`measurement.measure` with every sample, and ``repeat``: the second measurement of the first file),
``refused`` (file, error), ``sustained`` (name, file, threads, conditions, windows), ``benchmark_model`` (rows of
:func:`benchmark_model.measure_signatures` with ``file``, where a lab file names that binary); and for emulated ones ``agreement``
(file, texts, worst_difference, tolerance, same_bits, same_answers, accuracy_percent there and accuracy_here_percent) and
``instructions`` (file, texts, total_per_text: the median, totals, by_class). An emulated target has no measurements.

What this does not do: decide whether a difference is real (``comparison.py``); print (``pipeline`` does).
"""

from __future__ import annotations

import hashlib
import math
import statistics
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from device_bench.lab import Place, open_target
from device_bench.measurement import WARMUP, Candidate, Care, job_of, measure
from device_bench.targets import OutOfMemory, Target
from device_bench.texts import write_texts
from runtimes.backends import installed_formats, load_model
from runtimes.bundle import Bundle, ModelEntry, file_sha256
from runtimes.errors import BadInput, IntegrityError, PocketbertError
from runtimes.text import TextEncoder

FORMAT = "pocketbert bench 1"
EMULATED_TEXTS = 16
"""Texts an emulator counts instructions for; an inference takes it seconds."""
REPEAT = " (again)"
CARE = Care(cool_down_s=60.0, max_noise=0.05, extra_rounds=3)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Tier:
    """How long to measure one file at one thread count and case, all rounds together."""

    inferences: int
    seconds: float
    rounds: int


TIERS = {"rapid": Tier(64, 6.0, 3), "quick": Tier(128, 10.0, 5), "normal": Tier(1024, 60.0, 6)}


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        texts: real texts of the task, measured as they come; the bundle's golden cases if empty.
        answers: their labels, for accuracy there against accuracy here; empty if unknown.
        files: files of the bundle; all if empty.
        threads: counts for places that name none; one and all strong cores of the place if empty.
        lengths: fixed lengths in tokens; those above the bundle's max_length are left out.
        sustained_minutes: run the first file so long to see what heat does; 0 for not.
        repeat: measure the first file of a place a second time in the same rounds, as the A/A run that tells its noise.
        care: cool-down and stability.
    """

    tier: str = "quick"
    texts: Sequence[str] = ()
    answers: Sequence[str] = ()
    files: Sequence[str] = ()
    threads: Sequence[int] = ()
    lengths: Sequence[int] = (16, 32, 64)
    sustained_minutes: float = 0.0
    window_seconds: float = 1.0
    repeat: bool = True
    care: Care = CARE


def bench(bundle: Bundle, places: Sequence[Place], plan: Plan, say: Say) -> dict[str, Any]:
    """The document of every place; those that failed carry an ``error`` there.

    Raises:
        BadInput: a plan that no place could follow: an unknown tier or file, or answers that do not go with the texts.
    """
    entries = _chosen(bundle, plan)
    say_safely, lock = _locked(say), threading.Semaphore(1)
    open_targets: list[Target] = []

    def visit(place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {"name": place.label, "on": place.on, "emulated": False, "error": None, "conditions": None}
        found |= {"formats": {}, "measurements": [], "refused": [], "sustained": [], "benchmark_model": [], "agreement": [], "instructions": []}
        try:
            target = open_target(place, say_safely)
            found["emulated"] = target.emulated
            open_targets.append(target)  # before it connects, so that it can be stopped meanwhile
            with target:
                if target.emulated:
                    with lock:
                        _emulate(target, bundle, entries, plan, found, say_safely)
                else:
                    _time(target, place, bundle, entries, plan, found, say_safely)
        except PocketbertError as error:
            say_safely(f"{place.label}: {str(error).removeprefix(f'{place.label}: ')}")
            found["error"] = _described(error)
        return found

    here = [place for place in places if place.kind == "local"]
    away = [place for place in places if place.kind != "local"]
    done = {place.label: visit(place) for place in here}
    if len(away) == 1:
        done[away[0].label] = visit(away[0])
    elif away:
        with ThreadPoolExecutor(len(away), thread_name_prefix="target") as pool:
            try:
                done |= dict(zip([place.label for place in away], pool.map(visit, away), strict=True))
            except BaseException:  # Ctrl-C reaches this thread alone: end what the others wait for
                for target in open_targets:
                    target.stop()
                raise
    texts = _texts(bundle, plan)
    shown = {"name": bundle.manifest["name"], "files": [_file(bundle, entry) for entry in entries]}
    return {
        "format": FORMAT, "bundle": shown, "tier": plan.tier, "rounds": TIERS[plan.tier].rounds,
        "texts": len(texts), "texts_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        "texts_from": "file" if plan.texts else "golden cases",
        "targets": [done[place.label] for place in places],
    }  # fmt: skip


def failed(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Places with an error, and files that a place refused, each with name, message and exit_code."""
    found = []
    for target in document["targets"]:
        if target["error"] is not None:
            found.append({"name": target["name"], **target["error"]})
        found += [{"name": f"{target['name']}: {refused['file']}", **refused["error"]} for refused in target["refused"]]
    return found


def _time(target: Target, place: Place, bundle: Bundle, entries: list[ModelEntry], plan: Plan, found: dict[str, Any], say: Say) -> None:
    entries = _that_run_there(target, entries, found)
    tier, candidates = TIERS[plan.tier], _candidates(bundle, entries, plan)
    threads = list(place.threads) or list(plan.threads) or _thread_counts(found["conditions"])
    again = [replace(candidates[0], name=candidates[0].name + REPEAT)] if plan.repeat else []
    lengths = [length for length in plan.lengths if length <= bundle.max_length]
    each_round = math.ceil(tier.inferences / tier.rounds)

    def refuse(candidate: Candidate, error: PocketbertError) -> None:
        if not candidate.name.endswith(REPEAT):
            found["refused"].append({"file": candidate.file, "error": _described(error)})

    def stop(error: PocketbertError) -> None:
        found["error"] = _described(error)

    rows = measure(
        [*candidates, *again], target, threads, lengths, tier.rounds, tier.seconds / tier.rounds, say, cores=place.cores, keep_samples=True,
        length_inferences=each_round, text_inferences=each_round, care=plan.care, refused=refuse, stopped=stop,
    )  # fmt: skip
    found["measurements"] = [{**row, "repeat": row["name"].endswith(REPEAT)} for row in rows]
    if plan.sustained_minutes and found["error"] is None:
        found["sustained"] = [_sustain(target, candidates[0], place, threads[0], plan, say)]
    if place.benchmark_model and found["error"] is None:
        found["benchmark_model"] = _time_officially(target, candidates, place, threads, lengths, say)


def _that_run_there(target: Target, entries: list[ModelEntry], found: dict[str, Any]) -> list[ModelEntry]:
    info = target.info()
    found["conditions"], found["formats"] = info["conditions"], info["formats"]
    fitting = [entry for entry in entries if entry.runs_on(info["formats"])]
    for entry in entries:
        if entry not in fitting:
            there = info["formats"].get(entry.format)
            why = f"{there} cannot run it" if there else f"no runtime for {entry.format} files is there; --provision brings one to a board"
            found["refused"].append({"file": entry.file, "error": _described(BadInput(why))})
    if not fitting:
        raise BadInput(f"none of the files can run there: {'; '.join(refused['error']['message'] for refused in found['refused'])}")
    return fitting


def _sustain(target: Target, candidate: Candidate, place: Place, threads: int, plan: Plan, say: Say) -> dict[str, Any]:
    say(f"{target.name}: {candidate.name}: {plan.sustained_minutes:g} minutes without a pause")
    seconds = plan.sustained_minutes * 60
    with tempfile.TemporaryDirectory(prefix="pocketbert-bench-") as folder:
        job = job_of(candidate, Path(folder), place.cores) | {
            "mode": "sustained", "threads": threads, "warmup": WARMUP, "min_seconds": seconds, "window_seconds": plan.window_seconds,
            "deadline_s": seconds + place.deadline_s,
        }  # fmt: skip
        answer = target.run(job)
    return {"name": candidate.name, "file": candidate.file, "threads": threads, "conditions": answer["conditions"], "windows": answer["windows"]}


def _time_officially(
    target: Target, candidates: Sequence[Candidate], place: Place, threads: Sequence[int], lengths: Sequence[int], say: Say
) -> list[dict[str, Any]]:
    """The TFLite files once more, by TFLite's own benchmark binary."""
    from device_bench.benchmark_model import measure_signatures

    rows = []
    with tempfile.TemporaryDirectory(prefix="pocketbert-bench-") as folder:
        for number, candidate in enumerate(one for one in candidates if one.format == "tflite"):
            job = job_of(candidate, Path(folder) / str(number), place.cores)
            for count in threads:
                say(f"{target.name}: {candidate.name}: benchmark_model, threads {count}")
                measured = measure_signatures(target, Path(place.benchmark_model), job | {"threads": count}, lengths)
                rows += [{"file": candidate.file, **row} for row in measured]
    return rows


def _emulate(target: Target, bundle: Bundle, entries: list[ModelEntry], plan: Plan, found: dict[str, Any], say: Say) -> None:
    """What an emulator can tell: whether outputs agree with this machine's, and how many instructions they take."""
    entries = _that_run_there(target, entries, found)
    here = installed_formats()
    with tempfile.TemporaryDirectory(prefix="pocketbert-bench-") as name:
        folder = Path(name)
        for candidate, entry in zip(_candidates(bundle, entries, plan), entries, strict=True):
            job = job_of(candidate, folder, None) | {"threads": 1}
            try:
                if entry.runs_on(here):
                    say(f"{target.name}: {candidate.name}: outputs")
                    shape = target.run(job | {"mode": "outputs", "output": str(folder / "logits")})["shape"]
                    there = np.fromfile(folder / "logits", "<f4").reshape(shape)
                    found["agreement"].append(_agreement(bundle, entry, candidate, plan, there))
                if target.counts_instructions:
                    say(f"{target.name}: {candidate.name}: instructions")
                    write_texts(folder / "few.texts", candidate.id_lists[:EMULATED_TEXTS])
                    counts = target.run(job | {"mode": "count", "inputs": str(folder / "few.texts")})["instructions"]
                    found["instructions"].append(_counted(candidate, counts))
            except (BadInput, IntegrityError, OutOfMemory) as error:
                found["refused"].append({"file": candidate.file, "error": _described(error)})


def _counted(candidate: Candidate, counts: list[dict[str, int]]) -> dict[str, Any]:
    median = {key: int(statistics.median_low([one[key] for one in counts])) for key in counts[0]}
    return {
        "file": candidate.file, "texts": len(counts), "total_per_text": median.pop("total"), "totals": [one["total"] for one in counts],
        "by_class": median,
    }  # fmt: skip


def _agreement(bundle: Bundle, entry: ModelEntry, candidate: Candidate, plan: Plan, there: np.ndarray) -> dict[str, Any]:
    model = load_model(bundle.path(entry), session=entry.session)
    here = np.stack([model.logits(list(ids)) for ids in candidate.id_lists]).reshape(there.shape)

    def accuracy(logits: np.ndarray) -> float | None:
        if not plan.answers:
            return None
        return round(100 * float(np.mean([bundle.labels[best] == answer for best, answer in zip(logits.argmax(1), plan.answers, strict=True)])), 3)

    return {
        "file": entry.file, "texts": len(there), "worst_difference": float(np.abs(there - here).max()), "tolerance": entry.tolerance,
        "same_bits": bool((there == here).all()), "same_answers": int((there.argmax(1) == here.argmax(1)).sum()),
        "accuracy_percent": accuracy(there), "accuracy_here_percent": accuracy(here),
    }  # fmt: skip


def _candidates(bundle: Bundle, entries: list[ModelEntry], plan: Plan) -> list[Candidate]:
    """Golden texts first, because the agents prove the file with them."""
    texts = _texts(bundle, plan)
    id_lists = TextEncoder(bundle.tokenizer_file, bundle.max_length).encode_batch(texts)
    golden = list(bundle.golden_cases())
    return [
        Candidate(
            name=entry.file, path=bundle.path(entry), format=entry.format, file=entry.file, id_lists=id_lists,
            golden_logits=np.array([case["logits"][entry.file] for case in golden], np.float32), golden_ids=[case["ids"] for case in golden],
            tolerance=entry.tolerance, session=entry.session,
        )
        for entry in entries
    ]  # fmt: skip


def _texts(bundle: Bundle, plan: Plan) -> list[str]:
    return list(plan.texts) or [case["text"] for case in bundle.golden_cases()]


def _chosen(bundle: Bundle, plan: Plan) -> list[ModelEntry]:
    if plan.tier not in TIERS:
        raise BadInput(f"tier {plan.tier!r}: known are {', '.join(TIERS)}")
    if plan.answers and len(plan.answers) != len(plan.texts):
        raise BadInput(f"{len(plan.answers)} answers for {len(plan.texts)} texts")
    known = [entry.file for entry in bundle.models]
    unknown = [file for file in plan.files if file not in known]
    if unknown:
        raise BadInput(f"the bundle has no file {unknown[0]!r}; it has {', '.join(known)}")
    return [entry for entry in bundle.models if not plan.files or entry.file in plan.files]


def _thread_counts(conditions: dict[str, Any]) -> list[int]:
    """One, and one per strong core that the job may use."""
    allowed = conditions["affinity"] or conditions["cores"] or [0]
    strong = conditions["clusters"][-1]["cores"] if conditions["clusters"] else allowed
    return sorted({1, len(set(strong) & set(allowed)) or len(allowed)})


def _file(bundle: Bundle, entry: ModelEntry) -> dict[str, Any]:
    path = bundle.path(entry)
    return {"file": entry.file, "precision": entry.precision, "size_bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _described(error: PocketbertError) -> dict[str, Any]:
    return {"kind": type(error).__name__, "message": str(error), "exit_code": error.exit_code}


def _locked(say: Say) -> Say:
    lock = threading.Lock()

    def one_at_a_time(message: str) -> None:
        with lock:
            say(message)

    return one_at_a_time

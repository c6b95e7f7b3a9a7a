"""Measure the files of a bundle on many places at once and keep it all in one document.

This machine is measured alone; then boards and phones, each in its own thread, beside the emulators, which share what
processors this machine has. A place that fails says why in the document and never stops the others; what it gave before it
failed is kept.

The document, ``{"format": "pocketbert bench 2", ...}``: ``bundle`` (name, files with precision, size_bytes, sha256), ``tier``,
``rounds``, ``texts`` (how many examples of the task), ``inputs`` (how many sequences of tokens they are, which is what a sample
of a latency is of), ``texts_sha256``, ``texts_from``, and ``targets``, one object per place: ``name``, ``on``, ``emulated``,
``error`` (null, or kind, message, exit_code), ``conditions`` and ``formats`` (of the agent's mode info), ``measurements``
(rows of :func:`measurement.measure` with every sample, and ``repeat``: the second measurement of the first file),
``refused`` (file, error), ``sustained`` (name, file, threads, conditions, windows), ``benchmark_model`` (rows of
:func:`benchmark_model.measure_signatures` with ``file``, where a lab file names that binary); and for emulated ones ``agreement``
(file, texts, inputs, worst_difference of any value of any output, tolerance, same_bits, decisions, same_decisions: how many
of these are the same there and here, scores there and scores_here: metrics by name, null without answers) and ``instructions``
(file, texts: how many inputs were counted, total_per_text: the median, totals, by_class). An emulated target has no
measurements. A decision is a class, a tag, or an end of an answer; numbers and vectors decide nothing.

What this does not do: decide whether a difference is real (``comparison.py``); print (``pipeline`` does).
"""

from __future__ import annotations

import hashlib
import math
import statistics
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from device_bench.agent.agent import AgentError, read_inputs
from device_bench.lab import Place, open_target
from device_bench.measurement import WARMUP, Candidate, Care, job_of, measure
from device_bench.targets import OutOfMemory, Target
from runtimes.backends import installed_formats, load_model
from runtimes.bundle import Bundle, ModelEntry, file_sha256
from runtimes.decode.base import Decoder, Outputs
from runtimes.errors import BadInput, IntegrityError, PocketbertError
from runtimes.text import Encoding, TextEncoder

FORMAT = "pocketbert bench 2"
EMULATED_TEXTS = 16
"""Inputs an emulator counts instructions for; an inference takes it seconds."""
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
        examples: real examples of the task, what `predict` takes, measured as they come; the bundle's golden cases if empty.
        score: metrics by name, from the outputs of each example's inputs, in the order of ``examples``; for the scores there
            against the scores here. None if the right answers are unknown.
        files: files of the bundle; all if empty.
        threads: counts for places that name none; one and all strong cores of the place if empty.
        lengths: fixed lengths in tokens; those above the bundle's max_length are left out.
        sustained_minutes: run the first file so long to see what heat does; 0 for not.
        repeat: measure the first file of a place a second time in the same rounds, as the A/A run that tells its noise.
        care: cool-down and stability.
    """

    tier: str = "quick"
    examples: Sequence[Mapping[str, str]] = ()
    score: Callable[[Sequence[Sequence[Outputs]]], dict[str, float]] | None = None
    files: Sequence[str] = ()
    threads: Sequence[int] = ()
    lengths: Sequence[int] = (16, 32, 64)
    sustained_minutes: float = 0.0
    window_seconds: float = 1.0
    repeat: bool = True
    care: Care = CARE


@dataclass(frozen=True)
class Work:
    """What is measured everywhere: the examples, encoded once.

    Args:
        inputs: of each example; a pair of texts may be two, a long text several.
        candidates: in the order of ``entries``, with the inputs of all examples.
    """

    examples: Sequence[Mapping[str, str]]
    inputs: Sequence[Sequence[Encoding]]
    decoder: Decoder
    entries: Sequence[ModelEntry]
    candidates: Sequence[Candidate]

    def of(self, entries: Sequence[ModelEntry]) -> list[Candidate]:
        return [candidate for entry, candidate in zip(self.entries, self.candidates, strict=True) if entry in entries]

    def by_example(self, outputs: Sequence[Outputs]) -> list[list[Outputs]]:
        """Outputs of all inputs, as the outputs of each example's."""
        remaining = iter(outputs)
        return [[next(remaining) for _ in inputs] for inputs in self.inputs]


def bench(bundle: Bundle, places: Sequence[Place], plan: Plan, say: Say) -> dict[str, Any]:
    """The document of every place; those that failed carry an ``error`` there.

    Raises:
        BadInput: a plan that no place could follow: an unknown tier or file, an example that the task cannot encode, or a score
            without examples.
    """
    work = _prepared(bundle, _chosen(bundle, plan), plan)
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
                        _emulate(target, bundle, work, plan, found, say_safely)
                else:
                    _time(target, place, bundle, work, plan, found, say_safely)
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
    shown = {"name": bundle.manifest["name"], "files": [_file(bundle, entry) for entry in work.entries]}
    lines = ["\t".join(example[column] for column in work.decoder.columns if column in example) for example in work.examples]
    return {
        "format": FORMAT, "bundle": shown, "tier": plan.tier, "rounds": TIERS[plan.tier].rounds,
        "texts": len(work.examples), "inputs": sum(map(len, work.inputs)),
        "texts_sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(), "texts_from": "file" if plan.examples else "golden cases",
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


def _time(target: Target, place: Place, bundle: Bundle, work: Work, plan: Plan, found: dict[str, Any], say: Say) -> None:
    tier, candidates = TIERS[plan.tier], work.of(_that_run_there(target, work.entries, found))
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


def _that_run_there(target: Target, entries: Sequence[ModelEntry], found: dict[str, Any]) -> list[ModelEntry]:
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


def _emulate(target: Target, bundle: Bundle, work: Work, plan: Plan, found: dict[str, Any], say: Say) -> None:
    """What an emulator can tell: whether outputs agree with this machine's, and how many instructions they take."""
    entries = _that_run_there(target, work.entries, found)
    here = installed_formats()
    with tempfile.TemporaryDirectory(prefix="pocketbert-bench-") as name:
        folder = Path(name)
        for candidate, entry in zip(work.of(entries), entries, strict=True):
            job = job_of(candidate, folder, None) | {"threads": 1}
            try:
                if entry.runs_on(here):
                    say(f"{target.name}: {candidate.name}: outputs")
                    target.run(job | {"mode": "outputs", "output": str(folder / "outputs")})
                    found["agreement"].append(_agreement(bundle, entry, candidate, work, plan, _read_outputs(folder / "outputs")))
                if target.counts_instructions:
                    say(f"{target.name}: {candidate.name}: instructions")
                    few = job_of(replace(candidate, inputs=candidate.inputs[:EMULATED_TEXTS]), folder / "few", None) | {"threads": 1}
                    found["instructions"].append(_counted(candidate, target.run(few | {"mode": "count"})["instructions"]))
            except (BadInput, IntegrityError, OutOfMemory) as error:
                found["refused"].append({"file": candidate.file, "error": _described(error)})


def _read_outputs(path: Path) -> list[Outputs]:
    """What a target wrote, for every input."""
    try:
        return read_inputs(str(path))[1]
    except AgentError as error:
        raise IntegrityError(f"{error}; the outputs did not arrive whole") from error


def _counted(candidate: Candidate, counts: list[dict[str, int]]) -> dict[str, Any]:
    median = {key: int(statistics.median_low([one[key] for one in counts])) for key in counts[0]}
    return {
        "file": candidate.file, "texts": len(counts), "total_per_text": median.pop("total"), "totals": [one["total"] for one in counts],
        "by_class": median,
    }  # fmt: skip


def _agreement(bundle: Bundle, entry: ModelEntry, candidate: Candidate, work: Work, plan: Plan, there: Sequence[Outputs]) -> dict[str, Any]:
    model = load_model(bundle.path(entry), session=entry.session)
    here = [model.run(one.ids, one.types) for one in candidate.inputs]
    pairs = list(zip(there, here, strict=True))
    decided = [(work.decoder.decisions(one), work.decoder.decisions(other)) for one, other in pairs]
    return {
        "file": entry.file, "texts": len(work.examples), "inputs": len(pairs),
        "worst_difference": float(np.max([np.abs(one[name] - other[name]).max() for one, other in pairs for name in other])),
        "tolerance": entry.tolerance, "same_bits": all(np.array_equal(one[name], other[name]) for one, other in pairs for name in other),
        "decisions": sum(len(other) for _, other in decided), "same_decisions": sum(int((one == other).sum()) for one, other in decided),
        "scores": _scores(work, plan, there), "scores_here": _scores(work, plan, here),
    }  # fmt: skip


def _scores(work: Work, plan: Plan, outputs: Sequence[Outputs]) -> dict[str, float] | None:
    return None if plan.score is None else {name: round(value, 3) for name, value in plan.score(work.by_example(outputs)).items()}


def _prepared(bundle: Bundle, entries: Sequence[ModelEntry], plan: Plan) -> Work:
    decoder, golden = bundle.decoder(), list(bundle.golden_cases())
    examples = list(plan.examples) or [case["example"] for case in golden]
    encoder = bundle.text_encoder()
    inputs = [_encoded(decoder, encoder, example, number) for number, example in enumerate(examples, start=1)]
    proofs = [Encoding(one["ids"], one["types"]) for case in golden for one in case["inputs"]]
    candidates = [
        Candidate(
            name=entry.file, path=bundle.path(entry), format=entry.format, file=entry.file,
            inputs=[one for encoded in inputs for one in encoded], golden=_golden_outputs(golden, entry.file), golden_inputs=proofs,
            tolerance=entry.tolerance, session=entry.session,
        )
        for entry in entries
    ]  # fmt: skip
    return Work(examples, inputs, decoder, entries, candidates)


def _encoded(decoder: Decoder, encoder: TextEncoder, example: Mapping[str, str], number: int) -> list[Encoding]:
    try:
        return decoder.encode(encoder, decoder.example(example))
    except BadInput as error:
        raise BadInput(f"example {number}: {error}") from error


def _golden_outputs(cases: Sequence[Mapping[str, Any]], file: str) -> list[dict[str, np.ndarray]]:
    """Outputs of a file for every input of the golden cases."""
    return [{name: np.array(values, np.float32) for name, values in one.items()} for case in cases for one in case["outputs"][file]]


def _chosen(bundle: Bundle, plan: Plan) -> list[ModelEntry]:
    if plan.tier not in TIERS:
        raise BadInput(f"tier {plan.tier!r}: known are {', '.join(TIERS)}")
    if plan.score is not None and not plan.examples:
        raise BadInput("a score needs the examples whose answers it knows; golden cases have none")
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

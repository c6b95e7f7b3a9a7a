"""Measure candidates against each other on one target: interleaved rounds, merged samples, memory apart.

A round runs every candidate once, each in a fresh process, before the next round begins (A, B, C, A, B, C, ...), so that
heat, clocks and other people's load hit all of them alike. Percentiles are computed on the samples of all rounds together.

What this does not do: decide whether a difference is real; tokenize; choose texts. They come as encoded inputs: a text, a pair,
or one window of a long text each.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from device_bench.agent.agent import latency_summary, milliseconds, write_inputs
from device_bench.targets import OutOfMemory, Target
from runtimes.errors import BadInput, IntegrityError, PocketbertError, TargetUnreachable
from runtimes.session import SessionOptions

if TYPE_CHECKING:  # it needs the tokenizers, and measuring does not
    from runtimes.text import Encoding

WARMUP = {"window": 16, "tolerance": 0.05, "max_seconds": 2.0}
LENGTH_INFERENCES = 100
"""Least inferences per round at a fixed length, where one is like the other; of real inputs, each is to run once."""


KEPT_SAMPLES = 1024


@dataclass(frozen=True)
class Care:
    """What a device needs that heats up, or that others use.

    Args:
        pause_s: between two processes.
        cool_down_s: longest wait before a process for the hottest zone to come within ``margin_c`` of where it was at the
            start, asked every ``poll_s``; nothing is waited for where no temperature can be read.
        max_noise: one more round of everything while a file's median on texts moves more than this between rounds ...
        extra_rounds: ... and at most so many.
    """

    pause_s: float = 0.0
    cool_down_s: float = 0.0
    margin_c: float = 3.0
    poll_s: float = 5.0
    max_noise: float = 0.0
    extra_rounds: int = 0


@dataclass(frozen=True)
class Candidate:
    """One model file to measure.

    Args:
        name: how it is called in tables; the same file may run under two names, for an A/A run.
        path: the file on this machine.
        format: "onnx" or "tflite".
        file: its name in its bundle; "" if it comes from elsewhere.
        inputs: what to run, encoded by *its* tokenizer, in an order in which every stretch is a fair mix.
        golden: the outputs of the G golden inputs, by name: float32 [values] of a whole input, or [tokens] or [tokens, width]; None
            if nothing proves the outputs right.
        tolerance: largest |difference| from the golden outputs.
        baseline: the others are compared with this one.
        session: how the runtime is to run it, but for the threads.
        threads: thread counts for this one; those of the measurement if None.
        golden_inputs: the G golden inputs; the first G of ``inputs`` if None.
    """

    name: str
    path: Path
    format: str
    file: str
    inputs: Sequence[Encoding]
    golden: Sequence[Mapping[str, np.ndarray]] | None
    tolerance: float
    baseline: bool = False
    session: SessionOptions = field(default_factory=SessionOptions)
    threads: Sequence[int] | None = None
    golden_inputs: Sequence[Encoding] | None = None

    @property
    def proofs(self) -> Sequence[Encoding]:
        """The inputs whose outputs are known; those that ``golden`` does not reach are left out."""
        return self.inputs if self.golden_inputs is None else self.golden_inputs


def measure(
    candidates: Sequence[Candidate],
    target: Target,
    threads: Sequence[int],
    lengths: Sequence[int],
    rounds: int,
    min_seconds: float,
    say: Callable[[str], None],
    cores: Sequence[int] | str | None = None,
    memory: bool = True,
    keep_samples: bool = False,
    length_inferences: int = LENGTH_INFERENCES,
    text_inferences: int = 1,
    care: Care = Care(),
    refused: Callable[[Candidate, PocketbertError], None] | None = None,
    stopped: Callable[[PocketbertError], None] | None = None,
) -> list[dict[str, Any]]:
    """Latency of every candidate at every thread count, for real texts and fixed lengths, and memory at one thread.

    Args:
        threads: counts for every candidate that has none of its own.
        lengths: fixed lengths in tokens, beside the real texts; each must fit every candidate.
        rounds: processes per candidate and thread count; noise takes two or more.
        min_seconds: the least time per case and round; every input runs at least once whatever it takes.
        say: is told what runs now.
        cores: pin to these, or to the "big" or "little" ones; None leaves it to the system.
        memory: whether to measure memory too.
        keep_samples: whether rows carry samples, at most about :data:`KEPT_SAMPLES` of a round.
        length_inferences: the least inferences per round at a fixed length.
        text_inferences: the least inferences per round on the inputs; every one runs at least once anyway.
        refused: is told which candidate cannot be measured and why, and the others go on; without it the first one ends all.
        stopped: is told why the target was lost, and what it gave before is returned; without it that is lost too.

    Returns:
        One dict per candidate, thread count and case, in that order, with: name, file, baseline, target, runtime, threads,
        case ("texts": the inputs as they come, or "length"), length (tokens, None for texts), tokens_mean, count, p50_ms, p90_ms, p99_ms, mean_ms,
        min_ms, quantiles_ms (percentiles 0..100), round_p50_ms, round_samples_ms (samples of every round in order, if kept),
        noise ((max - min) / median of round_p50_ms, None for one round), warmup_stable (in every round), load_ms and
        first_inference_ms (medians of the rounds), memory (baseline_bytes, peak_bytes, model_bytes, pss_bytes; from a run of
        its own; None if not measured), conditions (``before`` the first round, ``after`` the last).

    Raises:
        BadInput: a plan that measures nothing; and as in :meth:`Target.run`.
        IntegrityError, TargetUnreachable: as in :meth:`Target.run`. One refused candidate ends the whole measurement.
    """
    _check_plan(candidates, threads, lengths, rounds)
    counts = list(dict.fromkeys(count for candidate in candidates for count in _threads(candidate, threads)))
    fixed = [{"case": "length", "length": length, "min_inferences": length_inferences} for length in lengths]
    plan = {"mode": "latency", "cases": [{"case": "texts"}, *fixed], "warmup": WARMUP, "min_seconds": min_seconds}
    thermostat = _Thermostat(target, care, say)
    footprints: dict[int, dict[str, Any]] = {}
    answers: dict[tuple[int, int], list[dict[str, Any]]] = {}
    with TemporaryDirectory(prefix="pocketbert-bench-") as folder:
        jobs = {index: job_of(candidate, Path(folder) / str(index), cores) for index, candidate in enumerate(candidates)}

        def run(index: int, job: dict[str, Any]) -> dict[str, Any] | None:
            """The answer, or None for a candidate that is refused and takes no further part."""
            thermostat.wait()
            try:
                answer = target.run(job)
            except (BadInput, IntegrityError, OutOfMemory) as error:
                if refused is None:
                    raise
                refused(candidates[index], error)
                del jobs[index]
                return None
            thermostat.note(answer)
            return answer

        def run_all() -> None:
            for index in list(jobs) if memory else ():
                say(f"{target.name}: {candidates[index].name}: memory")
                answer = run(index, {**jobs[index], "mode": "memory", "threads": 1})
                if answer is not None:
                    footprints[index] = answer["memory"]
            round_number = 0
            while round_number < rounds or (round_number < rounds + care.extra_rounds and _unsteady(answers, care.max_noise)):
                round_number += 1
                for count in counts:
                    for index in list(jobs):
                        if count not in _threads(candidates[index], threads):
                            continue
                        of = f"round {round_number}/{max(rounds, round_number)}, threads {count}"
                        say(f"{target.name}: {candidates[index].name}: {of}")
                        least = max(text_inferences, len(candidates[index].inputs))
                        answer = run(index, {**jobs[index], **plan, "min_inferences": least, "threads": count})
                        if answer is not None:
                            answers.setdefault((index, count), []).append(answer)

        try:
            run_all()
        except TargetUnreachable as error:
            if stopped is None:
                raise
            stopped(error)
    return [
        {
            "name": candidates[index].name, "file": candidates[index].file, "baseline": candidates[index].baseline, "target": target.name,
            "threads": count, "memory": footprints.get(index),
            **_merge_rounds(answers[index, count], case, keep_samples, len(candidates[index].inputs)),
        }
        for index in jobs
        for count in _threads(candidates[index], threads)
        for case in range(len(plan["cases"]))
        if (index, count) in answers
    ]  # fmt: skip


class _Thermostat:
    """Waits before a process until the place is as cool as at the start, as far as it says."""

    def __init__(self, target: Target, care: Care, say: Callable[[str], None]) -> None:
        self._target, self._care, self._say = target, care, say
        self._start_c: float | None = None
        self._now_c: float | None = None

    def note(self, answer: dict[str, Any]) -> None:
        if self._start_c is None:
            self._start_c = _hottest(answer["conditions"]["before"])
        self._now_c = _hottest(answer["conditions"]["after"])

    def wait(self) -> None:
        time.sleep(self._care.pause_s)
        until = time.monotonic() + self._care.cool_down_s
        while self._too_hot() and time.monotonic() < until:
            self._say(f"{self._target.name}: {self._now_c:.0f} °C, waiting for {self._start_c + self._care.margin_c:.0f} °C")
            time.sleep(min(self._care.poll_s, max(0.0, until - time.monotonic())))
            self._now_c = _hottest(self._target.info()["conditions"]["before"])

    def _too_hot(self) -> bool:
        return None not in (self._start_c, self._now_c) and self._now_c > self._start_c + self._care.margin_c


def _hottest(state: dict[str, Any]) -> float | None:
    return max((value for value in (state.get("temperatures_c") or {}).values() if value is not None), default=None)


def _unsteady(answers: dict[tuple[int, int], list[dict[str, Any]]], max_noise: float) -> bool:
    """Whether the median on texts of any file moves more between rounds than it may."""
    return any(_noise([answer["cases"][0]["p50_ms"] for answer in rounds]) > max_noise for rounds in answers.values())


def _noise(round_p50_ms: list[float]) -> float:
    return (max(round_p50_ms) - min(round_p50_ms)) / statistics.median(round_p50_ms)


def _threads(candidate: Candidate, threads: Sequence[int]) -> Sequence[int]:
    return threads if candidate.threads is None else candidate.threads


def _merge_rounds(answers: list[dict[str, Any]], case: int, keep_samples: bool, inputs: int) -> dict[str, Any]:
    """One case of one candidate at one thread count: the samples of all rounds together."""
    rounds = [answer["cases"][case] for answer in answers]
    samples_ns = [sample for one in rounds for sample in one["samples_ns"]]
    round_p50_ms = [one["p50_ms"] for one in rounds]
    return {
        "runtime": answers[0]["runtime"],
        "case": rounds[0]["case"],
        "length": rounds[0]["length"],
        "tokens_mean": round(sum(one["tokens_mean"] * one["count"] for one in rounds) / len(samples_ns), 3),
        **latency_summary(samples_ns),
        "round_p50_ms": round_p50_ms,
        "noise": round(_noise(round_p50_ms), 4) if len(rounds) > 1 else None,
        "warmup_stable": all(one["warmup"]["stable"] for one in rounds),
        "load_ms": round(statistics.median(answer["load_ms"] for answer in answers), 5),
        "first_inference_ms": round(statistics.median(answer["first_inference_ms"] for answer in answers), 5),
        "conditions": {**answers[0]["conditions"], "after": answers[-1]["conditions"]["after"]},
        **({"round_samples_ms": [_thinned(one["samples_ns"], inputs if one["case"] == "texts" else 1) for one in rounds]} if keep_samples else {}),
    }


def _thinned(samples_ns: list[int], inputs: int) -> list[float]:
    """Whole passes over the inputs, evenly over the round, so that sample i is of input ``i % inputs`` in every round."""
    passes = max(1, len(samples_ns) // inputs)
    step = math.ceil(passes * inputs / KEPT_SAMPLES)
    kept = [sample for start in range(0, passes, step) for sample in samples_ns[start * inputs : (start + 1) * inputs]]
    return [milliseconds(sample) for sample in kept]


def job_of(candidate: Candidate, folder: Path, cores: Sequence[int] | str | None) -> dict[str, Any]:
    """The keys of a job that stay the same in every run of ``candidate``, with its inputs saved in ``folder``."""
    folder.mkdir(exist_ok=True)
    inputs, golden = folder / "measured.inputs", None
    write_inputs(inputs, _as_pairs(candidate.inputs))
    if candidate.golden is not None:
        golden = folder / "golden.inputs"
        write_inputs(golden, _as_pairs(candidate.proofs[: len(candidate.golden)]), candidate.golden)
    return {
        "model": str(candidate.path), "format": candidate.format, "cores": cores if cores is None or isinstance(cores, str) else list(cores),
        "inputs": str(inputs), "golden": None if golden is None else str(golden), "tolerance": candidate.tolerance,
        "session": candidate.session.as_manifest(candidate.format),
    }  # fmt: skip


def _as_pairs(inputs: Sequence[Encoding]) -> list[tuple[list[int], list[int]]]:
    return [(one.ids, one.types) for one in inputs]


def _check_plan(candidates: Sequence[Candidate], threads: Sequence[int], lengths: Sequence[int], rounds: int) -> None:
    if not candidates:
        raise BadInput("nothing to measure: no candidates")
    for candidate in candidates:
        if not candidate.inputs:
            raise BadInput(f"{candidate.name}: no texts to measure it with")
        if candidate.golden is not None and not 0 < len(candidate.golden) <= len(candidate.proofs):
            raise BadInput(f"{candidate.name}: outputs of {len(candidate.golden)} golden cases for {len(candidate.proofs)} inputs")
    for counts in (threads, *(candidate.threads for candidate in candidates if candidate.threads is not None)):
        if not counts or len(set(counts)) != len(counts):
            raise BadInput(f"threads: {list(counts)} must be one or more different counts")
        if any(count < 1 for count in counts):
            raise BadInput(f"threads: {list(counts)} must all be at least 1")
    for name, values in (("lengths", lengths), ("rounds", [rounds])):
        if any(value < 1 for value in values):
            raise BadInput(f"{name}: {list(values)} must all be at least 1")

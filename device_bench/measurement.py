"""Measure candidates against each other on one target: interleaved rounds, merged samples, memory apart.

A round runs every candidate once, each in a fresh process, before the next round begins (A, B, C, A, B, C, ...), so that
heat, clocks and other people's load hit all of them alike. Percentiles are computed on the samples of all rounds together.

What this does not do: decide whether a difference is real; tokenize; choose texts. Texts come as ids with special tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from device_bench.agent.agent import latency_summary
from device_bench.targets import Target
from runtimes.errors import BadInput
from runtimes.session import SessionOptions

WARMUP = {"window": 16, "tolerance": 0.05, "max_seconds": 2.0}
LENGTH_INFERENCES = 100
"""Least inferences per round at a fixed length, where one is like the other; of real texts, each is to run once."""


@dataclass(frozen=True)
class Candidate:
    """One model file to measure.

    Args:
        name: how it is called in tables; the same file may run under two names, for an A/A run.
        path: the file on this machine.
        format: "onnx" or "tflite".
        file: its name in its bundle; "" if it comes from elsewhere.
        id_lists: the texts to run, as token ids of *its* tokenizer, in an order in which every stretch is a fair mix.
        golden_logits: float32 [G, C], what the first G texts give; None if nothing proves the outputs right.
        tolerance: largest |difference| from the golden logits.
        baseline: the others are compared with this one.
        session: how the runtime is to run it, but for the threads.
        threads: thread counts for this one; those of the measurement if None.
    """

    name: str
    path: Path
    format: str
    file: str
    id_lists: Sequence[Sequence[int]]
    golden_logits: np.ndarray | None
    tolerance: float
    baseline: bool = False
    session: SessionOptions = field(default_factory=SessionOptions)
    threads: Sequence[int] | None = None


def measure(
    candidates: Sequence[Candidate],
    target: Target,
    threads: Sequence[int],
    lengths: Sequence[int],
    rounds: int,
    min_seconds: float,
    say: Callable[[str], None],
    cores: Sequence[int] | None = None,
    memory: bool = True,
) -> list[dict[str, Any]]:
    """Latency of every candidate at every thread count, for real texts and fixed lengths, and memory at one thread.

    Args:
        threads: counts for every candidate that has none of its own.
        lengths: fixed lengths in tokens, beside the real texts; each must fit every candidate.
        rounds: processes per candidate and thread count; noise takes two or more.
        min_seconds: the least time per case and round; every text runs at least once whatever it takes.
        say: is told what runs now.
        cores: pin to these; None leaves it to the system.
        memory: whether to measure memory too.

    Returns:
        One dict per candidate, thread count and case, in that order, with: name, file, baseline, target, runtime, threads,
        case ("texts" or "length"), length (tokens, None for texts), tokens_mean, count, p50_ms, p90_ms, p99_ms, mean_ms,
        min_ms, quantiles_ms (percentiles 0..100), round_p50_ms, noise ((max - min) / median of round_p50_ms, None for one
        round), warmup_stable (in every round), load_ms and first_inference_ms (medians of the rounds), memory (baseline_bytes,
        peak_bytes, model_bytes; from a run of its own; None if not measured), conditions (``before`` the first round, ``after`` the last).

    Raises:
        BadInput: a plan that measures nothing; and as in :meth:`Target.run`.
        IntegrityError, TargetUnreachable: as in :meth:`Target.run`. One refused candidate ends the whole measurement.
    """
    _check_plan(candidates, threads, lengths, rounds)
    counts = list(dict.fromkeys(count for candidate in candidates for count in _threads(candidate, threads)))
    fixed = [{"case": "length", "length": length, "min_inferences": LENGTH_INFERENCES} for length in lengths]
    plan = {"mode": "latency", "cases": [{"case": "texts"}, *fixed], "warmup": WARMUP, "min_seconds": min_seconds}
    with TemporaryDirectory(prefix="pocketbert-bench-") as folder:
        jobs = [_job(candidate, Path(folder) / str(index), cores) for index, candidate in enumerate(candidates)]
        footprints: list[dict[str, Any] | None] = [None] * len(candidates)
        for index, candidate in enumerate(candidates if memory else ()):
            say(f"{target.name}: {candidate.name}: memory")
            footprints[index] = target.run({**jobs[index], "mode": "memory", "threads": 1})["memory"]
        answers: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for round_number in range(1, rounds + 1):
            for count in counts:
                for index, candidate in enumerate(candidates):
                    if count not in _threads(candidate, threads):
                        continue
                    say(f"{target.name}: {candidate.name}: round {round_number}/{rounds}, threads {count}")
                    answer = target.run({**jobs[index], **plan, "min_inferences": len(candidate.id_lists), "threads": count})
                    answers.setdefault((index, count), []).append(answer)
    return [
        {
            "name": candidate.name, "file": candidate.file, "baseline": candidate.baseline, "target": target.name,
            "threads": count, "memory": footprints[index], **_merge_rounds(answers[index, count], case),
        }
        for index, candidate in enumerate(candidates)
        for count in _threads(candidate, threads)
        for case in range(len(plan["cases"]))
    ]  # fmt: skip


def _threads(candidate: Candidate, threads: Sequence[int]) -> Sequence[int]:
    return threads if candidate.threads is None else candidate.threads


def _merge_rounds(answers: list[dict[str, Any]], case: int) -> dict[str, Any]:
    """One case of one candidate at one thread count: the samples of all rounds together."""
    rounds = [answer["cases"][case] for answer in answers]
    samples_ns = [sample for one in rounds for sample in one["samples_ns"]]
    round_p50_ms = [one["p50_ms"] for one in rounds]
    spread = (max(round_p50_ms) - min(round_p50_ms)) / statistics.median(round_p50_ms)
    return {
        "runtime": answers[0]["runtime"],
        "case": rounds[0]["case"],
        "length": rounds[0]["length"],
        "tokens_mean": round(sum(one["tokens_mean"] * one["count"] for one in rounds) / len(samples_ns), 3),
        **latency_summary(samples_ns),
        "round_p50_ms": round_p50_ms,
        "noise": round(spread, 4) if len(rounds) > 1 else None,
        "warmup_stable": all(one["warmup"]["stable"] for one in rounds),
        "load_ms": round(statistics.median(answer["load_ms"] for answer in answers), 5),
        "first_inference_ms": round(statistics.median(answer["first_inference_ms"] for answer in answers), 5),
        "conditions": {**answers[0]["conditions"], "after": answers[-1]["conditions"]["after"]},
    }


def _job(candidate: Candidate, folder: Path, cores: Sequence[int] | None) -> dict[str, Any]:
    """The keys of a job that stay the same in every run of ``candidate``, with its arrays saved in ``folder``."""
    folder.mkdir()
    inputs, golden = folder / "inputs.npz", None
    np.savez(inputs, **_packed(candidate.id_lists))
    if candidate.golden_logits is not None:
        golden = folder / "golden.npz"
        logits = np.asarray(candidate.golden_logits, dtype=np.float32)
        np.savez(golden, **_packed(candidate.id_lists[: len(logits)]), logits=logits)
    return {
        "model": str(candidate.path), "format": candidate.format, "cores": None if cores is None else list(cores),
        "inputs": str(inputs), "golden": None if golden is None else str(golden), "tolerance": candidate.tolerance,
        "session": candidate.session.as_manifest(candidate.format),
    }  # fmt: skip


def _packed(id_lists: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Texts end to end, as the agent reads them: text i is ``ids[offsets[i]:offsets[i + 1]]``."""
    offsets = np.cumsum([0, *(len(ids) for ids in id_lists)], dtype=np.int64)
    return {"ids": np.concatenate([np.asarray(ids, dtype=np.int32) for ids in id_lists]), "offsets": offsets}


def _check_plan(candidates: Sequence[Candidate], threads: Sequence[int], lengths: Sequence[int], rounds: int) -> None:
    if not candidates:
        raise BadInput("nothing to measure: no candidates")
    for candidate in candidates:
        if not candidate.id_lists:
            raise BadInput(f"{candidate.name}: no texts to measure it with")
        if candidate.golden_logits is not None and not 0 < len(candidate.golden_logits) <= len(candidate.id_lists):
            raise BadInput(f"{candidate.name}: {len(candidate.golden_logits)} golden logits for {len(candidate.id_lists)} texts")
    for counts in (threads, *(candidate.threads for candidate in candidates if candidate.threads is not None)):
        if not counts or len(set(counts)) != len(counts):
            raise BadInput(f"threads: {list(counts)} must be one or more different counts")
        if any(count < 1 for count in counts):
            raise BadInput(f"threads: {list(counts)} must all be at least 1")
    for name, values in (("lengths", lengths), ("rounds", [rounds])):
        if any(value < 1 for value in values):
            raise BadInput(f"{name}: {list(values)} must all be at least 1")

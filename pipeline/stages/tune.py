"""Choose by measurement how a runtime is to run each file: graph optimization, memory, packed weights, threads.

Each file is measured under a handful of option sets, each in fresh processes and in turns, on real validation inputs. The runtime's
defaults stay unless another set is faster by clearly more than the noise: by ``margin``, by twice the difference of the defaults
measured against themselves, and in every round. More threads must pay for the cores that they take from the rest of the device.

Options may change outputs (those of an int8 file depend on how the graph was fused). A set whose outputs leave the tolerance of the
golden cases is refused before it is timed. If a set that changes outputs is chosen, the metrics of the file are taken again under it,
on all validation and test rows: the bundle states those, and the default stays after all if validation lost.

What it does not do: combine option sets; tune for another machine than this one; look at memory (``bench`` reports it).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from device_bench.measurement import Candidate, measure
from device_bench.targets import LocalTarget, Target, all_threads
from pipeline.flow.ledger import GATE_SPLIT
from pipeline.flow.stage import Context, Stage
from pipeline.stages.file_evaluation import FileOutputs, encode_for_files, encodings, evaluate_file, file_outputs, make_decoder
from pipeline.tasks.base import better
from runtimes.backends import load_model
from runtimes.errors import IntegrityError
from runtimes.session import SessionOptions
from runtimes.text import Encoding

Decide = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""Outputs of one input -> what they decide, as whole numbers."""

GOLDEN_INPUTS = 16
OUTPUT_TOLERANCE = 1e-2
"""The agent runs on this machine with these runtimes, so its outputs are those found here up to threading."""
CHECK_INPUTS, CHECK_SECONDS = 500, 1.0
"""Inputs, and seconds, that the comparison of outputs may take for one option set; never fewer inputs than golden ones."""
ROUND_SECONDS = 0.3
"""Seconds that one pass over the timed inputs may take; of a slow file fewer are timed."""
FILE = "session.json"


class Tune(Stage):
    """Measure option sets of the runtime for each file, and keep the default unless another is clearly faster."""

    use: ClassVar[str] = "tune"
    needs: ClassVar[tuple[str, ...]] = ("model", "exported")
    uses: ClassVar[tuple[str, ...]] = ("quantized",)
    gives: ClassVar[tuple[str, ...]] = ("tuned",)
    effect: ClassVar[str] = "Faster where this machine runs a file better with other options than the runtime's own."

    texts: int = Field(200, ge=1)
    """Validation inputs to time, drawn with the recipe's seed; fewer where a file is slow."""
    rounds: int = Field(3, ge=2)
    """Every option set is measured so many times, in turns."""
    min_seconds: float = Field(0.2, gt=0)
    """Shortest measurement of one round."""
    margin: float = Field(0.05, ge=0)
    """Share by which another option set must be faster than the default."""
    thread_speedup: float = Field(1.3, ge=1)
    """How many times faster all cores must be than one before the bundle recommends them."""

    def run(self, context: Context) -> None:
        files = {
            path.relative_to(context.folder(role)).as_posix(): path
            for role in ("exported", *self.uses)
            if role in context.inputs
            for pattern in ("onnx/*.onnx", "tflite/*.tflite")
            for path in sorted(context.folder(role).glob(pattern))
        }
        texts = encode_for_files(context, context.folder("exported"), GATE_SPLIT)
        drawn = np.random.default_rng(context.seed).permutation(len(texts))[: max(self.texts, CHECK_INPUTS)]
        inputs, decide = encodings(texts, drawn), make_decoder(context).decisions
        found = {}
        for file, path in files.items():
            context.progress.say(f"  {file}: measuring option sets of its runtime")
            trials = self.measure_file(file, path, inputs, decide, all_threads(), LocalTarget())
            chosen, why = choose(trials, self.margin, self.thread_speedup)
            metrics = None
            if chosen.worst_difference:
                chosen, why, metrics = self._held_to_metric(context, path, trials[0], chosen, why)
            context.note(f"{file}: {why}")
            for trial in trials:
                if trial.refused:
                    context.note(f"{file}: {trial.name!r} was refused: {trial.refused}")
            file_format = path.suffix.removeprefix(".")
            found[file] = {
                "chosen": chosen.name, "why": why, "session": chosen.session.as_manifest(file_format), "metrics": metrics,
                "trials": [trial.as_dict(file_format) for trial in trials],
            }  # fmt: skip
        folder = context.output / "tuned"
        folder.mkdir()
        content = {"settings": self.model_dump(mode="json"), "cores": all_threads(), "files": found}
        (folder / FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _held_to_metric(
        self, context: Context, path: Path, default: Trial, chosen: Trial, why: str
    ) -> tuple[Trial, str, dict[str, dict[str, float]] | None]:
        """The trial to keep now that its metrics are known, the sentence on it, and the metrics where they are not those of the default."""
        metric = context.task.primary
        before, after = (evaluate_file(context, path, context.folder("exported"), trial.session) for trial in (default, chosen))
        old, new = (found[GATE_SPLIT][metric.name] for found in (before, after))
        if better(metric, new) < better(metric, old):
            told = f"{chosen.name!r} is faster ({chosen.p50_ms:.3f} ms, {default.p50_ms:.3f} by default)"
            return default, f"the default stays: {told} but takes {metric.title} on validation from {old:g} to {new:g} {metric.unit}", None
        if after != before:
            why += f"; {metric.title} on validation under it: {new:g} {metric.unit}, {old:g} by default"
        return chosen, why, after

    def measure_file(
        self, file: str, path: Path, inputs: Sequence[Encoding], decide: Decide, cores: int, target: Target
    ) -> list[Trial]:
        """Every option set for one file, proven and timed; the default first, and once more as second, to know the noise."""
        trials = option_sets(path.suffix.removeprefix("."), cores)
        seconds = seconds_per_input(path, inputs[:GOLDEN_INPUTS])
        checked = inputs[: max(GOLDEN_INPUTS, min(CHECK_INPUTS, int(CHECK_SECONDS / seconds)))]
        timed = inputs[: max(GOLDEN_INPUTS, min(self.texts, int(ROUND_SECONDS / seconds)))]
        expected = file_outputs(path, checked, trials[0].session)
        candidates = []
        for trial in trials:
            outputs = check_outputs(file, path, checked, expected, trial, decide)
            if outputs is not None:
                candidates.append(Candidate(
                    name=trial.name, path=path, format=path.suffix.removeprefix("."), file=file, inputs=timed,
                    golden=outputs[:GOLDEN_INPUTS], tolerance=agent_tolerance(outputs), session=trial.session,
                    threads=[trial.session.threads],
                ))  # fmt: skip
        measured = measure(
            candidates, target, threads=[1], lengths=[], rounds=self.rounds, min_seconds=self.min_seconds, say=_nothing, memory=False
        )
        by_name = {record["name"]: record for record in measured}
        for trial in trials:
            trial.measurement = by_name.get(trial.name)
        return trials


@dataclass
class Trial:
    """One option set for one file, and what was found.

    Attributes:
        refused: why it was not timed; None if it was.
        worst_difference: largest |difference| of an output from the default's; None if it was refused before any output.
        changed_answers: inputs of which something is decided otherwise than by default.
        measurement: as in :func:`device_bench.measurement.measure`.
    """

    name: str
    session: SessionOptions
    refused: str | None = None
    worst_difference: float | None = None
    changed_answers: int | None = None
    measurement: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def p50_ms(self) -> float:
        """Median of the rounds' p50, so that one disturbed round decides nothing."""
        return statistics.median(self.round_p50_ms)

    @property
    def round_p50_ms(self) -> list[float]:
        return self.measurement["round_p50_ms"]

    def as_dict(self, file_format: str) -> dict[str, Any]:
        wanted = ("runtime", "count", "p50_ms", "p90_ms", "mean_ms", "round_p50_ms", "load_ms", "conditions")
        figures = None if self.measurement is None else {key: self.measurement[key] for key in wanted}
        return {
            "name": self.name, "session": self.session.as_manifest(file_format), "refused": self.refused,
            "worst_difference": self.worst_difference, "changed_answers": self.changed_answers, "measurement": figures,
        }  # fmt: skip


def option_sets(file_format: str, cores: int) -> list[Trial]:
    """The option sets that are tried, the default first and second."""
    sets = {"default": SessionOptions(), "default again": SessionOptions()}
    if file_format == "onnx":
        sets |= {
            "graph optimization basic": SessionOptions(graph_optimization_level="basic"),
            "graph optimization extended": SessionOptions(graph_optimization_level="extended"),
            "no memory pattern, no arena": SessionOptions(memory_pattern=False, memory_arena=False),
            "denormals as zero": SessionOptions(config={"session.set_denormal_as_zero": "1"}),
        }
    else:
        sets["packed weights for each signature"] = SessionOptions(weight_cache="none")
    if cores > 1:
        sets[f"{cores} threads"] = SessionOptions(threads=cores)
        if file_format == "onnx":
            sets[f"{cores} threads that do not spin"] = SessionOptions(threads=cores, config={"session.intra_op.allow_spinning": "0"})
    return [Trial(name, session) for name, session in sets.items()]


def seconds_per_input(path: Path, inputs: Sequence[Encoding]) -> float:
    """Roughly, by default, to say how many inputs there is time for."""
    model = load_model(path)
    model.run(inputs[0].ids, inputs[0].types)  # the first inference makes what later ones find ready
    started = time.perf_counter()
    for one in inputs:
        model.run(one.ids, one.types)
    return (time.perf_counter() - started) / len(inputs)


def check_outputs(
    file: str, path: Path, inputs: Sequence[Encoding], expected: FileOutputs, trial: Trial, decide: Decide
) -> FileOutputs | None:
    """Outputs under the trial's options, with the difference from the default's noted; None if the trial is refused.

    Raises:
        IntegrityError: the file does not even run under the default options.
    """
    from exporters.golden import golden_tolerance

    try:
        outputs = file_outputs(path, inputs, trial.session)
    except IntegrityError as error:
        if trial.session == SessionOptions():
            raise
        trial.refused = str(error)
        return None
    pairs = list(zip(outputs, expected, strict=True))
    trial.worst_difference = max(float(np.abs(got[name] - value).max()) for got, wanted in pairs for name, value in wanted.items())
    trial.changed_answers = sum(bool((decide(got) != decide(wanted)).any()) for got, wanted in pairs)
    allowed = golden_tolerance(file, largest(expected))
    if not trial.worst_difference <= allowed:
        trial.refused = f"an output differs from the default's by {trial.worst_difference:.3g}, at most {allowed:.3g} is allowed"
        return None
    return outputs


def choose(trials: Sequence[Trial], margin: float, thread_speedup: float) -> tuple[Trial, str]:
    """The trial to keep, and why, in a sentence.

    Args:
        trials: the first two are the default and its repetition; the others were refused or measured in the same rounds.
        margin: least share by which one is faster than the default.
        thread_speedup: least factor by which one with more threads is faster than the best with one.
    """
    default, again = trials[:2]
    noise = max(default.p50_ms, again.p50_ms) / min(default.p50_ms, again.p50_ms) - 1
    needed = 1 + max(margin, 2 * noise)
    fastest = [min(pair) for pair in zip(default.round_p50_ms, again.round_p50_ms, strict=True)]
    reference_ms = min(default.p50_ms, again.p50_ms)
    timed = sorted((trial for trial in trials[2:] if trial.measurement), key=lambda trial: trial.p50_ms)

    def beats(trial: Trial, p50_ms: float, rounds: Sequence[float], factor: float) -> bool:
        return p50_ms / trial.p50_ms >= factor and all(one < other for one, other in zip(trial.round_p50_ms, rounds, strict=True))

    best = default
    single = [trial for trial in timed if trial.session.threads == 1]
    if single and beats(single[0], reference_ms, fastest, needed):
        best = single[0]
    best_ms, best_rounds = (reference_ms, fastest) if best is default else (best.p50_ms, best.round_p50_ms)
    for trial in timed:
        if trial.session.threads > 1 and beats(trial, best_ms, best_rounds, max(thread_speedup, needed)):
            best = trial
            break
    asked = f"{needed:.3g}x needed, {thread_speedup:g}x for threads; the default differs from itself by {100 * noise:.1f} %"
    if best is not default:
        return best, f"{best.name!r}: {best.p50_ms:.3f} ms at p50, {reference_ms:.3f} by default ({reference_ms / best.p50_ms:.2f}x; {asked})"
    if not timed:
        return default, f"the default stays: {reference_ms:.3f} ms at p50, and nothing else could be measured"
    others = ", ".join(f"{trial.name!r} {reference_ms / trial.p50_ms:.2f}x" for trial in timed)
    return default, f"the default stays: {reference_ms:.3f} ms at p50; {others} ({asked})"


def agent_tolerance(outputs: FileOutputs) -> float:
    """What an output that the agent finds may differ by from ``outputs``, which were found here."""
    return OUTPUT_TOLERANCE * max(1.0, largest(outputs))


def largest(outputs: FileOutputs) -> float:
    """The largest |value|."""
    return max(float(np.abs(value).max()) for one in outputs for value in one.values())


def tuned_files(context: Context) -> dict[str, dict[str, Any]]:
    """Name in the bundle -> what an earlier ``tune`` found for the file; {} where there was none."""
    if "tuned" not in context.inputs:
        return {}
    return json.loads((context.folder("tuned") / FILE).read_text(encoding="utf-8"))["files"]


def tuned_session(files: dict[str, dict[str, Any]], file: str) -> SessionOptions:
    """The options chosen for a file; the defaults where none were."""
    return SessionOptions.read(files[file]["session"], f"{FILE}: {file}") if file in files else SessionOptions()


def _nothing(message: str) -> None:
    """A line per process would be seventy lines."""

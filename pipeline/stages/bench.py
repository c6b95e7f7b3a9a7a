"""Measure latency and memory of every file, and of the teacher in ONNX Runtime fp32 in the same run, on every place named."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from device_bench.lab import open_target, parse_places
from device_bench.measurement import Candidate, measure
from device_bench.targets import all_threads
from pipeline.flow.ledger import teacher
from pipeline.flow.stage import Context, Stage
from pipeline.stages.file_evaluation import encode_for_files, encodings, file_outputs
from pipeline.stages.tune import GOLDEN_INPUTS, agent_tolerance, tuned_files, tuned_session
from runtimes.errors import BadInput
from runtimes.session import SessionOptions


class Bench(Stage):
    """Latency per real input and at fixed lengths, load time, first inference, memory."""

    use: ClassVar[str] = "bench"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("exported", "baseline_file")
    uses: ClassVar[tuple[str, ...]] = ("quantized", "tuned")
    gives: ClassVar[tuple[str, ...]] = ()
    reads_ledger: ClassVar[bool] = True
    measures: ClassVar[bool] = True
    effect: ClassVar[str] = "Numbers."

    on: list[str] = ["local"]
    """Where to measure, as on the command line: ``local``, ``ssh:USER@HOST``, ``adb:SERIAL``, ``@lab.toml``."""
    texts: int = Field(1000, ge=1, le=1_000_000)
    """Inputs of test rows to run, drawn with the recipe's seed."""
    rounds: int = Field(3, ge=1, le=1000)
    """Every file is measured so many times, in turns, so that drift of the machine meets all of them."""
    min_seconds: float = Field(1.0, gt=0, le=3600)
    """Shortest measurement of one round."""
    lengths: list[Annotated[int, Field(ge=2, le=100_000)]] = [16, 32, 64]
    """Fixed lengths in tokens; those above the task's max_length are left out."""

    def run(self, context: Context) -> None:
        places = parse_places(",".join(self.on))
        emulated = [place.on for place in places if place.kind == "qemu" or place.emulated]
        if emulated:
            raise BadInput(f"bench.on: {emulated[0]} is emulated and has no time to measure; pocketbert bench counts its instructions")
        tuned = tuned_files(context)
        candidates = [self._candidate(context, *item, tuned_session(tuned, item[2])) for item in self._files(context)]
        lengths = [n for n in self.lengths if n <= context.task.max_length]
        for place in places:
            threads = place.threads or sorted({1, all_threads()} if place.kind == "local" else {1})
            with open_target(place, context.progress.say) as target:
                context.measurements += measure(
                    candidates, target, threads=threads, lengths=lengths, rounds=self.rounds, min_seconds=self.min_seconds,
                    say=context.progress.say, cores=place.cores,
                )  # fmt: skip

    def _files(self, context: Context) -> list[tuple[str, Path, str, Path, bool]]:
        """(name in the ledger, file, name in the bundle, folder with its tokenizer, whether it is the baseline)."""
        reference = teacher(context.history)
        base = context.folder("baseline_file")
        found = [(reference["name"], base / "model.onnx", "", base, True)]
        for record in context.history:
            for subject in record["subjects"]:
                if subject["file"] is not None:
                    folder = context.folder("exported" if subject["precision"] == "fp32" else "quantized")
                    found.append((subject["name"], folder / subject["file"], subject["file"], folder, False))
        return found

    def _candidate(
        self, context: Context, name: str, path: Path, file: str, folder: Path, baseline: bool, session: SessionOptions
    ) -> Candidate:
        texts = encode_for_files(context, folder, "test")
        inputs = encodings(texts, np.random.default_rng(context.seed).permutation(len(texts))[: self.texts])
        golden = file_outputs(path, inputs[:GOLDEN_INPUTS], session)
        return Candidate(
            name=name, path=path, format=path.suffix.removeprefix("."), file=file, baseline=baseline, inputs=inputs,
            golden=golden, tolerance=agent_tolerance(golden), session=session,
        )  # fmt: skip

"""Measure latency and memory of every file, and of the teacher in ONNX Runtime fp32 in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from device_bench.measurement import Candidate, measure
from device_bench.targets import LocalTarget, all_threads
from pipeline.ledger import teacher
from pipeline.stage import Context, Stage
from runtimes.backends import load_model
from runtimes.errors import BadInput
from runtimes.text import TextEncoder

GOLDEN_TEXTS = 16
LOGIT_TOLERANCE = 1e-2
"""The agent runs on this machine with these runtimes, so its logits are those found here up to threading."""


class Bench(Stage):
    """Latency per real text and at fixed lengths, load time, first inference, memory."""

    use: ClassVar[str] = "bench"
    needs: ClassVar[tuple[str, ...]] = ("exported", "baseline_file")
    uses: ClassVar[tuple[str, ...]] = ("quantized",)
    gives: ClassVar[tuple[str, ...]] = ()
    reads_ledger: ClassVar[bool] = True
    effect: ClassVar[str] = "Numbers."

    on: list[str] = ["local"]
    """Where to measure; ``local`` is this machine."""
    texts: int = Field(1000, ge=1)
    """Test texts to run, drawn with the recipe's seed."""
    rounds: int = Field(3, ge=1)
    """Every file is measured so many times, in turns, so that drift of the machine meets all of them."""
    min_seconds: float = Field(1.0, gt=0)
    """Shortest measurement of one round."""
    lengths: list[int] = [16, 32, 64]
    """Fixed lengths in tokens; those above the task's max_length are left out."""

    def run(self, context: Context) -> None:
        unknown = [name for name in self.on if name != "local"]
        if unknown:
            raise BadInput(f"bench.on: unknown target {unknown[0]!r}; known is local")
        candidates = [self._candidate(context, *item) for item in self._files(context)]
        lengths = [n for n in self.lengths if n <= context.task.max_length]
        for name in self.on:
            context.measurements += measure(
                candidates, LocalTarget(name), threads=sorted({1, all_threads()}), lengths=lengths, rounds=self.rounds,
                min_seconds=self.min_seconds, say=context.progress.say,
            )  # fmt: skip

    def _files(self, context: Context) -> list[tuple[str, Path, str, Path, bool]]:
        """(name in the ledger, file, name in the bundle, tokenizer, whether it is the baseline)."""
        reference = teacher(context.history)
        base = context.folder("baseline_file")
        found = [(reference["name"], base / "model.onnx", "", base / "tokenizer" / "tokenizer.json", True)]
        for record in context.history:
            for subject in record["subjects"]:
                if subject["file"] is not None:
                    folder = context.folder("exported" if subject["precision"] == "fp32" else "quantized")
                    found.append((subject["name"], folder / subject["file"], subject["file"], folder / "tokenizer" / "tokenizer.json", False))
        return found

    def _candidate(self, context: Context, name: str, path: Path, file: str, tokenizer: Path, baseline: bool) -> Candidate:
        rows = context.data.test
        drawn = np.random.default_rng(context.seed).permutation(len(rows))[: self.texts]
        id_lists = TextEncoder(tokenizer, context.task.max_length).encode_batch([rows[i].text for i in drawn])
        model = load_model(path)
        golden: dict[str, Any] = {"id_lists": id_lists[:GOLDEN_TEXTS]}
        logits = np.stack([model.logits(ids) for ids in golden["id_lists"]])
        tolerance = LOGIT_TOLERANCE * max(1.0, float(np.abs(logits).max()))
        return Candidate(
            name=name, path=path, format=path.suffix.removeprefix("."), file=file, baseline=baseline, id_lists=id_lists,
            golden_logits=logits, tolerance=tolerance,
        )  # fmt: skip

"""The ledger: one record per stage, what it cost and what it bought, and the gates that look at it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.flow.cache import digest, library_versions
from pipeline.flow.recipe import Recipe, lock_text
from pipeline.flow.stage import Stage
from pipeline.tasks.base import DIVERGENCE, FIDELITY, better
from runtimes.errors import GateFailed

FORMAT = 2
GATE_SPLIT = "validation"
"""Gates look at validation data; test data is reported and decides nothing."""
FEWEST_ROWS_OF_A_CLASS = 20
"""Validation rows that a class must have for its recall to be judged; of fewer, one row is more than 5 points."""


class Ledger:
    """Records of a run in order.

    Args:
        rows: number of rows by split.
        judged_classes: those that ``budget.recall_drop`` is held for.
    """

    def __init__(self, recipe: Recipe, rows: dict[str, int], judged_classes: Sequence[str] = ()) -> None:
        self.judged_classes = judged_classes
        self.recipe = recipe
        self.rows = rows
        self.records: list[dict[str, Any]] = []
        self.gates: list[dict[str, Any]] = []
        self.floor: dict[str, Any] | None = None
        self.outcome = "running"

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def fingerprint(self) -> str:
        """Hash of all that is the same whenever the same recipe runs: no seconds, no latencies."""
        facts = [[r["stage"], r["subjects"], r["notes"]] for r in self.records if not r["measurements"]]
        return digest([lock_text(self.recipe), facts])

    def check_gates(self, stage: Stage) -> None:
        """Hold the files that this stage made, or measured, and that ship, against the budget.

        Raises:
            GateFailed: naming the file, its figure and the budget.
        """
        budget, metric = self.recipe.budget, self.recipe.task.primary
        record = self.records[-1]
        if {"exported", "quantized"} & set(stage.gives):
            reference = teacher(self.records)
            for subject in record["subjects"]:
                if not self._ships(subject):
                    continue
                if budget.size_mb is not None:
                    self._gate(subject["file"], "size_mb", subject["size_bytes"] / 1e6, budget.size_mb, "MB")
                if budget.metric_drop is not None and reference is not None:
                    before, after = (better(metric, s["metrics"][GATE_SPLIT][metric.name]) for s in (reference, subject))
                    self._gate(subject["file"], "metric_drop", before - after, budget.metric_drop, f"points of validation {metric.title}")
                if budget.divergence is not None:
                    self._gate(subject["file"], "divergence", subject["metrics"][GATE_SPLIT][DIVERGENCE.name], budget.divergence, "from the model")
                if budget.recall_drop is not None and reference is not None:
                    self._check_recalls(subject, reference, budget.recall_drop)
        if budget.latency_ms is not None:
            shipped = {s["file"] for r in self.records for s in r["subjects"] if self._ships(s)}
            for measured in record["measurements"]:
                if measured["file"] in shipped and measured["case"] == "texts" and measured["threads"] == 1:
                    self._gate(measured["file"], "latency_ms", measured["p50_ms"], budget.latency_ms, "ms per text at p50")
        failed = [gate for gate in self.gates if not gate["ok"]]
        if failed:
            raise GateFailed(
                "; ".join(f"{g['file']}: {g['gate']} is {g['value']:.3g} {g['unit']}, the budget allows {g['limit']:g}" for g in failed)
                + ". No bundle is published; the ledger tells what each stage cost"
            )

    def _check_recalls(self, subject: dict[str, Any], reference: dict[str, Any], limit: float) -> None:
        before, after = (one["metrics"][GATE_SPLIT] for one in (reference, subject))
        for label in self.judged_classes:
            lost = before[f"recall {label}"] - after[f"recall {label}"]
            self._gate(subject["file"], "recall_drop", lost, limit, f"points of validation recall of {label!r}")

    def _ships(self, subject: dict[str, Any]) -> bool:
        """Whether it is a file that the recipe's ``pack`` takes; a recipe that packs nothing is judged as if it took all."""
        packed = [stage.precisions for stage in self.recipe.stages if "bundle" in stage.gives and hasattr(stage, "precisions")]
        return subject["file"] is not None and all(subject["precision"] in precisions for precisions in packed)

    def _gate(self, file: str, gate: str, value: float, limit: float, unit: str) -> None:
        self.gates.append({"file": file, "gate": gate, "value": value, "limit": limit, "unit": unit, "ok": value <= limit})

    def as_dict(self) -> dict[str, Any]:
        task = self.recipe.task
        metrics = [metric._asdict() for metric in (task.primary, *(m for m in (*task.metrics, *FIDELITY) if m != task.primary))]
        return {
            "format": FORMAT, "name": self.recipe.name, "outcome": self.outcome, "seed": self.recipe.seed, "rows": self.rows,
            "task": {"kind": task.kind, "metrics": metrics}, "floor": self.floor, "libraries": library_versions(),
            "recipe": lock_text(self.recipe), "gates": self.gates, "stages": self.records,
        }  # fmt: skip

    def write(self, folder: Path) -> None:
        """Write ``ledger.json``; the old one stays until the new one is whole."""
        partial = folder / "ledger.json.partial"
        partial.write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, folder / "ledger.json")


def teacher(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fine-tuned model that everything is compared with: the first model the run reported."""
    return next((s for r in records for s in r["subjects"] if s["file"] is None), None)

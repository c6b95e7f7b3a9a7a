"""The ledger: one record per stage, what it cost and what it bought, and the gates that look at it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pipeline.flow.cache import digest, library_versions
from pipeline.flow.recipe import Recipe, lock_text
from pipeline.flow.stage import Stage
from runtimes.errors import GateFailed

FORMAT = 1
GATE_SPLIT = "validation"
"""Gates look at validation data; test data is reported and decides nothing."""


class Ledger:
    """Records of a run in order.

    Args:
        rows: number of training, validation and test texts.
    """

    def __init__(self, recipe: Recipe, rows: list[int]) -> None:
        self.recipe = recipe
        self.rows = rows
        self.records: list[dict[str, Any]] = []
        self.gates: list[dict[str, Any]] = []
        self.outcome = "running"

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def fingerprint(self) -> str:
        """Hash of all that is the same whenever the same recipe runs: no seconds, no latencies."""
        facts = [[r["stage"], r["subjects"], r["notes"]] for r in self.records if not r["measurements"]]
        return digest([lock_text(self.recipe), facts])

    def check_gates(self, stage: Stage) -> None:
        """Hold the files this stage made, or measured, against the budget.

        Raises:
            GateFailed: naming the file, its figure and the budget.
        """
        budget = self.recipe.budget
        shipped_role = "quantized" if any("quantized" in s.gives for s in self.recipe.stages) else "exported"
        record = self.records[-1]
        if shipped_role in stage.gives:
            reference = teacher(self.records)
            for subject in record["subjects"]:
                if budget.size_mb is not None:
                    self._gate(subject["file"], "size_mb", subject["size_bytes"] / 1e6, budget.size_mb, "MB")
                if budget.accuracy_drop is not None and reference is not None:
                    drop = reference["accuracy"][GATE_SPLIT] - subject["accuracy"][GATE_SPLIT]
                    self._gate(subject["file"], "accuracy_drop", drop, budget.accuracy_drop, "points of validation accuracy")
        if budget.latency_ms is not None:
            role_files = {s["file"] for r in self.records for s in r["subjects"] if s["precision"] != "fp32" or shipped_role == "exported"}
            for measured in record["measurements"]:
                if measured["file"] in role_files and measured["case"] == "texts" and measured["threads"] == 1:
                    self._gate(measured["file"], "latency_ms", measured["p50_ms"], budget.latency_ms, "ms per text at p50")
        failed = [gate for gate in self.gates if not gate["ok"]]
        if failed:
            raise GateFailed(
                "; ".join(f"{g['file']}: {g['gate']} is {g['value']:.3g} {g['unit']}, the budget allows {g['limit']:g}" for g in failed)
                + ". No bundle is published; the ledger tells what each stage cost"
            )

    def _gate(self, file: str, gate: str, value: float, limit: float, unit: str) -> None:
        self.gates.append({"file": file, "gate": gate, "value": value, "limit": limit, "unit": unit, "ok": value <= limit})

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "name": self.recipe.name, "outcome": self.outcome, "seed": self.recipe.seed,
            "rows": dict(zip(("train", "validation", "test"), self.rows, strict=True)),
            "libraries": library_versions(), "recipe": lock_text(self.recipe), "gates": self.gates, "stages": self.records,
        }  # fmt: skip

    def write(self, folder: Path) -> None:
        """Write ``ledger.json``; the old one stays until the new one is whole."""
        partial = folder / "ledger.json.partial"
        partial.write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, folder / "ledger.json")


def teacher(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fine-tuned model that everything is compared with: the first model the run reported."""
    return next((s for r in records for s in r["subjects"] if s["file"] is None), None)


def result_rows(ledger: dict[str, Any]) -> list[dict[str, Any]]:
    """The ledger as the rows a person reads: each model or file once, with its latency where it was measured.

    Columns: stage, name, seconds of the stage, unique_params, size_bytes, validation and test accuracy (per cent),
    p50_ms per real text on one thread of the place that was measured first, speedup against the baseline there.
    """
    texts = [m for r in ledger["stages"] for m in r["measurements"] if m["case"] == "texts" and m["threads"] == 1]
    measured = {m["name"]: m for m in texts if m["target"] == texts[0]["target"]}
    baseline = next((m["p50_ms"] for m in measured.values() if m["baseline"]), None)
    rows = []
    for record in ledger["stages"]:
        for index, subject in enumerate(record["subjects"]):
            latency = measured.get(subject["name"])
            p50_ms = latency["p50_ms"] if latency else None
            rows.append({
                "stage": record["stage"], "name": subject["name"], "file": subject["file"],
                "seconds": record["seconds"] if index == 0 else None, "cached": record["cached"],
                "unique_params": subject["unique_params"], "size_bytes": subject["size_bytes"],
                "validation": subject["accuracy"].get("validation"), "test": subject["accuracy"].get("test"),
                "p50_ms": p50_ms, "speedup": baseline / p50_ms if baseline and p50_ms else None,
            })  # fmt: skip
    return rows

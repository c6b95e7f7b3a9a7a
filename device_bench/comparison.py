"""Compare two bench documents row by row, or the files of one, and gate what became slower.

A row is matched by target, file, threads, case and length. Milliseconds are judged by :mod:`device_bench.latency_change`: a
difference is *seen* when its interval leaves out zero and it is larger than the noise floor. Instructions that an emulator
counted repeat exactly, so they are compared as they are, and never called time.

Rows are refused where a verdict would be about something else: another processor, board or set of texts, a single round.
What may explain a difference (another runtime, governor, kernel, ...) goes with the verdict as a warning.

What this does not do: compare memory, load times or tails; measure; print (``verdicts.py`` makes text of comparisons).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from device_bench.latency_change import BETWEEN_RUNS, WITHIN_RUN, floor_between_runs, floor_within_run, location, relative_change, typical
from device_bench.measurement import WARMUP
from device_bench.verdicts import Comparison, Verdict, as_junit, as_markdown, as_table, gate, ungated
from runtimes.errors import BadInput

__all__ = ["Comparison", "Verdict", "as_junit", "as_markdown", "as_table", "compare", "compare_files", "gate", "read_bench", "ungated"]

FORMAT = "pocketbert bench"
VERSION = 2

OTHER_MACHINE = ("cpu_model", "board", "architecture")
"""Conditions without which a comparison is one of machines."""
EXPLAINS = ("runtime", "agent", "governors", "max_frequencies_khz", "affinity", "cores", "isa", "kernel", "libc", "python", "numpy")
"""Conditions that may be the reason for a difference."""
OTHER_TEXTS = 0.1
"""Mean lengths may differ by this fraction between measurements of the same inputs, because a last pass over them is cut."""
BUSY_PERCENT = 10.0
"""Of the time, that somebody waited for a core; one measurement alone on a machine makes nobody wait."""
THROTTLED_NOW = 0xF
"""Of the Raspberry Pi's bits: those that tell of now, not of some time since boot."""


def compare(a: dict[str, Any], b: dict[str, Any], min_floor: float = BETWEEN_RUNS, other_machine: bool = False, seed: int = 0) -> list[Comparison]:
    """From document ``a`` to document ``b``, in the order of ``a``; then what only ``b`` has.

    Args:
        a, b: as :func:`read_bench` gives them.
        min_floor: differences up to this are never seen, however quiet the rounds were.
        other_machine: judge rows of different processors too, with a warning instead of a refusal.
        seed: of the bootstrap; the same documents and seed give the same figures.
    """
    found = []
    first, second = ({target["name"]: target for target in document["targets"]} for document in (a, b))
    for name in dict.fromkeys([*first, *second]):
        one, other = first.get(name), second.get(name)
        rows_a, rows_b = _rows(one), _rows(other)
        repeats = {threads: _repeats(a, one, threads) + _repeats(b, other, threads) for threads in {key[1] for key in (*rows_a, *rows_b)}}
        for key in dict.fromkeys([*rows_a, *rows_b]):
            file, threads, case, length = key
            place = {"target": name, "file": file, "threads": threads, "case": case, "length": length}
            if key not in rows_b:
                found.append(Comparison(**place, verdict=Verdict.ONLY_FIRST, base=rows_a[key]["p50_ms"], reason=_missing(other, file, "second")))
            elif key not in rows_a:
                found.append(Comparison(**place, verdict=Verdict.ONLY_SECOND, new=rows_b[key]["p50_ms"], reason=_missing(one, file, "first")))
            else:
                found.append(_judge(place, (a, rows_a[key]), (b, rows_b[key]), repeats[threads], min_floor, other_machine, seed))
        found += _compare_instructions(name, one, other)
    return found


def compare_files(document: dict[str, Any], min_floor: float = WITHIN_RUN, seed: int = 0) -> list[Comparison]:
    """Every file of one document against the first of its target, from the same rounds; no row for the first itself."""
    found = []
    for target in document["targets"]:
        rows = _rows(target)
        first = next((file for file, *_ in rows), None)
        for (file, threads, case, length), row in rows.items():
            if file == first:
                continue
            place = {"target": target["name"], "file": file, "threads": threads, "case": case, "length": length, "against": first}
            base = rows.get((first, threads, case, length))
            if base is None:
                found.append(Comparison(**place, verdict=Verdict.ONLY_SECOND, new=row["p50_ms"], reason=f"{first} was not measured so"))
                continue
            repeats = _repeats(document, target, threads)
            found.append(_judge(place, (document, base), (document, row), repeats, min_floor, True, seed, same_rounds=True))
        counts = target["instructions"]
        for one in counts[1:]:
            found.append(_instructions(target["name"], counts[0], one, against=counts[0]["file"]))
    return found


def read_bench(path: Path) -> dict[str, Any]:
    """The bench document in ``path``, in the form of :data:`VERSION`, with everything that a comparison needs.

    Raises:
        BadInput: no such file, no JSON, no bench document, one of a newer format, or a damaged one.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); give a file that `pocketbert bench --out` wrote") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: no JSON ({error}); give a file that `pocketbert bench --out` wrote") from error
    kind, _, version = str(document.get("format") if isinstance(document, dict) else None).rpartition(" ")
    if kind != FORMAT or not version.isascii() or not version.isdigit() or len(version) > 9:
        raise BadInput(f"{path}: not a bench document; give a file that `pocketbert bench --out` wrote")
    if int(version) > VERSION:
        raise BadInput(f"{path}: format {version} of bench documents, this version reads up to {VERSION}; update pocketbert")
    try:
        if int(version) == 1:
            _upgrade(document)
        _check(document)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BadInput(f"{path}: damaged bench document: {what}; measure again") from error
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _upgrade(document: dict[str, Any]) -> None:
    """From format 1, in which every text was one input with one answer, a class."""
    document |= {"format": f"{FORMAT} {VERSION}", "inputs": document["texts"]}
    for target in document["targets"]:
        for row in target["agreement"]:
            same, there, here = (row.pop(key, None) for key in ("same_answers", "accuracy_percent", "accuracy_here_percent"))
            scores = [None if accuracy is None else {"accuracy": accuracy} for accuracy in (there, here)]
            row |= {"inputs": row["texts"], "decisions": row["texts"], "same_decisions": same, "scores": scores[0], "scores_here": scores[1]}


def _check(document: dict[str, Any]) -> None:
    if document["texts"] < 1 or document["inputs"] < 1:
        raise ValueError("no texts")
    for target in document["targets"]:
        for key in ("name", "emulated", "error", "sustained", "agreement"):
            target[key]
        for row in target["measurements"]:
            for key in ("name", "file", "threads", "case", "length", "p50_ms", "tokens_mean", "conditions"):
                row[key]
            rounds = row["round_samples_ms"]
            if not rounds or not all(len(samples) and min(samples) > 0 and max(samples) < math.inf for samples in rounds):
                raise ValueError(f"{target['name']}: {row['name']}: samples must be above zero, in one round or more")
        for counted in target["instructions"]:
            if counted["total_per_text"] < 1:
                raise ValueError(f"{target['name']}: {counted['file']}: no instructions")


Key = tuple[str, int, str, int | None]


def _rows(target: dict[str, Any] | None) -> dict[Key, dict[str, Any]]:
    """Measurements by file, threads, case and length, but for those that only repeat another."""
    measured = target["measurements"] if target else []
    return {_key(row): row for row in measured if not row.get("repeat")}


def _key(row: dict[str, Any]) -> Key:
    return row["file"] or row["name"], row["threads"], row["case"], row["length"]


def _missing(target: dict[str, Any] | None, file: str, which: str) -> str:
    """Why a document has no row of ``file``."""
    if target is None:
        return f"the {which} document has no such target"
    refused = next((one["error"]["message"] for one in target.get("refused", ()) if one["file"] == file), None)
    failed = refused or (target["error"] or {}).get("message")
    return f"the {which} could not measure it: {failed}" if failed else f"the {which} did not measure it"


def _repeats(document: dict[str, Any], target: dict[str, Any] | None, threads: int) -> list[float]:
    """Changes from the first file to itself in the same rounds, in every case at this thread count."""
    rows, found = _rows(target), []
    for row in target["measurements"] if target else ():
        twin = rows.get(_key(row))
        if row.get("repeat") and row["threads"] == threads and twin is not None:
            inputs = _inputs(document, row)
            one, again = (typical(each["round_samples_ms"], inputs) for each in (twin, row))
            found.append(math.expm1(location(again) - location(one)))
    return found


def _inputs(document: dict[str, Any], row: dict[str, Any]) -> int:
    """How many different inputs a row went round."""
    return document["inputs"] if row["case"] == "texts" else min(document["inputs"], WARMUP["window"])


def _judge(
    place: dict[str, Any], one: tuple[dict[str, Any], dict[str, Any]], other: tuple[dict[str, Any], dict[str, Any]],
    repeats: list[float], min_floor: float, other_machine: bool, seed: int, same_rounds: bool = False,
) -> Comparison:  # fmt: skip
    """Verdict on a row of each document."""
    (a, row_a), (b, row_b) = one, other
    place = {**place, "base": row_a["p50_ms"], "new": row_b["p50_ms"]}
    machines = [] if same_rounds else list(_differences(row_a, row_b, OTHER_MACHINE))
    reasons = [*([] if other_machine else machines), *_too_little(a, row_a), *_too_little(b, row_b)]
    if not same_rounds:
        reasons += _other_texts(a, row_a, b, row_b)
    if reasons:
        return Comparison(**place, verdict=Verdict.REFUSED, reason="; ".join(dict.fromkeys(reasons)))
    inputs = min(_inputs(a, row_a), _inputs(b, row_b))
    rounds_a, rounds_b = (typical(row["round_samples_ms"], inputs) for row in (row_a, row_b))
    paired = same_rounds and len(rounds_a) == len(rounds_b)
    found = relative_change(rounds_a, rounds_b, paired, seed)
    floor = floor_within_run(repeats, min_floor) if same_rounds else floor_between_runs(rounds_a, rounds_b, repeats, min_floor)
    seen = abs(found.change) > floor and not found.low <= 0 <= found.high
    warnings = list(_unsteady(row_a, row_b, (place["against"], place["file"]) if same_rounds else ("the first", "the second")))
    if not same_rounds:
        tiers = [f"tier: {a.get('tier')}, then {b.get('tier')}"] if a.get("tier") != b.get("tier") else []
        warnings = [*machines, *_differences(row_a, row_b, EXPLAINS), *tiers, *warnings]
    return Comparison(
        **place, verdict=Verdict.NOT_SEEN if not seen else Verdict.SLOWER if found.change > 0 else Verdict.FASTER,
        change=found.change, low=found.low, high=found.high, floor=floor, warnings=tuple(warnings),
    )  # fmt: skip


def _differences(row_a: dict[str, Any], row_b: dict[str, Any], keys: tuple[str, ...]) -> Iterator[str]:
    """Conditions that both rows know and that are not the same."""
    for key in keys:
        before, after = (row["conditions"].get(key) for row in (row_a, row_b))
        if None not in (before, after) and before != after:
            yield f"{key.replace('_', ' ')}: {_short(before)}, then {_short(after)}"


def _short(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    alike = len(value) > 1 and all(one == value[0] for one in value)
    return f"{len(value)} x {value[0]}" if alike else " ".join(str(one) for one in value) or "none"


def _other_texts(a: dict[str, Any], row_a: dict[str, Any], b: dict[str, Any], row_b: dict[str, Any]) -> Iterator[str]:
    """Texts are the same if their digests are; documents without one must agree in number and mean length."""
    if row_a["case"] != "texts":
        return
    digests = a.get("texts_sha256"), b.get("texts_sha256")
    lengths = row_a["tokens_mean"], row_b["tokens_mean"]
    if a["texts"] != b["texts"]:
        yield f"other texts: {a['texts']}, then {b['texts']}"
    elif a["inputs"] != b["inputs"]:
        yield f"the same texts in {a['inputs']}, then {b['inputs']} inputs"
    elif None not in digests:
        if digests[0] != digests[1]:
            yield "other texts"
    elif abs(lengths[1] - lengths[0]) > OTHER_TEXTS * lengths[0]:
        yield f"other texts: {lengths[0]:.1f} tokens on average, then {lengths[1]:.1f}"


def _too_little(document: dict[str, Any], row: dict[str, Any]) -> Iterator[str]:
    if len(row["round_samples_ms"]) < 2:
        yield "one round tells no noise; measure more"
    elif min(map(len, row["round_samples_ms"])) < _inputs(document, row):
        yield "a round did not run every text"


def _unsteady(row_a: dict[str, Any], row_b: dict[str, Any], names: tuple[str, str]) -> Iterator[str]:
    """What made a measurement itself doubtful."""
    for row, name in zip((row_a, row_b), names, strict=True):
        states = [row["conditions"].get(state) or {} for state in ("before", "after")]
        if row.get("warmup_stable") is False:
            yield f"{name} was still drifting after warm-up"
        if any(((state.get("pressure") or {}).get("cpu") or 0.0) > BUSY_PERCENT for state in states):
            yield f"{name} was measured beside other work (CPU pressure above {BUSY_PERCENT:g} %)"
        if any((state.get("throttled") or 0) & THROTTLED_NOW for state in states):
            yield f"{name} was throttled"


def _compare_instructions(name: str, one: dict[str, Any] | None, other: dict[str, Any] | None) -> list[Comparison]:
    first, second = ({count["file"]: count for count in (target["instructions"] if target else ())} for target in (one, other))
    found = []
    for file in dict.fromkeys([*first, *second]):
        place = {"target": name, "file": file, "threads": None, "case": "instructions", "length": None}
        if file not in second:
            found.append(Comparison(**place, verdict=Verdict.ONLY_FIRST, base=first[file]["total_per_text"], reason=_missing(other, file, "second")))
        elif file not in first:
            found.append(Comparison(**place, verdict=Verdict.ONLY_SECOND, new=second[file]["total_per_text"], reason=_missing(one, file, "first")))
        else:
            found.append(_instructions(name, first[file], second[file]))
    return found


def _instructions(name: str, one: dict[str, Any], other: dict[str, Any], against: str = "") -> Comparison:
    """Counts repeat, so that any difference is one."""
    base, new = one["total_per_text"], other["total_per_text"]
    place = {"target": name, "file": other["file"], "threads": None, "case": "instructions", "length": None, "base": base, "new": new}
    if one.get("texts") != other.get("texts"):
        return Comparison(**place, verdict=Verdict.REFUSED, reason=f"other texts: {one.get('texts')}, then {other.get('texts')}", against=against)
    ratio = new / base - 1
    verdict = Verdict.SAME if new == base else Verdict.FEWER if new < base else Verdict.MORE
    return Comparison(**place, verdict=verdict, change=ratio, low=ratio, high=ratio, floor=0.0, against=against)

"""Verdicts on documents whose truth is known, because the noise was drawn; and one on documents that were really measured."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, replace
from statistics import median
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from device_bench.comparison import Comparison, Verdict, as_junit, as_markdown, as_table, compare, compare_files, gate, read_bench, ungated
from device_bench.latency_change import (
    WITHIN_RUN,
    floor_between_runs,
    floor_within_run,
    location,
    relative_change,
    spread,
    student_quantile,
    typical,
)
from device_bench.measurement import measure
from device_bench.targets import LocalTarget
from runtimes.errors import BadInput

TEXTS = 12
CONDITIONS = {
    "cpu_model": "Cortex-A76", "board": "Raspberry Pi 5", "architecture": "aarch64", "governors": ["performance"] * 4, "kernel": "Linux 6.6",
    "runtime": "onnxruntime 1.31.1", "before": {"throttled": 0}, "after": {"throttled": 0},
}  # fmt: skip


def draw(
    seed: int, factor: float | np.ndarray = 1.0, rounds: int = 5, passes: int = 20, drift: float = 0.01, wild: float = 0.0, slow_clock: float = 0.0,
    disturbed: float = 0.05,
) -> list[list[float]]:  # fmt: skip
    """Samples of ``rounds``: texts of different length, noise per sample with a heavy tail, and the whole round shifted.

    Args:
        factor: the truth, for all texts or each.
        drift: standard deviation of the shift of a round.
        wild: share of rounds that something disturbs by 20 % and more.
        slow_clock: share of rounds at a clock that is 15 % slower.
        disturbed: share of samples that an interrupt makes longer.
    """
    generator = np.random.default_rng(seed)
    texts = np.linspace(0.2, 0.9, TEXTS) * factor
    found = []
    for _ in range(rounds):
        shift = generator.normal(0, drift) + 0.2 * (generator.random() < wild) + 0.15 * (generator.random() < slow_clock)
        shape = (passes, TEXTS)
        tail = np.where(generator.random(shape) < disturbed, generator.exponential(0.5, shape), 0)
        found.append(np.round(texts * np.exp(shift + generator.normal(0, 0.03, shape) + tail), 5).ravel().tolist())
    return found


def row(samples: list[list[float]], **changes: Any) -> dict[str, Any]:
    known = {"name": "onnx/model.onnx", "file": "onnx/model.onnx", "threads": 1, "case": "texts", "length": None, "repeat": False}
    p50 = float(np.median(np.concatenate(samples)))
    measured = {"p50_ms": p50, "tokens_mean": 11.0, "warmup_stable": True, "conditions": copy.deepcopy(CONDITIONS), "round_samples_ms": samples}
    return known | measured | changes


def document(*rows: dict[str, Any], instructions: tuple[dict[str, Any], ...] = (), **changes: Any) -> dict[str, Any]:
    target = {"name": "pi", "emulated": False, "error": None, "conditions": CONDITIONS, "measurements": list(rows), "refused": []}
    target |= {"sustained": [], "agreement": [], "instructions": list(instructions)}
    known = {"format": "pocketbert bench 2", "bundle": {"name": "demo", "files": []}, "tier": "quick", "rounds": 5, "texts": TEXTS, "inputs": TEXTS}
    return known | {"targets": [target]} | changes


def verdict(a: list[list[float]], b: list[list[float]], **options: Any) -> Comparison:
    (found,) = compare(document(row(a)), document(row(b)), **options)
    return found


# --- the statistic ------------------------------------------------------------------------------------------------


NOISES: list[dict[str, Any]] = [
    {}, {"drift": 0.002}, {"wild": 0.1}, {"disturbed": 0.2}, {"slow_clock": 0.2, "drift": 0.003}, {"passes": 1}, {"rounds": 3}, {"rounds": 8},
]  # fmt: skip


@pytest.mark.parametrize("noise", NOISES)
def test_the_interval_holds_the_truth_and_no_difference_is_invented(noise):
    """95 % are promised; of 60 draws each, 53 leave room for chance (1 in 200 at worst)."""
    held = false = 0
    for seed in range(60):
        a = typical(draw(seed, **noise), TEXTS)
        planted = typical(draw(1000 + seed, 1.1, **noise), TEXTS)
        found = relative_change(a, planted)
        held += found.low <= 0.1 <= found.high
        false += verdict(draw(seed, **noise), draw(2000 + seed, **noise)).verdict != Verdict.NOT_SEEN
    assert held >= 53
    assert false <= 3


@pytest.mark.parametrize("noise", [{}, {"drift": 0.003}, {"disturbed": 0.25}, {"passes": 3}])
def test_a_planted_slow_down_is_found(noise):
    found = [verdict(draw(seed, **noise), draw(3000 + seed, 1.1, **noise)).verdict for seed in range(40)]
    assert found.count(Verdict.SLOWER) >= 38
    assert Verdict.FASTER not in found


def test_swapping_the_documents_turns_the_verdict_round():
    one, other = verdict(draw(1), draw(2, 1.2)), verdict(draw(2, 1.2), draw(1))
    assert (one.verdict, other.verdict) == (Verdict.SLOWER, Verdict.FASTER)
    assert other.change == pytest.approx(1 / (1 + one.change) - 1)


def test_the_same_documents_give_the_same_figures():
    a, b = document(row(draw(1))), document(row(draw(2)))
    assert compare(a, b) == compare(a, b)
    assert compare(a, b) != compare(a, b, seed=1)  # the interval does come from the bootstrap
    assert compare(a, a)[0].change == 0


def test_buckets_of_equal_share_do_not_make_it_jump():
    """The median over all samples lies between two buckets, and one text that moves decides which."""
    near = np.repeat([1.0, 4.0], TEXTS // 2)
    a, b = (draw(seed, near / np.linspace(0.2, 0.9, TEXTS), drift=0.0, disturbed=disturbed) for seed, disturbed in ((1, 0.0), (2, 0.06)))
    assert np.median(np.concatenate(b)) > 1.5 * np.median(np.concatenate(a)) or np.median(np.concatenate(a)) > 1.5
    assert abs(verdict(a, b).change) < 0.02


def test_a_slow_down_of_long_texts_alone_is_found():
    long_texts = np.where(np.arange(TEXTS) >= 8, 1.5, 1.0)
    found = verdict(draw(1, drift=0.002), draw(2, long_texts, drift=0.002))
    assert found.verdict == Verdict.SLOWER
    assert found.change == pytest.approx(1.5 ** (4 / TEXTS) - 1, abs=0.02)


def test_what_other_processes_add_is_not_taken_for_the_model():
    quiet, busy = draw(1, disturbed=0.0, drift=0.001), draw(2, disturbed=0.5, drift=0.001)
    assert np.mean(np.concatenate(busy)) > 1.2 * np.mean(np.concatenate(quiet))
    assert verdict(quiet, busy).verdict == Verdict.NOT_SEEN


def test_two_runs_may_differ_by_the_floor_and_files_of_one_run_may_not():
    """The machine may be 2 % slower an hour later; in the same rounds it is the same machine."""
    a, b = draw(1, drift=0.0), draw(2, 1.02, drift=0.0)
    between = verdict(a, b)
    assert between.low > 0 and between.verdict == Verdict.NOT_SEEN and between.floor >= 0.03
    assert verdict(a, b, min_floor=0.005).verdict == Verdict.SLOWER
    (within,) = compare_files(document(row(a), row(b, name="other", file="other.onnx")))
    assert (within.verdict, within.against, within.floor) == (Verdict.SLOWER, "onnx/model.onnx", WITHIN_RUN)


def test_rounds_of_one_run_are_compared_in_pairs():
    """A machine that slows down from round to round does so for both files."""
    shifts = np.exp(0.1 * np.arange(5))
    rounds = (draw(1, drift=0.0), draw(2, 1.05, drift=0.0))
    one, other = (typical([np.multiply(samples, shift) for samples, shift in zip(each, shifts, strict=True)], TEXTS) for each in rounds)
    paired, apart = relative_change(one, other, paired=True), relative_change(one, other)
    assert apart.low < 0 < apart.high
    assert 0 < paired.low < 0.05 < paired.high < 0.1


def test_a_repeat_that_differs_raises_the_floor_of_its_threads():
    again = row(draw(3, 1.06, drift=0.002), name="onnx/model.onnx (again)", repeat=True)
    wide = row(draw(4, drift=0.002), threads=2)
    a = document(row(draw(1, drift=0.002)), again, wide)
    b = document(row(draw(2, 1.08, drift=0.002)), row(draw(5, 1.08, drift=0.002), threads=2))
    one, other = compare(a, b)
    assert (one.threads, one.verdict) == (1, Verdict.NOT_SEEN)
    assert one.floor == pytest.approx(0.12, abs=0.02)
    assert (other.threads, other.verdict) == (2, Verdict.SLOWER)


def test_the_floor_grows_with_the_spread_of_rounds_but_not_with_one_wild_round():
    calm, restless = (typical(draw(1, drift=drift), TEXTS) for drift in (0.002, 0.03))
    wild = calm.copy()
    wild[2] += 0.4
    assert floor_between_runs(calm, calm, []) < 0.04 < floor_between_runs(restless, restless, [])
    assert floor_between_runs(wild, calm, []) < 0.05
    assert floor_within_run([]) == WITHIN_RUN
    assert floor_within_run([0.03, -0.04]) == pytest.approx(2 * math.sqrt(0.00125))


@pytest.mark.parametrize("rounds", [3, 5, 8])
def test_the_spread_is_a_standard_deviation(rounds):
    generator = np.random.default_rng(0)
    estimates = [spread(*generator.normal(0, 0.02, (2, rounds, 1))) for _ in range(600)]
    assert np.mean(estimates) == pytest.approx(0.02, rel=0.1)


def test_typical_takes_samples_in_the_order_of_the_texts():
    samples = [[1.0, 2.0, 3.0] * 4 + [100.0], [2.0, 4.0, 6.0]]
    np.testing.assert_allclose(np.exp(typical(samples, 3)), [[1, 2, 3], [2, 4, 6]])
    assert math.exp(location(typical([[4.0, 9.0]] * 2, 2))) == pytest.approx(6)
    with pytest.raises(ValueError, match="a round of 2 samples for 3 texts"):
        typical([[1.0, 2.0]], 3)
    with pytest.raises(ValueError, match="cannot be compared"):
        relative_change(np.zeros((1, 3)), np.zeros((2, 3)))


def test_student_quantiles_of_the_tables():
    table = {(0.975, 1): 12.7062, (0.975, 2): 4.3027, (0.975, 8): 2.3060, (0.95, 5): 2.0150, (0.995, 3): 5.8409}
    assert {key: round(student_quantile(*key), 4) for key in table} == table


# --- what is compared with what -----------------------------------------------------------------------------------


def test_rows_are_matched_by_place_file_threads_case_and_length():
    samples = draw(1)
    fixed = {"case": "length", "length": 16}
    a = document(row(samples), row(samples, threads=4), row(samples, **fixed), row(samples, file="gone.onnx"))
    b = document(row(samples, file="new.onnx"), row(samples, **fixed), row(samples))
    found = {(one.file, one.threads, one.length): one for one in compare(a, b)}
    assert [one.verdict for one in found.values()] == [
        Verdict.NOT_SEEN, Verdict.ONLY_FIRST, Verdict.NOT_SEEN, Verdict.ONLY_FIRST, Verdict.ONLY_SECOND,
    ]  # fmt: skip
    assert found["onnx/model.onnx", 4, None].reason == "the second did not measure it"
    assert found["new.onnx", 1, None].new == row(samples)["p50_ms"]
    assert found["onnx/model.onnx", 1, 16].setting == "16 tokens, 1 thread"


def test_a_place_that_failed_or_refused_a_file_says_so():
    a, failed = document(row(draw(1))), document()
    failed["targets"][0]["error"] = {"kind": "TargetUnreachable", "message": "pi: no route to host", "exit_code": 4}
    assert compare(a, failed)[0].reason == "the second could not measure it: pi: no route to host"
    refused = document()
    refused["targets"][0]["refused"] = [{"file": "onnx/model.onnx", "error": {"message": "out of memory", "kind": "OutOfMemory", "exit_code": 4}}]
    assert compare(refused, a)[0].reason == "the first could not measure it: out of memory"
    assert compare(a, document(targets=[]))[0].reason == "the second document has no such target"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["targets"][0]["measurements"][0]["conditions"].update(cpu_model="Cortex-A72"), "cpu model: Cortex-A76, then Cortex-A72"),
        (lambda d: d["targets"][0]["measurements"][0]["conditions"].update(board="Raspberry Pi 4"), "board: Raspberry Pi 5, then Raspberry Pi 4"),
        (lambda d: d.update(texts=6), "other texts: 12, then 6"),
        (lambda d: d.update(texts_sha256="b"), "other texts"),
        (lambda d: d.update(inputs=6), "the same texts in 12, then 6 inputs"),
        (lambda d: d["targets"][0]["measurements"][0].update(round_samples_ms=draw(1, rounds=1)), "one round tells no noise; measure more"),
    ],
)  # fmt: skip
def test_rows_of_another_thing_are_refused(change, reason):
    a, b = document(row(draw(1)), texts_sha256="a"), document(row(draw(2, 2.0)), texts_sha256="a")
    change(b)
    (found,) = compare(a, b)
    assert (found.verdict, found.reason, found.change) == (Verdict.REFUSED, reason, None)
    assert gate([found], 0.0) == [] and ungated([found], 1.0) == [found]


def test_texts_without_a_digest_must_agree_in_length():
    a, b = document(row(draw(1))), document(row(draw(2), tokens_mean=14.0))
    assert compare(a, b)[0].reason == "other texts: 11.0 tokens on average, then 14.0"


def test_another_machine_is_judged_on_demand_with_a_warning():
    b = document(row(draw(2, 1.3)))
    b["targets"][0]["measurements"][0]["conditions"]["cpu_model"] = "Cortex-A72"
    (found,) = compare(document(row(draw(1))), b, other_machine=True)
    assert found.verdict == Verdict.SLOWER
    assert found.warnings == ("cpu model: Cortex-A76, then Cortex-A72",)


def test_what_may_explain_a_difference_is_told_and_unknown_is_not():
    b = document(row(draw(2), warmup_stable=False), tier="rapid")
    changed = b["targets"][0]["measurements"][0]["conditions"]
    changed |= {"runtime": "onnxruntime 1.32.0", "governors": ["powersave"] * 4, "kernel": None}
    changed["after"] = {"throttled": 0x50005, "pressure": {"cpu": 61.2}}
    (found,) = compare(document(row(draw(1))), b)
    assert found.warnings == (
        "runtime: onnxruntime 1.31.1, then onnxruntime 1.32.0", "governors: 4 x performance, then 4 x powersave", "tier: quick, then rapid",
        "the second was still drifting after warm-up", "the second was measured beside other work (CPU pressure above 10 %)",
        "the second was throttled",
    )  # fmt: skip


def test_files_of_one_document_are_warned_about_by_name():
    busy = copy.deepcopy(CONDITIONS) | {"before": {"pressure": {"cpu": 61.2}}}
    (found,) = compare_files(document(row(draw(1)), row(draw(2), file="other.onnx", conditions=busy, runtime="another")))
    assert found.warnings == ("other.onnx was measured beside other work (CPU pressure above 10 %)",)


def test_throttled_since_boot_is_not_throttled_now():
    b = document(row(draw(2)))
    b["targets"][0]["measurements"][0]["conditions"]["after"]["throttled"] = 0x50000
    assert compare(document(row(draw(1))), b)[0].warnings == ()


# --- instructions -------------------------------------------------------------------------------------------------


def counted(total: int, file: str = "onnx/model.onnx", texts: int = 16) -> dict[str, Any]:
    return {"file": file, "texts": texts, "total_per_text": total, "totals": [total], "by_class": {}}


@pytest.mark.parametrize(("after", "told"), [(217_241_407, Verdict.SAME), (217_241_408, Verdict.MORE), (100_000_000, Verdict.FEWER)])
def test_instructions_are_compared_exactly_and_are_never_time(after, told):
    comparisons = compare(document(instructions=(counted(217_241_407),)), document(instructions=(counted(after),)))
    (found,) = comparisons
    assert (found.verdict, found.floor, found.low) == (told, 0.0, found.change)
    for text in (as_table(comparisons), as_markdown(comparisons), as_junit(comparisons, 0.05)):
        assert " ms" not in text and told in text
    assert gate(comparisons, 0.0) == ([found] if told == Verdict.MORE else [])
    assert gate(comparisons, 0.05) == []


def test_instructions_of_other_texts_or_files():
    found = compare(document(instructions=(counted(5), counted(6, "a"))), document(instructions=(counted(5, texts=8), counted(7, "b"))))
    assert [one.verdict for one in found] == [Verdict.REFUSED, Verdict.ONLY_FIRST, Verdict.ONLY_SECOND]
    (within,) = compare_files(document(instructions=(counted(100), counted(50, "small"))))
    assert (within.verdict, within.change, within.against) == (Verdict.FEWER, -0.5, "onnx/model.onnx")


# --- gate and text ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed() -> list[Comparison]:
    """Slower, faster, within noise, gone, and counted."""
    rows_a = [row(draw(1)), row(draw(2), threads=2), row(draw(3), threads=4), row(draw(4), file="gone <&|>\x07.onnx")]
    rows_b = [row(draw(5, 1.12)), row(draw(6, 0.8), threads=2), row(draw(7), threads=4)]
    return compare(document(*rows_a, instructions=(counted(10),)), document(*rows_b, instructions=(counted(11),), tier="rapid"))


def test_the_gate_fails_what_is_seen_and_larger_than_allowed(mixed):
    assert [one.verdict for one in gate(mixed, 0.05)] == [Verdict.SLOWER, Verdict.MORE]
    assert gate(mixed, 0.2) == []
    assert [one.verdict for one in ungated(mixed, 0.10)] == [Verdict.ONLY_FIRST]
    assert len(ungated(mixed, 0.01)) == 4  # every floor of milliseconds is above one percent
    with pytest.raises(BadInput, match="zero or more"):
        gate(mixed, -0.01)


def test_a_change_below_the_floor_never_fails_a_gate():
    assert gate([verdict(draw(1, drift=0.0), draw(2, 1.02, drift=0.0))], 0.0) == []


def test_the_table_has_every_row_aligned_and_tells_what_was_not_judged(mixed):
    timed, counts, notes = as_table(mixed).split("\n\n")
    header, *lines = timed.splitlines()
    assert len(lines) == 4 and len(counts.splitlines()) == 2
    for line, told in zip(lines, ("slower", "faster", "no difference seen", "only in the first"), strict=True):
        assert line[header.index("verdict") :] == told
    assert notes.splitlines()[0] == "1 slower, 1 faster, 1 no difference seen, 1 more instructions, 1 only in the first"
    assert "pi: gone <&|>?.onnx, texts, 1 thread: only in the first: the second did not measure it" in notes
    assert "pi: tier: quick, then rapid (3 of 4 rows)" in notes
    assert "\x07" not in as_table(mixed)


def test_markdown_is_tables_that_a_name_cannot_break(mixed):
    text = as_markdown(mixed)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows[:6]}) == 1
    assert "**slower**" in text and "**no difference seen**" not in text and "gone <&\\|>?.onnx" in text
    assert text.startswith("1 slower") and text.endswith("\n")


def test_junit_has_a_case_per_row_with_failures_and_skips(mixed):
    root = ElementTree.fromstring(as_junit(mixed, 0.05).encode())
    (suite,) = root
    assert [suite.get(key) for key in ("tests", "failures", "skipped", "errors")] == ["5", "2", "1", "0"]
    cases = list(suite)
    assert [case.get("classname") for case in cases] == ["pi"] * 5
    assert len({case.get("name") for case in cases}) == 5
    assert [[child.tag for child in case][:-1] for case in cases] == [["failure"], [], [], ["skipped"], ["failure"]]
    assert "at most 5.0 % is allowed" in cases[0].find("failure").get("message")
    assert not list(ElementTree.fromstring(as_junit(mixed, 0.5).encode()).iter("failure"))


def test_nothing_to_compare_is_said():
    assert as_table([]) == "nothing to compare"
    assert ElementTree.fromstring(as_junit([], 0.05).encode()).get("tests") == "0"


def test_comparisons_are_json(mixed):
    told = json.loads(json.dumps([asdict(one) for one in mixed]))
    assert [one["verdict"] for one in told][:2] == ["slower", "faster"]


# --- reading ------------------------------------------------------------------------------------------------------


def test_a_document_is_read_as_it_was_written(tmp_path):
    written = document(row(draw(1)), instructions=(counted(7),))
    (tmp_path / "bench.json").write_text(json.dumps(written))
    assert read_bench(tmp_path / "bench.json") == written


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "no JSON"),
        ("[]", "not a bench document"),
        ('{"format": 1, "stages": []}', "not a bench document"),
        (b"\xff\xfe", "no JSON"),
        (json.dumps(document() | {"format": "pocketbert bench 3"}), "format 3 of bench documents, this version reads up to 2; update pocketbert"),
        (json.dumps({k: v for k, v in document().items() if k != "targets"}), "'targets' is missing"),
        (json.dumps(document(row(draw(1), p50_ms=float("nan")))), "NaN is no number"),
        (json.dumps(document({k: v for k, v in row(draw(1)).items() if k != "round_samples_ms"})), "'round_samples_ms' is missing"),
        (json.dumps(document(row([[1.0], [0.0]]))), "pi: onnx/model.onnx: samples must be above zero"),
        (json.dumps(document(row([[1.0], []]))), "samples must be above zero"),
        (json.dumps(document(row([[1.0], [2.0]]) | {"round_samples_ms": [["1"]]})), "damaged bench document"),
        (json.dumps(document(targets=None)), "damaged bench document"),
        (json.dumps(document(instructions=(counted(0),))), "no instructions"),
    ],
)  # fmt: skip
def test_what_is_no_bench_document_is_named(tmp_path, content, says):
    path = tmp_path / "bench.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=says) as raised:
        read_bench(path)
    assert str(raised.value).startswith(str(path))


def test_a_document_of_format_1_is_read_as_one_of_today(tmp_path):
    agreement = {"file": "a", "texts": 12, "worst_difference": 0.1, "tolerance": 0.2, "same_bits": False}
    of_old = agreement | {"same_answers": 11, "accuracy_percent": 91.5, "accuracy_here_percent": None}
    old = document(row(draw(1)), format="pocketbert bench 1")
    del old["inputs"]
    old["targets"][0]["agreement"] = [of_old]
    (tmp_path / "old.json").write_text(json.dumps(old))
    found = read_bench(tmp_path / "old.json")
    scores = {"scores": {"accuracy": 91.5}, "scores_here": None}
    expected = document(row(draw(1)))
    expected["targets"][0]["agreement"] = [agreement | {"inputs": 12, "decisions": 12, "same_decisions": 11} | scores]
    assert found == expected
    assert compare(found, expected)[0].verdict == Verdict.NOT_SEEN


def test_inputs_are_what_samples_are_of():
    """Twelve texts in 24 inputs: a round of twelve samples did not run them all."""
    a, b = (document(row(draw(seed)), inputs=2 * TEXTS) for seed in (1, 2))
    for one in (a, b):
        for measured in one["targets"][0]["measurements"]:
            measured["round_samples_ms"] = [samples[:TEXTS] for samples in measured["round_samples_ms"]]
    assert compare(a, b)[0].reason == "a round did not run every text"


def test_a_document_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        read_bench(tmp_path / "none.json")


# --- for real -----------------------------------------------------------------------------------------------------


def test_documents_that_were_really_measured(onnx_candidate, tmp_path):
    documents = []
    for number in range(2):
        rows = measure(
            [onnx_candidate, replace(onnx_candidate, name="again")], LocalTarget(), [1], [8], rounds=3, min_seconds=0.0, say=lambda message: None,
            memory=False, keep_samples=True, text_inferences=20, length_inferences=40,
        )  # fmt: skip
        rows = [one | {"repeat": one["name"] == "again"} for one in rows]
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(document(*rows, texts=len(onnx_candidate.inputs), inputs=len(onnx_candidate.inputs))))
        documents.append(read_bench(path))
    found = compare(*documents)
    assert [(one.case, one.length) for one in found] == [("texts", None), ("length", 8)]
    for one in found:
        assert one.verdict in (Verdict.SLOWER, Verdict.FASTER, Verdict.NOT_SEEN)
        assert one.low <= one.change <= one.high
        assert one.base == median_of(documents[0], one)
    assert compare_files(documents[0]) == []


def median_of(measured: dict[str, Any], one: Comparison) -> float:
    (samples,) = (r["round_samples_ms"] for r in measured["targets"][0]["measurements"] if r["length"] == one.length and not r["repeat"])
    return pytest.approx(median(value for each in samples for value in each), abs=1e-5)

"""Rounds, merging and the shape of results; one run with real models, the rest against a target that plays back answers."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from device_bench.agent.agent import latency_summary, read_inputs
from device_bench.measurement import KEPT_SAMPLES, LENGTH_INFERENCES, Candidate, Care, _thinned, measure
from device_bench.targets import LocalTarget
from runtimes.errors import BadInput, IntegrityError, TargetUnreachable
from runtimes.session import SessionOptions
from runtimes.text import Encoding
from tests.device_bench.conftest import INPUTS as INPUTS_OF_MODELS
from tests.device_bench.conftest import assert_outputs, pairs, reference_outputs

KEYS = {
    "name", "file", "baseline", "target", "runtime", "threads", "case", "length", "tokens_mean", "count", "p50_ms", "p90_ms",
    "p99_ms", "mean_ms", "min_ms", "quantiles_ms", "round_p50_ms", "noise", "warmup_stable", "load_ms", "first_inference_ms",
    "memory", "conditions",
}  # fmt: skip
INPUTS = [Encoding(ids, [0, *[1] * (len(ids) - 1)]) for ids in ([1, 5, 2], [1, 3, 4, 2], [1, 6, 7, 8, 9, 2], [1, 10, 2])]


class PlaybackTarget:
    """Answers like the agent; the samples of a round are ``round * 1 ms``, and 3 ms more for candidate b."""

    name = "playback"

    def __init__(self, refuses: str = "", degrees_c: list[float] | None = None, lost_after: int | None = None) -> None:
        self.lost_after = lost_after
        self.refuses = refuses
        self.degrees_c = degrees_c
        self.jobs: list[dict] = []
        self.rounds: dict[tuple[str, int], int] = {}

    def info(self) -> dict:
        return {"conditions": {"before": self.state()}}

    def state(self) -> dict:
        """The zone's temperatures one after the other, the last for ever."""
        if self.degrees_c is None:
            return {"temperatures_c": None}
        return {"temperatures_c": {"cpu": self.degrees_c.pop(0) if len(self.degrees_c) > 1 else self.degrees_c[0], "modem": None}}

    def run(self, job: dict) -> dict:
        arrays = {key: read_inputs(job[key]) for key in ("inputs", "golden") if job[key] is not None}
        if len(self.jobs) == self.lost_after:
            raise TargetUnreachable("the link broke")
        self.jobs.append({**job, "arrays": arrays})
        if self.refuses and self.refuses in job["model"]:
            raise IntegrityError(f"{job['model']}: golden case 1 differs")
        if job["mode"] == "memory":
            memory = {"baseline_bytes": 10, "peak_bytes": 15, "model_bytes": 5, "pss_bytes": None}
            return {"memory": memory, "conditions": {"before": self.state(), "after": self.state()}}
        key = (job["model"], job["threads"])
        number = self.rounds[key] = self.rounds.get(key, 0) + 1
        samples_ns = [(number + 3 * (job["model"] == "b.onnx")) * 1_000_000] * (10 * number)
        common = {"tokens_mean": float(number), "warmup": {"inferences": 3, "seconds": 0.1, "stable": number > 1}}
        cases = [{**case, "length": case.get("length"), **common, **latency_summary(samples_ns), "samples_ns": samples_ns} for case in job["cases"]]
        conditions = {"before": {"loadavg": [number], **self.state()}, "after": {"loadavg": [number + 0.5], **self.state()}}
        return {"runtime": "r 1", "conditions": conditions, "load_ms": number, "first_inference_ms": 2 * number, "cases": cases}


def candidate(name: str, golden: list[dict] | None = None, baseline: bool = False) -> Candidate:
    return Candidate(name, Path(f"{name}.onnx"), "onnx", "", INPUTS, golden, 1e-3, baseline)


def run(target, candidates, **changes):
    plan = {"threads": [1, 2], "lengths": [32], "rounds": 3, "min_seconds": 0.0, "say": lambda message: None}
    return measure(candidates, target, **{**plan, **changes})


def test_rounds_are_interleaved_and_memory_is_apart():
    target, said = PlaybackTarget(), []
    run(target, [candidate("a"), candidate("b"), candidate("c")], rounds=2, threads=[1, 4], say=said.append)
    order = [(job["mode"], job["model"][0], job["threads"]) for job in target.jobs]
    memory = [("memory", name, 1) for name in "abc"]
    one_round = [("latency", name, threads) for threads in (1, 4) for name in "abc"]
    assert order == memory + one_round + one_round
    assert len(said) == len(order)
    assert said[0] == "playback: a: memory"
    assert said[-1] == "playback: c: round 2/2, threads 4"


def test_rounds_are_merged_on_their_samples():
    results = run(PlaybackTarget(), [candidate("a", baseline=True), candidate("b")])
    assert [(r["name"], r["threads"], r["case"], r["length"]) for r in results] == [
        (name, threads, *case) for name in "ab" for threads in (1, 2) for case in (("texts", None), ("length", 32))
    ]
    first = results[0]
    assert set(first) == KEYS
    assert first["count"] == 60
    assert first["round_p50_ms"] == [1, 2, 3]
    assert first["p50_ms"] == 2.5  # of 10 x 1, 20 x 2, 30 x 3 ms; the median of the rounds would be 2
    assert first["noise"] == 1.0
    assert first["tokens_mean"] == 2.333
    assert (first["load_ms"], first["first_inference_ms"]) == (2, 4)
    assert first["warmup_stable"] is False
    assert first["conditions"] == {
        "before": {"loadavg": [1], "temperatures_c": None}, "after": {"loadavg": [3.5], "temperatures_c": None},
    }  # fmt: skip
    assert first["memory"] == {"baseline_bytes": 10, "peak_bytes": 15, "model_bytes": 5, "pss_bytes": None}
    assert [r["baseline"] for r in results] == [True] * 4 + [False] * 4
    assert results[4]["round_p50_ms"] == [4, 5, 6]


def test_one_round_says_nothing_about_noise():
    assert run(PlaybackTarget(), [candidate("a")], rounds=1)[0]["noise"] is None


def test_samples_are_kept_by_round_when_asked_for():
    first = run(PlaybackTarget(), [candidate("a")], keep_samples=True)[0]
    assert first["round_samples_ms"] == [[1.0] * 8, [2.0] * 20, [3.0] * 28]  # whole passes over the four texts


def test_kept_samples_are_whole_passes_from_all_over_the_round():
    samples_ns = [(pass_ * 10 + text) * 1_000_000 for pass_ in range(3000) for text in range(4)]
    kept = _thinned([*samples_ns, 1, 2], 4)
    assert 512 < len(kept) <= KEPT_SAMPLES
    assert [int(sample) % 10 for sample in kept] == [0, 1, 2, 3] * (len(kept) // 4)
    assert kept[0] == 0
    assert kept[-1] > 29_000


def test_a_refused_candidate_takes_no_further_part_and_the_others_go_on():
    target, refused = PlaybackTarget(refuses="b"), []
    results = run(target, [candidate("a"), candidate("b"), candidate("c")], refused=lambda one, error: refused.append((one.name, str(error))))
    assert {row["name"] for row in results} == {"a", "c"}
    assert refused == [("b", "b.onnx: golden case 1 differs")]
    assert [job["mode"] for job in target.jobs if job["model"] == "b.onnx"] == ["memory"]


def test_noisy_rounds_are_followed_by_more_but_not_for_ever():
    noisy = run(PlaybackTarget(), [candidate("a")], rounds=2, care=Care(max_noise=0.05, extra_rounds=3))[0]
    assert noisy["round_p50_ms"] == [1, 2, 3, 4, 5]
    calm = run(PlaybackTarget(), [candidate("a")], rounds=2, care=Care(max_noise=5.0, extra_rounds=3))[0]
    assert calm["round_p50_ms"] == [1, 2]


def test_waits_for_the_hottest_zone_to_cool_down():
    said = []
    target = PlaybackTarget(degrees_c=[40.0, 41.0, 60.0, 61.0, 50.0, 42.0])
    run(target, [candidate("a")], threads=[1], rounds=1, care=Care(cool_down_s=30.0, poll_s=0.0), say=said.append)
    assert [line for line in said if "°C" in line] == []
    target = PlaybackTarget(degrees_c=[40.0, 60.0, 50.0, 42.0, 42.0])
    run(target, [candidate("a")], threads=[1], rounds=1, care=Care(cool_down_s=30.0, poll_s=0.0), say=said.append)
    assert [line for line in said if "°C" in line] == ["playback: 60 °C, waiting for 43 °C", "playback: 50 °C, waiting for 43 °C"]


def test_what_a_lost_target_gave_before_is_kept():
    lost = []
    results = run(PlaybackTarget(lost_after=7), [candidate("a"), candidate("b")], threads=[1], stopped=lambda error: lost.append(str(error)))
    assert lost == ["the link broke"]
    assert [(row["name"], len(row["round_p50_ms"])) for row in results if row["case"] == "texts"] == [("a", 3), ("b", 2)]
    with pytest.raises(TargetUnreachable, match="the link broke"):
        run(PlaybackTarget(lost_after=7), [candidate("a"), candidate("b")], threads=[1])


def test_does_not_wait_for_ever_nor_where_nothing_is_known():
    said = []
    run(PlaybackTarget(degrees_c=[40.0, 60.0]), [candidate("a")], care=Care(cool_down_s=0.01, poll_s=0.0), say=said.append)
    run(PlaybackTarget(), [candidate("a")], care=Care(cool_down_s=1e6), say=said.append)


def as_lists(inputs: list[tuple]) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), types.tolist()) for ids, types in inputs]


def test_golden_inputs_may_be_others():
    target, golden = PlaybackTarget(), [{"logits": np.ones(2, np.float32)}]
    run(target, [replace(candidate("a", golden), golden_inputs=INPUTS[2:])], memory=False, rounds=1, threads=[1])
    assert as_lists(target.jobs[0]["arrays"]["golden"][0]) == pairs(INPUTS[2:3])


def test_jobs_carry_the_plan_and_the_arrays():
    target, golden = PlaybackTarget(), [{"logits": np.full(5, n, np.float32), "tags": np.full((n, 2), 1, np.float32)} for n in (3, 4)]
    run(target, [candidate("a", golden), replace(candidate("b"), inputs=INPUTS[:1])], cores=[0, 1])
    proven, unproven = target.jobs[:2]
    (inputs, none), (golden_inputs, golden_outputs) = proven["arrays"]["inputs"], proven["arrays"]["golden"]
    assert as_lists(inputs) == pairs(INPUTS)
    assert none == [{}] * len(INPUTS)
    assert as_lists(golden_inputs) == pairs(INPUTS[:2])
    assert_outputs(golden_outputs, golden, atol=0)
    assert as_lists(unproven["arrays"]["inputs"][0]) == pairs(INPUTS[:1])
    assert unproven["golden"] is None
    assert proven["cores"] == [0, 1]
    of_a, of_b = target.jobs[2:4]
    assert (of_a["min_inferences"], of_b["min_inferences"], of_a["min_seconds"]) == (4, 1, 0.0)
    assert of_a["cases"] == [{"case": "texts"}, {"case": "length", "length": 32, "min_inferences": LENGTH_INFERENCES}]
    assert not any(Path(job["inputs"]).exists() for job in target.jobs)


def test_same_file_twice_is_two_results():
    results = run(PlaybackTarget(), [candidate("a"), replace(candidate("a"), name="a again")], threads=[1], lengths=[])
    assert [r["name"] for r in results] == ["a", "a again"]


def test_a_candidate_brings_its_own_threads_and_session():
    target = PlaybackTarget()
    session = SessionOptions(threads=2, graph_optimization_level="basic")
    own = replace(candidate("b"), threads=[2], session=session)
    results = run(target, [candidate("a"), own], threads=[1], lengths=[], rounds=2, memory=False)
    assert [(job["mode"], job["model"][0], job["threads"]) for job in target.jobs] == [("latency", "a", 1), ("latency", "b", 2)] * 2
    assert [(r["name"], r["threads"], r["memory"]) for r in results] == [("a", 1, None), ("b", 2, None)]
    assert target.jobs[1]["session"] == session.as_manifest("onnx")
    assert target.jobs[0]["session"] == SessionOptions().as_manifest("onnx")
    with pytest.raises(BadInput, match=r"threads: \[0\] must all be at least 1"):
        run(target, [replace(candidate("a"), threads=[0])])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"threads": []}, "one or more different counts"),
        ({"threads": [0]}, r"threads: .* at least 1"),
        ({"threads": [2, 2]}, "one or more different counts"),
        ({"lengths": [16, 0]}, r"lengths: .* at least 1"),
        ({"rounds": 0}, r"rounds: .* at least 1"),
    ],
)
def test_plans_that_measure_nothing(changes, says):
    with pytest.raises(BadInput, match=says):
        run(PlaybackTarget(), [candidate("a")], **changes)


def test_nothing_to_measure_or_to_measure_with():
    with pytest.raises(BadInput, match="no candidates"):
        run(PlaybackTarget(), [])
    with pytest.raises(BadInput, match="a: no texts"):
        run(PlaybackTarget(), [replace(candidate("a"), inputs=[])])
    with pytest.raises(BadInput, match="a: outputs of 5 golden cases for 4 inputs"):
        run(PlaybackTarget(), [candidate("a", [{"logits": np.ones(2)}] * 5)])


def test_real_models_end_to_end(onnx_candidate, tflite_candidate, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    results = run(LocalTarget(), [onnx_candidate, tflite_candidate], threads=[1], lengths=[8], rounds=2)
    assert len(results) == 4
    for result in results:
        assert set(result) == KEYS
        assert result["target"] == "local"
        assert result["count"] == 2 * (LENGTH_INFERENCES if result["case"] == "length" else 5)
        assert len(result["quantiles_ms"]) == 101
        assert result["quantiles_ms"] == sorted(result["quantiles_ms"])
        assert len(result["round_p50_ms"]) == 2
        assert all(value > 0 for value in result["memory"].values())
        assert result["conditions"]["runtime"] == result["runtime"]
    assert [r["baseline"] for r in results] == [True, True, False, False]
    assert [r["file"] for r in results] == ["onnx/tiny.onnx"] * 2 + ["tflite/tiny.tflite"] * 2
    assert list(tmp_path.iterdir()) == []


def test_wrong_model_stops_everything_before_any_timing(onnx_candidate):
    wrong = replace(onnx_candidate, name="wrong", golden=reference_outputs(INPUTS_OF_MODELS[:3], change=1.0))
    said = []
    with pytest.raises(IntegrityError, match="golden case 1 differs by 1"):
        run(LocalTarget(), [onnx_candidate, wrong], say=said.append)
    assert said == ["local: tiny onnx: memory", "local: wrong: memory"]

"""The agent as a program: what it answers, what it refuses, and that stdout carries nothing else."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from device_bench.agent.agent import OnnxModel, latency_summary, name_death, name_outputs, read_inputs, write_inputs
from device_bench.targets import AGENT
from runtimes.backends import per_token
from tests.device_bench.conftest import INPUTS, OUTPUTS, TEXTS, assert_outputs, pairs, reference_outputs, write_identity

CASE_KEYS = {
    "case", "length", "tokens_mean", "warmup", "count", "mean_ms", "p50_ms", "p90_ms", "p99_ms", "min_ms", "quantiles_ms",
    "samples_ns",
}  # fmt: skip


def test_is_one_file_that_old_boards_can_run():
    tree = ast.parse(AGENT.read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    runtimes_and_numpy = {"numpy", "onnxruntime", "ai_edge_litert", "tflite_runtime"}
    assert imported - set(sys.stdlib_module_names) == runtimes_and_numpy


@pytest.mark.parametrize("file", ["onnx_file", "tflite_file"])
def test_latency(file, request, make_job, run_agent):
    cases = [{"case": "texts"}, {"case": "length", "length": 7, "min_inferences": 5}]
    code, answer = run_agent(make_job(request.getfixturevalue(file), cases=cases))
    assert code == 0
    assert answer["load_ms"] > 0
    assert answer["first_inference_ms"] > 0
    texts, fixed = answer["cases"]
    for case in (texts, fixed):
        assert set(case) == CASE_KEYS
        assert len(case["quantiles_ms"]) == 101
        assert case["quantiles_ms"] == sorted(case["quantiles_ms"])
        assert case["count"] == len(case["samples_ns"])
        assert case["p50_ms"] == case["quantiles_ms"][50]
        assert all(sample > 0 for sample in case["samples_ns"])
    assert (texts["count"], fixed["count"]) == (12, 5)
    assert texts["length"] is None
    assert texts["tokens_mean"] == pytest.approx((2 * (3 + 4 + 6 + 3 + 10) + 3 + 4) / 12, abs=1e-3)
    assert (fixed["length"], fixed["tokens_mean"]) == (7, 7)


@pytest.mark.parametrize("file", ["onnx_file", "tflite_file"])
def test_memory_has_no_timing(file, request, make_job, run_agent):
    code, answer = run_agent(make_job(request.getfixturevalue(file), mode="memory"))
    assert code == 0
    assert set(answer) == {"runtime", "conditions", "memory"}
    assert all(answer["memory"][key] > 0 for key in ("baseline_bytes", "peak_bytes", "model_bytes"))
    assert answer["memory"]["model_bytes"] == answer["memory"]["peak_bytes"] - answer["memory"]["baseline_bytes"]


def test_runs_until_the_least_time_is_over(onnx_file, make_job, run_agent):
    _, answer = run_agent(make_job(onnx_file, min_inferences=1, min_seconds=0.05, golden=None))
    assert sum(answer["cases"][0]["samples_ns"]) < 1e9
    assert answer["cases"][0]["count"] > 1


def test_conditions(onnx_file, make_job, run_agent):
    _, answer = run_agent(make_job(onnx_file, cores=[0]))
    conditions = answer["conditions"]
    assert conditions["affinity"] == [0]
    assert conditions["numpy"] == np.__version__
    assert conditions["runtime"] == answer["runtime"]
    assert answer["runtime"].startswith("onnxruntime ")
    state = {"loadavg", "temperatures_c", "frequencies_khz", "throttled", "cooling", "battery", "pressure"}
    assert state == set(conditions["before"]) == set(conditions["after"])


@pytest.mark.parametrize("mode", ["latency", "memory"])
@pytest.mark.parametrize("file", ["onnx_file", "tflite_file"])
def test_wrong_golden_output_is_never_timed(file, mode, request, tmp_path, make_job, run_agent):
    job = make_job(request.getfixturevalue(file), mode=mode)
    write_inputs(tmp_path / "golden.inputs", pairs(INPUTS), reference_outputs(change=0.01))
    code, answer = run_agent(job)
    assert code == 3
    assert set(answer) == {"error"}
    assert answer["error"]["kind"] == "wrong_output"
    assert "golden case 1 differs by 0.01 in logits, at most 0.0001 is allowed" in answer["error"]["message"]


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("file", ["onnx_file", "tflite_file"])
def test_every_output_is_checked(file, name, request, tmp_path, make_job, run_agent):
    job = make_job(request.getfixturevalue(file), mode="memory")
    golden = reference_outputs()
    golden[2][name][-1] += 0.5
    write_inputs(tmp_path / "golden.inputs", pairs(INPUTS), golden)
    code, answer = run_agent(job)
    assert (code, answer["error"]["kind"]) == (3, "wrong_output")
    assert f"golden case 3 differs by 0.5 in {name}" in answer["error"]["message"]


def test_outputs_that_nobody_named_are_not_checked(onnx_file, tmp_path, make_job, run_agent):
    job = make_job(onnx_file)
    write_inputs(tmp_path / "golden.inputs", pairs(INPUTS), [{"logits": one["logits"]} for one in reference_outputs()])
    assert run_agent(job)[0] == 0


def test_an_output_that_is_not_there_is_a_wrong_output(onnx_file, tmp_path, make_job, run_agent):
    job = make_job(onnx_file)
    write_inputs(tmp_path / "golden.inputs", pairs(INPUTS), [{"vector": one["start_logits"]} for one in reference_outputs()])
    code, answer = run_agent(job)
    assert (code, answer["error"]["kind"]) == (3, "wrong_output")
    assert "golden case 1 differs: there is no output vector" in answer["error"]["message"]


@pytest.mark.parametrize("file", ["onnx_file", "tflite_file"])
def test_token_types_reach_the_model(file, request, tmp_path, make_job, run_agent):
    job = make_job(request.getfixturevalue(file))
    write_inputs(tmp_path / "golden.inputs", [(ids, [0] * len(ids)) for ids in TEXTS], reference_outputs())
    code, answer = run_agent(job)
    assert (code, answer["error"]["kind"]) == (3, "wrong_output")
    assert "golden case 2 differs by" in answer["error"]["message"]  # the first has no token of the second type


def test_nan_is_a_wrong_output(make_onnx, make_job, run_agent):
    path = make_onnx(lambda embeddings, head: (embeddings * np.nan, head))
    code, answer = run_agent(make_job(path, tolerance=1e9))
    assert (code, answer["error"]["kind"]) == (3, "wrong_output")


def test_another_number_of_classes_is_a_wrong_output(make_onnx, make_job, run_agent):
    path = make_onnx(lambda embeddings, head: (embeddings, head[:, :1]))
    code, answer = run_agent(make_job(path, tolerance=1e9))
    assert (code, answer["error"]["kind"]) == (3, "wrong_output")
    assert "golden case 1 differs in logits: its shape is [1], not [3]" in answer["error"]["message"]


def test_text_longer_than_every_bucket(tflite_file, make_job, run_agent):
    code, answer = run_agent(make_job(tflite_file, cases=[{"case": "length", "length": 17}]))
    assert (code, answer["error"]["kind"]) == (2, "too_long")
    assert "17 tokens do not fit the largest bucket of 16" in answer["error"]["message"]


def test_token_outside_the_vocabulary(onnx_file, tmp_path, make_job, run_agent):
    job = make_job(onnx_file, golden=None)
    write_inputs(tmp_path / "measured.inputs", [([99], [0])])
    code, answer = run_agent(job)
    assert (code, answer["error"]["kind"]) == (5, "failed_inference")


@pytest.mark.parametrize("suffix", [".onnx", ".tflite"])
def test_damaged_model(suffix, tmp_path, make_job, run_agent):
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(b"not a model at all" * 10)
    code, answer = run_agent(make_job(path))
    assert (code, answer["error"]["kind"]) == (5, "unreadable_model")
    assert str(path) in answer["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "/nowhere.onnx"}, "/nowhere.onnx: no such file"),
        ({"inputs": "/nowhere.inputs"}, "/nowhere.inputs: no inputs can be read"),
        ({"golden": "/nowhere.inputs"}, "/nowhere.inputs: no inputs can be read"),
        ({"format": "pt"}, "'pt' is none of onnx, tflite"),
        ({"mode": "speed"}, "a mode of"),
        ({"cores": [0, 4095]}, "cannot pin to cores [0, 4095]"),
    ],
)
def test_bad_jobs(changes, says, onnx_file, make_job, run_agent):
    code, answer = run_agent(make_job(onnx_file, **changes))
    assert (code, answer["error"]["kind"]) == (2, "bad_job")
    assert says in answer["error"]["message"]


def test_job_that_lacks_keys(run_agent):
    code, answer = run_agent({"mode": "memory", "model": "m.onnx"})
    assert (code, answer["error"]["kind"]) == (2, "bad_job")
    assert "lacks format, threads, cores, inputs, golden, tolerance" in answer["error"]["message"]


def test_golden_needs_outputs(onnx_file, tmp_path, make_job, run_agent):
    job = make_job(onnx_file)
    write_inputs(tmp_path / "golden.inputs", pairs(INPUTS))
    code, answer = run_agent(job)
    assert (code, answer["error"]["kind"]) == (2, "bad_job")
    assert "golden.inputs: has no outputs" in answer["error"]["message"]


@pytest.mark.parametrize("key", ["inputs", "golden"])
def test_inputs_that_are_damaged(key, onnx_file, make_job, run_agent):
    job = make_job(onnx_file)
    file = Path(job[key])
    file.write_bytes(file.read_bytes()[:-4])
    code, answer = run_agent(job)
    assert (code, answer["error"]["kind"]) == (2, "bad_job")
    assert f"{file}: {file.stat().st_size} bytes that are no inputs file: the file is too short" in answer["error"]["message"]


@pytest.mark.parametrize("cache", ["memory", "none"])
@pytest.mark.parametrize("file", ["onnx_file", "tflite_file"])
def test_outputs_are_the_models(file, cache, request, tmp_path, make_job, run_agent):
    output, session = tmp_path / "outputs with a space", {"weight_cache": cache} if file == "tflite_file" else {}
    code, answer = run_agent(make_job(request.getfixturevalue(file), mode="outputs", output=str(output), session=session))
    assert (code, answer["outputs"]) == (0, OUTPUTS)
    inputs, outputs = read_inputs(str(output))
    assert [(ids.tolist(), types.tolist()) for ids, types in inputs] == pairs(INPUTS)
    assert_outputs(outputs, reference_outputs())


def test_what_was_written_is_golden_for_the_next(onnx_file, tflite_file, tmp_path, make_job, run_agent):
    run_agent(make_job(onnx_file, mode="outputs", output=str(tmp_path / "outputs")))
    assert run_agent(make_job(tflite_file, golden=str(tmp_path / "outputs")))[0] == 0


def test_an_output_that_cannot_be_written(onnx_file, tmp_path, make_job, run_agent):
    code, answer = run_agent(make_job(onnx_file, mode="outputs", output=str(tmp_path / "no folder" / "out")))
    assert (code, answer["error"]["kind"]) == (2, "bad_job")
    assert "cannot be written" in answer["error"]["message"]


def test_a_model_that_takes_no_tokens(tmp_path, make_job, run_agent):
    code, answer = run_agent(make_job(write_identity(tmp_path / "pixels.onnx", "pixels")))
    assert (code, answer["error"]["kind"]) == (5, "unreadable_model")
    assert "inputs pixels; outputs logits; needed: input_ids, attention_mask and no more than token_type_ids" in answer["error"]["message"]


def test_an_output_that_is_no_float32(tmp_path, make_job, run_agent):
    path = write_identity(tmp_path / "whole.onnx", "input_ids", "attention_mask")
    code, answer = run_agent(make_job(path))
    assert (code, answer["error"]["kind"]) == (5, "unreadable_model")
    assert "logits is int64 [1, 3]; needed: float32" in answer["error"]["message"]


def test_sustained_windows_follow_each_other(onnx_file, make_job, run_agent):
    code, answer = run_agent(make_job(onnx_file, mode="sustained", min_seconds=0.5, window_seconds=0.1))
    assert code == 0
    starts = [window["at_s"] for window in answer["windows"]]
    assert len(starts) >= 3
    assert all(later - earlier > 0.098 for earlier, later in pairwise(starts))
    assert all(0 < window["p50_ms"] <= window["p90_ms"] and window["count"] > 0 for window in answer["windows"])


def test_count_marks_every_text(onnx_file, make_job, run_agent):
    code, answer = run_agent(make_job(onnx_file, mode="count"))
    assert (code, answer["marked"]) == (0, len(TEXTS))


def test_deadline_stops_the_work(onnx_file, make_job, run_agent):
    code, answer = run_agent(make_job(onnx_file, min_seconds=60.0, deadline_s=2.0))
    assert (code, answer["error"]["kind"]) == (4, "timeout")
    assert "no end within 2 s" in answer["error"]["message"]
    assert answer["error"]["rss_bytes"] > 1e6


def test_the_end_of_standard_input_stops_the_work(onnx_file, tmp_path, make_job):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(make_job(onnx_file, min_seconds=60.0, watch_stdin=True)), encoding="utf-8")
    agent = subprocess.Popen([sys.executable, str(AGENT), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    while not children.read_text(encoding="ascii").strip():
        time.sleep(0.02)
    worker = int(children.read_text(encoding="ascii"))
    stdout, _ = agent.communicate(timeout=60)
    assert (agent.returncode, json.loads(stdout)["error"]["kind"]) == (4, "host_gone")
    assert not Path(f"/proc/{worker}").exists()


def test_a_killed_worker_is_told_apart_from_a_broken_one(onnx_file, tmp_path, make_job):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(make_job(onnx_file, min_seconds=60.0)), encoding="utf-8")
    agent = subprocess.Popen([sys.executable, str(AGENT), str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    while not children.read_text(encoding="ascii").strip():
        time.sleep(0.02)
    os.kill(int(children.read_text(encoding="ascii")), signal.SIGKILL)
    stdout, _ = agent.communicate(timeout=60)
    error = json.loads(stdout)["error"]
    assert (agent.returncode, error["kind"]) == (4, "killed")
    assert "SIGKILL" in error["message"]


def test_a_death_is_the_kernels_only_if_it_says_so():
    assert name_death(signal.SIGKILL, 50_000_000, 3, 4) == ("out_of_memory", "out of memory: killed by the kernel; it held 50 MB at most")
    assert name_death(signal.SIGKILL, 50_000_000, 3, 3)[0] == "killed"
    assert name_death(signal.SIGSEGV, 50_000_000, 3, 4) == ("killed", "killed by SIGSEGV; it held 50 MB at most")
    assert "does not say whether for memory" in name_death(signal.SIGKILL, 1, None, None)[1]


@pytest.mark.parametrize(
    ("file", "session"),
    [
        ("onnx_file", {"graph_optimization_level": "basic", "memory_pattern": False, "memory_arena": False}),
        ("onnx_file", {"threads": 1, "config": {"session.set_denormal_as_zero": "1"}}),
        ("tflite_file", {"weight_cache": "none"}),
        ("tflite_file", {"threads": 1, "weight_cache": "memory"}),
    ],
)
def test_session_options(file, session, request, make_job, run_agent):
    code, answer = run_agent(make_job(request.getfixturevalue(file), session=session))
    assert code == 0
    assert answer["cases"][0]["count"] == 12


@pytest.mark.parametrize(
    ("session", "says"),
    [
        ({"graph_optimization_level": "most"}, "session.graph_optimization_level: 'most' is no option for onnx files"),
        (["all"], "session: ['all'] is not an object of options"),
        ({"weight_cache": "memory"}, "session.weight_cache: 'memory' is no option for onnx files"),
    ],
)
def test_session_options_that_no_runtime_has(session, says, onnx_file, make_job, run_agent):
    code, answer = run_agent(make_job(onnx_file, session=session))
    assert (code, answer["error"]["kind"], answer["error"]["message"]) == (2, "bad_job", says)


def test_the_bundles_reader_takes_the_same_outputs_for_those_of_tokens():
    names = ("logits", "slot_logits", "start_logits", "end_logits", "sentence_embedding")
    for name, shape in ((name, shape) for name in names for shape in ((1, 5), (1, 5, 2))):
        got = name_outputs("m", {name: np.zeros(shape, np.float32)}, 3)[name]
        assert (len(got) == 3) is per_token(name, len(shape))


def test_session_options_reach_the_runtime(onnx_file):
    import onnxruntime

    session = {"graph_optimization_level": "extended", "memory_pattern": False, "memory_arena": False}
    options = OnnxModel(str(onnx_file), 2, onnxruntime, session)._session.get_session_options()
    assert options.graph_optimization_level.name == "ORT_ENABLE_EXTENDED"
    assert (options.enable_mem_pattern, options.enable_cpu_mem_arena, options.intra_op_num_threads) == (False, False, 2)


def test_shared_packed_weights_take_less_memory(wide_tflite_file, make_job, run_agent):
    """Four signatures on the same 8 MB of weights: packed once, or once for each."""
    taken = {}
    for cache in ("memory", "none"):
        code, answer = run_agent(make_job(wide_tflite_file, mode="memory", golden=None, session={"weight_cache": cache}))
        assert code == 0
        taken[cache] = answer["memory"]["model_bytes"]
    assert taken["memory"] < 0.6 * taken["none"]


def test_tflite_runtimes_say_nothing(tflite_file, make_job, tmp_path):
    """Standard error is quoted when something fails; what LiteRT tells of accelerators would push the reason out."""
    job = tmp_path / "job.json"
    job.write_text(json.dumps(make_job(tflite_file)), encoding="utf-8")
    done = subprocess.run([sys.executable, str(AGENT), str(job)], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_stdout_stays_clean_under_a_runtime_that_prints_and_is_broken(tmp_path, onnx_file, make_job):
    package = tmp_path / "site" / "onnxruntime"
    package.mkdir(parents=True)
    noisy = "import os\nprint('hello')\nos.write(1, b'native hello')\nraise ImportError('libmissing.so')\n"
    (package / "__init__.py").write_text(noisy, encoding="utf-8")
    job = tmp_path / "job.json"
    job.write_text(json.dumps(make_job(onnx_file)), encoding="utf-8")
    environment = {"PYTHONPATH": str(package.parent), "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, str(AGENT), str(job)], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2
    answer = json.loads(done.stdout)
    assert answer["error"]["kind"] == "missing_runtime"
    assert "libmissing.so" in answer["error"]["message"]
    assert "native hello" in done.stderr


def test_summary_of_known_samples():
    summary = latency_summary([1_000_000 * n for n in range(1, 102)])
    assert summary["count"] == 101
    assert (summary["min_ms"], summary["p50_ms"], summary["p90_ms"], summary["p99_ms"]) == (1, 51, 91, 100)
    assert summary["mean_ms"] == 51
    assert summary["quantiles_ms"] == [float(n) for n in range(1, 102)]

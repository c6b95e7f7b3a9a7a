"""Logs of benchmark_model in the words of four generations, all written for these tests: the real binary is not at hand here.

That it is run rightly on a phone is shown in ``tests/boards/test_adb.py``, by a program that prints such a log.
"""

from __future__ import annotations

import re

import pytest

from device_bench.benchmark_model import measure_signatures, parse_log
from runtimes.errors import BadInput

MIB = 1024 * 1024
FIRST_GENERATION = """\
STARTING!
Num threads: [1]
Graph: [/data/local/tmp/m.tflite]
Loaded model /data/local/tmp/m.tflite
resolved reporter
Initialized session in 2.125ms
Running benchmark for at least 4 iterations and at least 0.5 seconds
count=7 first=9000 curr=6100 min=6050 max=9000 avg=6500.5 std=1000

Running benchmark for at least 10 iterations and at least 1 seconds
count=160 first=6090 curr=6110 min=6040 max=6900 avg=6123.25 std=77

Average inference timings in us: Warmup: 6500.5, Init: 2125, no stats: 6123.25
"""
SECOND_GENERATION = """\
STARTING!
Log parameter values verbosely: [0]
Num threads: [4]
Graph: [m.tflite]
#threads used for CPU inference: [4]
Loaded model m.tflite
The input model file size (MB): 3.71
Initialized session in 0.925ms.
Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
count=1 curr=3100200

Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
count=50 first=2500100 curr=2400700 min=2300900 max=2600800 avg=2.41234e+06 std=80500

Inference timings in us: Init: 925, First inference: 3100200, Warmup (avg): 3.1002e+06, Inference (avg): 2.41234e+06
Note: (a sentence of advice)
Peak memory footprint (MB): init=0 overall=12.5
"""
THIRD_GENERATION = """\
INFO: STARTING!
INFO: Log parameter values verbosely: [0]
INFO: Min num runs: [128]
INFO: Graph: [m.tflite]
INFO: Signature to run: [serving_32]
INFO: Loaded model m.tflite
INFO: Using signature: serving_32
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
WARN: Tensor # 0 is named serving_32_input_ids:0 but flags call it input_ids
INFO: The input model file size (MB): 3.71
INFO: Initialized session in 12.75ms.
INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
INFO: count=3 first=2400 curr=2000 min=2000 max=2400 avg=2133.33 std=188 p5=2000 median=2000 p95=2400

INFO: Running benchmark for at least 128 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
INFO: count=470 first=2010 curr=2050 min=1990 max=2600 avg=2042.5 std=60 p5=2000 median=2040 p95=2120

INFO: Inference timings in us: Init: 12750, First inference: 2400, Warmup (avg): 2133.33, Inference (avg): 2042.5
INFO: Memory footprint delta from the start of the tool (MB): init=4.25 overall=8.5
INFO: Overall peak memory footprint (MB) via periodic monitoring: 13.125
INFO: Profiling Info for Benchmark Initialization:
Timings (microseconds): count=470 first=1 curr=2 min=1 max=3 avg=2 std=1
"""
LITERT = """\
INFO: STARTING!
WARN: Unconsumed cmdline flags: --input_layer=a,b --input_layer_shape=1,16:1,16 --input_layer_value_range=a,0,9:b,1,1
INFO: [litert/tools/benchmark_litert_model.cc:1] Using CPU
INFO: Initialized session in 6.543ms.
INFO: count=410 first=3456 curr=1201 min=1180 max=3456 avg=1222.75 std=90 p5=1190 median=1215 p95=1290

INFO: count=820 first=1210 curr=1208 min=1175 max=1400 avg=1212.5 std=30 p5=1188 median=1211 p95=1260

INFO: [./litert/tools/benchmark_litert_model.h:72]
========== BENCHMARK RESULTS ==========
INFO: [./litert/tools/benchmark_litert_model.h:73] Model initialization: 6.54 ms
INFO: [./litert/tools/benchmark_litert_model.h:75] Warmup (first):       3.46 ms
INFO: [./litert/tools/benchmark_litert_model.h:105] Init footprint:       4.50 MB
INFO: [./litert/tools/benchmark_litert_model.h:107] Overall footprint:    9.25 MB
INFO: [./litert/tools/benchmark_litert_model.h:112] Peak memory:          14.00 MB
INFO: [./litert/tools/benchmark_litert_model.h:120] ======================================
"""
NO_MEMORY = {"init_bytes": None, "overall_bytes": None, "peak_bytes": None}


def test_first_generation():
    parsed = parse_log(FIRST_GENERATION)
    assert (parsed["init_ms"], parsed["first_inference_ms"]) == (2.125, 9.0)
    assert parsed["warmup"]["mean_ms"] == 6.5005
    assert parsed["inference"] == {
        "count": 160, "mean_ms": 6.12325, "min_ms": 6.04, "max_ms": 6.9, "std_ms": 0.077, "p5_ms": None, "p50_ms": None, "p95_ms": None,
    }  # fmt: skip
    assert parsed["memory"] == NO_MEMORY
    assert (parsed["signature"], parsed["ignored_flags"]) == (None, [])


def test_second_generation_with_powers_of_ten_and_a_single_warm_up():
    parsed = parse_log(SECOND_GENERATION)
    assert (parsed["init_ms"], parsed["first_inference_ms"]) == (0.925, 3100.2)
    assert parsed["warmup"] == {
        "count": 1, "mean_ms": 3100.2, "min_ms": 3100.2, "max_ms": 3100.2, "std_ms": 0.0, "p5_ms": None, "p50_ms": None, "p95_ms": None,
    }  # fmt: skip
    assert (parsed["inference"]["count"], parsed["inference"]["mean_ms"]) == (50, 2412.34)
    assert parsed["memory"] == {"init_bytes": 0, "overall_bytes": 12.5 * MIB, "peak_bytes": None}


def test_third_generation_with_percentiles_and_profile():
    parsed = parse_log(THIRD_GENERATION)
    assert parsed["init_ms"] == 12.75
    assert parsed["first_inference_ms"] == 2.4
    assert parsed["inference"]["count"] == 470
    assert [parsed["inference"][key] for key in ("p5_ms", "p50_ms", "p95_ms")] == [2.0, 2.04, 2.12]
    assert parsed["memory"] == {"init_bytes": 4.25 * MIB, "overall_bytes": 8.5 * MIB, "peak_bytes": 13.125 * MIB}
    assert parsed["signature"] == "serving_32"


def test_litert():
    parsed = parse_log(LITERT)
    assert (parsed["init_ms"], parsed["first_inference_ms"]) == (6.543, 3.456)  # not rounded as in its summary
    assert (parsed["inference"]["count"], parsed["inference"]["p50_ms"]) == (820, 1.211)
    assert parsed["memory"] == {"init_bytes": 4.5 * MIB, "overall_bytes": 9.25 * MIB, "peak_bytes": 14 * MIB}
    assert parsed["signature"] is None
    assert parsed["ignored_flags"] == ["--input_layer", "--input_layer_shape", "--input_layer_value_range"]


def test_equal_samples_and_carriage_returns():
    text = re.sub("count=50 .*", "count=50 curr=70(all same)", SECOND_GENERATION)
    for ending in ("\n", "\r\n"):
        inference = parse_log(text.replace("\n", ending))["inference"]
        assert (inference["count"], inference["mean_ms"], inference["max_ms"], inference["std_ms"]) == (50, 0.07, 0.07, 0.0)


def test_no_warm_up():
    """With --warmup_runs=0 the first inference that was timed is the first of all."""
    parsed = parse_log(SECOND_GENERATION.replace("count=1 curr=3100200", ""))
    assert parsed["warmup"] is None
    assert parsed["first_inference_ms"] == 2500.1


@pytest.mark.parametrize("end", ["Initialized session", "count=3", "Inference timings"])
def test_run_that_broke_off(end):
    with pytest.raises(ValueError, match="no finished run"):
        parse_log(THIRD_GENERATION.partition(end)[0])


def test_other_formats_are_refused(tmp_path):
    job = {"model": "a.onnx", "format": "onnx"}
    with pytest.raises(BadInput, match=r"a\.onnx: benchmark_model runs TFLite files only"):
        measure_signatures(None, tmp_path / "benchmark_model", job)

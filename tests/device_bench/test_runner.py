"""The C runner as a program: it answers what the Python agent answers, refuses what that refuses, and its parent process tells why it died."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from device_bench.agent.agent import (
    AgentError,
    latency_summary,
    read_clusters,
    read_conditions,
    read_inputs,
    read_state,
    write_inputs,
)
from device_bench.runner_build import SOURCES, build_runner, runner_arguments, runtime_library
from device_bench.targets import AGENT
from tests.device_bench.conftest import INPUTS, OUTPUTS, assert_outputs, pairs, reference_outputs, write_identity
from tests.device_bench.conftest import make_job as make_small_job  # noqa: F401 - a fixture
from tests.device_bench.test_inputs_file import DAMAGES, OUTPUT_DAMAGES, WITH_OUTPUTS
from tests.device_bench.trees import phone, raspberry_pi_4, raspberry_pi_5, write
from tests.exporters.small_models import CLASSES, LONGEST, small_encoder, texts

HERE = platform.machine()
FORMATS = ("onnx", "tflite")
TEXTS = [(ids, [int(2 * place >= len(ids)) for place in range(len(ids))]) for ids in texts(12)]
"""Pairs of token ids and types; the second half of each is of the second type."""
OF_A_LANGUAGE = {"python", "numpy", "agent", "runtime"}
COMPILER = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


@dataclass(frozen=True)
class Done:
    code: int
    answer: dict
    stderr: str

    @property
    def error(self) -> tuple[int, str]:
        return self.code, self.answer["error"]["kind"]

    @property
    def message(self) -> str:
        return self.answer["error"]["message"]


def strict(text: str | bytes) -> dict:
    """One JSON document on one line, in ASCII, without NaN."""
    document = text if isinstance(text, str) else text.decode("ascii")
    assert document.endswith("\n")
    assert document.count("\n") == 1

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(document.encode("ascii"), parse_constant=refuse)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POCKETBERT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def runner(cache) -> Path:
    if COMPILER is None:
        pytest.skip("no C compiler here")
    return build_runner(HERE)


def run(runner: Path, arguments: list, **options) -> Done:
    done = subprocess.run([runner, *arguments], capture_output=True, timeout=120, **{"stdin": subprocess.DEVNULL, **options})
    return Done(done.returncode, strict(done.stdout), done.stderr.decode(errors="replace"))


def run_job(runner: Path, job: dict, library: Path | None = None, **options) -> Done:
    return run(runner, runner_arguments(job, library or runtime_library(job["format"])), **options)


def run_agent(job: dict, folder: Path) -> Done:
    path = folder / "job.json"
    path.write_text(json.dumps({"cores": None, "golden": None, "tolerance": 0.0, **job}), encoding="utf-8")
    done = subprocess.run([sys.executable, AGENT, path], capture_output=True, timeout=120, stdin=subprocess.DEVNULL)
    return Done(done.returncode, json.loads(done.stdout), done.stderr.decode(errors="replace"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> dict:
    """A small BERT for two segments (three inputs) as (format, precision) -> file, and the logits [N, C] that torch computes for TEXTS."""
    import torch

    from exporters.folding import fold
    from exporters.onnx_writer import write_onnx
    from exporters.quant_plan import FLOAT32, INT8, QuantPlan
    from exporters.tflite_writer import write_tflite

    folder = tmp_path_factory.mktemp("bert")
    model = small_encoder("bert")
    folded = fold(model, LONGEST, segments=2)
    files = {}
    for precision, plan in (("float32", QuantPlan(FLOAT32)), ("int8", QuantPlan(INT8))):
        files["onnx", precision] = folder / f"{precision}.onnx"
        write_onnx(folded, files["onnx", precision], plan)
        files["tflite", precision] = folder / f"{precision}.tflite"
        write_tflite(folded, files["tflite", precision], [8, LONGEST], plan)
    with torch.no_grad():
        rows = [[torch.tensor([row]) for row in (ids, [1] * len(ids), types)] for ids, types in TEXTS]
        logits = torch.cat([model(ids, mask, token_type_ids=types).logits for ids, mask, types in rows]).numpy()
    return {"files": files, "logits": logits}


@pytest.fixture
def make_job(bert, tmp_path):
    """A short latency job for a file of the BERT; keywords replace its keys."""

    def make(format: str, precision: str = "float32", /, **changes) -> dict:
        write_inputs(tmp_path / "measured.inputs", TEXTS)
        write_inputs(tmp_path / "golden.inputs", TEXTS, named(bert["logits"]))
        return {
            "model": str(bert["files"][format, precision]), "format": format, "threads": 1, "cores": None, "mode": "latency",
            "inputs": str(tmp_path / "measured.inputs"), "golden": str(tmp_path / "golden.inputs"), "tolerance": 1e-3,
            "cases": [{"case": "texts"}], "warmup": {"window": 4, "tolerance": 0.5, "max_seconds": 0.05},
            "min_inferences": 30, "min_seconds": 0.0, **changes,
        }  # fmt: skip

    return make


def named(logits: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [{"logits": row} for row in logits]


def compile_library(path: Path, source: str, *options: str, compiler: str | None = COMPILER) -> Path:
    """A shared library out of C; of this machine unless another compiler is named."""
    if compiler is None or shutil.which(compiler) is None:
        pytest.skip(f"no {compiler or 'C compiler'} here")
    path.parent.mkdir(exist_ok=True)
    command = [compiler, "-shared", "-fPIC", "-o", path, "-x", "c", "-", "-x", "none", *options]
    subprocess.run(command, input=source, text=True, check=True, capture_output=True)
    return path


@pytest.fixture
def make_library(tmp_path):
    return lambda name, source, *options: compile_library(tmp_path / name, source, *options)


def shape_of(value: object) -> object:
    """Keys and kinds of an answer, without its numbers. A list is as its first member."""
    if isinstance(value, dict):
        return {key: shape_of(member) for key, member in value.items()}
    if isinstance(value, list):
        return [shape_of(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


# --- the same answers as the agent's --------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("format", FORMATS)
def test_outputs_are_the_agents_to_the_last_bit(format, precision, threads, runner, bert, make_job, tmp_path):
    job = make_job(format, precision, mode="outputs", threads=threads, golden=None, output=str(tmp_path / "ours, with a space"))
    done = run_job(runner, job)
    assert (done.code, done.answer["outputs"]) == (0, ["logits"])
    theirs = run_agent({**job, "output": str(tmp_path / "theirs")}, tmp_path)
    assert theirs.answer["outputs"] == done.answer["outputs"]
    assert Path(job["output"]).read_bytes() == (tmp_path / "theirs").read_bytes()
    if precision == "float32":
        assert_outputs(read_inputs(job["output"])[1], named(bert["logits"]), atol=1e-4)


@pytest.mark.parametrize("file", ["onnx_file", "tflite_file"])
def test_outputs_of_every_kind_are_the_agents(file, runner, request, make_small_job, tmp_path):  # noqa: F811
    job = make_small_job(request.getfixturevalue(file), mode="outputs", output=str(tmp_path / "ours"))
    done = run_job(runner, job)
    assert (done.code, done.answer["outputs"]) == (0, OUTPUTS)
    inputs, outputs = read_inputs(job["output"])
    assert [(ids.tolist(), types.tolist()) for ids, types in inputs] == pairs(INPUTS)
    assert_outputs(outputs, reference_outputs())
    assert run_agent({**job, "golden": job["output"], "output": str(tmp_path / "theirs")}, tmp_path).code == 0
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(
    ("format", "session"),
    [
        ("onnx", {"graph_optimization_level": "disabled", "memory_pattern": False, "memory_arena": False}),
        ("onnx", {"graph_optimization_level": "extended", "threads": 1, "config": {"session.set_denormal_as_zero": "1"}}),
        ("tflite", {"weight_cache": "memory"}),
        ("tflite", {"weight_cache": "none", "threads": 1}),
    ],
)
def test_sessions_give_the_agents_outputs(format, session, runner, make_job, tmp_path):
    job = make_job(format, "int8", mode="outputs", golden=None, session=session, output=str(tmp_path / "ours"))
    assert run_job(runner, job).code == 0
    assert run_agent({**job, "output": str(tmp_path / "theirs")}, tmp_path).code == 0
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("mode", ["latency", "memory", "outputs", "count", "sustained"])
@pytest.mark.parametrize("format", FORMATS)
def test_answers_have_the_agents_form(format, mode, runner, make_job, tmp_path):
    changes = {"output": str(tmp_path / "output"), "min_seconds": 0.1, "window_seconds": 0.03}
    job = make_job(format, mode=mode, cases=[{"case": "texts"}, {"case": "length", "length": 5}], **changes)
    done, agents = run_job(runner, job), run_agent(job, tmp_path)
    assert (done.code, agents.code) == (0, 0)
    ours, theirs = shape_of(done.answer), shape_of(agents.answer)
    for answer in (ours, theirs):
        assert answer["conditions"].pop("agent") == "str"
        for key in ("python", "numpy"):
            answer["conditions"].pop(key)
    if mode == "memory":
        assert ours["memory"].pop("dumpsys_pss_bytes") == "NoneType"
    assert ours == theirs
    assert done.answer["conditions"]["agent"] == "c runner 3"
    assert done.answer["conditions"]["runtime"] == done.answer["runtime"]


def test_the_runtime_has_a_name(runner, make_job):
    import onnxruntime

    assert run_job(runner, make_job("onnx")).answer["runtime"] == f"onnxruntime {onnxruntime.__version__}"
    size = runtime_library("tflite").stat().st_size
    assert run_job(runner, make_job("tflite")).answer["runtime"] == f"LiteRT 2.3 or later (libLiteRt.so of {size} bytes)"


@pytest.mark.parametrize("format", FORMATS)
def test_percentiles_are_numpys(format, runner, make_job):
    cases = [{"case": "texts"}, {"case": "length", "length": 7, "min_inferences": 23}, {"case": "length", "length": LONGEST, "min_inferences": 2}]
    done = run_job(runner, make_job(format, cases=cases, min_inferences=500))
    answer = done.answer
    assert done.code == 0
    assert [case["count"] for case in answer["cases"]] == [500, 23, 2]
    for case in answer["cases"]:
        assert all(sample > 0 for sample in case["samples_ns"])
        expected = latency_summary(case["samples_ns"])
        assert {key: case[key] for key in expected} == expected
    lengths = [len(ids) for ids, _ in TEXTS]
    assert answer["cases"][0]["tokens_mean"] == round(float(np.resize(lengths, 500).mean()), 3)
    assert [(case["case"], case["length"], case["tokens_mean"]) for case in answer["cases"][1:]] == [("length", 7, 7), ("length", 16, 16)]
    assert 0 <= answer["cases"][0]["warmup"]["seconds"] < 60
    shapes = {8 if length <= 8 else LONGEST for length in lengths} if format == "tflite" else set(lengths)
    assert answer["cases"][0]["warmup"]["inferences"] > len(shapes)
    assert answer["load_ms"] > 0
    assert answer["first_inference_ms"] > 0


def test_warms_up_until_two_windows_agree(runner, make_job):
    easy = run_job(runner, make_job("onnx", warmup={"window": 10, "tolerance": 1e9, "max_seconds": 60.0}))
    warmup = easy.answer["cases"][0]["warmup"]
    assert warmup["stable"] is True
    assert warmup["inferences"] == len({len(ids) for ids, _ in TEXTS}) + 2 * 10
    never = run_job(runner, make_job("onnx", warmup={"window": 10, "tolerance": 0.0, "max_seconds": 0.02})).answer["cases"][0]["warmup"]
    assert never["stable"] is False
    assert never["seconds"] >= 0.02


def test_runs_until_the_least_time_is_over(runner, make_job):
    case = run_job(runner, make_job("onnx", min_inferences=1, min_seconds=0.3)).answer["cases"][0]
    assert case["count"] > 10
    assert sum(case["samples_ns"]) < 30e9


def test_no_clock_that_can_be_set_is_read():
    source = "".join(path.read_text(encoding="utf-8") for path in SOURCES.glob("*.c"))
    assert set(re.findall(r"\bCLOCK_\w+", source)) == {"CLOCK_MONOTONIC"}
    assert not re.search(r"\b(gettimeofday|timespec_get|time|clock)\(", source)


def test_sustained_windows_follow_each_other(runner, make_job, tmp_path):
    phone(tmp_path / "root")
    job = make_job("onnx", mode="sustained", min_seconds=0.5, window_seconds=0.1, root=str(tmp_path / "root"))
    done = run_job(runner, job)
    starts = [window["at_s"] for window in done.answer["windows"]]
    assert len(starts) >= 3
    assert starts[0] < 0.1
    assert all(later - earlier > 0.098 for earlier, later in pairwise(starts))  # each is rounded to 1e-3
    state = read_state(tmp_path / "root")
    for window in done.answer["windows"]:
        assert 0 < window["p50_ms"] <= window["p90_ms"]
        assert window["count"] > 0
        assert (window["frequencies_khz"], window["temperatures_c"]) == (state["frequencies_khz"], state["temperatures_c"])


def test_every_text_runs_between_two_marks(runner, make_job, tmp_path):
    if shutil.which("strace") is None:
        pytest.skip("no strace here to see the marks with")
    arguments = runner_arguments(make_job("onnx", mode="count", golden=None), runtime_library("onnx"))
    log = tmp_path / "marks"
    done = subprocess.run(["strace", "-f", "-e", "trace=getpriority", "-o", log, runner, *arguments], capture_output=True, timeout=120)
    if "ptrace" in done.stderr.decode(errors="replace"):
        pytest.skip("strace may not trace here")
    marks = re.findall(r"getpriority\((?:0x7a|122)[^,]*, (\d+)\)\s+= -1 EINVAL", log.read_text(encoding="utf-8"))
    assert [int(mark) for mark in marks] == list(range(2 * len(TEXTS)))
    assert strict(done.stdout)["marked"] == len(TEXTS)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_memory(format, runner, make_job):
    memory = run_job(runner, make_job(format, mode="memory")).answer["memory"]
    assert memory["model_bytes"] == memory["peak_bytes"] - memory["baseline_bytes"] > 0
    assert 1e6 < memory["pss_bytes"] < memory["peak_bytes"]


def test_memory_that_cannot_be_read_is_null(runner, make_job, tmp_path):
    done = run_job(runner, make_job("onnx", mode="memory", root=str(tmp_path)))
    assert done.answer["memory"] == dict.fromkeys(("baseline_bytes", "peak_bytes", "model_bytes", "pss_bytes", "dumpsys_pss_bytes"))


def test_android_is_asked_for_the_total_pss(runner, make_job, tmp_path):
    shim = tmp_path / "bin" / "dumpsys"
    write(
        tmp_path,
        "bin/dumpsys",
        '#!/bin/sh\n[ "$1" = meminfo ] && kill -0 "$2" && echo " App Summary" && echo " TOTAL PSS:   12345   TOTAL RSS: 99"\n',
    )
    shim.chmod(0o755)
    environment = {"PATH": f"{shim.parent}:{os.environ['PATH']}"}
    assert run_job(runner, make_job("onnx", mode="memory"), env=environment).answer["memory"]["dumpsys_pss_bytes"] == 12345 * 1024


def test_signatures_share_their_packed_weights(runner, make_job, tmp_path):
    from exporters.folding import fold
    from exporters.tflite_writer import write_tflite
    from pipeline.models.config import layer_shape

    wide = small_encoder("bert", hidden_size=256, layers=[layer_shape(4, 64, [4096])])
    write_tflite(fold(wide, LONGEST), tmp_path / "wide.tflite", [4, 8, 12, LONGEST])
    taken = {}
    for cache in ("memory", "none"):
        job = make_job("tflite", mode="memory", golden=None, session={"weight_cache": cache})
        taken[cache] = run_job(runner, {**job, "model": str(tmp_path / "wide.tflite")}).answer["memory"]["model_bytes"]
    assert taken["memory"] < 0.6 * taken["none"]


# --- refusals: kind, exit code, one document ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["latency", "memory", "outputs", "count", "sustained"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_model_with_wrong_outputs_is_never_measured(format, mode, runner, bert, make_job, tmp_path):
    job = make_job(format, mode=mode, window_seconds=0.1, output=str(tmp_path / "output"))
    write_inputs(tmp_path / "golden.inputs", TEXTS, named(bert["logits"] + np.eye(len(TEXTS), CLASSES, -3) * 0.01))
    done = run_job(runner, job)
    assert (*done.error, set(done.answer)) == (3, "wrong_output", {"error"})
    assert re.search(r"golden case 4 differs by 0\.01\d* in logits, at most 0\.001 is allowed", done.message)


@pytest.mark.parametrize("change", [lambda logits: logits * np.nan, lambda logits: logits[:2], lambda logits: np.tile(logits, 2), np.atleast_2d])
def test_golden_outputs_that_no_output_can_equal(change, runner, bert, make_job, tmp_path):
    job = make_job("onnx", tolerance=1e9)
    write_inputs(tmp_path / "golden.inputs", TEXTS, named([change(row) for row in bert["logits"]]))
    done = run_job(runner, job)
    assert done.error == (3, "wrong_output")
    assert done.message == run_agent(job, tmp_path).message


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("file", ["onnx_file", "tflite_file"])
def test_every_output_is_checked(file, name, runner, request, make_small_job, tmp_path):  # noqa: F811
    job = make_small_job(request.getfixturevalue(file), mode="memory")
    golden = reference_outputs()
    golden[2][name][-1] += 0.5
    write_inputs(tmp_path / "golden.inputs", pairs(INPUTS), golden)
    done = run_job(runner, job)
    assert (*done.error, f"golden case 3 differs by 0.5 in {name}" in done.message) == (3, "wrong_output", True)


def test_an_output_that_is_not_there_is_a_wrong_output(runner, onnx_file, make_small_job, tmp_path):  # noqa: F811
    job = make_small_job(onnx_file)
    write_inputs(tmp_path / "golden.inputs", pairs(INPUTS), [{"vector": one["start_logits"]} for one in reference_outputs()])
    done = run_job(runner, job)
    assert (*done.error, done.message) == (3, "wrong_output", f"{onnx_file}: golden case 1 differs: there is no output vector")
    write_inputs(tmp_path / "golden.inputs", pairs(INPUTS), [{"logits": one["logits"]} for one in reference_outputs()])
    assert run_job(runner, job).code == 0


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_that_is_damaged(format, runner, make_job, tmp_path):
    job = make_job(format)
    damaged = tmp_path / f"damaged.{format}"
    for content in (b"", b"not a model at all" * 10):
        damaged.write_bytes(content)
        done = run_job(runner, {**job, "model": str(damaged)})
        assert done.error == (5, "unreadable_model")
        assert done.message.startswith(f"{damaged}: cannot be loaded: ")


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_that_is_cut_off(format, runner, make_job, tmp_path):
    """LiteRT 2.3 trusts the offsets in a file and may crash on it, in whatever language it is called."""
    job = make_job(format)
    cut = tmp_path / f"cut.{format}"
    cut.write_bytes(Path(job["model"]).read_bytes()[:2000])
    done = run_job(runner, {**job, "model": str(cut)})
    assert done.error in {(5, "unreadable_model"), *([(4, "killed")] if format == "tflite" else [])}
    assert re.match(rf"{re.escape(str(cut))}: (cannot be loaded: |killed by SIG(SEGV|BUS|ABRT); it held )", done.message)


@pytest.mark.parametrize("inputs", [["pixels"], ["input_ids"], ["input_ids", "attention_mask", "pixels"]])
def test_a_model_that_takes_something_else(inputs, runner, make_job, tmp_path):
    job = make_job("onnx", model=str(write_identity(tmp_path / "pixels.onnx", *inputs)))
    done = run_job(runner, job)
    assert done.error == (5, "unreadable_model")
    assert f"inputs {', '.join(inputs)}; outputs logits; needed: input_ids, attention_mask and no more than token_type_ids" in done.message
    assert done.message == run_agent(job, tmp_path).message


def test_an_output_that_is_no_float32(runner, make_job, tmp_path):
    done = run_job(runner, make_job("onnx", model=str(write_identity(tmp_path / "whole.onnx", "input_ids", "attention_mask"))))
    assert done.error == (5, "unreadable_model")
    assert "logits is not a float32 tensor [1, values] or [1, tokens, width]" in done.message


def test_a_text_that_no_bucket_holds(runner, make_job):
    done = run_job(runner, make_job("tflite", cases=[{"case": "length", "length": LONGEST + 1}]))
    assert done.error == (2, "too_long")
    assert done.message.endswith("17 tokens do not fit the largest bucket of 16")


def test_a_token_outside_the_vocabulary(runner, make_job, tmp_path):
    job = make_job("onnx", golden=None)
    write_inputs(tmp_path / "measured.inputs", [([4000], [0])])
    done = run_job(runner, job)
    assert done.error == (5, "failed_inference")
    assert "out of" in done.message  # ONNX Runtime's own words


@pytest.mark.parametrize("format", FORMATS)
def test_a_runtime_that_is_not_there(format, runner, make_job, tmp_path):
    done = run_job(runner, make_job(format), tmp_path / "libnowhere.so")
    assert (*done.error, "libnowhere.so: no such file" in done.message) == (2, "missing_runtime", True)
    (tmp_path / "libtext.so").write_text("not a library")
    done = run_job(runner, make_job(format), tmp_path / "libtext.so")
    assert (*done.error, "libtext.so: cannot be loaded: " in done.message) == (2, "missing_runtime", True)
    other = runtime_library("tflite" if format == "onnx" else "onnx")
    done = run_job(runner, make_job(format), other)
    assert (*done.error, f"{other}: no " in done.message) == (2, "missing_runtime", True)


OLD_ONNX_RUNTIME = """
#include <stddef.h>
#include <stdint.h>
static const void *get_api(uint32_t version) { (void)version; return NULL; }
static const char *get_version(void) { return "1.4.0"; }
static const struct { const void *(*api)(uint32_t); const char *(*version)(void); } base = {get_api, get_version};
const void *OrtGetApiBase(void) { return &base; }
"""


def test_a_runtime_that_is_too_old(runner, make_job, make_library):
    done = run_job(runner, make_job("onnx"), make_library("old.so", OLD_ONNX_RUNTIME))
    assert done.error == (2, "missing_runtime")
    assert "ONNX Runtime 1.4.0 has none of the API versions 5 to 17; take 1.5 or later" in done.message
    # LiteRT's functions had the same names and other parameters before 2.1.6.
    done = run_job(runner, make_job("tflite"), make_library("old.so", "int LiteRtCreateEnvironment(void) { return 0; }"))
    assert done.error == (2, "missing_runtime")
    assert "no LiteRT of version 2.1.6 or later" in done.message
    done = run_job(runner, make_job("tflite"), make_library("new.so", "int LiteRtCreateModelFromFd(void) { return 0; }"))
    assert done.error == (2, "missing_runtime")
    assert "it has no LiteRtCreateEnvironment" in done.message


def test_what_lies_beside_a_library_is_found(runner, make_job, make_library, tmp_path):
    """As libc++_shared.so does beside Android's; nothing else tells the loader of it."""
    make_library("libbeside.so", "int beside(void) { return 3; }", "-Wl,-soname,libbeside.so")
    source = "int beside(void); int called(void) { return beside(); }" + OLD_ONNX_RUNTIME
    library = make_library("libneeds.so", source, "-L", str(tmp_path), "-lbeside")
    assert "1.4.0" in run_job(runner, make_job("onnx"), library).message
    (tmp_path / "libbeside.so").unlink()
    done = run_job(runner, make_job("onnx"), library)
    assert (*done.error, "libbeside.so" in done.message) == (2, "missing_runtime", True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "/nowhere.onnx"}, "/nowhere.onnx: no such file"),
        ({"model": "/"}, "/: no such file"),
        ({"inputs": "/nowhere.inputs"}, "/nowhere.inputs: no inputs can be read: No such file"),
        ({"golden": "/nowhere.inputs"}, "/nowhere.inputs: no inputs can be read: No such file"),
        ({"format": "pt"}, "--format: 'pt' is none of onnx, tflite"),
        ({"mode": "speed"}, "--mode: 'speed' is none of info, latency, memory, outputs, count, sustained"),
        ({"threads": 0}, "--threads: '0' is no whole number of at least 1"),
        ({"threads": "2x"}, "--threads: '2x' is no whole number"),
        ({"min_seconds": "nan"}, "--min-seconds: 'nan' is no number of at least 0"),
        ({"deadline_s": -1}, "--deadline-s: '-1' is no number"),
        ({"cases": [{"case": "length", "length": 0}]}, "--case: '0' is no whole number of at least 1"),
        ({"cases": []}, "the job lacks case"),
        ({"cores": [0, 4095]}, "cannot pin to cores [0, 4095]; this process may use ["),
        ({"cores": []}, "--cores: '' is no whole number"),
        ({"session": {"graph_optimization_level": "most"}}, "--graph-optimization-level: 'most' is none of disabled, basic, extended, all"),
        ({"session": {"weight_cache": "memory"}}, "--weight-cache is no option for onnx files"),
        ({"session": {"config": {"session.intra_op_thread_affinities": "x"}}, "threads": 2}, ""),
    ],
)
def test_bad_options(changes, says, runner, make_job):
    library = runtime_library("onnx")
    done = run(runner, runner_arguments(make_job("onnx", **changes), library))
    kinds = {(2, "bad_job")} if says else {(2, "bad_job"), (5, "unreadable_model")}  # ONNX Runtime decides when it looks at them
    assert done.error in kinds
    assert says in done.message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the job lacks mode"),
        (["--mode", "memory", "--model", "m"], "the job lacks runtime, format, threads, inputs"),
        (["--mode", "latency"], "the job lacks runtime, model, format, threads, inputs, case, warmup, min-inferences, min-seconds"),
        (["--mode"], "--mode: not an option with a value"),
        (["latency", "x"], "latency: not an option with a value"),
        (["--speed", "9"], "--speed: no such option"),
        (["--mode", "latency", "--warmup", "16,0.05"], "--warmup: '16,0.05' is not WINDOW,TOLERANCE,SECONDS"),
        (["--mode", "latency", "--config", "novalue"], "--config: 'novalue' is not KEY=VALUE"),
    ],
)
def test_bad_command_lines(arguments, says, runner):
    done = run(runner, arguments)
    assert done.error == (2, "bad_job")
    assert says in done.message


@pytest.mark.parametrize("damage", [*DAMAGES, *OUTPUT_DAMAGES])
def test_damaged_inputs_files_are_refused_in_the_agents_words(damage, runner, make_job):
    job = make_job("onnx")
    Path(job["golden"]).write_bytes((DAMAGES | OUTPUT_DAMAGES)[damage](WITH_OUTPUTS))
    done = run_job(runner, job)
    with pytest.raises(AgentError) as agents:
        read_inputs(job["golden"])
    assert (*done.error, done.message) == (2, "bad_job", str(agents.value))


def test_golden_inputs_need_outputs(runner, make_job, tmp_path):
    job = make_job("onnx")
    write_inputs(tmp_path / "golden.inputs", TEXTS)
    done = run_job(runner, job)
    assert (*done.error, done.message) == (2, "bad_job", f"{tmp_path}/golden.inputs: has no outputs")


@pytest.mark.parametrize("name", ["with spaces", "with 'both' \"quotes\" and \\", "größe 模型 🙂", "tab\tand\nnewline", "$HOME `x` ;&|"])
def test_paths_of_every_kind(name, runner, make_job, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    job = make_job("onnx", mode="outputs", output=str(folder / "out"), golden=None)
    for key in ("model", "inputs"):
        job[key] = shutil.copy(job[key], folder / Path(job[key]).name)
    assert run_job(runner, job).code == 0
    assert len(read_inputs(str(folder / "out"))[1]) == len(TEXTS)
    assert run_job(runner, {**job, "model": str(folder / "not there")}).message == f"{folder / 'not there'}: no such file"


def test_bytes_that_are_no_text_are_still_json(runner, make_job):
    arguments = [os.fsencode(argument) for argument in runner_arguments(make_job("onnx", model="MODEL"), runtime_library("onnx"))]
    wrong = "\ufffd"
    for name, shown in (
        (b"/\xff\xfe!", f"/{2 * wrong}!"),
        (b"/\xc3(", f"/{wrong}("),
        (b"/\xed\xa0\x80", f"/{3 * wrong}"),
        (b"/\xf0\x9f\x99\x82", "/🙂"),
    ):
        done = run(runner, [name if argument == b"MODEL" else argument for argument in arguments])
        assert done.message == f"{shown}: no such file"


def test_an_output_that_cannot_be_written(runner, make_job, tmp_path):
    done = run_job(runner, make_job("onnx", mode="outputs", output=str(tmp_path / "no folder" / "out")))
    assert (*done.error, "cannot be written" in done.message) == (2, "bad_job", True)
    if Path("/dev/full").exists():
        done = run_job(runner, make_job("onnx", mode="outputs", output="/dev/full"))
        assert (*done.error, "No space left" in done.message) == (2, "bad_job", True)


# --- the process that waits -----------------------------------------------------------------------------------------


@contextmanager
def started(runner: Path, job: dict, **options):
    """(the runner while it measures, the process id of its worker)"""
    arguments = runner_arguments(job, runtime_library(job["format"]))
    process = subprocess.Popen([runner, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: children.read_text(encoding="ascii").strip())
        worker = int(children.read_text(encoding="ascii"))
        library = runtime_library(job["format"]).name
        wait_until(lambda: library in Path(f"/proc/{worker}/maps").read_text(encoding="utf-8"))
        yield process, worker
    finally:
        process.kill()
        process.communicate()


def wait_until(reached) -> None:
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_gone(worker: int) -> bool:
    stat = Path(f"/proc/{worker}/stat")
    try:
        return stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_the_deadline_stops_the_work(runner, make_job):
    done = run_job(runner, make_job("onnx", min_seconds=60.0, deadline_s=1.5))
    assert done.error == (4, "timeout")
    assert done.message.endswith("no end within 1.5 s; stopped")
    assert done.answer["error"]["rss_bytes"] > 1e6


def test_the_deadline_stops_a_library_that_hangs(runner, make_job, make_library):
    library = make_library("hangs.so", "#include <unistd.h>\n__attribute__((constructor)) static void hang(void) { for (;;) pause(); }")
    done = run_job(runner, make_job("onnx", deadline_s=1.0), library)
    assert done.error == (4, "timeout")


def test_the_end_of_standard_input_stops_the_work(runner, make_job):
    job = make_job("onnx", min_seconds=60.0, watch_stdin=True)
    with started(runner, job, stdin=subprocess.PIPE) as (process, worker):
        process.stdin.write(b"still here")
        process.stdin.flush()
        time.sleep(0.3)
        assert process.poll() is None
        stdout, _ = process.communicate(timeout=60)
        assert (process.returncode, strict(stdout)["error"]["kind"]) == (4, "host_gone")
        assert is_gone(worker)


def test_standard_input_that_is_not_watched_may_end(runner, make_job):
    assert run_job(runner, make_job("onnx")).code == 0
    assert run_job(runner, make_job("onnx", watch_stdin=True)).error == (4, "host_gone")


def test_the_worker_ends_with_its_parent(runner, make_job):
    with started(runner, make_job("onnx", min_seconds=60.0)) as (process, worker):
        process.kill()
        process.wait(timeout=60)
        wait_until(lambda: is_gone(worker))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_worker_that_is_killed(number, runner, make_job):
    with started(runner, make_job("onnx", min_seconds=60.0)) as (process, worker):
        os.kill(worker, number)
        stdout, _ = process.communicate(timeout=60)
        error = strict(stdout)["error"]
        assert (process.returncode, error["kind"]) == (4, "killed")
        assert re.search(rf"killed by {number.name}; it held \d+ MB at most$", error["message"])
        assert error["rss_bytes"] > 0


@pytest.mark.parametrize(
    ("before", "after", "kind", "says"),
    [
        ("oom_kill 3\n", "oom_kill 4\n", "out_of_memory", "out of memory: killed by the kernel; it held "),
        ("oom_kill 3\n", "oom_kill 3\n", "killed", "killed by SIGKILL; it held "),
        ("nr_free 1\n", "nr_free 1\n", "killed", "killed by SIGKILL; the kernel does not say whether for memory; it held "),
    ],
)
def test_the_kernels_own_count_tells_what_memory_killed(before, after, kind, says, runner, make_job, tmp_path):
    write(tmp_path, "proc/vmstat", before)
    with started(runner, make_job("onnx", min_seconds=60.0, root=str(tmp_path))) as (process, worker):
        write(tmp_path, "proc/vmstat", after)
        os.kill(worker, signal.SIGKILL)
        stdout, _ = process.communicate(timeout=60)
    error = strict(stdout)["error"]
    assert (process.returncode, error["kind"]) == (4, kind)
    assert says in error["message"]


@contextmanager
def memory_group(cap_bytes: int):
    """Two files: one that takes the number of a process, and so caps it."""
    unified, first = Path("/sys/fs/cgroup/cgroup.controllers"), Path("/sys/fs/cgroup/memory")
    group = (Path("/sys/fs/cgroup") if unified.is_file() else first) / f"pocketbert-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        try:
            (group / ("memory.max" if unified.is_file() else "memory.limit_in_bytes")).write_text(str(cap_bytes))
        except OSError as error:
            pytest.skip(f"cgroups have no memory controller here: {error}")
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def test_out_of_memory(runner, make_job):
    with memory_group(9_000_000) as members:
        arguments = runner_arguments(make_job("onnx"), runtime_library("onnx"))
        enter = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(members), str(runner), *arguments]
        done = subprocess.run(enter, capture_output=True, timeout=120, stdin=subprocess.DEVNULL)
        wait_until(lambda: not members.read_text(encoding="ascii").strip())
    error = strict(done.stdout)["error"]
    assert (done.returncode, error["kind"]) == (4, "out_of_memory")
    assert 1e6 < error["rss_bytes"] < 50e6


def test_libraries_that_print_exit_or_abort(runner, make_job, make_library):
    noisy = '#include <stdio.h>\n#include <unistd.h>\n__attribute__((constructor)) static void speak(void) { puts("hello"); fflush(stdout); }\n'
    done = run_job(runner, make_job("onnx"), make_library("noisy.so", noisy + OLD_ONNX_RUNTIME))
    assert (*done.error, "hello" in done.stderr) == (2, "missing_runtime", True)
    done = run_job(runner, make_job("onnx"), make_library("exits.so", "#include <stdlib.h>\nvoid *OrtGetApiBase(void) { exit(7); }"))
    assert (*done.error, done.message) == (1, "internal", "the worker ended with exit code 7 and no answer")
    done = run_job(runner, make_job("onnx"), make_library("aborts.so", "#include <stdlib.h>\nvoid *OrtGetApiBase(void) { abort(); }"))
    assert (*done.error, "killed by SIGABRT" in done.message) == (4, "killed", True)


def test_streams_that_the_caller_closed_or_ignored_signals(runner, make_job):
    """What a phone's shell or a daemon may leave behind."""
    arguments = shlex.join([str(runner), *runner_arguments(make_job("onnx"), runtime_library("onnx"))])
    done = subprocess.run(["/bin/sh", "-c", f"trap '' CHLD PIPE HUP; exec {arguments} <&- 2>&-"], stdout=subprocess.PIPE, timeout=120)
    assert (done.returncode, strict(done.stdout)["cases"][0]["count"]) == (0, 30)


# --- the machine ----------------------------------------------------------------------------------------------------


def made_up(root: Path) -> None:
    """What no device has all at once: cores out of order, holes, names twice, damaged numbers, no unit."""
    write(root, "proc/cpuinfo", 'model name : B "x"\nmodel name\t: A\nflags\t: avx avx2x avx512f fma\nflags : neon\nempty :\nno separator\n')
    write(root, "proc/meminfo", "MemFree: 1 kB\n")
    write(root, "proc/loadavg", "12 0.5 1e1 0/0 broken\n")
    (root / "proc/pressure").mkdir()
    write(root, "proc/pressure/cpu", "full avg10=9.99\n")
    for core, clock in (("cpu10", "5"), ("cpu2", "-7"), ("cpufreq", "1"), ("cpuidle", "1")):
        write(root, f"sys/devices/system/cpu/{core}/cpufreq/scaling_max_freq", clock)
        write(root, f"sys/devices/system/cpu/{core}/cpu_capacity", "100" if core == "cpu2" else "x")
    for zone, (kind, temperature) in enumerate((("a", "1"), ("a", "-1500"), ("a", "99999999999999999999999"), ("", "12 34"))):
        write(root, f"sys/class/thermal/thermal_zone{zone}/type", kind)
        write(root, f"sys/class/thermal/thermal_zone{zone}/temp", temperature)
    write(root, "sys/devices/platform/soc/soc:firmware/get_throttled", "0x50005\n")
    for name, kind in (("b", "Battery"), ("a", "Mains"), ("c", "Battery")):
        write(root, f"sys/class/power_supply/{name}/type", kind)
        write(root, f"sys/class/power_supply/{name}/capacity", "0")


def nothing(root: Path) -> None:
    root.mkdir(exist_ok=True)


@pytest.mark.parametrize("tree", [raspberry_pi_4, raspberry_pi_5, phone, nothing, made_up])
def test_the_same_conditions_as_the_agent(tree, runner, tmp_path):
    tree(tmp_path)
    conditions = run(runner, ["--mode", "info", "--root", str(tmp_path)]).answer["conditions"]
    state = read_state(tmp_path)
    if tree is made_up:  # no clock of a device; the agent has integers of any size
        state["temperatures_c"]["a thermal_zone2"] = None
    assert conditions.pop("before") == state
    expected = read_conditions(tmp_path, None)
    assert set(conditions) == set(expected)
    assert {key: conditions[key] for key in set(expected) - OF_A_LANGUAGE} == {key: expected[key] for key in set(expected) - OF_A_LANGUAGE}
    assert {key: conditions[key] for key in OF_A_LANGUAGE} == {"python": None, "numpy": None, "agent": "c runner 3", "runtime": None}


def test_the_same_conditions_as_the_agent_here(runner):
    conditions = run(runner, ["--mode", "info"]).answer["conditions"]
    expected = read_conditions(Path("/"), None)
    assert {key: conditions[key] for key in set(expected) - OF_A_LANGUAGE} == {key: expected[key] for key in set(expected) - OF_A_LANGUAGE}
    assert set(conditions["before"]) == set(read_state(Path("/")))


def test_info_names_the_runtime_of_the_library(runner, make_library):
    assert run(runner, ["--mode", "info"]).answer["formats"] == {}
    for format in FORMATS:
        formats = run(runner, ["--mode", "info", "--runtime", str(runtime_library(format))]).answer["formats"]
        assert list(formats) == [format]
        assert formats[format].startswith(("onnxruntime 1.", "LiteRT 2.3 or later"))
    assert run(runner, ["--mode", "info", "--runtime", str(make_library("libother.so", "int other;"))]).answer["formats"] == {}


def two_kinds(root: Path, big: int, little: int, capacities: bool) -> None:
    for core, capacity, clock in ((big, 1024, 2400000), (little, 400, 1800000)):
        if capacities:
            write(root, f"sys/devices/system/cpu/cpu{core}/cpu_capacity", f"{capacity}\n")
            clock = 2000000  # equal: the capacity decides
        write(root, f"sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq", f"{clock}\n")


@pytest.mark.parametrize("capacities", [True, False])
@pytest.mark.parametrize("swapped", [True, False])
def test_big_and_little_cores_are_pinned_to(swapped, capacities, runner, make_job, tmp_path):
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("this process may use one core only")
    big, little = (allowed[1], allowed[0]) if swapped else (allowed[0], allowed[1])
    two_kinds(tmp_path, big, little, capacities)
    for name, core in (("big", big), ("little", little)):
        done = run_job(runner, make_job("onnx", cores=name, root=str(tmp_path)))
        assert (done.code, done.answer["conditions"]["affinity"]) == (0, [core])


def test_the_cores_of_a_phone_are_not_here(runner, make_job, tmp_path):
    phone(tmp_path)
    done = run_job(runner, make_job("onnx", cores="little", root=str(tmp_path)))
    if len(os.sched_getaffinity(0)) < 4:
        assert done.error == (2, "bad_job")
        assert "cannot pin to cores [0, 1, 2, 3]; this process may use [" in done.message
    done = run_job(runner, make_job("onnx", cores="big", root=str(tmp_path)))
    if 8 not in os.sched_getaffinity(0):
        assert "cannot pin to cores [8]" in done.message


@pytest.mark.parametrize(("tree", "reason"), [(raspberry_pi_5, "all cores are alike here"), (nothing, "the machine does not say which those are")])
def test_machines_without_big_cores(tree, reason, runner, make_job, tmp_path):
    tree(tmp_path)
    done = run_job(runner, make_job("onnx", cores="big", root=str(tmp_path)))
    assert done.error == (2, "bad_job")
    assert done.message == f"cores 'big': {reason}; leave cores out or give their numbers"


def test_big_cores_of_this_machine(runner, make_job):
    clusters = read_clusters(Path("/"))
    done = run_job(runner, make_job("onnx", cores="big"))
    if clusters is not None and len(clusters) > 1:
        assert done.answer["conditions"]["affinity"] == clusters[-1]["cores"]
    else:
        assert done.error == (2, "bad_job")


def test_the_runtimes_threads_stay_on_the_chosen_core(runner, make_job):
    core = max(os.sched_getaffinity(0))
    job = make_job("tflite", cores=[core], threads=2, min_seconds=60.0, golden=None)
    with started(runner, job) as (_, worker):
        tasks = Path(f"/proc/{worker}/task")
        wait_until(lambda: len(list(tasks.iterdir())) == 2)
        for task in tasks.iterdir():
            assert f"Cpus_allowed_list:\t{core}\n" in (task / "status").read_text(encoding="utf-8")

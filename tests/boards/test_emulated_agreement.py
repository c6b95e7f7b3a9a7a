"""Files on emulated Arm against the same files on this machine: outputs, answers, and what they cost in instructions.

Three CPUs stand for three ways to multiply 8-bit integers: cortex-a72 widens and adds, cortex-a76 has dot products, max has
matrix products. The C runner runs on both sides, on real texts of 11 tokens on average.

What can be promised, as measured with onnxruntime 1.31.1 and ai-edge-litert 2.3.0: integer arithmetic agrees bit for bit.
In a float32 file, sums in another order and fused multiply-adds move a logit by 5e-5 at most. In an int8 file such a
difference usually rounds away, and half of the texts agree to 5e-6; now and then it tips one activation's 8-bit code, and
then logits move as far as quantizing moves them anyway. Answers agree but where two classes tie.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, checker, helper, numpy_helper, save

from device_bench.agent.agent import read_inputs, write_inputs
from device_bench.runner_build import build_runner, runner_arguments, runtime_library
from device_bench.targets import parse_answer
from device_bench.targets.qemu import QemuTarget
from runtimes.bundle import Bundle, ModelEntry, open_bundle
from runtimes.errors import BadInput, IntegrityError
from runtimes.text import Encoding, TextEncoder
from tests.boards.clinc150 import find_data
from tests.device_bench.conftest import pairs

CPUS = ("cortex-a72", "cortex-a76", "max")
TEXTS, FEW = 100, 10
NEAR_TIES = 2
"""Texts whose two best classes may lie so close together that rounding decides."""
FLOAT_OF = {"onnx/model_quantized.onnx": "onnx/model.onnx", "tflite/model_int8.tflite": "tflite/model_fp32.tflite"}
FLOAT_TOLERANCE = 2e-4
USUAL_INT8_DIFFERENCE = 1e-4
WIDTH, WIDER, CLASSES = 384, 1536, 30


@pytest.fixture(scope="session")
def bundle(clinc150_bundle) -> Bundle:
    return open_bundle(clinc150_bundle)


@pytest.fixture(scope="session")
def texts(bundle) -> tuple[list[Encoding], np.ndarray]:
    """(inputs, numbers of the right labels) of real test texts, taken evenly from all intents."""
    rows = find_data().test
    rows = rows[:: len(rows) // TEXTS][:TEXTS]
    encoder = TextEncoder(bundle.tokenizer_file, bundle.max_length)
    labels = list(bundle.labels["logits"])
    return encoder.encode_batch([row["text"] for row in rows]), np.array([labels.index(row["label"]) for row in rows])


class Here:
    """The C runner on this machine."""

    name = "here"

    def run(self, job: dict) -> dict:
        command = [str(build_runner("x86_64")), *runner_arguments(job, runtime_library(job["format"]))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        return parse_answer(self.name, done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def outputs(aarch64, texts, tmp_path_factory):
    """Logits [N, C] of a file on a CPU (None: on this machine), computed once for all tests."""
    known: dict[tuple, np.ndarray] = {}

    def logits(path: Path, cpu: str | None, count: int = TEXTS, session: dict | None = None) -> np.ndarray:
        key = (path, cpu, count, json.dumps(session))
        if key not in known:
            folder = tmp_path_factory.mktemp("outputs")
            job = make_job("outputs", path, texts[0][:count], folder, output=str(folder / "outputs"), session=session)
            (Here() if cpu is None else QemuTarget(cpu)).run(job)
            known[key] = read_logits(folder / "outputs")
        return known[key]

    return logits


def read_logits(path: Path) -> np.ndarray:
    return np.stack([found["logits"] for found in read_inputs(str(path))[1]])


def make_job(mode: str, path: Path, inputs: list[Encoding], folder: Path, golden: np.ndarray | None = None, tolerance: float = 0.0, **more) -> dict:
    write_inputs(folder / "measured.inputs", pairs(inputs))
    if golden is not None:
        write_inputs(folder / "golden.inputs", pairs(inputs[: len(golden)]), [{"logits": row} for row in golden])
    return {
        "mode": mode, "model": str(path), "format": path.suffix[1:], "threads": 1, "cores": None, "inputs": str(folder / "measured.inputs"),
        "golden": None if golden is None else str(folder / "golden.inputs"), "tolerance": tolerance, **more,
    }  # fmt: skip


def entry(bundle: Bundle, file: str) -> ModelEntry:
    return next(model for model in bundle.models if model.file == file)


# --- outputs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def integer_file(bundle, tmp_path_factory) -> Path:
    """Three layers of BERT's sizes in 8 bits, in which every operation on float32 is exact or rounded once as IEEE 754 says."""
    generator = np.random.default_rng(0)
    vocabulary = max(len(line) and number for number, line in enumerate((bundle.folder / "vocab.txt").read_text().splitlines())) + 1
    constants = {"words": generator.normal(size=(vocabulary, WIDTH)).astype(np.float32), "last": np.array([-1]), "tokens": np.array([1])}
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["found"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["found", "mask3"], ["x0"]),
    ]
    for layer, (size_in, size_out) in enumerate([(WIDTH, WIDER), (WIDER, WIDTH), (WIDTH, CLASSES)]):
        name = f"layer{layer}_"
        constants[f"{name}weight"] = generator.integers(-127, 128, (size_in, size_out)).astype(np.int8)
        constants[f"{name}zero"] = np.zeros((), np.int8)
        constants[f"{name}scale"] = generator.uniform(1e-3, 2e-3, size_out).astype(np.float32)
        constants[f"{name}bias"] = generator.normal(size=size_out).astype(np.float32)
        nodes += [
            helper.make_node("DynamicQuantizeLinear", [f"x{layer}"], [f"{name}codes", f"{name}step", f"{name}x_zero"]),
            helper.make_node("MatMulInteger", [f"{name}codes", f"{name}weight", f"{name}x_zero", f"{name}zero"], [f"{name}sums"]),
            helper.make_node("Cast", [f"{name}sums"], [f"{name}floats"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}step", f"{name}scale"], [f"{name}steps"]),
            helper.make_node("Mul", [f"{name}floats", f"{name}steps"], [f"{name}products"]),
            helper.make_node("Add", [f"{name}products", f"{name}bias"], [f"{name}y"]),
            helper.make_node("Relu", [f"{name}y"], [f"x{layer + 1}"]),
        ]
    nodes.append(helper.make_node("ReduceMax", ["layer2_y"], ["logits"], axes=[1], keepdims=0))
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, [1, "n"]) for name in ("input_ids", "attention_mask")]
    result = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, CLASSES])]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "integers", inputs, result, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    path = tmp_path_factory.mktemp("integers") / "integers.onnx"
    save(model, path)
    return path


@pytest.mark.parametrize("cpu", CPUS)
def test_integer_arithmetic_agrees_bit_for_bit(cpu, integer_file, outputs):
    """As written: graph optimizations would fuse the scale and the bias into one rounding on Arm, and not here."""
    session = {"graph_optimization_level": "disabled"}
    expected = outputs(integer_file, None, session=session)
    assert np.isfinite(expected).all()
    assert len(np.unique(expected, axis=0)) > TEXTS / 2
    np.testing.assert_array_equal(outputs(integer_file, cpu, session=session), expected)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("file", list(FLOAT_OF))
def test_int8_files_give_the_same_answers(cpu, file, bundle, texts, outputs):
    path = bundle.path(entry(bundle, file))
    here, there = outputs(path, None), outputs(path, cpu)
    right_here, right_there = ((logits.argmax(axis=1) == texts[1]) for logits in (here, there))
    assert right_here.sum() > 0.9 * TEXTS
    assert abs(int(right_there.sum()) - int(right_here.sum())) <= NEAR_TIES
    assert (there.argmax(axis=1) == here.argmax(axis=1)).sum() >= TEXTS - NEAR_TIES
    differences = np.abs(there - here).max(axis=1)
    assert np.median(differences) < USUAL_INT8_DIFFERENCE
    in_float = outputs(bundle.path(entry(bundle, FLOAT_OF[file])), None)
    assert differences.max() < np.abs(here - in_float).max()


def test_onnx_int8_file_is_the_same_with_and_without_dot_products(bundle, outputs):
    path = bundle.path(entry(bundle, "onnx/model_quantized.onnx"))
    np.testing.assert_array_equal(outputs(path, "cortex-a76"), outputs(path, "cortex-a72"))


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("file", list(FLOAT_OF.values()))
def test_float_files_agree(cpu, file, bundle, outputs):
    path = bundle.path(entry(bundle, file))
    np.testing.assert_allclose(outputs(path, cpu, FEW), outputs(path, None, FEW), rtol=0, atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize("file", list(FLOAT_OF))
def test_golden_cases_hold(file, bundle, aarch64, tmp_path):
    """What ``bench`` checks before it measures anything."""
    model, cases = entry(bundle, file), list(bundle.golden_cases())
    golden = np.array([one["logits"] for case in cases for one in case["outputs"][file]], np.float32)
    inputs = [Encoding(one["ids"], one["types"]) for case in cases for one in case["inputs"]]
    output = tmp_path / "outputs"
    QemuTarget("cortex-a76").run(make_job("outputs", bundle.path(model), inputs, tmp_path, golden, model.tolerance, output=str(output)))
    assert read_logits(output).shape == golden.shape
    golden[3, 5] += 2 * model.tolerance
    job = make_job("outputs", bundle.path(model), inputs, tmp_path, golden, model.tolerance, output=str(output))
    with pytest.raises(IntegrityError, match=r"qemu:cortex-a76: .*golden case 4 differs"):
        QemuTarget("cortex-a76").run(job)


# --- instructions -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def counts(bundle, texts, aarch64, tmp_path_factory):
    """Instructions per text of a file on a CPU, counted once for all tests."""
    known: dict[tuple, list] = {}

    def count(file: str, cpu: str) -> list[dict[str, int]]:
        if (file, cpu) not in known:
            known[file, cpu] = count_again(bundle, texts, file, cpu, tmp_path_factory.mktemp("counts"))
        return known[file, cpu]

    return count


def count_again(bundle: Bundle, texts: tuple, file: str, cpu: str, folder: Path) -> list[dict[str, int]]:
    answer = QemuTarget(cpu).run(make_job("count", bundle.path(entry(bundle, file)), texts[0][:FEW], folder))
    assert answer["marked"] == FEW
    return answer["instructions"]


def mean(counted: list[dict[str, int]], kind: str = "total") -> float:
    return sum(one[kind] for one in counted) / len(counted)


@pytest.mark.parametrize("file", list(FLOAT_OF))
def test_counts_repeat_exactly_wherever_the_files_lie(file, bundle, texts, counts, tmp_path, monkeypatch):
    elsewhere = tmp_path / "a folder with a rather longer name"
    elsewhere.mkdir()
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert count_again(bundle, texts, file, "cortex-a76", elsewhere) == counts(file, "cortex-a76")


@pytest.mark.parametrize(("float_file", "int8_file"), [(float_file, file) for file, float_file in FLOAT_OF.items()])
def test_int8_takes_fewer_instructions_and_fewer_still_with_dot_products(float_file, int8_file, counts):
    in_float, without, with_dot, with_matrices = (
        counts(float_file, "cortex-a76"), counts(int8_file, "cortex-a72"), counts(int8_file, "cortex-a76"), counts(int8_file, "max"),
    )  # fmt: skip
    assert mean(without) < mean(in_float)
    assert mean(with_dot) < 0.7 * mean(without)
    assert mean(with_matrices) < 0.9 * mean(with_dot)
    assert mean(without, "dot") == mean(in_float, "dot") == 0
    assert mean(with_dot, "dot") > mean(with_matrices, "dot") > 0  # one matrix product does what two dot products do, or more
    for counted in (in_float, without, with_dot, with_matrices):
        for one in counted:
            assert one["dot"] + one["fma"] <= one["simd"]
            assert one["simd"] + one["load_store"] <= one["total"]
    assert mean(in_float, "fma") > 0.3 * mean(in_float)


def test_longer_texts_take_more_instructions(counts, texts):
    totals = [one["total"] for one in counts("onnx/model_quantized.onnx", "cortex-a76")]
    lengths = [len(one.ids) for one in texts[0][:FEW]]
    assert np.argsort(totals, kind="stable")[-1] in np.flatnonzero(np.array(lengths) == max(lengths))
    assert np.corrcoef(totals, lengths)[0, 1] > 0.95


# --- what it says of itself -----------------------------------------------------------------------------------------


def test_info_is_the_emulated_boards_and_nothing_of_this_machines(aarch64):
    with QemuTarget("cortex-a72") as target:
        info = target.info()
    assert target.emulated
    assert info["formats"] == {
        "onnx": f"onnxruntime {aarch64.runtimes['onnxruntime']}",
        "tflite": f"ai-edge-litert {aarch64.runtimes['ai-edge-litert']}",
    }
    conditions = info["conditions"]
    assert (conditions["architecture"], conditions["cpu_model"]) == ("aarch64", "implementer 0x41 part 0xd08")
    assert conditions["isa"] == ["asimd"]
    assert conditions["agent"].startswith("c runner")
    for key in ("board", "kernel", "cores", "clusters", "governors", "memory_total_bytes", "affinity"):
        assert conditions[key] is None, key
    assert "asimddp" in QemuTarget("cortex-a76").info()["conditions"]["isa"]
    assert "i8mm" in QemuTarget("max").info()["conditions"]["isa"]
    assert "sme" not in QemuTarget("max").info()["conditions"]["isa"]


# --- Armv7 ----------------------------------------------------------------------------------------------------------


def test_armv7_runs_float_files_and_refuses_what_its_runtime_does_not_know(armv7, bundle, texts, outputs, tmp_path):
    target = QemuTarget("cortex-a7")
    assert target.info()["formats"] == {"tflite": "tflite-runtime 2.14.0"}
    path = bundle.path(entry(bundle, "tflite/model_fp32.tflite"))
    job = make_job("outputs", path, texts[0][:FEW], tmp_path, output=str(tmp_path / "outputs"))
    answer = target.run(job)
    assert answer["conditions"]["architecture"] == "armv7l"
    np.testing.assert_allclose(read_logits(tmp_path / "outputs"), outputs(path, None, FEW), rtol=0, atol=FLOAT_TOLERANCE)
    with pytest.raises(IntegrityError, match=r"qemu:cortex-a7: .*model_int8\.tflite: cannot be loaded"):
        target.run({**job, "model": str(bundle.path(entry(bundle, "tflite/model_int8.tflite")))})
    with pytest.raises(BadInput, match=r"qemu:cortex-a7: instructions are counted on aarch64 only"):
        target.run({**job, "mode": "count"})

"""The gate of quantized files: it trips, finds what does the damage, keeps that in float32, and ships; or it refuses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema

from exporters.calibration import calibrate
from exporters.folding import fold
from exporters.graph import FoldedEncoder
from exporters.onnx_writer import write_onnx
from exporters.quant_plan import FLOAT32, FLOAT_PLAN, INT8, INT8_STATIC, QuantPlan, tensor_bytes, tensor_names
from exporters.sensitivity import MAX_KEPT_SHARE, Outcome, quantize_within, rank
from exporters.tflite_writer import write_tflite
from runtimes.errors import GateFailed
from tests.exporters.results import file_logits, file_results, inputs
from tests.exporters.small_models import LONGEST, break_ffn, one_thread, small_encoder, texts  # noqa: F401 - a fixture

FORMATS, SCHEMES = ("onnx", "tflite"), (INT8, INT8_STATIC)
TEXTS = texts(120, seed=3)
STUDENT = "no-norm student"
FLOOR = 85.0
"""Per cent; a broken file has less than 60, one without the breakage more than 93."""


def probed(path: Path) -> list[dict[str, np.ndarray]]:
    return file_results(path, inputs(TEXTS[:60]))


def decide(result: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.array([result["logits"].argmax()])


@dataclass
class Gate:
    """``quantize_within`` on files of ``model``, whose metric is how often they decide as its float32 file does."""

    model: FoldedEncoder
    path: Path
    plan: QuantPlan
    written: list[QuantPlan] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.write(FLOAT_PLAN, self.path)
        self.right = file_logits(self.path, TEXTS).argmax(axis=1)
        self.path.unlink()
        self.written.clear()

    def write(self, plan: QuantPlan, path: Path) -> None:
        self.written.append(plan)
        if path.suffix == ".onnx":
            write_onnx(self.model, path, plan)
        else:
            write_tflite(self.model, path, [LONGEST], plan)

    def score(self, path: Path) -> float:
        return 100 * float(np.mean(file_logits(path, TEXTS).argmax(axis=1) == self.right))

    def pass_through(self, floor: float, sizes: dict[str, int] | None = None) -> Outcome:
        sizes = tensor_bytes(self.model) if sizes is None else sizes
        return quantize_within(self.write, self.path, self.plan, sizes, probed, decide, self.score, floor, self.said.append)


def make_gate(folder: Path, suffix: str, scheme: str, broken: list[tuple[int, int]], kind: str = STUDENT) -> tuple[Gate, list[str]]:
    encoder = small_encoder(kind)
    names = [break_ffn(encoder, layer, ffn) for layer, ffn in broken]
    model = fold(encoder, LONGEST)
    ranges = calibrate(model, inputs(texts(60))).ranges if scheme == INT8_STATIC else {}
    return Gate(model, folder / f"m.{suffix}", QuantPlan(scheme, (), ranges)), names


def stored(path: Path) -> dict[str, set[str]]:
    """Names of matrices and tables in a file -> "float32" or "int8", as the file itself stores them; NAME.0 is a piece of NAME."""
    if path.suffix == ".onnx":
        kinds = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT8: "int8", onnx.TensorProto.UINT8: "int8"}
        held = [tensor for tensor in onnx.load(path).graph.initializer if tensor.data_type in kinds]
        return {re.sub(r"\.\d+$", "", tensor.name): {kinds[tensor.data_type]} for tensor in held}
    kinds = {schema.TensorType.FLOAT32: "float32", schema.TensorType.INT8: "int8"}
    found: dict[str, set[str]] = {}
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    for tensor in (tensor for graph in model.subgraphs for tensor in graph.tensors):
        if tensor.type in kinds:
            found.setdefault(tensor.name.decode(), set()).add(kinds[tensor.type])
    return found


def needed(names: list[str], suffix: str, scheme: str) -> set[str]:
    """What must be kept for the broken ``names``: where a TFLite matrix gives int8 codes, the huge unit breaks its writer too."""
    both = suffix == "tflite" and scheme == INT8_STATIC
    return {*names, *(name.replace(".down", ".up") for name in names if both)}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", [STUDENT, "relu bert"])
def test_the_gate_trips_falls_back_and_ships(tmp_path, suffix, scheme, kind):
    gate, names = make_gate(tmp_path, suffix, scheme, [(0, 0)], kind)
    kept = needed(names, suffix, scheme)
    outcome = gate.pass_through(FLOOR)
    assert outcome.first_score < FLOOR - 15, "the plain quantization is broken"
    assert {damage.name for damage in outcome.ranking[: len(kept)]} == kept
    assert outcome.ranking[len(kept) - 1].squared_change > 20 * outcome.ranking[len(kept)].squared_change
    assert {damage.name for damage in outcome.kept} == kept, "no more than is needed"
    assert outcome.kept == outcome.ranking[: len(kept)]
    assert outcome.kept[0].decided_otherwise > 5
    assert gate.score(gate.path) == outcome.score >= FLOOR, "the score is that of the file that ships"
    found = stored(gate.path)
    for name in tensor_names(gate.model):
        assert found[name] == {"float32" if name in kept else "int8"}, name
        assert outcome.plan.precision(name) == (FLOAT32 if name in kept else scheme)
    assert list(tmp_path.iterdir()) == [gate.path], "probes are removed"
    assert f"m.{suffix}: {outcome.first_score:.2f}, at least {FLOOR:.2f} is needed" in gate.said[0]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_that_holds_at_once_costs_no_search(tmp_path, suffix):
    gate, _ = make_gate(tmp_path, suffix, INT8, [])
    outcome = gate.pass_through(FLOOR)
    assert (outcome.kept, outcome.ranking, outcome.plan, gate.said) == ((), (), gate.plan, [])
    assert outcome.score == outcome.first_score == gate.score(gate.path)
    assert gate.written == [gate.plan]
    assert list(tmp_path.iterdir()) == [gate.path]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_as_few_as_possible_are_kept(tmp_path, suffix, scheme):
    """Three places are broken and all must be kept: one fewer does not hold, and all counts up to half the weights would."""
    gate, names = make_gate(tmp_path, suffix, scheme, [(0, 0), (0, 1), (1, 0)])
    outcome = gate.pass_through(FLOOR)
    count = len(outcome.kept)
    assert {damage.name for damage in outcome.kept} == needed(names, suffix, scheme)
    fewer = tmp_path / f"fewer.{suffix}"
    gate.write(gate.plan.keeping(damage.name for damage in outcome.ranking[: count - 1]), fewer)
    assert gate.score(fewer) < FLOOR <= outcome.score == gate.score(gate.path)
    assert {name for name, kind in stored(gate.path).items() if kind == {"float32"} and name in tensor_names(gate.model)} == {
        damage.name for damage in outcome.kept
    }  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8])
def test_the_search_ends_at_the_least_number_wherever_it_is(tmp_path, count):
    """The metric counts here how many of the worst are kept, so that every answer has its turn."""
    gate, _ = make_gate(tmp_path, "onnx", INT8, [])
    names = tensor_names(gate.model)
    ranking = rank(gate.write, tmp_path / "r.onnx", gate.plan, dict.fromkeys(names, 1), probed, decide)
    order = [damage.name for damage in ranking]
    gate.score = lambda path: float(sum(stored(path)[name] == {"float32"} for name in order[:count]))
    outcome = gate.pass_through(count, dict.fromkeys(names, 1))
    assert [damage.name for damage in outcome.kept] == order[:count]
    assert outcome.score == count == gate.score(gate.path)
    assert [damage.name for damage in outcome.ranking] == order
    assert sum("worst in float32" in line for line in gate.said) <= 7


@pytest.mark.parametrize("suffix", FORMATS)
def test_where_nothing_holds_the_file_is_refused(tmp_path, suffix):
    gate, names = make_gate(tmp_path, suffix, INT8, [(0, 0)])
    with pytest.raises(GateFailed) as error:
        gate.pass_through(101)
    assert error.value.exit_code == 3
    message = str(error.value)
    assert message.startswith(f"m.{suffix}: ")
    assert "101.00 is needed" in message and "50%" in message
    assert f"the most damage is done by {names[0]} (" in message
    assert sum(name in message for name in tensor_names(gate.model)) == 3
    sizes = tensor_bytes(gate.model)
    kept = sum(sizes[name] for name, kind in stored(gate.path).items() if name in sizes and kind == {"float32"})
    assert 0 < kept <= MAX_KEPT_SHARE * sum(sizes.values()), "the last try stays, and it is within the share"
    assert not list(tmp_path.glob("probe_*"))


def test_a_tensor_that_is_most_of_the_weights_is_not_kept(tmp_path):
    """One huge number in each row of the table, which nothing reads, breaks the row's scale. Kept, the file would hold, and would be no int8 file."""
    encoder = small_encoder("no-norm student", vocab_size=4000)
    encoder.embeddings.word.weight.data[:, 0] = 1e4
    encoder.embeddings.projection.weight.data[:, :: encoder.config.embedding_size] = 0.0
    gate = Gate(fold(encoder, LONGEST), tmp_path / "m.onnx", QuantPlan(INT8, (("embeddings.projection", FLOAT32),)))
    with pytest.raises(GateFailed, match=r" with 0 of \d+ tensors in float32.* done by embeddings\.words \("):
        gate.pass_through(FLOOR)
    gate.write(gate.plan.keeping(["embeddings.words"]), gate.path)
    assert gate.score(gate.path) >= FLOOR


def test_each_tensor_is_measured_alone_and_those_in_float32_are_not(tmp_path):
    gate, _ = make_gate(tmp_path, "onnx", INT8, [(0, 0)])
    plan = QuantPlan(INT8, (("layers.1.*", FLOAT32),))
    names = tensor_names(gate.model)
    ranking = rank(gate.write, tmp_path / "probe.onnx", plan, tensor_bytes(gate.model), lambda path: file_results(path, inputs(TEXTS)), decide)
    assert {damage.name for damage in ranking} == {name for name in names if not name.startswith("layers.1")}
    assert [d.squared_change for d in ranking] == sorted((d.squared_change for d in ranking), reverse=True)
    alone = [{name for name in names if written.precision(name) != FLOAT32} for written in gate.written]
    assert alone == [set(), *({damage.name} for damage in sorted(ranking, key=lambda d: names.index(d.name)))]
    worst, path = ranking[0], tmp_path / "by_hand.onnx"
    gate.write(FLOAT_PLAN, path)
    exact = file_logits(path, TEXTS)
    gate.write(QuantPlan(FLOAT32, ((worst.name, INT8),)), path)
    got = file_logits(path, TEXTS)
    assert worst.squared_change == pytest.approx(float(((got - exact) ** 2).mean()))
    assert worst.decided_otherwise == pytest.approx(100 * float((got.argmax(1) != exact.argmax(1)).mean()), abs=1e-3)
    assert not (tmp_path / "probe.onnx").exists()


def test_damage_is_the_mean_over_outputs_and_decisions(tmp_path):
    """Of two outputs one has a value per token: it counts as much as the other. Without decisions none falls otherwise."""
    exact = [{"logits": np.zeros(2), "slot_logits": np.zeros((n, 3))} for n in (1, 5)]
    changed = [{"logits": np.array([0.0, 2.0]), "slot_logits": np.full((n, 3), 1.0)} for n in (1, 5)]

    def write(plan: QuantPlan, path: Path) -> None:
        path.write_text(plan.precision("a"))

    def outputs(path: Path) -> list[dict[str, np.ndarray]]:
        return exact if path.read_text() == FLOAT32 else changed

    def classes(result: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.array([result["logits"].argmax(), *result["slot_logits"].argmax(axis=1)])

    (damage,) = rank(write, tmp_path / "probe", QuantPlan(INT8), {"a": 1}, outputs, classes)
    assert (damage.squared_change, damage.decided_otherwise) == (1.5, 25.0)
    (damage,) = rank(write, tmp_path / "probe", QuantPlan(INT8), {"a": 1}, outputs, lambda result: np.zeros(0, int))
    assert (damage.squared_change, damage.decided_otherwise) == (1.5, 0.0)

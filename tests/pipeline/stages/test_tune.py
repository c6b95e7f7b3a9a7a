"""Options of the runtimes: measured in turns, refused where answers change, kept by default, and carried into the bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from device_bench.targets import LocalTarget
from pipeline.flow.cache import Artifact, Cache
from pipeline.flow.engine import run
from pipeline.flow.progress import Progress
from pipeline.flow.recipe import load_recipe
from pipeline.flow.stage import Context, Stage
from pipeline.reports.run_report import write_report
from pipeline.stages import tune
from pipeline.stages.file_evaluation import evaluate_file, file_outputs
from pipeline.stages.tune import FILE, Trial, Tune, check_outputs, choose, option_sets
from pipeline.tasks import load_data
from runtimes.errors import IntegrityError
from runtimes.predictor import Predictor
from runtimes.session import SessionOptions
from runtimes.text import Encoding
from runtimes.verify import verify

QUICK = {"texts": 3, "rounds": 2, "min_seconds": 0.005}
INPUTS = [Encoding([2, 5 + i, 3], [0, 0, 0]) for i in range(20)]


def decide(outputs) -> np.ndarray:
    return np.array([outputs["logits"].argmax()])


def trial(name: str, *round_p50_ms: float, threads: int = 1, refused: str | None = None) -> Trial:
    measurement = {"p50_ms": sum(round_p50_ms) / len(round_p50_ms), "round_p50_ms": list(round_p50_ms)} if round_p50_ms else None
    return Trial(name, SessionOptions(threads=threads), refused, 0.0, 0, measurement)


QUIET = [trial("default", 1.0, 1.0, 1.0), trial("default again", 1.0, 1.01, 1.0)]
NOISY = [trial("default", 1.0, 1.0, 1.0), trial("default again", 1.1, 1.1, 1.0)]


@pytest.mark.parametrize(
    ("trials", "name"),
    [
        ([*QUIET, trial("bit faster", 0.97, 0.97, 0.97)], "default"),
        ([*QUIET, trial("faster", 0.9, 0.9, 0.9)], "faster"),
        ([*QUIET, trial("faster", 0.9, 0.9, 0.9), trial("fastest", 0.8, 0.8, 0.8)], "fastest"),
        ([*QUIET, trial("faster but for a round", 0.8, 0.8, 1.001)], "default"),
        ([*NOISY, trial("within twice the noise", 0.9, 0.9, 0.9)], "default"),
        ([*NOISY, trial("beyond it", 0.8, 0.8, 0.8)], "beyond it"),
        ([*QUIET, trial("refused", refused="other answers")], "default"),
        ([*QUIET, trial("2 threads", 0.8, 0.8, 0.8, threads=2)], "default"),
        ([*QUIET, trial("2 threads", 0.7, 0.7, 0.7, threads=2)], "2 threads"),
        ([*QUIET, trial("faster", 0.8, 0.8, 0.8), trial("2 threads", 0.7, 0.7, 0.7, threads=2)], "faster"),
        ([*QUIET, trial("faster", 0.8, 0.8, 0.8), trial("2 threads", 0.6, 0.6, 0.6, threads=2)], "2 threads"),
    ],
)
def test_what_is_chosen(trials, name):
    chosen, why = choose(trials, margin=0.05, thread_speedup=1.3)
    assert chosen.name == name
    assert "1.000" in why, "the default's figure is told"
    assert "the default stays" in why if name == "default" else repr(name) in why


def test_every_set_of_a_file_is_measured_in_fresh_processes(tiny_run):
    path = tiny_run / "bundle" / "tflite" / "model_fp32.tflite"
    trials = Tune(**QUICK).measure_file("tflite/model_fp32.tflite", path, INPUTS, decide, 2, LocalTarget())
    assert [t.name for t in trials] == ["default", "default again", "packed weights for each signature", "2 threads"]
    for t in trials:
        assert t.refused is None and t.worst_difference <= 1e-5 and t.changed_answers == 0
        assert len(t.round_p50_ms) == 2 and t.p50_ms > 0
        assert t.measurement["threads"] == t.session.threads
        assert t.measurement["memory"] is None


def test_the_default_is_first_and_one_core_asks_for_no_threads():
    for file_format in ("onnx", "tflite"):
        sets = option_sets(file_format, 1)
        assert [t.session for t in sets[:2]] == [SessionOptions()] * 2
        assert {t.session.threads for t in sets} == {1}
        assert {t.session.threads for t in option_sets(file_format, 4)} == {1, 4}


def test_options_that_change_outputs_beyond_the_golden_tolerance_are_refused(tiny_run):
    """The int8 file stands in for options that break the fp32 one: its outputs are a little off, its answers are not."""
    folder = tiny_run / "bundle" / "onnx"
    expected = file_outputs(folder / "model.onnx", INPUTS, SessionOptions())
    one = Trial("broken", SessionOptions(graph_optimization_level="basic"))
    assert check_outputs("onnx/model.onnx", folder / "model_quantized.onnx", INPUTS, expected, one, decide) is None
    assert "an output differs from the default's by" in one.refused
    other = Trial("fine", SessionOptions(graph_optimization_level="basic"))
    assert check_outputs("onnx/model.onnx", folder / "model.onnx", INPUTS, expected, other, decide) is not None
    assert other.refused is None and other.changed_answers == 0


def test_options_under_which_a_file_does_not_load_are_refused_but_not_the_default(tmp_path):
    path = tmp_path / "damaged.onnx"
    path.write_bytes(b"nonsense")
    one = Trial("other", SessionOptions(graph_optimization_level="basic"))
    assert check_outputs("onnx/model.onnx", path, INPUTS, [], one, decide) is None
    assert "is damaged or cut off" in one.refused
    with pytest.raises(IntegrityError, match="is damaged or cut off"):
        check_outputs("onnx/model.onnx", path, INPUTS, [], Trial("default", SessionOptions()), decide)


@pytest.fixture
def context(tiny_run, tiny_recipe, tiny_model, tiny_data, tmp_path) -> Context:
    """Of a run that exported one ONNX file."""
    folder = tmp_path / "exported"
    (folder / "onnx").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    shutil.copyfile(tiny_run / "bundle" / "onnx" / "model.onnx", folder / "onnx" / "model.onnx")
    shutil.copyfile(tiny_run / "bundle" / "tokenizer.json", folder / "tokenizer" / "tokenizer.json")
    recipe = load_recipe(str(tiny_recipe), model=str(tiny_model), data=str(tiny_data))
    output = tmp_path / "output"
    output.mkdir()
    model = max((tiny_run.parent / "cache" / "stages").glob("*/model"), key=lambda path: path.stat().st_mtime_ns)  # the last one made
    return Context(
        recipe.name, recipe.seed, recipe.task, load_data(recipe.task, None), recipe.model.source, "",
        {"exported": Artifact(folder, ""), "model": Artifact(model, "")}, output, tmp_path, Progress(quiet=True), [], Cache(tmp_path / "cache"),
    )  # fmt: skip


def test_the_stage_writes_what_it_chose_and_every_figure(context, monkeypatch):
    monkeypatch.setattr(tune, "all_threads", lambda: 1)
    Tune(**QUICK).run(context)
    content = json.loads((context.output / "tuned" / FILE).read_text())
    assert list(content["files"]) == ["onnx/model.onnx"]
    found = content["files"]["onnx/model.onnx"]
    assert [t["name"] for t in found["trials"]][:2] == ["default", "default again"]
    assert all(len(t["measurement"]["round_p50_ms"]) == 2 for t in found["trials"])
    chosen = next(t for t in found["trials"] if t["name"] == found["chosen"])
    assert found["session"] == chosen["session"]
    assert context.notes[0] == f"onnx/model.onnx: {found['why']}"
    assert content["settings"]["margin"] == 0.05


def test_metrics_under_options_are_those_of_the_file(context, tiny_run):
    folder = context.folder("exported")
    ledger = json.loads((tiny_run / "ledger.json").read_text())
    known = next(s["metrics"] for r in ledger["stages"] for s in r["subjects"] if s["file"] == "onnx/model.onnx")
    assert evaluate_file(context, folder / "onnx" / "model.onnx", folder, SessionOptions(graph_optimization_level="basic")) == known


@pytest.mark.parametrize(("validation", "kept"), [(50.0, "default"), (60.0, "other"), (70.0, "other")])
def test_a_set_that_loses_validation_accuracy_is_not_kept(context, monkeypatch, validation, kept):
    """Timing and accuracy are given here: what is tested is what follows from them."""
    trials = [*QUIET, trial("other", 0.5, 0.5, 0.5)]
    for one in trials:
        one.measurement |= dict.fromkeys(("runtime", "count", "p90_ms", "mean_ms", "load_ms", "conditions"))
    trials[2].session, trials[2].worst_difference = SessionOptions(graph_optimization_level="basic"), 0.01
    monkeypatch.setattr(Tune, "measure_file", lambda *arguments: trials)
    scores = {"all": (60.0, 61.0), "basic": (validation, 59.0)}
    scores = {name: {"validation": {"accuracy": v}, "test": {"accuracy": t}} for name, (v, t) in scores.items()}
    monkeypatch.setattr(tune, "evaluate_file", lambda context, path, folder, session: scores[session.graph_optimization_level])
    Tune().run(context)
    found = json.loads((context.output / "tuned" / FILE).read_text())["files"]["onnx/model.onnx"]
    assert found["chosen"] == kept
    assert found["metrics"] == (scores["basic"] if kept == "other" else None)
    assert ("takes accuracy on validation from 60 to 50 %" in found["why"]) == (kept == "default")


CHOSEN = {
    "onnx/model.onnx": SessionOptions(threads=2, graph_optimization_level="basic", memory_arena=False),
    "tflite/model_int8.tflite": SessionOptions(weight_cache="none"),
}


METRICS = {"validation": {"accuracy": 1.0}, "test": {"accuracy": 2.0}}


class FixedTune(Stage):
    """In place of ``tune``: a choice that does not hang on the noise of a machine."""

    use: ClassVar[str] = "tune"
    needs: ClassVar[tuple[str, ...]] = ("exported",)
    gives: ClassVar[tuple[str, ...]] = ("tuned",)

    def run(self, context: Context) -> None:
        (context.output / "tuned").mkdir()
        files = {f: {"session": s.as_manifest(Path(f).suffix[1:]), "metrics": METRICS} for f, s in CHOSEN.items()}
        (context.output / "tuned" / FILE).write_text(json.dumps({"files": files}))


def test_the_bundle_carries_the_choice_and_everything_runs_by_it(tiny_run, tiny_recipe, tiny_model, tiny_data, tmp_path):
    shutil.copytree(tiny_run.parent / "cache", tmp_path / "cache")
    recipe = load_recipe(str(tiny_recipe), model=str(tiny_model), data=str(tiny_data))
    recipe.stages.insert([stage.use for stage in recipe.stages].index("bench"), FixedTune())
    ledger = run(recipe, tmp_path / "out", Cache(tmp_path / "cache"), Progress(quiet=True), write_report)
    assert [r["stage"] for r in ledger.records if not r["cached"]] == ["tune", "bench", "pack"]
    bundle = tmp_path / "out" / "bundle"
    models = {entry["file"]: entry for entry in json.loads((bundle / "bundle.json").read_text())["models"]}
    assert len(models) == 4
    for file, entry in models.items():
        assert entry["session"] == CHOSEN.get(file, SessionOptions()).as_manifest(entry["format"])
        assert (entry["metrics"] == METRICS) == (file in CHOSEN)
    verify(bundle)
    predictor = Predictor(bundle, "onnx/model.onnx")
    assert predictor.entry.session == CHOSEN["onnx/model.onnx"]
    assert predictor.model._session.get_session_options().intra_op_num_threads == 2

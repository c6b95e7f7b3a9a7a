"""Bundles of every task answer and verify by ONNX Runtime and LiteRT; a manifest or a golden case of another shape is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtimes.bundle import MANIFEST, open_bundle, write_sums
from runtimes.errors import BadInput, IntegrityError
from runtimes.predictor import Predictor
from runtimes.verify import verify
from tests.runtimes.tiny_bundles import FILES, LONG, TASKS, write_bundle


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer_file, pieces):
    found: dict[str, Path] = {}

    def make(task: str) -> Path:
        if task not in found:
            found[task] = write_bundle(tmp_path_factory.mktemp(task), task, tokenizer_file, len(pieces))
        return found[task]

    return make


@pytest.fixture
def bundle(made, tmp_path, request) -> Path:
    """A copy that a test may damage: of intents and slots, or of the task that it is parametrized with."""
    return shutil.copytree(made(getattr(request, "param", "intent-and-slots")), tmp_path / "bundle")


def rewrite(path: Path, change) -> None:
    """Change the manifest, or the first golden case, and make the checksums match again."""
    first, *others = path.read_text().split("\n", 1)
    document = json.loads(first)
    change(document)
    path.write_text("\n".join([json.dumps(document), *others]))
    write_sums(path.parent if path.name == MANIFEST else path.parent.parent)


@pytest.mark.parametrize("task", TASKS)
def test_a_bundle_of_each_task_verifies_on_both_runtimes(made, task):
    _, checks = verify(made(task))
    assert [(check.file, check.cases) for check in checks] == [(file, len(TASKS[task]["examples"])) for file in FILES]
    assert all(check.runtime and check.worst <= check.tolerance for check in checks)


@pytest.mark.parametrize("task", TASKS)
def test_both_runtimes_answer_alike_however_the_example_is_given(made, task):
    predictors = [Predictor(made(task), file) for file in FILES]
    for example in TASKS[task]["examples"]:
        texts = tuple(example.values())
        forms = [example, texts, *(texts if len(texts) == 1 else ())]
        answers = [predictor.predict(form) for predictor in predictors for form in forms]
        assert all(one.example == example for one in answers)
        assert len({predictors[0].decoder.line(one.answer).replace("-0.0000", "0.0000") for one in answers}) == 1
        assert json.loads(json.dumps(answers[0].answer)) == answers[0].answer


def test_labels_keep_the_signs_that_end_lines_elsewhere(made):
    assert open_bundle(made("text-classification")).labels == {"logits": ("on\x85", "off", "music")}


def test_a_text_that_is_cut_is_told_and_a_context_in_windows_is_not_cut(made):
    tagger, reader = Predictor(made("token-classification")), Predictor(made("question-answering"))
    assert tagger.predict(LONG).truncated and not tagger.predict("anna").truncated
    assert not reader.predict(("who lives in?", LONG)).truncated


def test_what_cannot_be_answered_is_bad_input_and_the_next_example_works(made):
    predictor = Predictor(made("text-classification"))
    for given, says in (("a\ud800", "half of a surrogate pair"), (("a", "b"), "2 texts given"), (None, "is no example"), ([3], "is not a text")):
        with pytest.raises(BadInput, match=says):
            predictor.predict(given)
    assert predictor.predict("anna").answer["labels"]
    with pytest.raises(BadInput, match="the question has 40 tokens"):
        Predictor(made("question-answering")).predict(("who " * 40, LONG))


def test_half_a_surrogate_pair_does_not_end_the_process(made):
    code = """if True:
        import sys
        from pathlib import Path
        from runtimes.errors import BadInput
        from runtimes.predictor import Predictor
        predictor = Predictor(Path(sys.argv[1]))
        try:
            predictor.predict(chr(0xD800))
        except BadInput:
            print(predictor.predict("anna").answer.keys() >= {"label"})
    """
    done = subprocess.run([sys.executable, "-c", code, str(made("text-classification"))], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


WRONG_MANIFESTS = {
    "schema": [("2", "schema: '2' is not a whole number"), (1, "schema 1; this version reads schema 2"), (3, "schema 3")],
    "task": [(None, "task: None is not a table"), ("text-classification", "task: 'text-classification' is not a table")],
    "task.kind": [(3, "task: kind: 3 is not a text")],
    "tokenizer": [([], r"tokenizer: \[\] is not a table")],
    "tokenizer.file": [(None, "tokenizer: file: None is not a text"), ("../x", "would leave the bundle"), ("x", "x: listed in .* but missing")],
    "tokenizer.max_length": [("16", "tokenizer: max_length: '16'"), (0, "max_length: 0"), (True, "max_length: True"), (1.5, "max_length: 1.5")],
    "labels": [("labels.txt", "labels: 'labels.txt' is not a table"), ({"logits": ["a"]}, r"labels: logits: \['a'\] is not a text")],
    "labels.logits": [("/etc/passwd", "would leave the bundle"), ("none.txt", "none.txt: listed in bundle.json but missing")],
    "models": [({}, "models: {} is not a list of tables"), ([3], r"models\[1\]: 3 is not a table")],
    "models.0.file": [(3, r"models\[1\]: file: 3 is not a text")],
    "models.0.format": [(None, r"models\[1\]: format: None")],
    "models.0.precision": [(32, r"models\[1\]: precision: 32")],
    "models.0.buckets": [("8", r"models\[1\]: buckets: '8'"), (["8"], r"models\[1\]: buckets"), ([True], "buckets")],
    "models.0.tolerance": [("0.1", r"models\[1\]: tolerance: '0.1'"), (None, "tolerance: None"), (float("nan"), "nan is not a finite number")],
    "models.0.metrics": [([], r"models\[1\]: metrics: \[\] is not a table")],
    "models.0.session": [(3, "onnx/model.onnx: session: 3 is not a table")],
    "models.0.refused_by": [("tflite-runtime", r"models\[1\]: refused_by: 'tflite-runtime' is not a list of texts"), ([1], "refused_by")],
    "golden": [(None, "golden: None is not a table")],
    "golden.file": [(1, "golden: file: 1 is not a text"), ("../cases", "would leave the bundle")],
}


def put(document, place: str, *value) -> None:
    *path, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    for key in path:
        document = document[key]
    if value:
        document[last] = value[0]
    else:
        del document[last]


@pytest.mark.parametrize(("place", "value", "says"), [(place, *one) for place, cases in WRONG_MANIFESTS.items() for one in cases])
def test_a_manifest_of_another_shape_is_an_integrity_error_with_its_place(bundle, place, value, says):
    rewrite(bundle / MANIFEST, lambda manifest: put(manifest, place, value))
    with pytest.raises(IntegrityError, match=says):
        open_bundle(bundle)


@pytest.mark.parametrize("place", [place for place in WRONG_MANIFESTS if place.rpartition(".")[2] not in ("session", "refused_by", "logits")])
def test_a_missing_key_is_an_integrity_error_with_its_place(bundle, place):
    rewrite(bundle / MANIFEST, lambda manifest: put(manifest, place))
    with pytest.raises(IntegrityError, match=rf"bundle\.json: .*{place.rpartition('.')[2]} is missing"):
        open_bundle(bundle)


def test_nesting_without_end_is_an_integrity_error(bundle):
    (bundle / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(IntegrityError, match=r"bundle\.json: not JSON"):
        open_bundle(bundle)


def test_options_that_the_decoder_does_not_take_name_the_manifest(bundle):
    rewrite(bundle / MANIFEST, lambda manifest: manifest["task"].update(threshold="high"))
    for use in (verify, Predictor):
        with pytest.raises(IntegrityError, match=r"bundle\.json: task: threshold: 'high' is not a finite number"):
            use(bundle)
    rewrite(bundle / MANIFEST, lambda manifest: manifest["task"].update(kind="poetry"))
    with pytest.raises(BadInput, match="task kind 'poetry': no decoder for it is installed"):
        verify(bundle)


def test_labels_of_another_number_are_found(bundle):
    (bundle / "slot_logits.txt").write_text("O\nB-PER\n")
    write_sums(bundle)
    with pytest.raises(IntegrityError, match=r"onnx/model\.onnx: golden case 1: slot_logits: the file gives 5 classes, the bundle names 2"):
        verify(bundle)
    with pytest.raises(IntegrityError, match=r"model\.onnx: slot_logits: the file gives 5 classes"):
        Predictor(bundle, "onnx/model.onnx").predict("anna")


WRONG_CASES = {
    "example": (None, "example: None is not a table"),
    "example.text": (3, "example: text: 3 is not a text"),
    "inputs": ({}, "inputs: {} is not a list of tables"),
    "inputs.0.ids": ("1 2", r"inputs\[1\]: ids: '1 2' is not a list of whole numbers"),
    "inputs.0.types": ([0], r"inputs\[1\]: \d+ ids with 1 types"),
    "outputs": ([], r"outputs: \[\] is not a table"),
    "outputs.onnx/model*onnx": ([], r"outputs: onnx/model.onnx: 0 outputs for 1 inputs"),
    "answer": ("go", "answer: 'go' is not a table"),
    "answer.onnx/model*onnx": (None, "answer: onnx/model.onnx: None is not a table"),
}


@pytest.mark.parametrize("place", WRONG_CASES)
def test_a_golden_case_of_another_shape_is_an_integrity_error_with_its_line(bundle, place):
    value, says = WRONG_CASES[place]
    path = bundle / "golden" / "cases.jsonl"
    whole = json.loads(path.read_text().split("\n", 1)[0])

    def change(case, *value) -> None:
        table, _, key = place.partition(".")
        if not key:
            put(case, table, *value)
        elif table == "inputs":
            put(case, place, *value)
        else:
            case[table].pop(key.replace("*", "."))
            case[table] |= {key.replace("*", "."): one for one in value}

    rewrite(path, lambda case: change(case, value))
    with pytest.raises(IntegrityError, match=rf"cases\.jsonl:1: {says}"):
        verify(bundle)
    rewrite(path, lambda case: (case.clear(), case.update(whole), change(case)))
    with pytest.raises(IntegrityError, match=r"cases\.jsonl:1: .* is missing" if place != "example.text" else "golden case 1: text missing"):
        verify(bundle)


def test_a_golden_line_that_is_no_json_is_named(bundle):
    path = bundle / "golden" / "cases.jsonl"
    path.write_text(path.read_text() + "{\n")
    write_sums(bundle)
    with pytest.raises(IntegrityError, match=r"cases\.jsonl:5: not JSON"):
        verify(bundle)


def damaged(case, file: str, name: str, value) -> None:
    case["outputs"][file][0][name] = value


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda case: case["inputs"][0]["ids"].__setitem__(0, 4), r"golden case 1: the tokenizer gives ids \[2, .*expected \[4, "),
        (lambda case: case["inputs"][0]["types"].__setitem__(0, 1), "golden case 1: the tokenizer gives types"),
        (lambda case: case["example"].update(text="berlin"), "golden case 1: the tokenizer gives ids"),
        (lambda case: case["example"].update(text="\ud800"), "golden case 1: .*half of a surrogate pair"),
        (lambda case: case["answer"][FILES[0]].update(label="elsewhere"), r"onnx/model\.onnx: golden case 1: its outputs are decoded as .*elsewhere"),
        (lambda case: case["answer"][FILES[1]].update(probability=0.123), r"tflite/model_fp32\.tflite: golden case 1: its outputs are decoded as"),
        (lambda case: case["answer"][FILES[0]].pop("spans"), "its outputs are decoded as"),
        (lambda case: damaged(case, FILES[0], "logits", [[1], [2, 3]]), "golden case 1: outputs that are no arrays of numbers"),
        (lambda case: damaged(case, FILES[0], "logits", "x"), "outputs that are no arrays of numbers"),
        (lambda case: damaged(case, FILES[0], "extra", [1.0]), r"the file gives logits, slot_logits on onnxruntime.*, expected extra, logits, slot"),
        (lambda case: case["outputs"][FILES[0]][0].pop("logits"), "golden case 1: no output logits or probabilities; the file gives slot_logits"),
        (lambda case: case["outputs"][FILES[0]][0]["slot_logits"].pop(), "the file gives tags for"),
    ],
)
def test_damage_of_a_golden_case_is_found_and_named(bundle, change, says):
    rewrite(bundle / "golden" / "cases.jsonl", change)
    with pytest.raises(IntegrityError, match=says):
        verify(bundle)


@pytest.mark.parametrize("bundle", ["text-regression", "question-answering", "sentence-embedding", "token-classification"], indirect=True)
def test_every_output_is_held_against_its_tolerance(bundle):
    """Also the one of the last token of the last input."""

    def nudge(case) -> None:
        for outputs in case["outputs"].values():
            place = outputs[-1][max(outputs[-1])]
            while isinstance(place[-1], list):
                place = place[-1]
            place[-1] += 2e-3

    rewrite(bundle / "golden" / "cases.jsonl", nudge)
    with pytest.raises(IntegrityError, match=r"onnx/model\.onnx: golden case 1 differs by 0\.002 in \w+ on onnxruntime.*, at most 0\.001 is allowed"):
        verify(bundle)
    rewrite(bundle / MANIFEST, lambda manifest: [entry.update(tolerance=3e-3) for entry in manifest["models"]])
    _, checks = verify(bundle)
    assert all(1e-3 < check.worst <= 3e-3 for check in checks)


PLUG_IN = """
import numpy as np
from runtimes.decode.base import Decoder

class Fine(Decoder):
    kind = "fine-number"
    def answer(self, example, encodings, outputs):
        return {}
    def line(self, answer):
        return ""
    def decisions(self, outputs):
        return np.array([int(outputs["logits"][0] * 1e5)])
    def margins(self, outputs):
        return np.array([self.options.number("margin")])
"""


def test_decisions_must_agree_where_their_margin_says_so(bundle, tmp_path, monkeypatch):
    """The decoders here cannot differ while outputs agree; one of a plug-in, with margins of its own, can."""
    (tmp_path / "fine_plug_in.py").write_text(PLUG_IN)
    (tmp_path / "fine_plug_in-1.0.dist-info").mkdir()
    (tmp_path / "fine_plug_in-1.0.dist-info" / "entry_points.txt").write_text("[pocketbert.decoders]\nfine-number = fine_plug_in:Fine\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def nudge(case) -> None:
        for file in FILES:
            case["outputs"][file][0]["logits"][0] += 5e-4
            case["answer"][file] = {}

    path = bundle / "golden" / "cases.jsonl"
    path.write_text(path.read_text().split("\n", 1)[0])
    rewrite(path, nudge)
    rewrite(bundle / MANIFEST, lambda manifest: [manifest["task"].update(kind="fine-number", margin=1e-3), manifest["golden"].update(count=1)])
    verify(bundle)
    rewrite(bundle / MANIFEST, lambda manifest: manifest["task"].update(margin=1.0))
    with pytest.raises(IntegrityError, match=r"onnx/model\.onnx: golden case 1 has another answer on onnxruntime"):
        verify(bundle)


def test_an_input_too_many_is_found(made, tmp_path):
    bundle = shutil.copytree(made("question-answering"), tmp_path / "bundle")

    def add(case) -> None:
        case["inputs"].append(case["inputs"][0])
        for outputs in case["outputs"].values():
            outputs.append(outputs[0])

    rewrite(bundle / "golden" / "cases.jsonl", add)
    with pytest.raises(IntegrityError, match=r"golden case 1: the tokenizer makes \d+ inputs, expected \d+"):
        verify(bundle)

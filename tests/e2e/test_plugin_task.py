"""A task that pocketbert does not know: two classes of a plug-in go through every kind of stage, to an answer from the bundle."""

from __future__ import annotations

import json
import sys
from importlib.metadata import entry_points

import pytest

from pipeline.flow.cache import Cache
from pipeline.flow.engine import run
from pipeline.flow.progress import Progress
from pipeline.flow.recipe import load_recipe
from pipeline.reports.run_report import write_report
from runtimes.predictor import Predictor
from runtimes.verify import verify
from tests.conftest import ROWS

TASK = '''
"""How urgent a text is, from 0 to 1, judged by the mean error: less is better."""

import numpy as np
from typing import ClassVar

from pipeline.tasks.base import Data, Metric, Task
from pipeline.tasks.batches import encode
from pipeline.tasks.files import fingerprint, read_splits, text_of
from pipeline.tasks.heads import head_shape


class Urgency(Task):
    kind: ClassVar[str] = "urgency"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("error", "mean error", "", False),)

    def read(self, folder):
        rows, notes = read_splits(folder, lambda r, place: {"text": text_of(r, "text", place), "urgency": float(r["urgency"])})
        return Data(rows["train"], rows["validation"], rows["test"], {}, fingerprint(rows.values()), tuple(notes))

    def heads(self, data):
        return [head_shape("urgency", ["urgency"], "first", 1, pooler=True)]

    def encode(self, tokenizer, rows, data, pad_id):
        from dataclasses import replace

        made = encode(tokenizer, [row["text"] for row in rows], self.max_length, pad_id)
        return replace(made, targets={"urgency": np.array([row.get("urgency", np.nan) for row in rows], np.float32)})

    def loss(self, outputs, batch):
        return (outputs["urgency"][:, 0].float() - batch.targets["urgency"]).square().mean()

    def soft_loss(self, outputs, teacher, batch, temperature):
        return (outputs["urgency"].float() - teacher["urgency"].float()).square().mean()

    def evaluate(self, outputs, texts, rows, data):
        wanted = np.array([rows[i]["urgency"] for i in texts.rows])
        return {"error": float(np.abs(np.asarray(outputs["urgency"])[:, 0] - wanted).mean())}

    def unlabeled_row(self, line):
        return {"text": line}
'''
DECODER = '''
"""What an app shows of an urgency."""

from runtimes.decode.base import Decoder


class UrgencyDecoder(Decoder):
    kind = "urgency"

    def answer(self, example, encodings, outputs):
        return {"urgent": bool(outputs[0]["urgency"][0] > 0.5), "urgency": float(outputs[0]["urgency"][0])}

    def line(self, answer):
        return "urgent" if answer["urgent"] else "later"
'''
STAGES = """
[[stage]]
use = "finetune"
epochs = 20
batch_size = 8
learning_rate = 3e-3
[[stage]]
use = "prune-vocab"
[[stage]]
use = "prune-heads"
fraction = 0.25
heal = { epochs = 2, batch_size = 8 }
[[stage]]
use = "layerdrop"
layers = 1
drop_epochs = 0
heal = { epochs = 4, batch_size = 8 }
[[stage]]
use = "factorize-embeddings"
rank = 8
heal = { epochs = 1, batch_size = 8 }
[[stage]]
use = "export"
buckets = [8]
[[stage]]
use = "quantize"
metric_drop = 1.0
[[stage]]
use = "tune"
texts = 3
rounds = 2
min_seconds = 0.005
[[stage]]
use = "bench"
texts = 5
rounds = 1
min_seconds = 0.01
lengths = [8]
[[stage]]
use = "pack"
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Two modules and the entry points that an installed package has."""
    place = tmp_path / "site"
    info = place / "urgency-1.0.dist-info"
    info.mkdir(parents=True)
    (place / "urgency_task.py").write_text(TASK)
    (place / "urgency_decoder.py").write_text(DECODER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: urgency\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[pocketbert.tasks]\nurgency = urgency_task:Urgency\n[pocketbert.decoders]\nurgency = urgency_decoder:UrgencyDecoder\n"
    )
    monkeypatch.syspath_prepend(str(place))
    assert [point.name for point in entry_points(group="pocketbert.tasks")] == ["urgency"]
    yield
    for name in ("urgency_task", "urgency_decoder"):
        sys.modules.pop(name, None)


def test_a_task_of_a_plugin_goes_through_all_stages(plugin, tiny_model, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split, copies in (("train", 8), ("validation", 1), ("test", 1)):
        rows = [{"text": text, "urgency": float(label == "off")} for _ in range(copies) for label, texts in ROWS.items() for text in texts]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "urgency.toml"
    head = '[model]\nsource = "unset"\n[task]\nkind = "urgency"\ndata = "unset"\nmax_length = 16\n[budget]\nmetric_drop = 0.5\n'
    recipe.write_text(head + STAGES)
    loaded = load_recipe(str(recipe), (), str(tiny_model), str(data))
    out = tmp_path / "out"
    ledger = run(loaded, out, Cache(tmp_path / "cache"), Progress(quiet=True), write_report)
    assert ledger.outcome == "published" and ledger.floor is None
    written = [one["file"] for record in ledger.records for one in record["subjects"] if one["file"]]
    assert [(gate["gate"], gate["file"]) for gate in ledger.gates] == [("metric_drop", file) for file in written]
    assert len(written) == 4
    teacher = ledger.records[0]["subjects"][0]
    assert teacher["metrics"]["validation"]["error"] < 0.45, "it learned: guessing the mean gives 0.44"
    assert "mean error" in (out / "report.html").read_text()
    files, checks = verify(out / "bundle")
    assert files and all(check.worst is not None for check in checks)
    predictor = Predictor(out / "bundle")
    assert set(predictor.predict("turn off the light").answer) == {"urgent", "urgency"}
    manifest = json.loads((out / "bundle" / "bundle.json").read_text())
    assert manifest["task"]["kind"] == "urgency"
    assert {item["name"] for model in manifest["models"] for item in model["outputs"]} == {"urgency"}

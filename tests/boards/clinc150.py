"""A bundle that classifies real CLINC150 texts, made in a minute: MiniLM as it is, and a classifier fitted by least squares.

Thirty of the intents, which such a classifier tells apart (96 %). Training would do for all of them, and take half an hour;
what the boards have to prove is that they give the same answers.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from device_bench import board_cache

ROOT = Path(__file__).parents[2]
SOURCE = "sentence-transformers/all-MiniLM-L6-v2"
MAX_LENGTH = 32
BUCKETS = [8, 16, 32]
INTENTS = 30
PIECES = 6000
RIDGE = 0.03
FILES = {
    "onnx/model.onnx": "fp32", "onnx/model_quantized.onnx": "int8", "tflite/model_fp32.tflite": "fp32", "tflite/model_int8.tflite": "int8",
}  # fmt: skip


def find_task():
    from pipeline.tasks.text_classification import TextClassification

    return TextClassification(data="clinc150", max_length=MAX_LENGTH)


def find_data():
    """The rows of some of CLINC150's intents.

    Raises:
        BadInput: they are not on this machine.
    """
    from pipeline.tasks import load_data

    data = load_data(find_task(), None)
    labels = data.labels["logits"][:: len(data.labels["logits"]) // INTENTS][:INTENTS]
    splits = {name: [row for row in data.split(name) if row["label"] in labels] for name in ("train", "validation", "test")}
    return replace(data, **splits, labels={"logits": labels})


def build_bundle(say) -> Path:
    """Folder of the bundle, made once for each state of the code that writes it."""
    from pipeline.flow.cache import digest, library_versions, tree_sha256
    from runtimes.bundle import file_sha256

    code = [tree_sha256(ROOT / "exporters"), tree_sha256(ROOT / "runtimes"), file_sha256(Path(__file__))]
    recipe = {"code": digest(code), "libraries": library_versions(), "data": find_data().fingerprint}

    def build(folder: Path) -> None:
        say("fitting a classifier to CLINC150 texts")
        _write(folder)

    return board_cache.build_once(board_cache.place("clinc150", recipe), build)


def _write(folder: Path) -> None:
    from exporters.bundle import BundleParts, ModelFile, write_bundle
    from exporters.folding import fold
    from exporters.onnx_writer import write_onnx
    from exporters.quant_plan import FLOAT32, INT8, QuantPlan
    from exporters.tflite_writer import write_tflite
    from pipeline.methods.prune.vocab import kept_tokens, prune
    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.encoder import count_unique_parameters
    from pipeline.models.hub import hub_config
    from pipeline.models.source import find_source
    from pipeline.models.tokenizer_files import copy_tokenizer
    from runtimes.decode import decoder

    task, data = find_task(), find_data()
    checkpoint = Checkpoint.load(find_source(SOURCE), task.heads(data), data.labels["logits"])
    texts = task.encode(checkpoint.tokenizer, data.train, data, checkpoint.model.config.pad_token_id)
    checkpoint = prune(checkpoint, kept_tokens(checkpoint, texts.ids, 1, PIECES))
    fit_classifier(checkpoint, task, data)
    work = folder / "work"
    checkpoint.save(work / "model", MAX_LENGTH)
    copy_tokenizer(work / "model", work / "tokenizer")
    folded = fold(checkpoint.model, MAX_LENGTH, segments=1)
    models = []
    for name, precision in FILES.items():
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        plan = QuantPlan(INT8 if precision == "int8" else FLOAT32)
        if path.suffix == ".onnx":
            write_onnx(folded, path, plan)
        else:
            write_tflite(folded, path, BUCKETS, plan)
        models.append(ModelFile(name, path, precision, count_unique_parameters(checkpoint.model), {}))
    (folder / "bundle").mkdir()
    options = task.options(data)
    write_bundle(folder / "bundle", BundleParts(
        name="boards", version=version("pocketbert"), task=options, models=models, labels=data.labels,
        decoder=decoder(task.kind)(options, data.labels), tokenizer_folder=work / "tokenizer",
        pad_id=checkpoint.model.config.pad_token_id, max_length=MAX_LENGTH,
        hub_config=hub_config(checkpoint.model.config) | task.hub_fields(data), recipe_lock="",
        examples=[task.example(row) for row in data.validation], provenance={},
    ))  # fmt: skip


def fit_classifier(checkpoint, task, data) -> None:
    """Least squares with a ridge, from what the classifier reads to 1 for the right class and 0 for the others."""
    import torch

    from pipeline.tasks.batches import in_order

    model, read = checkpoint.model, []
    classifier = model.heads["classifier"]
    handle = classifier.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].double()))
    texts = task.encode(checkpoint.tokenizer, data.train, data, model.config.pad_token_id)
    labels = []
    with torch.no_grad():
        for batch in in_order(texts, 64):
            model.outputs(batch)
            labels.append(batch.targets["labels"])
    handle.remove()
    x, y = torch.cat(read), torch.nn.functional.one_hot(torch.cat(labels).long(), len(data.labels["logits"])).double()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    ridge = RIDGE * x.square().sum(dim=0).mean() * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
    size = np.sqrt(10.0) / (x @ weight).std()  # logits of the usual size
    classifier.weight.data = (weight * size).T.float().contiguous()
    classifier.bias.data = ((y_mean - x_mean @ weight) * size).float()

"""What a model file is worth: run on the task's rows in its own runtime, input by input, as an app would.

What this file does not do: time anything (``bench``, ``tune``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from pipeline.flow.stage import Context
from pipeline.learning.evaluation import REPORTED
from pipeline.models.inference import EVALUATION_BATCH, predict
from pipeline.tasks.base import AGREEMENT, DIVERGENCE, Data, Task, better
from pipeline.tasks.batches import EncodedTexts, in_order
from runtimes.backends import load_model, per_token
from runtimes.decode import decoder
from runtimes.decode.base import Decoder
from runtimes.session import SessionOptions
from runtimes.text import Encoding

FileOutputs = list[dict[str, np.ndarray]]
"""Outputs by name of each input."""


def encode_for_files(context: Context, folder: Path, split: str) -> EncodedTexts:
    """The rows of a split as the tokenizer in ``folder/tokenizer`` has them, with their targets."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    return context.task.encode(tokenizer, context.data.split(split), context.data, pad_id=0)


def encodings(texts: EncodedTexts, numbers: Sequence[int] | np.ndarray | None = None) -> list[Encoding]:
    """The inputs ``numbers``, all if None, as runtimes take them."""
    return [texts.encoding(int(i)) for i in (range(len(texts)) if numbers is None else numbers)]


def file_outputs(path: Path, inputs: Sequence[Encoding], session: SessionOptions | None = None) -> FileOutputs:
    """What a model file gives for each input, run alone."""
    model = load_model(path, session=session)
    return [model.run(one.ids, one.types) for one in inputs]


def joined(outputs: FileOutputs) -> dict[str, np.ndarray]:
    """Outputs of each input -> the layout of tasks: [N, ...] per input, [T, ...] per token."""
    made = {}
    for name, first in outputs[0].items():
        values = [one[name] for one in outputs]
        made[name] = np.concatenate(values) if per_token(name, first.ndim + 1) else np.stack(values)
    return made


def evaluate_outputs(context: Context, outputs: FileOutputs, texts: EncodedTexts, split: str) -> dict[str, float]:
    """Every metric of the task that there are labels for, and how near the file comes to the model."""
    task = context.task
    found = task.evaluate(joined(outputs), texts, context.data.split(split), context.data) if task.needs_labels else {}
    return {name: round(value, 3) for name, value in found.items()} | fidelity(task, context.data, outputs, model_outputs(context, texts), texts)


def fidelity(task: Task, data: Data, outputs: FileOutputs, expected: FileOutputs, texts: EncodedTexts) -> dict[str, float]:
    """Agreement in per cent, for tasks that decide, and divergence: see :data:`pipeline.tasks.base.FIDELITY`."""
    found = {}
    if task.decides:
        decide = decoder(task.kind)(task.options(data), data.labels).decisions
        same = np.concatenate([decide(given) == decide(wanted) for given, wanted in zip(outputs, expected, strict=True)])
        if same.size:  # a plug-in's answers may decide nothing, and its task need not say so
            found[AGREEMENT.name] = round(100 * float(same.mean()), 3)
    if set(outputs[0]) >= set(expected[0]):  # a file that gives probabilities has other names for them
        found[DIVERGENCE.name] = max(0.0, round(divergence(task, outputs, expected, texts), 6))
    return found


def model_outputs(context: Context, texts: EncodedTexts) -> FileOutputs:
    """What the model gives in PyTorch for each input; computed once, since every file is compared with it."""
    key = texts.fingerprint
    if key not in context.expected:
        model = context.load("model").model
        context.expected[key] = apart({name: v.numpy() for name, v in predict(model, texts).items()}, model.config.per_token_outputs, texts)
    return context.expected[key]


def apart(outputs: Mapping[str, np.ndarray], per_token_names: Collection[str], texts: EncodedTexts) -> FileOutputs:
    """The reverse of :func:`joined`: the outputs of each input."""
    places = [(i, slice(*texts.offsets[i : i + 2])) for i in range(len(texts))]
    return [{name: values[own if name in per_token_names else i] for name, values in outputs.items()} for i, own in places]


@torch.no_grad()
def divergence(task: Task, outputs: FileOutputs, expected: FileOutputs, texts: EncodedTexts) -> float:
    """Mean over inputs of the task's soft-target loss, less the least that it can be."""
    total = 0.0
    for batch in in_order(texts, EVALUATION_BATCH):
        given, wanted = (
            {name: torch.from_numpy(values).float() for name, values in joined([one[i] for i in batch.rows]).items()} for one in (outputs, expected)
        )
        total += float(task.soft_loss(given, wanted, batch, 1.0) - task.soft_loss(wanted, wanted, batch, 1.0)) * len(batch.rows)
    return total / len(texts)


def file_score(context: Context, path: Path, texts: EncodedTexts, split: str, session: SessionOptions | None = None) -> float:
    """The primary metric of a file, so that more is better."""
    primary = context.task.primary
    return better(primary, evaluate_outputs(context, file_outputs(path, encodings(texts), session), texts, split)[primary.name])


def evaluate_file(context: Context, path: Path, folder: Path, session: SessionOptions | None = None) -> dict[str, dict[str, float]]:
    """Every metric of a file by split."""
    splits = {split: encode_for_files(context, folder, split) for split in REPORTED}
    return {split: evaluate_outputs(context, file_outputs(path, encodings(texts), session), texts, split) for split, texts in splits.items()}


def make_decoder(context: Context) -> Decoder:
    """What turns outputs into answers, as the bundle's will."""
    return decoder(context.task.kind)(context.task.options(context.data), context.data.labels)

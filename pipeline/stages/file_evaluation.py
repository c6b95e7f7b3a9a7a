"""What a model file is worth: run on the task's rows in its own runtime, input by input, as an app would.

What this file does not do: time anything (``bench``, ``tune``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pipeline.flow.stage import Context
from pipeline.learning.evaluation import REPORTED
from pipeline.tasks.base import better
from pipeline.tasks.batches import EncodedTexts
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
    """Every metric of the task."""
    found = context.task.evaluate(joined(outputs), texts, context.data.split(split), context.data)
    return {name: round(value, 3) for name, value in found.items()}


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

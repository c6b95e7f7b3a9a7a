"""A bundle in use: text in, label out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.backends import installed_formats, load_model
from runtimes.bundle import Bundle, ModelEntry, open_bundle
from runtimes.errors import BadInput
from runtimes.text import TextEncoder


@dataclass(frozen=True)
class Prediction:
    """``label`` with its ``probability``, and whether the text was cut to fit."""

    text: str
    label: str
    probability: float
    truncated: bool


class Classifier:
    """Classify texts with a bundle.

    Args:
        folder: the bundle.
        file: which of its model files; the first one that a runtime here can run if None.
        threads: threads of the runtime; those that the bundle recommends for the file if None.
    """

    def __init__(self, folder: Path, file: str | None = None, threads: int | None = None) -> None:
        self.bundle = open_bundle(folder)
        self.entry = choose_model(self.bundle, file)
        self.encoder = TextEncoder(self.bundle.tokenizer_file, self.bundle.max_length)
        self.model = load_model(self.bundle.path(self.entry), threads, self.entry.session)

    def predict(self, text: str) -> Prediction:
        before = self.encoder.truncated
        ids = self.encoder.encode(text)
        result = self.model.logits(ids)
        probabilities = softmax(result) if self.bundle.decode == "softmax" else result
        best = int(probabilities.argmax())
        return Prediction(text, self.bundle.labels[best], float(probabilities[best]), self.encoder.truncated > before)


def choose_model(bundle: Bundle, file: str | None = None) -> ModelEntry:
    """The named model file, or the first that can be run here."""
    if file is not None:
        for entry in bundle.models:
            if entry.file == file:
                return entry
        raise BadInput(f"{bundle.folder}: no model file {file!r}; it has {', '.join(m.file for m in bundle.models)}")
    formats = installed_formats()
    for entry in bundle.models:
        if entry.runs_on(formats):
            return entry
    raise BadInput(
        f"{bundle.folder}: no runtime for its files ({', '.join(m.file for m in bundle.models)}); "
        "pip install 'pocketbert[onnx]' or 'pocketbert[tflite]'"
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()

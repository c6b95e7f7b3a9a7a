"""A bundle in use: an example in, its answer out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtimes.backends import installed_formats, load_model
from runtimes.bundle import Bundle, ModelEntry, open_bundle
from runtimes.decode.base import Answer
from runtimes.errors import BadInput, IntegrityError


@dataclass(frozen=True)
class Prediction:
    """The ``answer`` to an ``example``, and whether a text of it was cut to fit.

    What an answer holds is told by the decoder of the task (:mod:`runtimes.decode`).
    """

    example: dict[str, str]
    answer: Answer
    truncated: bool


class Predictor:
    """Answer examples with a bundle.

    Args:
        folder: the bundle.
        file: which of its model files; the first one that a runtime here can run if None.
        threads: threads of the runtime; those that the bundle recommends for the file if None.
        special_tokens: what ``[SEP]`` in a text is, "special" or "text" (:data:`runtimes.text.SPECIAL_TOKENS`); as the bundle says if None.
            Choose "text" where strangers type the texts and the bundle was packed with "special".

    Raises:
        BadInput: no bundle there, no such file, or no runtime for it.
        IntegrityError: a bundle, or the chosen file in it, that is damaged.

    Attributes:
        decoder: what reads examples and writes answers; ``decoder.columns`` names what an example has, ``decoder.line`` shows an answer.
    """

    def __init__(self, folder: Path, file: str | None = None, threads: int | None = None, special_tokens: str | None = None) -> None:
        self.bundle = open_bundle(folder)
        self.decoder = self.bundle.decoder()
        self.entry = choose_model(self.bundle, file)
        self.bundle.check_file(self.entry)
        self.encoder = self.bundle.text_encoder(special_tokens)
        self.model = load_model(self.bundle.path(self.entry), threads, self.entry.session)

    def predict(self, example: str | Sequence[str] | Mapping[str, str]) -> Prediction:
        """Answer one example.

        Args:
            example: a text where the task needs one; else a tuple of texts in the order of ``decoder.columns``, or texts by column.

        Raises:
            BadInput: other columns than the task has, or texts that cannot be encoded.
            IntegrityError: the file gives other outputs than the task reads.
        """
        named = self.decoder.example(example)
        before = self.encoder.truncated
        encodings = self.decoder.encode(self.encoder, named)
        outputs = [self.model.run(encoding.ids, encoding.types) for encoding in encodings]
        try:
            answer = self.decoder.answer(named, encodings, outputs)
        except IntegrityError as error:
            raise IntegrityError(f"{self.bundle.path(self.entry)}: {error}") from error
        return Prediction(named, answer, self.encoder.truncated > before)


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

"""Kinds of task -> what turns outputs of a file into an answer; each is imported when asked for.

A package adds a kind with an entry point of the group ``pocketbert.decoders``: its name is the kind, its value a subclass of
:class:`runtimes.decode.base.Decoder`, as ``module:Class``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from runtimes.errors import BadInput

if TYPE_CHECKING:
    from runtimes.decode.base import Decoder

ENTRY_POINTS = "pocketbert.decoders"

BUILT_IN = {
    "text-classification": "runtimes.decode.text_classification:TextClassification",
    "text-regression": "runtimes.decode.text_regression:TextRegression",
    "token-classification": "runtimes.decode.token_classification:TokenClassification",
    "intent-and-slots": "runtimes.decode.intent_and_slots:IntentAndSlots",
    "question-answering": "runtimes.decode.question_answering:QuestionAnswering",
    "sentence-embedding": "runtimes.decode.sentence_embedding:SentenceEmbedding",
}


def decoder(kind: str) -> type[Decoder]:
    """The class for a kind of task.

    Raises:
        BadInput: no installed package knows it.
    """
    if kind in BUILT_IN:
        module, _, name = BUILT_IN[kind].partition(":")
        return getattr(import_module(module), name)
    from importlib.metadata import entry_points  # a tenth of the time that all else here takes to import

    added = entry_points(group=ENTRY_POINTS)
    for point in added:
        if point.name == kind:
            return point.load()
    raise BadInput(
        f"task kind {kind!r}: no decoder for it is installed; there are {', '.join([*BUILT_IN, *sorted(added.names)])}. "
        f"Install the package that adds it (entry points {ENTRY_POINTS})"
    )

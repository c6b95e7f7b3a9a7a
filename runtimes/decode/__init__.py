"""Kinds of task -> what turns outputs of a file into an answer; each is imported when asked for.

A package adds a kind with an entry point of the group ``pocketbert.decoders``: its name is the kind, its value a subclass of
:class:`runtimes.decode.base.Decoder`, as ``module:Class``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtimes.errors import BadInput
from runtimes.manifest import shown
from runtimes.registry import Registry

if TYPE_CHECKING:
    from runtimes.decode.base import Decoder

DECODERS = Registry("pocketbert.decoders", {
    "text-classification": "runtimes.decode.text_classification:TextClassification",
    "text-regression": "runtimes.decode.text_regression:TextRegression",
    "token-classification": "runtimes.decode.token_classification:TokenClassification",
    "intent-and-slots": "runtimes.decode.intent_and_slots:IntentAndSlots",
    "question-answering": "runtimes.decode.question_answering:QuestionAnswering",
    "sentence-embedding": "runtimes.decode.sentence_embedding:SentenceEmbedding",
})


def decoder(kind: str) -> type[Decoder]:
    """The class for a kind of task.

    Raises:
        BadInput: no installed package knows it.
    """
    if kind in DECODERS:
        return DECODERS[kind]
    raise BadInput(
        f"task kind {shown(kind)}: no decoder for it is installed; there are {', '.join(DECODERS)}. "
        f"Install the package that adds it (entry points {DECODERS.group})"
    )

"""Tokens with tags: reading and repairing them, encoding words with their pieces, and the F1 of spans.

A row of tokens is the text ``" ".join(tokens)``. A word's tag belongs to the first of its pieces; the others, and special tokens,
have no target (:mod:`runtimes.decode.words` has the same rule for raw text).

What this file does not do: decide what else a row has (the tasks do).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.tasks.base import Row
from pipeline.tasks.batches import IGNORED, EncodedTexts, from_id_lists
from pipeline.tasks.files import label_of
from runtimes.decode.words import CUT_OFF, first_tokens, joined_words
from runtimes.errors import BadInput
from runtimes.text import SPECIAL, Encoding

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

OUTSIDE = "O"


def tokens_and_tags(record: dict[str, Any], tokens_column: str, tags_column: str, place: str) -> tuple[list[str], list[str]]:
    """The two columns of one row, checked."""
    found = []
    for column in (tokens_column, tags_column):
        if column not in record:
            raise BadInput(f"{place}: no column {column!r}; the columns are {', '.join(map(str, record))}")
        value = record[column]
        value = value.split() if isinstance(value, str) else value
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item.strip() for item in value):
            raise BadInput(f"{place}: {column} must be a list of texts that are not empty, got {value!r:.80}")
        found.append(value)
    tokens, tags = found
    if len(tokens) != len(tags):
        raise BadInput(f"{place}: {len(tokens)} {tokens_column} but {len(tags)} {tags_column}; each token needs one tag")
    for tag in tags:
        if tag != OUTSIDE and (tag[:2] not in ("B-", "I-") or len(tag) < 3):
            raise BadInput(f"{place}: tag {tag!r} is neither O nor B-TYPE nor I-TYPE; convert the tags to BIO")
        label_of(tag, tags_column, place)
    for token in tokens:
        if len(token.split()) > 1:
            raise BadInput(f"{place}: {tokens_column}: token {token!r} has a blank; split it, with a tag for each part")
    return tokens, tags


def row_text(row: Row) -> str:
    """What a model reads of a row of tokens, or of a raw ``text`` without tags."""
    return " ".join(row["tokens"]) if "tokens" in row else row["text"]


def to_bio(splits: Sequence[list[Row]]) -> list[str]:
    """Make the tags of all rows BIO, in place; sentences on what was changed.

    In IOB1 a span begins with I- unless it follows another span of its type. Files in which I- begins most spans are taken for it.
    In BIO such an I- is a fault: it is made a B-.
    """
    opened = {"B": 0, "I": 0}
    first_place = None
    for row in (row for rows in splits for row in rows):
        for before, tag in zip([OUTSIDE, *row["tags"]], row["tags"], strict=False):
            if tag != OUTSIDE and (tag[0] == "B" or before[2:] != tag[2:]):
                opened[tag[0]] += 1
                if tag[0] == "I":
                    first_place = first_place or row.get("place")
    if not opened["I"]:
        return []
    for row in (row for rows in splits for row in rows):
        tags = row["tags"]
        row["tags"] = [
            f"B-{tag[2:]}" if tag[0] == "I" and before[2:] != tag[2:] else tag for before, tag in zip([OUTSIDE, *tags], tags, strict=False)
        ]
    if opened["I"] > opened["B"]:
        return ["the tags are IOB1 and were made BIO"]
    return [f"{opened['I']} spans begin with I- where B- is needed, the first in {first_place}; they were repaired"]


def tag_names(train: list[Row], others: Sequence[list[Row]]) -> list[str]:
    """All tags of the training rows, O first, each B- with its I-.

    Raises:
        BadInput: a type in other rows that training never has, or no span at all.
    """
    types = sorted({tag[2:] for row in train for tag in row["tags"] if tag != OUTSIDE})
    if not types:
        raise BadInput("task.data: no training row has a tag but O; there is nothing to learn")
    for row in (row for rows in others for row in rows):
        unknown = {tag[2:] for tag in row["tags"] if tag != OUTSIDE} - set(types)
        if unknown:
            raise BadInput(f"{row.get('place', 'task.data')}: type {sorted(unknown)[0]!r} never occurs in the training rows")
    return [OUTSIDE, *(f"{begin}-{kind}" for kind in types for begin in "BI")]


def encode_words(tokenizer: Tokenizer, rows: Sequence[Row], names: Sequence[str], max_length: int, pad_id: int) -> EncodedTexts:
    """Rows of tokens (or of raw ``text``, without tags) -> inputs with ``token_targets["tags"]`` int64 [T]."""
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    found = tokenizer.encode_batch([row_text(row) for row in rows])
    index = {name: number for number, name in enumerate(names)}
    encodings, targets = [], []
    for row, one in zip(rows, found, strict=True):
        sequences = [SPECIAL if number is None else number for number in one.sequence_ids]
        encodings.append(Encoding(one.ids, one.type_ids, one.offsets, sequences))
        tags = np.full(len(one.ids), IGNORED, np.int64)
        if "tags" in row:
            firsts = first_tokens(joined_words(row["tokens"]), encodings[-1])
            for at, tag in zip(firsts, row["tags"], strict=True):
                if at != CUT_OFF:
                    tags[at] = index[tag]
        targets.append(tags)
    made = from_id_lists([encoding.ids for encoding in encodings], pad_id)
    return replace(made, token_targets={"tags": np.concatenate(targets) if targets else np.zeros(0, np.int64)}, encodings=encodings)


def word_loss(logits: Tensor, tags: Tensor) -> Tensor:
    """Cross-entropy of logits [t, T] on the tokens that have a tag, averaged over them; 0 where none has one."""
    from torch.nn import functional

    known = (tags != IGNORED).sum().clamp(min=1)
    return functional.cross_entropy(logits.float(), tags, ignore_index=IGNORED, reduction="sum") / known


def predicted_tags(logits: np.ndarray, texts: EncodedTexts, rows: Sequence[Row], names: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    """(tags of the rows, tags that the logits [T, C] give their words); a word without a token counts as O."""
    best = np.asarray(logits).argmax(-1)
    wanted, given = [], []
    for number, row_number in enumerate(texts.rows):
        row = rows[row_number]
        own = best[texts.offsets[number] : texts.offsets[number + 1]]
        firsts = first_tokens(joined_words(row["tokens"]), texts.encoding(number))
        wanted.append(row["tags"])
        given.append([OUTSIDE if at == CUT_OFF else names[own[at]] for at in firsts])
    return wanted, given


def unseen_words(texts: EncodedTexts, rows: Sequence[Row]) -> dict[str, float]:
    """``unseen_words``, percent of the words without a token of their own, so that no model can tag them; {} if none."""
    unseen = words = 0
    for number, row_number in enumerate(texts.rows):
        firsts = first_tokens(joined_words(rows[row_number]["tokens"]), texts.encoding(number))
        unseen += firsts.count(CUT_OFF)
        words += len(firsts)
    return {"unseen_words": 100 * unseen / words} if unseen else {}


def span_scores(wanted: list[list[str]], given: list[list[str]]) -> dict[str, float]:
    """F1, precision and recall of whole spans, and the F1 of each type that ``wanted`` has (seqeval, as conlleval counts); 0 without spans."""
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(wanted, given, average="micro", zero_division=0)
    found = {"f1": f1, "precision": precision, "recall": recall}
    types = sorted({tag[2:] for row in (*wanted, *given) for tag in row if tag != OUTSIDE})  # seqeval's order
    _, _, each, spans = precision_recall_fscore_support(wanted, given, average=None, zero_division=0)
    found |= {f"f1 {kind}": value for kind, value, count in zip(types, each, spans, strict=True) if count}
    return {name: 100 * float(value) for name, value in found.items()}

"""Vocabulary pruning: keep the tokens that the task uses.

Source: Abdaoui et al. 2020, "Load What You Need", arXiv:2010.05609. Rows of the word table that the training texts
never touch are dropped, and the tokenizer's files are rewritten to match. Of a multilingual model the table is most of the bytes.

Every token of a training text is kept, and those texts keep their tokens (:mod:`pipeline.models.trimming` says why, for WordPiece, BPE
and unigram) and, the rows being copied, their logits. A text with a word never seen falls back to shorter pieces, at worst
to single characters. How many test tokens change is measured and said.

What this file does not do: learn a new vocabulary.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from tokenizers import Tokenizer

from pipeline.flow.stage import Context, Stage
from pipeline.learning.evaluation import subject
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.config import EncoderConfig
from pipeline.models.encoder import Encoder
from pipeline.models.trimming import check_kind, indispensable, single_characters, trim
from runtimes.errors import BadInput


class PruneVocab(Stage):
    """Keep the tokens that the task needs, the special ones and those of a single character."""

    use: ClassVar[str] = "prune-vocab"
    needs: ClassVar[tuple[str, ...]] = ("model", "teacher")
    gives: ClassVar[tuple[str, ...]] = ("model", "teacher")
    paper: ClassVar[str] = "Abdaoui et al. 2020, Load What You Need, arXiv:2010.05609"
    effect: ClassVar[str] = "Fewer rows in the word table: smaller files; speed unchanged."

    min_count: int = Field(1, ge=1)
    """Keep a piece that occurs at least so often in the training texts."""
    keep_frequent: int = Field(0, ge=0)
    """Also keep the first so many ordinary pieces of the old vocabulary, which is ordered by frequency."""
    characters: Literal["all", "used"] = "all"
    """Single characters to keep: all of the vocabulary, or those that the training texts hold. A multilingual vocabulary has thousands, for
    scripts that one task may never see; a character that went becomes the unknown token. Byte-level BPE keeps all 256 bytes."""

    def run(self, context: Context) -> None:
        model = context.load("model")
        check_kind(model.tokenizer_json)
        used = [context.encode(model, split).ids for split in ("train", "unlabeled") if context.data.split(split)]
        kept = kept_tokens(model, np.concatenate(used), self.min_count, self.keep_frequent, self.characters)
        same = context.inputs["model"].sha256 == context.inputs["teacher"].sha256
        for role in ("model",) if same else ("model", "teacher"):
            checkpoint = context.load(role)
            if checkpoint.tokenizer_json != model.tokenizer_json:
                raise BadInput("prune-vocab: model and teacher tokenize differently, so one choice of tokens cannot serve both")
            pruned = prune(checkpoint, kept)
            pruned.save(context.output / role, context.task.max_length)
            if role == "model":
                context.subjects.append(subject(context, pruned, "teacher, vocabulary pruned" if same else "vocabulary pruned"))
                self._report(context, checkpoint, pruned)
        if same:
            context.aliases["teacher"] = "model"

    def _report(self, context: Context, before: Checkpoint, after: Checkpoint) -> None:
        texts = [text for row in context.data.test for text in context.task.example(row).values()]
        changed, total, touched = changed_tokens(before.tokenizer, after.tokenizer, texts)
        context.note(
            f"{after.model.config.vocab_size} of {before.model.config.vocab_size} word pieces kept; {changed} of {total} test "
            f"tokens ({100 * changed / total:.2f} %) are cut differently, in {touched} of {len(texts)} texts"
        )


def kept_tokens(
    checkpoint: Checkpoint, ids: np.ndarray, min_count: int, keep_frequent: int, characters: Literal["all", "used"] = "all"
) -> list[int]:
    """The numbers of the tokens to keep; ``ids`` are the tokens of all training inputs."""
    vocabulary = checkpoint.tokenizer.get_vocab()
    text = checkpoint.tokenizer_json
    always = indispensable(text) | checkpoint.special_ids
    single = single_characters(text)
    counts = np.bincount(ids, minlength=max(vocabulary.values()) + 1)
    ordered = sorted(vocabulary, key=vocabulary.get)
    ordinary = [token for token in ordered if vocabulary[token] not in always | single and not _is_unused(token)]
    frequent = set(ordinary[:keep_frequent])
    return [
        number
        for token, number in ((token, vocabulary[token]) for token in ordered)
        if number in always
        or (characters == "all" and not _is_unused(token) and number in single)
        or counts[number] >= min_count
        or token in frequent
    ]


def _is_unused(token: str) -> bool:
    return token.startswith("[unused") and token.endswith("]")


def prune(checkpoint: Checkpoint, kept: list[int]) -> Checkpoint:
    """The checkpoint with word table and tokenizer cut to the tokens numbered in ``kept``, and what those need."""
    pad = checkpoint.model.config.pad_token_id
    if checkpoint.tokenizer.id_to_token(pad) is None:
        raise BadInput(f"prune-vocab: the model pads with number {pad}, which is no token of its tokenizer; correct pad_token_id in config.json")
    trimmed = trim(checkpoint.tokenizer_json, [*kept, pad])
    config = EncoderConfig(**checkpoint.model.config.to_dict() | {
        "vocab_size": len(trimmed.old_ids), "pad_token_id": trimmed.old_ids.index(pad),
    })  # fmt: skip
    weights = checkpoint.model.state_dict()
    weights["embeddings.word.weight"] = weights["embeddings.word.weight"][torch.tensor(trimmed.old_ids)].clone()
    model = Encoder(config)
    model.load_state_dict(weights)
    return Checkpoint(model.eval(), trimmed.tokenizer_json, checkpoint.tokenizer_config)


def changed_tokens(before: Tokenizer, after: Tokenizer, texts: list[str]) -> tuple[int, int, int]:
    """(tokens of the old segmentation that are gone, all its tokens, texts with a change)."""
    changed = total = touched = 0
    for tokenizer in (before, after):
        tokenizer.no_truncation()
    for old, new in zip(before.encode_batch(texts), after.encode_batch(texts), strict=True):
        gone = sum((Counter(old.tokens) - Counter(new.tokens)).values())
        changed, total, touched = changed + gone, total + len(old.tokens), touched + bool(gone)
    return changed, total, touched

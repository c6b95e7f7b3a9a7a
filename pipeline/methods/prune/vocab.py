"""Vocabulary pruning: keep the word pieces that the task uses.

Source: Abdaoui et al. 2020, "Load What You Need", arXiv:2010.05609. Rows of the word table that the training texts
never touch are dropped, and the tokenizer's files are rewritten to match.

Why kept words are untouched: WordPiece always takes the longest piece it knows. Every piece of a training text is
kept, and taking pieces away makes no other one longer, so those texts keep their segmentation and, the rows being
copied, their logits. A text with a word never seen falls back to shorter pieces, at worst to single characters,
which are all kept: it still has known pieces. How many test tokens change is measured and said.

What this file does not do: learn a new vocabulary, or touch tokenizers other than WordPiece.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from tokenizers import Tokenizer

from pipeline.flow.stage import Context, Stage
from pipeline.learning.evaluation import subject
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.config import EncoderConfig
from pipeline.models.encoder import Encoder
from runtimes.errors import BadInput

PREFIX = "##"


class PruneVocab(Stage):
    """Keep the word pieces the task needs, the special tokens and all single characters."""

    use: ClassVar[str] = "prune-vocab"
    needs: ClassVar[tuple[str, ...]] = ("model", "teacher")
    gives: ClassVar[tuple[str, ...]] = ("model", "teacher")
    paper: ClassVar[str] = "Abdaoui et al. 2020, Load What You Need, arXiv:2010.05609"
    effect: ClassVar[str] = "Fewer rows in the word table: smaller files; speed unchanged."

    min_count: int = Field(1, ge=1)
    """Keep a piece that occurs at least so often in the training texts."""
    keep_frequent: int = Field(0, ge=0)
    """Also keep the first so many ordinary pieces of the old vocabulary, which WordPiece orders by frequency."""

    def run(self, context: Context) -> None:
        model = context.load("model")
        used = [context.encode(model, split).ids for split in ("train", "unlabeled") if context.data.split(split)]
        kept = kept_pieces(model, np.concatenate(used), self.min_count, self.keep_frequent)
        same = context.inputs["model"].sha256 == context.inputs["teacher"].sha256
        for role in ("model",) if same else ("model", "teacher"):
            checkpoint = context.load(role)
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


def kept_pieces(checkpoint: Checkpoint, ids: np.ndarray, min_count: int, keep_frequent: int) -> list[str]:
    """The pieces to keep, in the order of the old vocabulary; ``ids`` are the tokens of all training inputs.

    Raises:
        BadInput: the tokenizer is not WordPiece.
    """
    model = json.loads(checkpoint.tokenizer_json)["model"]
    if model["type"] != "WordPiece":
        raise BadInput(f"prune-vocab: the tokenizer is {model['type']}, only WordPiece vocabularies can be pruned; leave this stage out")
    counts = np.bincount(ids, minlength=max(model["vocab"].values()) + 1)
    ordered = sorted(model["vocab"], key=model["vocab"].get)
    special = {token["content"] for token in json.loads(checkpoint.tokenizer_json)["added_tokens"]}
    ordinary = [p for p in ordered if p not in special and not _is_unused(p) and len(p.removeprefix(PREFIX)) > 1]
    frequent = set(ordinary[:keep_frequent])
    return [
        piece
        for piece in ordered
        if piece in special
        or (not _is_unused(piece) and len(piece.removeprefix(PREFIX)) == 1)
        or counts[model["vocab"][piece]] >= min_count
        or piece in frequent
    ]


def _is_unused(piece: str) -> bool:
    return piece.startswith("[unused") and piece.endswith("]")


def prune(checkpoint: Checkpoint, kept: list[str]) -> Checkpoint:
    """The checkpoint with rows, ids and tokenizer cut to ``kept``."""
    state: dict[str, Any] = json.loads(checkpoint.tokenizer_json)
    old_ids = state["model"]["vocab"]
    new_ids = {piece: index for index, piece in enumerate(kept)}
    state["model"]["vocab"] = new_ids
    for token in state["added_tokens"]:
        token["id"] = new_ids[token["content"]]
    _renumber(state["post_processor"], new_ids)
    rows = torch.tensor([old_ids[piece] for piece in kept])
    config = EncoderConfig(**checkpoint.model.config.to_dict() | {
        "vocab_size": len(kept), "pad_token_id": new_ids[_content(checkpoint, "pad_token")],
    })  # fmt: skip
    weights = checkpoint.model.state_dict()
    weights["embeddings.word.weight"] = weights["embeddings.word.weight"][rows].clone()
    model = Encoder(config)
    model.load_state_dict(weights)
    return Checkpoint(model.eval(), json.dumps(state, ensure_ascii=False), checkpoint.tokenizer_config)


def changed_tokens(before: Tokenizer, after: Tokenizer, texts: list[str]) -> tuple[int, int, int]:
    """(tokens of the old segmentation that are gone, all its tokens, texts with a change)."""
    changed = total = touched = 0
    for tokenizer in (before, after):
        tokenizer.no_truncation()
    for old, new in zip(before.encode_batch(texts), after.encode_batch(texts), strict=True):
        gone = sum((Counter(old.tokens) - Counter(new.tokens)).values())
        changed, total, touched = changed + gone, total + len(old.tokens), touched + bool(gone)
    return changed, total, touched


def _content(checkpoint: Checkpoint, role: str) -> str:
    return checkpoint.tokenizer.id_to_token(checkpoint.special_id(role))


def _renumber(post_processor: dict[str, Any] | None, new_ids: dict[str, int]) -> None:
    """Give the special tokens that the tokenizer adds around a text their new ids."""
    if post_processor is None:
        return
    if post_processor["type"] == "TemplateProcessing":
        for name, special in post_processor["special_tokens"].items():
            special["ids"] = [new_ids[token] for token in special["tokens"]]
            special["id"] = name
    elif post_processor["type"] == "BertProcessing":
        for key in ("sep", "cls"):
            post_processor[key] = [post_processor[key][0], new_ids[post_processor[key][0]]]
    else:
        raise BadInput(f"prune-vocab: the tokenizer's post-processor {post_processor['type']} is not supported")

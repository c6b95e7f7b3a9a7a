"""Cut a tokenizer to some of its tokens, so that a text whose tokens all stay is cut into the same tokens as before.

Why that holds, by kind of tokenizer:

- WordPiece takes the longest piece it knows. Taking pieces away makes no other one longer.
- BPE joins the pair of lowest rank again and again. Inside a token of the result only pairs of that token were joined, so the merges that
  build the kept tokens are kept, with what they build on the way; the lowest pair of all is then still among them at every step.
- Unigram takes the way through a text with the highest sum of scores. Fewer ways are left, the best one among them. What an unknown character
  costs hangs on the lowest score of the vocabulary, so one piece with that score stays.

Other texts fall back to shorter pieces, at worst to single characters or bytes, or to the unknown token: never to a number without a row.

What this file does not do: choose what to keep for a task (:mod:`pipeline.methods.prune.vocab`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from runtimes.errors import BadInput

TRIMMED_KINDS = ("WordPiece", "BPE", "Unigram")
WORD_START = "\u2581"
"""How unigram vocabularies mark the beginning of a word."""


@dataclass(frozen=True)
class Trimmed:
    """``tokenizer_json`` whose token number i was number ``old_ids[i]`` before."""

    tokenizer_json: str
    old_ids: list[int]


def check_kind(tokenizer_json: str) -> None:
    """Refuse a tokenizer that cannot be cut.

    Raises:
        BadInput: another kind than :data:`TRIMMED_KINDS`, or a BPE whose pieces are marked.
    """
    model = json.loads(tokenizer_json)["model"]
    if model["type"] not in TRIMMED_KINDS:
        raise BadInput(f"prune-vocab: the tokenizer is {model['type']}, and only {', '.join(TRIMMED_KINDS)} can be cut; leave this stage out")
    marks = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if model["type"] == "BPE" and marks:
        raise BadInput(f"prune-vocab: a BPE tokenizer with {marks[0]} cannot be cut; leave this stage out")


def indispensable(tokenizer_json: str) -> set[int]:
    """Tokens that every text may need: added ones, those around a text, the unknown one, bytes, and what unknown characters cost."""
    state = json.loads(tokenizer_json)
    model, ids = state["model"], Tokenizer.from_str(tokenizer_json).get_vocab()
    kept = {ids[token["content"]] for token in state.get("added_tokens") or []}
    kept |= {ids[token] for token in _around(state.get("post_processor")) if token in ids}
    if model["type"] == "Unigram":
        lowest = min(range(len(model["vocab"])), key=lambda number: model["vocab"][number][1])
        kept |= {lowest} | ({model["unk_id"]} if model.get("unk_id") is not None else set())
    elif model.get("unk_token") in ids:
        kept.add(ids[model["unk_token"]])
    if model.get("byte_fallback"):
        kept |= {ids[f"<0x{byte:02X}>"] for byte in range(256) if f"<0x{byte:02X}>" in ids}
    if _is_byte_level(state):
        kept |= {number for token, number in ids.items() if len(token) == 1}
    return kept


def single_characters(tokenizer_json: str) -> set[int]:
    """Tokens of one character, where that is how a text is spelt that no longer token fits."""
    state = json.loads(tokenizer_json)
    kind, prefix = state["model"]["type"], state["model"].get("continuing_subword_prefix") or ""
    mark = prefix if kind == "WordPiece" else WORD_START if kind == "Unigram" else ""
    bare = {number: token if token == mark else token.removeprefix(mark) for token, number in Tokenizer.from_str(tokenizer_json).get_vocab().items()}
    return {number for number, token in bare.items() if len(token) == 1}


def trim(tokenizer_json: str, kept: Iterable[int]) -> Trimmed:
    """The tokenizer with the tokens numbered in ``kept``, those of :func:`indispensable`, and what BPE builds them of.

    Tokens keep their order.

    Raises:
        BadInput: a tokenizer that cannot be cut (:func:`check_kind`).
    """
    check_kind(tokenizer_json)
    state: dict[str, Any] = json.loads(tokenizer_json)
    model, ids = state["model"], Tokenizer.from_str(tokenizer_json).get_vocab()
    wanted = set(kept) | indispensable(tokenizer_json)
    tokens = {token for token, number in ids.items() if number in wanted}
    if model["type"] == "BPE":
        merges = _needed_merges(model["merges"], tokens & model["vocab"].keys())
        model["merges"] = [merge for merge in model["merges"] if _pair(merge) in merges]
        tokens |= {part for pair in merges for part in (*pair, "".join(pair))}
    old_ids = sorted({ids[token] for token in tokens})
    numbers = {old: new for new, old in enumerate(old_ids)}
    new_ids = {token: numbers[ids[token]] for token in tokens}
    if model["type"] == "Unigram":
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in numbers]
        if model.get("unk_id") is not None:
            model["unk_id"] = numbers[model["unk_id"]]
    else:
        model["vocab"] = {token: new_ids[token] for token in sorted(model["vocab"], key=model["vocab"].get) if token in new_ids}
    for token in state.get("added_tokens") or []:
        token["id"] = new_ids[token["content"]]
    _renumber(state.get("post_processor"), new_ids)
    state["padding"] = None  # it holds a number; batches are padded by the model's config
    text = json.dumps(state, ensure_ascii=False)
    made = Tokenizer.from_str(text).get_vocab()
    if made != new_ids:
        wrong = min(set(made.items()) ^ set(new_ids.items()))[0]
        raise BadInput(f"prune-vocab: the tokenizer cannot be cut: token {wrong!r} would get another number than its row; leave this stage out")
    return Trimmed(text, old_ids)


def _needed_merges(merges: list[Any], tokens: set[str]) -> set[tuple[str, str]]:
    """The pairs that BPE joins on its way to each of ``tokens``."""
    ranks = {_pair(merge): rank for rank, merge in enumerate(merges)}
    needed: set[tuple[str, str]] = set()
    for token in tokens:
        parts = list(token)
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairwise(parts)))
            if rank == len(ranks):
                break  # no text becomes this token by merges
            needed.add((parts[at], parts[at + 1]))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return needed


def _pair(merge: Any) -> tuple[str, str]:
    """A merge in either of the forms that tokenizer.json has had: a list of two, or both with a space between."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _is_byte_level(state: dict[str, Any]) -> bool:
    """Whether texts are spelt in bytes before they reach the model."""
    parts = [state.get(name) or {} for name in ("pre_tokenizer", "normalizer")]
    parts += [inner for part in parts for inner in (*part.get("pretokenizers", ()), *part.get("normalizers", ()))]
    return any(part.get("type") == "ByteLevel" for part in parts)


def _around(post_processor: dict[str, Any] | None) -> set[str]:
    """Tokens that a post-processor adds."""
    kind = (post_processor or {}).get("type")
    if kind == "Sequence":
        return {token for part in post_processor["processors"] for token in _around(part)}
    if kind == "TemplateProcessing":
        return {token for special in post_processor["special_tokens"].values() for token in special["tokens"]}
    return {post_processor[key][0] for key in ("sep", "cls")} if kind in ("BertProcessing", "RobertaProcessing") else set()


def _renumber(post_processor: dict[str, Any] | None, new_ids: dict[str, int]) -> None:
    """Give the tokens that a post-processor adds their new numbers."""
    kind = (post_processor or {}).get("type")
    if kind == "Sequence":
        for part in post_processor["processors"]:
            _renumber(part, new_ids)
    elif kind == "TemplateProcessing":
        for special in post_processor["special_tokens"].values():
            special["ids"] = [new_ids[token] for token in special["tokens"]]
    elif kind in ("BertProcessing", "RobertaProcessing"):
        for key in ("sep", "cls"):
            post_processor[key] = [post_processor[key][0], new_ids[post_processor[key][0]]]

"""What a client that tokenizes by itself must do, as ``bundle.json`` tells it under ``tokenizer``.

Most of it is found by trying the tokenizer, because a normalizer may be a sequence of parts, or a table of characters, in which no field says
"lower case". Keys, all beside ``file`` and ``max_length``:

- ``type``: ``wordpiece``, ``bpe``, ``unigram`` or ``wordlevel``; ``vocab_file`` where ``vocab.txt`` has all of a WordPiece vocabulary.
- ``pad_id``, ``cls_id``, ``sep_id``, ``unk_id``, ``mask_id``: null where there is none. A text is ``cls_id``, its tokens, ``sep_id``; of a pair
  ``separators_between_pair`` times ``sep_id`` stand between the texts. ``special_tokens``: all of them, as they are written.
- ``clean_text``: control characters go, every blank becomes a space. ``lowercase``. ``strip_accents``. ``split_cjk``: every ideograph is a word.
- ``max_word_characters``: a longer word is one ``unk_id``; ``continuing_prefix`` begins pieces inside a word. Both WordPiece alone.
- ``truncation_keeps_special_tokens``: a text is cut to ``max_length`` before the last ``sep_id``; of a pair the longer text first.
- ``special_tokens_in_text``: ``special`` or ``text``, see :mod:`runtimes.bundle`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

MASKS = ("[MASK]", "<mask>")
IDEOGRAPHS = "\u4eca\u5929"
ACCENTED, PLAIN = "\u00e9\u00fc", "eu"


def tokenizer_contract(file: Path, pad_id: int, special_tokens: str) -> dict[str, Any]:
    """The part of the manifest about the tokenizer in ``file``.

    Args:
        pad_id: what the model was trained to see as padding.
        special_tokens: what a special token in a text becomes, one of :data:`runtimes.text.SPECIAL_TOKENS`.
    """
    model = json.loads(file.read_text(encoding="utf-8"))["model"]
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = {token.content: number for number, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special}
    alone, both = tokenizer.encode("").ids, tokenizer.encode("", "").ids
    wordpiece = model["type"] == "WordPiece"
    whole = wordpiece and file.with_name("vocab.txt").is_file()
    return {
        "type": model["type"].lower(), "pad_id": pad_id, "cls_id": alone[0] if len(alone) > 1 else None, "sep_id": alone[-1] if alone else None,
        "unk_id": _unknown(tokenizer, model), "mask_id": next((special[mask] for mask in MASKS if mask in special), None),
        "special_tokens": special, "separators_between_pair": max(0, len(both) - 2), "special_tokens_in_text": special_tokens,
        "truncation_keeps_special_tokens": True, "clean_text": "\u0000" not in _normalized(tokenizer, "a\u0000b"),
        "lowercase": _normalized(tokenizer, "ABC").strip("\u2581\u0120 ") == "abc",
        "strip_accents": _normalized(tokenizer, ACCENTED).strip("\u2581\u0120 ") == PLAIN, "split_cjk": _splits_ideographs(tokenizer),
        "max_word_characters": model["max_input_chars_per_word"] if wordpiece else None,
        "continuing_prefix": model["continuing_subword_prefix"] if wordpiece else None,
    } | ({"vocab_file": "vocab.txt"} if whole else {})  # fmt: skip


def _normalized(tokenizer: Tokenizer, text: str) -> str:
    return text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)


def _splits_ideographs(tokenizer: Tokenizer) -> bool:
    text = _normalized(tokenizer, IDEOGRAPHS)
    words = text.split() if tokenizer.pre_tokenizer is None else [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    return not any(IDEOGRAPHS in word for word in words) and text.replace(" ", "") == IDEOGRAPHS and len(words) > 1


def _unknown(tokenizer: Tokenizer, model: dict[str, Any]) -> int | None:
    if model.get("unk_token") is not None:
        return tokenizer.token_to_id(model["unk_token"])
    return model.get("unk_id")

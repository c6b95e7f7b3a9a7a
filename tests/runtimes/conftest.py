"""What these tests share: a WordPiece tokenizer that splits words, accents, signs and ideographs as BERT's does."""

from __future__ import annotations

from pathlib import Path

import pytest

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIGNS = list(".,!?'\"()-:%")
WORDS = ["anna", "berlin", "koln", "cafe", "who", "lives", "in", "the", "city", "of", "light", "今", "天", "3", "5"]


@pytest.fixture(scope="session")
def pieces() -> list[str]:
    return [*SPECIAL, *SIGNS, *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory, pieces) -> Path:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path

"""What the manifest tells of a tokenizer is what the tokenizer does, whatever parts it is made of."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from exporters.golden import golden_examples
from exporters.tokenizer_contract import tokenizer_contract
from runtimes.decode import decoder
from runtimes.text import TextEncoder

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CASED = dict.fromkeys(("lowercase", "strip_accents"), False)
UNCASED = dict.fromkeys(("lowercase", "strip_accents"), True)
BERT = {"clean_text": True, "split_cjk": True}
NORMALIZERS = {
    "uncased": (normalizers.BertNormalizer(lowercase=True), UNCASED | BERT),
    "cased": (normalizers.BertNormalizer(lowercase=False), CASED | BERT),
    "accents stay": (normalizers.BertNormalizer(lowercase=True, strip_accents=False), UNCASED | BERT | {"strip_accents": False}),
    "ideographs stay": (normalizers.BertNormalizer(handle_chinese_chars=False), UNCASED | BERT | {"split_cjk": False}),
    "sequence": (
        normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]),
        UNCASED | {"clean_text": False, "split_cjk": False},
    ),
    "nested": (normalizers.Sequence([normalizers.Sequence([normalizers.BertNormalizer()])]), UNCASED | BERT),
    "lower case alone": (normalizers.Lowercase(), {"lowercase": True, "strip_accents": False, "clean_text": False, "split_cjk": False}),
    "none": (None, CASED | {"clean_text": False, "split_cjk": False}),
}  # fmt: skip


def saved(tokenizer, normalizer, tmp_path):
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def wordpiece() -> Tokenizer:
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizing_is_told_as_it_is_done(tmp_path, name):
    normalizer, expected = NORMALIZERS[name]
    told = tokenizer_contract(saved(wordpiece(), normalizer, tmp_path), 0, "special")
    assert {key: told[key] for key in expected} == expected


def test_everything_a_client_needs_of_wordpiece(tmp_path):
    told = tokenizer_contract(saved(wordpiece(), normalizers.BertNormalizer(), tmp_path), 0, "text")
    assert json.loads(json.dumps(told)) == {
        "type": "wordpiece", "pad_id": 0, "cls_id": 2, "sep_id": 3, "unk_id": 1, "mask_id": 4, "separators_between_pair": 1,
        "special_tokens": {token: i for i, token in enumerate(SPECIAL)}, "special_tokens_in_text": "text", "truncation_keeps_special_tokens": True,
        "clean_text": True, "lowercase": True, "strip_accents": True, "split_cjk": True, "max_word_characters": 100, "continuing_prefix": "##",
    }  # fmt: skip
    encoder = TextEncoder(tmp_path / "tokenizer.json", 5)
    assert encoder.encode("a " * 9).ids == [2, 5, 5, 5, 3], "truncation keeps the separator"
    assert encoder.encode("a" * 101).ids == [2, 1, 3]


def test_a_pair_of_roberta_has_two_separators_between_its_texts(tmp_path):
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    told = tokenizer_contract(saved(tokenizer, None, tmp_path), 1, "special")
    wanted = {"type": "bpe", "pad_id": 1, "cls_id": 0, "sep_id": 2, "unk_id": 3, "mask_id": 4, "separators_between_pair": 2, "lowercase": False}
    assert {key: told[key] for key in wanted} == wanted
    assert told["max_word_characters"] is None and "vocab_file" not in told


@pytest.mark.parametrize("special_tokens", ["special", "text"])
def test_golden_cases_have_every_special_token_between_words(tmp_path, special_tokens):
    encoder = TextEncoder(saved(wordpiece(), normalizers.BertNormalizer(), tmp_path), 16, special_tokens)
    options = {"kind": "text-regression", "columns": ["text"], "segments": 1, "decode": "none"}
    texts = [example["text"] for example in golden_examples([], decoder("text-regression")(options, {}), encoder, [8])]
    for number, token in enumerate(SPECIAL):
        assert f"a {token} b" in texts
        ids = encoder.encode(f"a {token} b").ids
        assert (ids == [2, 5, number, 6, 3]) == (special_tokens == "special"), token

"""A text whose tokens stay is cut into the same tokens by the trimmed tokenizer; no other one gets a number without a row."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import AddedToken, Tokenizer

from pipeline.models.trimming import indispensable, trim
from runtimes.errors import BadInput
from tests.pipeline.models.hub_forms import ENGLISH, OTHERS, byte_level, corpus, unigram, word_piece

TEXTS = OTHERS | {"English": ENGLISH}
ALPHABET = sorted({character for text in corpus() for character in text} | set("éßİ\u200d\u00a0ঌ𝒳"))


def added_behind() -> str:
    """BPE with words that were added after it was made, numbered behind its vocabulary."""
    tokenizer = Tokenizer.from_str(byte_level())
    tokenizer.add_tokens(["covid19", AddedToken("Straßenlampe", single_word=True)])
    tokenizer.add_special_tokens(["<entity>"])
    return tokenizer.to_str()


def old_merges() -> str:
    """BPE as files of before 2024 have it, with the post-processor in a sequence."""
    state = json.loads(byte_level())
    state["model"]["merges"] = [" ".join(merge) for merge in state["model"]["merges"]]
    state["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
                                                                   "use_regex": True}, state["post_processor"]]}  # fmt: skip
    state["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 400, "pad_type_id": 0,
                        "pad_token": "<pad>"}  # fmt: skip
    return json.dumps(state)


def plain_word_piece() -> str:
    """Without a post-processor."""
    return json.dumps(json.loads(word_piece()) | {"post_processor": None})


KINDS = {
    "WordPiece": word_piece, "cased WordPiece": lambda: word_piece(False), "WordPiece without post-processor": plain_word_piece,
    "BPE": byte_level, "BPE with tokens added behind": added_behind, "BPE of old files": old_merges, "unigram": unigram,
    "unigram of ALBERT": lambda: unigram("[CLS]", "[SEP]"), "unigram with bytes": lambda: unigram(byte_fallback=True),
}  # fmt: skip


def numbers(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).ids


@pytest.mark.parametrize("kept", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_kept_texts_keep_their_tokens_and_all_others_stay_in_range(kind, kept):
    text = KINDS[kind]()
    before = Tokenizer.from_str(text)
    before.no_padding()
    used = {number for line in TEXTS[kept] for number in numbers(before, line)}
    trimmed = trim(text, used)
    after = Tokenizer.from_str(trimmed.tokenizer_json)
    rows = trimmed.old_ids
    assert len(rows) < before.get_vocab_size() and rows == sorted(set(rows))
    assert sorted(after.get_vocab().values()) == list(range(len(rows)))
    assert {token: rows[number] for token, number in after.get_vocab().items()}.items() <= before.get_vocab().items()
    for line in TEXTS[kept]:
        old, new = before.encode(line, line), after.encode(line, line)
        assert [rows[number] for number in new.ids] == old.ids
        assert (new.tokens, new.type_ids, new.offsets) == (old.tokens, old.type_ids, old.offsets)
    same = 0
    for line in [*corpus(), *random_texts(kept, 150)]:
        new, old = numbers(after, line), numbers(before, line)
        assert all(number < len(rows) for number in new)
        if set(old) <= set(rows):
            assert [rows[number] for number in new] == old
            same += 1
    assert same > len(TEXTS[kept]), "random texts of kept tokens are among them"


def random_texts(kept: str, count: int) -> list[str]:
    """Words and pieces of words of the kept texts, and characters of any."""
    generator = random.Random(kept)
    words = [word for line in TEXTS[kept] for word in line.split()]
    made = []
    for _ in range(count):
        parts = generator.choices(words, k=generator.randint(1, 5))
        if generator.random() < 0.5:
            parts[0] = parts[0][: generator.randint(1, 4)] + generator.choice(ALPHABET)
        made.append(generator.choice((" ", "", "  ")).join(parts))
    return made


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("BPE") and "old" not in kind])
def test_bytes_spell_what_no_token_is_left_for(kind):
    text = KINDS[kind]()
    after = Tokenizer.from_str(trim(text, ()).tokenizer_json)
    for line in corpus():
        assert after.decode(numbers(after, line)) == line
        assert "<unk>" not in after.encode(line).tokens
    state = json.loads(trim(text, ()).tokenizer_json)
    assert len(state["model"]["merges"]) < 5


def test_byte_fallback_spells_characters_that_went():
    after = Tokenizer.from_str(trim(unigram(byte_fallback=True), ()).tokenizer_json)
    assert [f"<0x{byte:02X}>" for byte in "灯".encode()] == after.encode("灯").tokens[-4:-1]


def test_what_an_unknown_character_costs_stays():
    before = json.loads(unigram())["model"]["vocab"]
    after = json.loads(trim(unigram(), ()).tokenizer_json)["model"]["vocab"]
    assert min(score for _, score in after) == min(score for _, score in before)


def test_words_added_behind_the_vocabulary_stay_whole():
    trimmed = trim(added_behind(), ())
    after = Tokenizer.from_str(trimmed.tokenizer_json)
    assert {"covid19", "Straßenlampe", "<entity>"} <= set(after.encode("covid19 Straßenlampe <entity>").tokens)
    assert {Tokenizer.from_str(added_behind()).get_vocab()["covid19"]} <= indispensable(added_behind())


@pytest.mark.parametrize(
    ("change", "named"),
    [({"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}, "is WordLevel"), ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix")],
)
def test_what_cannot_be_cut_is_refused(change, named):
    state = json.loads(byte_level())
    with pytest.raises(BadInput, match=named):
        trim(json.dumps(state | {"model": change if "type" in change else state["model"] | change}), ())

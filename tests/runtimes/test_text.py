"""Encoding: what the tokenizers library gives and cuts, without what it costs there, and character offsets in the text as it was given."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from tokenizers import Tokenizer

from runtimes.errors import BadInput, IntegrityError
from runtimes.text import TextEncoder

WORDS = ["anna", "lives", "in", "Köln", "Cafe\u0301", "今天", "[SEP]", "\U0001f600", "x-ray", "3.5%", "\u00a0", "unseen"]


def random_text(source: random.Random, most: int) -> str:
    return " ".join(source.choices(WORDS, k=source.randrange(most)))


@pytest.fixture
def library(tokenizer_file) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_file))


@pytest.mark.parametrize("max_length", [3, 4, 7, 8, 21])
def test_texts_and_pairs_are_cut_as_the_library_cuts_them(tokenizer_file, library, max_length):
    encoder, source, cut = TextEncoder(tokenizer_file, max_length), random.Random(max_length), 0
    library.enable_truncation(max_length)
    given = [random_text(source, 12) if i % 2 else (random_text(source, 12), random_text(source, 12)) for i in range(400)]
    for text, encoding, lean in zip(given, encoder.encode_batch(given), encoder.encode_batch(given, offsets=False), strict=True):
        expected = library.encode(*((text,) if isinstance(text, str) else text))
        assert (encoding.ids, encoding.types, encoding.offsets) == (expected.ids, expected.type_ids, expected.offsets), text
        assert encoding.sequences == [-1 if number is None else number for number in expected.sequence_ids]
        assert (lean.ids, lean.types) == (expected.ids, expected.type_ids) and not lean.offsets and not lean.sequences
        cut += bool(expected.overflowing)
        assert encoding == encoder.encode(*((text,) if isinstance(text, str) else text))
    assert encoder.truncated == 2 * cut + cut and cut > 0


@pytest.mark.parametrize("stride", [0, 1, 4])
@pytest.mark.parametrize("max_length", [12, 17])
def test_windows_are_those_of_the_library(tokenizer_file, library, max_length, stride):
    encoder, source = TextEncoder(tokenizer_file, max_length), random.Random(stride)
    library.enable_truncation(max_length, stride=stride, strategy="only_second")
    several = 0
    for _ in range(300):
        question, context = " ".join(source.choices(["who", "lives", "?"], k=source.randrange(4))), random_text(source, 25)
        expected = library.encode(question, context)
        windows = encoder.windows(question, context, stride)
        assert [(w.ids, w.types, w.offsets) for w in windows] == [(w.ids, w.type_ids, w.offsets) for w in (expected, *expected.overflowing)]
        several += len(windows) > 1
    assert several > 30 and encoder.truncated == 0, "a context in windows is not cut"


def test_windows_cover_the_context_and_overlap_by_the_stride(tokenizer_file):
    encoder = TextEncoder(tokenizer_file, 12)
    context = "anna lives in the city of light . " * 5
    windows = encoder.windows("who lives ?", context, stride=2)
    parts = [[offset for offset, text in zip(w.offsets, w.sequences, strict=True) if text == 1] for w in windows]
    alone = TextEncoder(tokenizer_file, 999).encode(context)
    whole = [offset for offset, text in zip(alone.offsets, alone.sequences, strict=True) if text == 0]
    assert [*parts[0], *(offset for part in parts[1:] for offset in part[2:])] == whole
    assert all(before[-2:] == after[:2] for before, after in pairwise(parts))
    assert all(len(w.ids) <= 12 and w.ids[:5] == windows[0].ids[:5] and w.types[0] == 0 and w.types[-1] == 1 for w in windows)


def test_a_context_that_fits_and_an_empty_one_are_one_window(tokenizer_file):
    encoder = TextEncoder(tokenizer_file, 12)
    assert encoder.windows("who", "anna", 128) == [encoder.encode("who", "anna")]
    (empty,) = encoder.windows("who", "", 4)
    assert 1 not in empty.sequences


@pytest.mark.parametrize(("question", "context", "stride"), [("who " * 8, "anna " * 9, 2), ("who " * 30, "anna", 0), ("who " * 30, "", 0)])
def test_a_question_that_leaves_no_room_is_refused_with_its_numbers(tokenizer_file, question, context, stride):
    asked = len(question.split())
    with pytest.raises(BadInput, match=rf"the question has {asked} tokens; of 12 tokens in a window, .* it may have {12 - 3 - stride - 1}"):
        TextEncoder(tokenizer_file, 12).windows(question, context, stride)


def test_the_longest_question_that_is_said_to_fit_does_fit(tokenizer_file):
    encoder = TextEncoder(tokenizer_file, 12)
    assert all(len(w.ids) <= 12 for w in encoder.windows("who " * 6, "anna " * 20, 2))
    with pytest.raises(BadInput):
        encoder.windows("who " * 7, "anna " * 20, 2)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Café Köln", ["Café", "Köln"]),  # composed letters become one letter and a mark that goes
        ("KO\u0308LN Anna", ["KO\u0308LN", "Anna"]),
        ("今天 anna", ["今", "天", "anna"]),  # blanks are put around ideographs
        ("\u200banna\x00 berlin", ["anna", "berlin"]),  # characters that are dropped
        ("  Anna   BERLIN\n", ["Anna", "BERLIN"]),
        ("\U0001f600 anna", ["\U0001f600", "anna"]),  # outside of the basic plane: one character, not two
    ],
)
def test_offsets_count_characters_of_the_text_as_given(tokenizer_file, text, parts):
    encoding = TextEncoder(tokenizer_file, 64).encode(text)
    found = [text[start:end].strip("\u200b\x00") for (start, end), part in zip(encoding.offsets, encoding.sequences, strict=True) if part == 0]
    assert found == parts
    assert encoding.offsets[0] == encoding.offsets[-1] == (0, 0) and encoding.sequences[0] == encoding.sequences[-1] == -1


def test_special_tokens_written_in_a_text_are_of_the_text(tokenizer_file):
    encoding = TextEncoder(tokenizer_file, 64).encode("a [SEP] b", "c")
    assert encoding.sequences == [-1, 0, 0, 0, -1, 1, -1]
    assert encoding.types == [0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("offsets", [True, False])
def test_half_a_surrogate_pair_is_refused_with_its_place(tokenizer_file, offsets):
    encoder = TextEncoder(tokenizer_file, 16)
    with pytest.raises(BadInput, match=r"^the text: character 3 is U\+D83D, half of a surrogate pair"):
        encoder.encode("an\ud83d", offsets=offsets)
    with pytest.raises(BadInput, match=r"^text 2 of 3: character 1 is U\+DC00"):
        encoder.encode_batch(["a", ("b", "\udc00c"), "d"], offsets)
    with pytest.raises(BadInput, match="half of a surrogate pair"):
        encoder.windows("who", "\udfff", 1)


@pytest.mark.parametrize("text", [None, 3, b"a", ["a", "b", "c"]])
def test_what_is_no_text_is_refused(tokenizer_file, text):
    with pytest.raises(BadInput, match="is not a text"):
        TextEncoder(tokenizer_file, 16).encode(text)


def test_settings_in_the_tokenizer_file_do_not_cut_or_pad(tmp_path, library):
    library.enable_truncation(4)
    library.enable_padding(length=20)
    library.save(str(tmp_path / "tokenizer.json"))
    assert len(TextEncoder(tmp_path / "tokenizer.json", 64).encode("anna lives in berlin").ids) == 6


def test_no_tokenizer_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json: not a tokenizer file"):
        TextEncoder(tmp_path / "tokenizer.json", 16)
    with pytest.raises(IntegrityError, match="not a tokenizer file"):
        TextEncoder(tmp_path / "none.json", 16)


def test_no_texts_make_no_encodings(tokenizer_file):
    assert TextEncoder(tokenizer_file, 16).encode_batch([]) == []

"""Words of a raw text, their first tokens, and spans from their tags."""

from __future__ import annotations

import random
import unicodedata

import pytest

from runtimes.decode.tags import spans_of
from runtimes.decode.words import find_words, first_tokens, is_ideograph, joined_words
from runtimes.text import Encoding, TextEncoder


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \t\n\u00a0 ", []),
        ("wake me up at 7:30", ["wake", "me", "up", "at", "7:30"]),
        ("(Don't go!)", ["(", "Don't", "go", "!", ")"]),
        ("U.S. costs 3.5%...", ["U.S.", "costs", "3.5", "%", ".", ".", "."]),
        ("...", [".", ".", "."]),
        ('"x-ray"', ['"', "x-ray", '"']),
        ("今天很cold", ["今", "天", "很", "cold"]),
        ("abc今def,天", ["abc", "今", "def", ",", "天"]),
        ("\U00020000x", ["\U00020000", "x"]),
        ("Cafe\u0301, na\u0131f", ["Cafe\u0301", ",", "na\u0131f"]),  # a mark after the last letter is of the word
        ("हिन्दी।", ["हिन्दी", "।"]),  # so are vowel signs
        ("hi \U0001f600\U0001f680", ["hi", "\U0001f600", "\U0001f680"]),
        ("$5 ½ ²", ["$", "5", "½", "²"]),
        ("Berlin—the city", ["Berlin", "—", "the", "city"]),
        ("Anna's, Anna’s ANNA'S", ["Anna", "'s", ",", "Anna", "’s", "ANNA", "'S"]),
        ("'s 's' cats'", ["'", "s", "'", "s", "'", "cats", "'"]),  # no word before it
        ("Berlin,Köln and 3,000", ["Berlin", ",", "Köln", "and", "3,000"]),
        ("B2,3c 3,c", ["B2,3c", "3", ",", "c"]),
        ("Berlin...anna Berlin…anna a.b", ["Berlin", ".", ".", ".", "anna", "Berlin", "…", "anna", "a.b"]),
        ("anna(Berlin)s", ["anna", "(", "Berlin", ")", "s"]),
        ("Anna/Berlin 24/7 1990–95", ["Anna", "/", "Berlin", "24/7", "1990", "–", "95"]),
        ("Anna--Berlin x-ray x‐ray", ["Anna", "-", "-", "Berlin", "x-ray", "x‐ray"]),
        ('Anna"Berlin„Köln', ["Anna", '"', "Berlin", "„", "Köln"]),
        ("(U.S.), U.S.'s u.s. ab.c. J.", ["(", "U.S.", ")", ",", "U.S.", "'s", "u.s.", "ab.c", ".", "J", "."]),
        ("a.b.", ["a.b."]),
        ("café's", ["café", "'s"]),
    ],
)
def test_words_of_a_text(text, words):
    assert [text[start:end] for start, end in find_words(text)] == words


def test_words_cover_everything_but_blanks_once_and_in_order():
    source = random.Random(0)
    signs = " \t\u2003absÉß3٣.,'-_$/(\u2014\u0301\u0902今豈\U0001f600\ufe0f\u200b\x00"
    for _ in range(2000):
        text = "".join(source.choices(signs, k=source.randrange(12)))
        words = find_words(text)
        covered = [i for start, end in words for i in range(start, end)]
        assert covered == [i for i, sign in enumerate(text) if not sign.isspace()], repr(text)
        for start, end in words:
            assert end - start == 1 or text[start].isalnum() or text[start:end].lower() == "'s", repr(text)
            assert end - start == 1 or unicodedata.category(text[end - 1])[0] in "LNM" or text[end - 1] == ".", repr(text)
            assert end - start == 1 or not any(map(is_ideograph, text[start:end]))


def test_words_of_joined_tokens_are_the_tokens():
    tokens = ["Anna", "'s", "", "New York", "今"]
    assert [" ".join(tokens)[start:end] for start, end in joined_words(tokens)] == tokens
    assert joined_words([]) == []


def test_a_word_is_where_its_first_piece_is(tokenizer_file, pieces):
    encoder = TextEncoder(tokenizer_file, 64)
    for text in ["Anna lives in Köln.", "xyz (Café) 今天 don't", "  a\u0301b  3.5%", "\U0001f600 anna"]:
        encoding, words = encoder.encode(text), find_words(text)
        firsts = first_tokens(words, encoding)
        assert all(token > 0 and encoding.sequences[token] == 0 for token in firsts)
        assert [encoding.offsets[token][0] for token in firsts] == [start for start, _ in words]
        assert not any(pieces[encoding.ids[token]].startswith("##") for token in firsts)
        assert firsts == sorted(set(firsts))


def test_a_word_that_was_cut_off_or_dropped_has_no_token(tokenizer_file):
    encoder = TextEncoder(tokenizer_file, 5)
    text = "anna \u200b lives in berlin today"
    assert first_tokens(find_words(text), encoder.encode(text)) == [1, -1, 2, 3, -1, -1]
    assert first_tokens([], encoder.encode(text)) == []


def test_a_tag_goes_to_the_first_text_of_a_pair_only(tokenizer_file):
    encoding = TextEncoder(tokenizer_file, 64).encode("anna", "lives in berlin")
    assert first_tokens([(0, 4), (6, 8)], encoding) == [1, -1]


def test_tokens_that_begin_with_the_blank_before_them_are_found():
    """SentencePiece gives a blank to the token after it; byte-level tokenizers may join what are two words here."""
    encoding = Encoding([0, 1, 2, 3], [0] * 4, [(0, 0), (0, 4), (4, 10), (0, 0)], [-1, 0, 0, -1])
    assert first_tokens([(0, 4), (5, 9), (9, 10)], encoding) == [1, 2, -1], "a token is of one word only"


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("", []),
        ("O O", []),
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("B-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),
        ("I-PER I-PER", [("PER", 0, 2)]),  # no beginning: it begins here
        ("O I-LOC O I-LOC", [("LOC", 1, 2), ("LOC", 3, 4)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),
        ("B-a-b I-a-b I-b", [("a-b", 0, 2), ("b", 2, 3)]),
        ("PER PER O LOC", [("PER", 0, 2), ("LOC", 3, 4)]),  # tags without B and I
    ],
)
def test_spans_of_tags(tags, spans):
    assert spans_of(tags.split()) == spans

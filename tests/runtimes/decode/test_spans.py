"""Spans with their characters: tags of tokens, intents with slots, and answers in a context read in windows."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from runtimes.decode.intent_and_slots import IntentAndSlots
from runtimes.decode.question_answering import QuestionAnswering, best_span, null_score
from runtimes.decode.token_classification import TokenClassification
from runtimes.decode.words import find_words, first_tokens
from runtimes.errors import BadInput, IntegrityError
from runtimes.text import TextEncoder

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
SURE = 6.0


def options(kind: str, **changes) -> dict:
    return {"kind": kind, "columns": ["text"], "segments": 1, "decode": "softmax"} | changes


def plain(found: dict) -> dict:
    assert json.loads(json.dumps(found)) == found, "an answer is plain JSON"
    return found


# --- tags -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tokenizer_file) -> TextEncoder:
    return TextEncoder(tokenizer_file, 32)


@pytest.fixture
def tagger() -> TokenClassification:
    return TokenClassification(options("token-classification"), {"logits": TAGS})


def tag_logits(text: str, encoder: TextEncoder, tags: dict[str, str]) -> np.ndarray:
    """Logits [n, T] that give words their tags on the first token, and something else on all others."""
    encoding = encoder.encode(text)
    logits = np.zeros((len(encoding.ids), len(TAGS)), np.float32)
    logits[:, TAGS.index("I-LOC")] = 2 * SURE  # what tokens that are not a word's first say must not matter
    words = find_words(text)
    for (start, end), token in zip(words, first_tokens(words, encoding), strict=True):
        if token >= 0:
            logits[token] = 0
            logits[token, TAGS.index(tags.get(text[start:end], "O"))] = SURE
    return logits


@pytest.mark.parametrize(
    ("text", "tags", "spans"),
    [
        ("Anna Köln lives in Berlin.", {"Anna": "B-PER", "Köln": "I-PER", "Berlin": "B-LOC"}, [("PER", "Anna Köln"), ("LOC", "Berlin")]),
        ('"Anna", (Berlin)', {"Anna": "B-PER", "Berlin": "I-LOC"}, [("PER", "Anna"), ("LOC", "Berlin")]),
        ("  Ko\u0308ln\t今天 \U0001f600 Café!", {"Ko\u0308ln": "B-LOC", "今": "B-PER", "天": "I-PER", "Café": "B-LOC"},
         [("LOC", "Ko\u0308ln"), ("PER", "今天"), ("LOC", "Café")]),
        ("anna berlin", {"anna": "B-PER", "berlin": "B-PER"}, [("PER", "anna"), ("PER", "berlin")]),
        ("anna \u200b berlin", {"anna": "B-PER", "berlin": "I-PER"}, [("PER", "anna \u200b berlin")]),  # what no tokenizer sees parts nothing
        ("the city", {}, []),
        ("", {}, []),
        ("\u200b", {}, []),
    ],
)  # fmt: skip
def test_spans_stand_where_they_are_in_the_original_text(tagger, encoder, text, tags, spans):
    example = {"text": text}
    found = plain(tagger.answer(example, tagger.encode(encoder, example), [{"logits": tag_logits(text, encoder, tags)}]))
    assert [(span["type"], span["text"]) for span in found["spans"]] == spans
    assert all(text[span["start"] : span["end"]] == span["text"] for span in found["spans"])
    sure = math.exp(SURE) / (math.exp(SURE) + len(TAGS) - 1)
    assert [span["probability"] for span in found["spans"]] == pytest.approx([sure] * len(spans))
    assert tagger.line(found).count("\t") == max(0, len(spans) - 1)


def test_a_span_is_as_probable_as_its_words_are_on_average(tagger, encoder):
    logits = tag_logits("anna berlin", encoder, {"anna": "B-PER", "berlin": "I-PER"})
    logits[2] *= 0.1
    found = tagger.answer({"text": "anna berlin"}, [encoder.encode("anna berlin")], [{"logits": logits}])
    expected = [math.exp(score) / (math.exp(score) + 4) for score in (SURE, 0.1 * SURE)]
    assert found["spans"][0]["probability"] == pytest.approx(np.mean(expected))
    assert tagger.line(found) == "PER 0-11 anna berlin"


def test_words_that_were_cut_off_have_no_tag(tagger, tokenizer_file):
    short = TextEncoder(tokenizer_file, 4)
    text = "anna in berlin"
    found = tagger.answer({"text": text}, [short.encode(text)], [{"logits": tag_logits(text, short, {"anna": "B-PER", "berlin": "B-LOC"})}])
    assert [span["text"] for span in found["spans"]] == ["anna"]


def test_a_token_of_two_words_tags_the_first_only(tagger, encoder):
    text = "in berlin\U0001f600, anna"
    encoding = encoder.encode(text)
    shared = encoding.offsets.index((3, 10))  # one [UNK] for the city and the emoji
    logits = np.zeros((len(encoding.ids), len(TAGS)), np.float32)
    logits[:, TAGS.index("O")] = SURE
    logits[shared] = SURE * np.eye(len(TAGS))[TAGS.index("B-LOC")]
    assert [(s["type"], s["start"], s["end"]) for s in tagger.answer({"text": text}, [encoding], [{"logits": logits}])["spans"]] == [("LOC", 3, 9)]


def test_tags_are_decided_for_every_token(tagger):
    logits = np.random.default_rng(0).normal(size=(7, len(TAGS)))
    assert tagger.decisions({"logits": logits}).tolist() == logits.argmax(1).tolist()
    assert tagger.margins({"logits": logits}) == pytest.approx(np.sort(logits)[:, -1] - np.sort(logits)[:, -2])


def test_tags_for_other_tokens_are_refused(tagger, encoder):
    with pytest.raises(IntegrityError, match="the file gives tags for 3 tokens of 4"):
        tagger.answer({"text": "anna berlin"}, [encoder.encode("anna berlin")], [{"logits": np.zeros((3, 5))}])
    with pytest.raises(IntegrityError, match="token-classification reads 1 to 1 columns"):
        TokenClassification(options("token-classification", columns=["text", "text_pair"]), {"logits": TAGS})


@pytest.mark.parametrize("names", [("logits", "slot_logits"), ("probabilities", "slot_probabilities")])
def test_intent_and_slots_are_one_answer(encoder, names):
    decode = "softmax" if names[0] == "logits" else "none"
    decoder = IntentAndSlots(options("intent-and-slots", decode=decode, threshold=0.4), {"logits": ["go", "stop"], "slot_logits": TAGS})
    text = "go to Berlin"
    outputs = {names[0]: np.array([0.9, 0.1]), names[1]: tag_logits(text, encoder, {"Berlin": "B-LOC"})}
    example = decoder.example(text)
    found = plain(decoder.answer(example, decoder.encode(encoder, example), [outputs]))
    assert (found["label"], [(s["type"], s["start"], s["end"]) for s in found["spans"]]) == ("go", [("LOC", 6, 12)])
    assert len(found["labels"]) == 2 and decoder.line(found).startswith("go\t0.") and decoder.line(found).endswith("\tLOC 6-12 Berlin")
    tokens = len(outputs[names[1]])
    assert decoder.decisions(outputs).tolist() == [0, *outputs[names[1]].argmax(1).tolist()]
    assert decoder.margins(outputs).shape == (1 + tokens,)


# --- questions ------------------------------------------------------------------------------------------------------------

CONTEXT = "The city of Köln: Anna lives in a Café (3.5%) in Berlin, 今天 the light of the city of Berlin lives in Köln."


def reader(**changes) -> QuestionAnswering:
    given = {"columns": ["question", "context"], "segments": 2, "decode": "none", "stride": 4, "longest_answer": 6} | changes
    return QuestionAnswering(options("question-answering", **given), {})


def random_outputs(encodings, seed: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [{name: random.normal(size=len(one.ids)).astype(np.float32) for name in ("start_logits", "end_logits")} for one in encodings]


def every_span(encodings, outputs, longest: int) -> list[tuple[float, int, int, int]]:
    """All spans that could be an answer: (score, window, first, last)."""
    found = []
    for window, (encoding, one) in enumerate(zip(encodings, outputs, strict=True)):
        tokens = [i for i, sequence in enumerate(encoding.sequences) if sequence == 1]
        found += [
            (float(one["start_logits"][i]) + float(one["end_logits"][j]), window, i, j) for i in tokens for j in tokens if i <= j < i + longest
        ]
    return found


@pytest.mark.parametrize("longest", [1, 3, 100])
@pytest.mark.parametrize("max_length", [14, 24])
def test_the_best_span_is_the_best_of_all(tokenizer_file, longest, max_length):
    encodings = TextEncoder(tokenizer_file, max_length).windows("who lives in?", CONTEXT, 4)
    assert len(encodings) > 1
    for seed in range(20):
        outputs = random_outputs(encodings, seed)
        score, *place = max(every_span(encodings, outputs, longest))
        span = best_span(encodings, outputs, longest)
        assert list(span[:3]) == place and span.score == pytest.approx(score)


def test_the_answer_is_the_context_between_its_characters_and_its_score_a_probability(tokenizer_file):
    encoder, decoder = TextEncoder(tokenizer_file, 14), reader()
    example = decoder.example(("who lives in?", CONTEXT))
    encodings = decoder.encode(encoder, example)
    totals = []
    for seed in range(20):
        outputs = random_outputs(encodings, seed)
        found = plain(decoder.answer(example, encodings, outputs))
        span = best_span(encodings, outputs, 6)
        first, last = encodings[span.window].offsets[span.first], encodings[span.window].offsets[span.last]
        assert (found["start"], found["end"], found["answer"]) == (first[0], last[1], CONTEXT[first[0] : last[1]])
        spans = every_span(encodings, outputs, 10**6)
        weights = {side: sum(math.exp(one[side][i]) for e, one in zip(encodings, outputs, strict=True) for i, s in enumerate(e.sequences) if s == 1)
                   for side in ("start_logits", "end_logits")}  # fmt: skip
        assert found["score"] == pytest.approx(math.exp(span.score) / (weights["start_logits"] * weights["end_logits"]), rel=1e-5)
        totals.append(sum(math.exp(score) for score, *_ in spans) / (weights["start_logits"] * weights["end_logits"]))
    assert max(totals) <= 1, "no more than the probability of everything"


@pytest.mark.parametrize("word", ["Köln", "Café", "3.5%", "今天", "Anna lives"])
def test_offsets_hold_in_every_window(tokenizer_file, word):
    encoder, decoder = TextEncoder(tokenizer_file, 16), reader()
    example = {"question": "who?", "context": CONTEXT}
    encodings = decoder.encode(encoder, example)
    outputs = [{name: np.zeros(len(one.ids)) for name in ("start_logits", "end_logits")} for one in encodings]
    at, whole = CONTEXT.index(word), 0
    for encoding, one in zip(encodings, outputs, strict=True):
        places = [i for i, (s, sequence) in enumerate(zip(encoding.offsets, encoding.sequences, strict=True)) if sequence == 1]
        first = [i for i in places if encoding.offsets[i][0] == at]
        last = [i for i in places if encoding.offsets[i][1] == at + len(word)]
        if first and last:
            one["start_logits"][first[0]], one["end_logits"][last[0]] = SURE, SURE
            whole += 1
    assert whole >= 1
    found = decoder.answer(example, encodings, outputs)
    assert (found["answer"], found["start"]) == (word, at)
    assert decoder.line(found) == f"{word}\t{found['score']:.4f}\t{at}-{at + len(word)}"


@pytest.mark.parametrize(
    ("context", "answer"), [("in cafe\u0301 berlin", "cafe\u0301"), ("anna cafe\u0301", "anna cafe\u0301"), ("in cafe berlin", "cafe")]
)
def test_an_answer_keeps_the_accent_of_its_last_letter(encoder, context, answer):
    example, at = {"question": "who", "context": context}, context.index(answer)
    (encoding,) = encodings = reader().encode(encoder, example)
    logits = np.zeros((2, len(encoding.ids)))
    inside = [i for i, ((a, _), n) in enumerate(zip(encoding.offsets, encoding.sequences, strict=True)) if n == 1 and at <= a < at + len(answer)]
    logits[0, inside[0]] = logits[1, inside[-1]] = SURE
    found = reader().answer(example, encodings, [{"start_logits": logits[0], "end_logits": logits[1]}])
    assert (found["answer"], found["start"], found["end"]) == (answer, at, at + len(answer))


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.5])
def test_no_answer_where_the_null_score_is_above_the_best_span_by_more_than_the_threshold(tokenizer_file, threshold):
    encoder, decoder = TextEncoder(tokenizer_file, 14), reader(no_answer=True, null_threshold=threshold)
    example = {"question": "who lives in?", "context": CONTEXT}
    encodings, without = decoder.encode(encoder, example), 0
    for seed in range(60):
        outputs = random_outputs(encodings, seed)
        for one in outputs:  # not equal in all windows: the lowest counts
            one["start_logits"][0] += 5.5
        null = min(float(one["start_logits"][0]) + float(one["end_logits"][0]) for one in outputs)
        assert null_score(outputs) == pytest.approx(null)
        found = plain(decoder.answer(example, encodings, outputs))
        expected = null - best_span(encodings, outputs, 6).score > threshold
        assert (found["answer"] is None) is expected is (found["start"] is None) is (found["end"] is None)
        assert 0 < found["score"] < 1
        assert decoder.line(found).startswith("(no answer)\t") is expected
        assert reader().answer(example, encodings, outputs)["answer"] is not None, "only where the task has questions without answer"
        without += expected
    assert 0 < without < 60


def test_the_first_token_is_never_a_part_of_an_answer(tokenizer_file):
    encoder, decoder = TextEncoder(tokenizer_file, 32), reader()
    example = {"question": "who lives in berlin", "context": "anna"}
    (encoding,) = encodings = decoder.encode(encoder, example)
    outputs = [{name: np.where(np.array(encoding.sequences) == 1, 0.0, 50.0) for name in ("start_logits", "end_logits")}]
    assert decoder.answer(example, encodings, outputs) == {"answer": "anna", "start": 0, "end": 4, "score": 1.0}


@pytest.mark.parametrize("context", ["", " ", "\u200b"])
def test_an_empty_context_has_no_answer(tokenizer_file, context):
    encoder = TextEncoder(tokenizer_file, 16)
    example = {"question": "who", "context": context}
    for decoder, score in ((reader(), 0.0), (reader(no_answer=True), 1.0)):
        encodings = decoder.encode(encoder, example)
        found = plain(decoder.answer(example, encodings, random_outputs(encodings, 0)))
        assert found == {"answer": None, "start": None, "end": None, "score": score}


def test_what_an_input_decides_is_its_start_and_its_end():
    outputs = {"start_logits": np.array([0.0, 3.0, 1.0]), "end_logits": np.array([0.0, 1.0, 1.5])}
    assert reader().decisions(outputs).tolist() == [1, 2]
    assert reader().margins(outputs).tolist() == [2.0, 0.5]


def test_a_question_without_room_is_bad_input(tokenizer_file):
    with pytest.raises(BadInput, match="the question has 40 tokens"):
        reader().encode(TextEncoder(tokenizer_file, 16), {"question": "who " * 40, "context": CONTEXT})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stride": -1}, "task: stride: -1 is not a whole number of 0 or more"),
        ({"longest_answer": 0}, "task: longest_answer: 0 is not"),
        ({"longest_answer": 3.0}, r"task: longest_answer: 3\.0 is not a whole number"),
        ({"no_answer": None}, "task: no_answer: None is not true or false"),
        ({"null_threshold": "x"}, "task: null_threshold: 'x' is not a finite number"),
        ({"columns": ["context"]}, "takes a question and a context"),
    ],
)
def test_options_that_are_nonsense_are_named(changes, says):
    with pytest.raises(IntegrityError, match=says):
        reader(**changes)


@pytest.mark.parametrize(
    "outputs", [{"start_logits": np.zeros(3)}, {"start_logits": np.zeros(3), "end_logits": np.zeros(2)}, {"logits": np.zeros(3)},
                {"start_logits": np.zeros((3, 1)), "end_logits": np.zeros((3, 1))}, {"start_logits": np.zeros(3), "end_logits": np.zeros(3)}],
)  # fmt: skip
def test_outputs_of_another_task_are_refused(encoder, outputs):
    with pytest.raises(IntegrityError, match=r"start_logits|end_logits"):
        reader().answer({"question": "who", "context": "anna"}, [encoder.encode("who", "anna")], [outputs])

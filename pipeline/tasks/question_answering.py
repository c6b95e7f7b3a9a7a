"""Questions whose answer stands in a text: SQuAD 1.1 and 2.0.

Source: Devlin et al. 2018, arXiv:1810.04805 §4.2 and §4.3: question and context are one input with two segments, and two logits a
token say where the answer starts and ends; a context that is too long is read in overlapping windows. An input without the answer
points at its first token in 2.0 and teaches nothing in 1.1. The metrics are those of the official evaluation script.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from pipeline.tasks.base import SPLITS, Data, Metric, Outputs, Row, Task
from pipeline.tasks.batches import IGNORED, EncodedTexts, from_id_lists
from pipeline.tasks.files import fill_missing, fingerprint, read_text, refuse_surrogates, split_files, told_names
from pipeline.tasks.heads import head_shape
from runtimes.decode.question_answering import QuestionAnswering as Decoder
from runtimes.decode.words import end_with_marks
from runtimes.errors import BadInput
from runtimes.text import Encoding, TextEncoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from pipeline.tasks.batches import Batch

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_SCORE = -1e4
"""Logit of what is no token of an input."""


class QuestionAnswering(Task):
    """A question and a context; the answer is a span of the context, or none."""

    kind: ClassVar[str] = "question-answering"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("f1", "F1"), Metric("exact_match", "exact match"))

    max_length: int = Field(256, ge=16, le=512)
    """Longest input in tokens, question and window of the context together."""
    stride: int = Field(64, ge=0)
    """Tokens of the context that a window shares with the one before."""
    longest_answer: int = Field(30, ge=1)
    """Most tokens of an answer."""
    null_threshold: float = 0.0
    """How much "no answer" must score above the best span to be the answer, where questions may have none."""

    @model_validator(mode="after")
    def _windows_move_on(self) -> QuestionAnswering:
        if self.stride >= self.max_length // 2:
            raise ValueError(f"stride: {self.stride} leaves windows of {self.max_length} tokens too little to move on by; at most half is needed")
        return self

    @property
    def segments(self) -> int:
        return 2

    @property
    def columns(self) -> tuple[str, ...]:
        return ("question", "context")

    # --- rows ---------------------------------------------------------------------------------------------------------

    def read(self, folder: Path) -> Data:
        rows, files = {}, split_files(folder, (".json",))
        for split, path in files.items():
            rows[split] = list(read_squad(path))
            if not rows[split]:
                raise BadInput(f"{path}: no questions")
        rows, notes = fill_missing(rows, folder, group=lambda row: row["title"])
        splits = [rows[split] for split in ("train", "validation", "test")]
        if _may_have_none(rows["validation"] + rows["test"]) and not _may_have_none(rows["train"]):
            notes = (*notes, "validation or test questions may have no answer (SQuAD 2.0), which the training rows (1.1) teach no model to say")
        return Data(*splits, {}, fingerprint(splits), (*told_names(files), *notes))

    def heads(self, data: Data) -> list[dict[str, Any]]:
        return [head_shape("span", ["start_logits", "end_logits"], "all", 2)]

    def encode(self, tokenizer: Tokenizer, rows: Sequence[Row], data: Data, pad_id: int) -> EncodedTexts:
        encoder = TextEncoder.of(tokenizer, self.max_length)
        encodings: list[Encoding] = []
        numbers, starts, ends = [], [], []
        for number, row in enumerate(rows):
            try:
                windows = encoder.windows(row["question"], row["context"], self.stride)
            except BadInput as error:
                raise BadInput(f"question {row.get('id', number)}: {error}") from error
            found = self._targets(windows, row)
            encodings += windows
            numbers += [number] * len(windows)
            starts += [start for start, _ in found]
            ends += [end for _, end in found]
        made = from_id_lists([one.ids for one in encodings], pad_id, [one.types for one in encodings])
        targets = {"start": np.array(starts, np.int64), "end": np.array(ends, np.int64)}
        return replace(made, targets=targets, row_of=np.array(numbers, np.int64), encodings=encodings)

    def _targets(self, windows: Sequence[Encoding], row: Row) -> list[tuple[int, int]]:
        """Tokens of the first answer in each window. A window without it points at the first token in 2.0 and teaches nothing in 1.1; where no
        window holds the answer, none teaches, since "no answer" would be false."""
        if not row.get("answers"):
            return [(0, 0) if row.get("impossible") else (IGNORED, IGNORED)] * len(windows)
        begin, text = row["answers"][0]
        last = len(windows) - 1
        end = begin + len(text)
        held = [_span(window, row["context"], begin, end, number == 0, number == last) for number, window in enumerate(windows)]
        absent = (0, 0) if row["may_have_none"] and any(held) else (IGNORED, IGNORED)
        return [span or absent for span in held]

    def trainable(self, texts: EncodedTexts) -> EncodedTexts:
        return texts.take(np.flatnonzero(texts.targets["start"] != IGNORED))

    def untaught(self, texts: EncodedTexts, rows: Sequence[Row]) -> str:
        answered = [number for number, row in enumerate(rows) if row.get("answers")]
        lost = len(set(answered) - set(texts.rows[texts.targets["start"] > 0].tolist()))
        if not lost:
            return ""
        return (
            f"{lost} of {len(answered)} answers stand whole in no window and teach nothing: they are longer than the {self.stride} tokens that "
            f"windows share, or nothing the tokenizer knows; a larger stride or max_length keeps more of them whole"
        )

    # --- losses -------------------------------------------------------------------------------------------------------

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Mean of two cross-entropies over the tokens of an input, of the answer's start and of its end."""
        from torch.nn import functional

        parts = []
        for name in ("start", "end"):
            logits = batch.padded(outputs[f"{name}_logits"].float(), NO_SCORE)
            parts.append(functional.cross_entropy(logits, batch.targets[name], ignore_index=IGNORED))
        return (parts[0] + parts[1]) / 2

    def soft_loss(self, outputs: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch, temperature: float) -> Tensor:
        """The same with the teacher's distributions over the tokens; every window teaches."""
        from pipeline.tasks.losses import softened_divergence

        names = ("start_logits", "end_logits")
        padded = [[batch.padded(values[name].float(), NO_SCORE) for name in names] for values in (outputs, teacher)]
        return sum(softened_divergence(one, other, temperature) for one, other in zip(*padded, strict=True)) / 2

    # --- figures and answers ------------------------------------------------------------------------------------------

    def evaluate(self, outputs: Outputs, texts: EncodedTexts, rows: Sequence[Row], data: Data) -> dict[str, float]:
        decoder = Decoder(self.options(data), {})
        windows: dict[int, list[int]] = {}
        for number, row in enumerate(texts.rows.tolist()):
            windows.setdefault(row, []).append(number)
        f1 = exact = 0.0
        for row_number, numbers in windows.items():
            row = rows[row_number]
            parts = [
                {name: np.asarray(outputs[name])[texts.offsets[n] : texts.offsets[n + 1]] for name in ("start_logits", "end_logits")} for n in numbers
            ]
            answer = decoder.answer(self.example(row), [texts.encoding(n) for n in numbers], parts)["answer"] or ""
            wanted = [text for _, text in row["answers"]] or [""]
            f1 += max(token_f1(answer, text) for text in wanted)
            exact += max(float(normalised(answer) == normalised(text)) for text in wanted)
        return {"f1": 100 * f1 / len(windows), "exact_match": 100 * exact / len(windows)}

    def options(self, data: Data) -> dict[str, Any]:
        return super().options(data) | {
            "stride": self.stride, "longest_answer": self.longest_answer, "null_threshold": self.null_threshold,
            "no_answer": any(_may_have_none(data.split(split)) for split in SPLITS),
        }  # fmt: skip

    def unlabeled_row(self, line: str) -> Row:
        question, separator, context = line.partition("\t")
        if not (separator and question.strip() and context.strip()):
            raise BadInput("a line without labels must hold a question and a context with a tab between them")
        return {"question": question, "context": context, "answers": [], "may_have_none": False}


def _may_have_none(rows: Sequence[Row]) -> bool:
    return any(row["may_have_none"] for row in rows)


def _span(window: Encoding, context: str, begin: int, end: int, first: bool, last: bool) -> tuple[int, int] | None:
    """First and last token of the characters ``begin`` to ``end`` of the context; None where ``window`` does not hold them whole.

    A tokenizer drops some characters. At the edge of an answer they are no loss: it is cut only where the window is.

    Args:
        first, last: whether the window begins, or ends, where the context does.
    """
    told = [i for i, n in enumerate(window.sequences) if n == 1]
    inside = [i for i in told if window.offsets[i][1] > begin and window.offsets[i][0] < end]
    if not inside:
        return None
    cut_before = window.offsets[inside[0]][0] > begin and inside[0] == told[0] and not first
    cut_behind = end_with_marks(context, window.offsets[inside[-1]][1]) < end and inside[-1] == told[-1] and not last
    return None if cut_before or cut_behind else (inside[0], inside[-1])


def read_squad(path: Path) -> Iterator[Row]:
    """Questions of a SQuAD file: id, title, question, context, answers [(first character, text)], may_have_none, impossible.

    Raises:
        BadInput: with the file and the question's id: not SQuAD's form, an answer that does not stand at its offset, no answer in 1.1.
    """
    content = read_text(path)
    try:
        read = json.loads(content)
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}:{error.lineno}: not JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON: {error}") from error
    place = str(path)
    try:
        questions = [
            (str(article.get("title", number)), paragraph["context"], question)
            for number, article in enumerate(read["data"])
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
        second_version = any("is_impossible" in question for _, _, question in questions)
        for title, context, question in questions:
            place = f"{path}: question {question['id']}"
            yield _question(title, context, question, second_version, place)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{place}: not in SQuAD's form, data > paragraphs > context, qas > id, question, answers: {error!r}") from error


def _question(title: str, context: str, question: dict[str, Any], second_version: bool, place: str) -> Row:
    asked = question["question"]
    refuse_surrogates([title, asked, context, str(question["id"])], place)
    if not asked.strip() or not context.strip():
        raise BadInput(f"{place}: question and context must not be empty")
    impossible = bool(question.get("is_impossible", False))
    answers = [] if impossible else [(answer["answer_start"], answer["text"]) for answer in question["answers"]]
    if not impossible and not answers:
        raise BadInput(f"{place}: no answer; only a question that is_impossible may have none")
    for begin, text in answers:
        if not text.strip() or begin < 0 or context[begin : begin + len(text)] != text:
            raise BadInput(f"{place}: the answer {text!r} does not stand at character {begin} of its context")
    # Blanks around an answer belong to no token.
    answers = [(begin + len(text) - len(text.lstrip()), text.strip()) for begin, text in answers]
    return {
        "id": str(question["id"]), "title": title, "question": asked, "context": context, "answers": answers,
        "may_have_none": second_version, "impossible": impossible,
    }  # fmt: skip


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and double blanks, as the official script compares answers."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", plain).split())


def token_f1(given: str, wanted: str) -> float:
    """F1 of the words that two answers share; 1 where both are empty."""
    one, other = normalised(given).split(), normalised(wanted).split()
    if not one or not other:
        return float(one == other)
    common = sum((Counter(one) & Counter(other)).values())
    return 2 * common / (len(one) + len(other))

"""The part of a context that answers a question.

Options: ``stride`` (tokens that a window of the context shares with the window before), ``longest_answer`` (tokens), ``no_answer`` (bool, false):
whether the context may have no answer; ``null_threshold`` (number, 0): how much "no answer" must score above the best span to be the answer.

The rules are those of BERT's ``run_squad.py`` (Devlin et al. 2019, arXiv 1810.04805, section 4.3): a span scores the start logit of its first
token plus the end logit of its last; "no answer" scores what the first token does, the lowest of all windows.

An answer ends after the marks (accents) of its last letter, which tokenizers drop.

What this file does not do: widen a span that ends within a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runtimes.decode.base import Answer, Decoder, Outputs, one_line, output
from runtimes.decode.classes import lead, softmax
from runtimes.decode.words import end_with_marks
from runtimes.errors import IntegrityError

if TYPE_CHECKING:
    from runtimes.text import Encoding, TextEncoder

NO_ANSWER = "(no answer)"
CONTEXT = 1
"""Number of the context among the texts of an input."""


class Span(NamedTuple):
    """Tokens ``first`` to ``last``, both included, of input number ``window``; ``score`` is the sum of their two logits."""

    window: int
    first: int
    last: int
    score: float


class QuestionAnswering(Decoder):
    """``{"answer", "start", "end", "score"}``: the answer is ``context[start:end]``; all three are null if there is none.

    ``score`` is the probability of the answer's start times that of its end, among the context's tokens in all windows (and "no answer").
    """

    kind = "question-answering"
    needs_offsets = True

    def __init__(self, options: Mapping[str, Any], labels: Mapping[str, Sequence[str]]) -> None:
        super().__init__(options, labels)
        self.stride = self.options.whole("stride")
        self.longest_answer = self.options.whole("longest_answer", least=1)
        self.no_answer = self.options.flag("no_answer", False)
        self.null_threshold = float(self.options.number("null_threshold", 0.0))
        if len(self.columns) != 2:
            raise IntegrityError(f"task: columns: {', '.join(self.columns)}; {self.kind} takes a question and a context")

    def encode(self, encoder: TextEncoder, example: Mapping[str, str]) -> list[Encoding]:
        question, context = (example[column] for column in self.columns)
        return encoder.windows(question, context, self.stride)

    def answer(self, example: Mapping[str, str], encodings: Sequence[Encoding], outputs: Sequence[Outputs]) -> Answer:
        nothing = {"answer": None, "start": None, "end": None}
        span = best_span(encodings, outputs, self.longest_answer)
        null = null_score(outputs) if self.no_answer else None
        if span is None:
            return nothing | {"score": float(null is not None)}
        if null is not None and null - span.score > self.null_threshold:
            return nothing | {"score": _probability(encodings, outputs, None, True)}
        offsets, context = encodings[span.window].offsets, example[self.columns[1]]
        start, end = offsets[span.first][0], end_with_marks(context, offsets[span.last][1])
        score = _probability(encodings, outputs, span, self.no_answer)
        return {"answer": context[start:end], "start": start, "end": end, "score": score}

    def line(self, answer: Answer) -> str:
        if answer["answer"] is None:
            return f"{NO_ANSWER}\t{answer['score']:.4f}"
        return f"{one_line(answer['answer'])}\t{answer['score']:.4f}\t{answer['start']}-{answer['end']}"

    def decisions(self, outputs: Outputs) -> np.ndarray:
        """The tokens with the highest start and end logits."""
        return np.array([logits.argmax() for logits in _logits(outputs)])

    def margins(self, outputs: Outputs) -> np.ndarray:
        return np.array([lead(logits) for logits in _logits(outputs)])


def best_span(encodings: Sequence[Encoding], outputs: Sequence[Outputs], longest: int) -> Span | None:
    """The span of the context with the highest score, of at most ``longest`` tokens; None if the context is empty.

    Of equal ones it is that in the first window, then the shortest, then the first.
    """
    best = None
    for window, (encoding, one) in enumerate(zip(encodings, outputs, strict=True)):
        tokens = _context_tokens(encoding)
        starts, ends = (logits[tokens] for logits in _logits(one, len(encoding.ids)))
        for extra in range(min(longest, len(tokens))):  # spans of 1 + extra tokens
            sums = starts[: len(tokens) - extra] + ends[extra:]
            first = int(sums.argmax())
            if best is None or sums[first] > best.score:
                best = Span(window, int(tokens[first]), int(tokens[first + extra]), float(sums[first]))
    return best


def null_score(outputs: Sequence[Outputs]) -> float:
    """What "no answer" scores."""
    return min(float(starts[0] + ends[0]) for starts, ends in map(_logits, outputs))


def _probability(encodings: Sequence[Encoding], outputs: Sequence[Outputs], span: Span | None, with_null: bool) -> float:
    """Of a span, or of "no answer" if None: that of its start times that of its end, each a softmax over all windows."""
    pairs = [_logits(one) for one in outputs]
    windows = [_context_tokens(encoding) for encoding in encodings]
    lowest = min(pairs, key=lambda pair: pair[0][0] + pair[1][0])
    null, before = (1 if with_null else 0), sum(len(tokens) for tokens in windows[: span.window if span else 0])
    probability = 1.0
    for side, logits_of_null in enumerate(lowest):
        context = np.concatenate([pair[side][tokens] for pair, tokens in zip(pairs, windows, strict=True)])
        pooled = softmax(np.concatenate([logits_of_null[:null], context]))
        token = (span.first, span.last)[side] if span else None
        probability *= pooled[0 if span is None else null + before + int(np.searchsorted(windows[span.window], token))]
    return float(probability)


def _context_tokens(encoding: Encoding) -> np.ndarray:
    """Numbers of the tokens that stand for characters of the context, rising."""
    tokens = zip(encoding.sequences, encoding.offsets, strict=True)
    return np.array([i for i, (sequence, (start, end)) in enumerate(tokens) if sequence == CONTEXT and end > start], np.int64)


def _logits(outputs: Outputs, tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Start and end logits [n], float64; ``tokens`` is n where it is known."""
    starts, ends = (np.asarray(output(outputs, (name,)), np.float64) for name in ("start_logits", "end_logits"))
    if starts.ndim != 1 or starts.shape != ends.shape or tokens not in (None, len(starts)):
        raise IntegrityError(f"start_logits {list(starts.shape)} and end_logits {list(ends.shape)} for {tokens} tokens")
    return starts, ends

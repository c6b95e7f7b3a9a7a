"""The steps of a folded encoder, written once for everyone who takes them.

:func:`forward` walks a :class:`~exporters.graph.FoldedEncoder` and asks a :class:`Steps` for each operation. A writer
of files appends an operator per call; :class:`NumpySteps` computes. So every file, and the reference it is calibrated
and judged by, has the same steps in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from exporters.graph import QUATERNION_SIGNS, FoldedEncoder, Linear, Norm, Table
from runtimes.text import Encoding

Value = Any
"""What a :class:`Steps` passes around: an array, or the name of a tensor."""
Watch = Callable[[str, np.ndarray, np.ndarray, np.ndarray], None]
SMALLEST_LENGTH = 1e-12
"""What a vector is divided by at least when it is normalised, as torch does it."""


def input_names(segments: int) -> list[str]:
    """Inputs of every file, in the order of their names, as its outputs are too.

    LiteRT's interpreter sorts what a signature takes and gives by name, its compiled models keep the order of the file, and the manifest lists
    one order: a client that feeds by place is right everywhere only if all three are the same.
    """
    return ["attention_mask", "input_ids"] + (["token_type_ids"] if segments == 2 else [])


class Steps(Protocol):
    """The operations of an encoder. Values are [n, width] for one text (files may add a batch axis in front)."""

    def words(self, table: Table) -> Value:
        """Rows of the tokens, [n, width]."""

    def blanked(self, words: Value) -> Value:
        """The rows of real tokens as they are, zeros at padding."""

    def trigrams(self, words: Value) -> Value:
        """Previous, this and next row side by side, [n, 3 width]; zeros beyond both ends."""

    def positions(self, table: Table, segments: int, max_length: int) -> Value:
        """One row per token, [n, H]."""

    def linear(self, linear: Linear, x: Value) -> Value:
        """A dense matrix; what runs first where it is a product of two has run."""

    def quaternion(self, linear: Linear, x: Value) -> Value:
        """A quaternion matrix: every block times every component of x, then sums of these with their signs."""

    def shift(self, linear: Linear, x: Value) -> Value:
        """x plus the bias of a matrix without columns."""

    def add(self, a: Value, b: Value) -> Value: ...

    def norm(self, norm: Norm, x: Value) -> Value: ...

    def split(self, x: Value, widths: Sequence[int]) -> list[Value]:
        """Parts of the last axis."""

    def first(self, x: Value) -> Value:
        """The first token alone, [1, width]."""

    def attention(self, query: Value, key: Value, value: Value, heads: int, head_size: int) -> Value:
        """softmax(q k^T + mask) v per head, [m, A d]; the queries carry their 1/sqrt(d) already."""

    def mean(self, x: Value) -> Value:
        """Mean over the real tokens in float32, [1, width]; padding has no weight."""

    def unit(self, x: Value) -> Value:
        """Every row divided by its length, or by ``SMALLEST_LENGTH`` where that is more."""

    def softmax(self, logits: Value) -> Value: ...

    def sigmoid(self, logits: Value) -> Value: ...

    def unbind(self, x: Value, count: int) -> list[Value]:
        """The ``count`` columns of x, each without its axis: [n]."""


def forward(model: FoldedEncoder, steps: Steps) -> dict[str, Value]:
    """Results by name of the text that ``steps`` holds: [1, C] for heads that read the first token or the mean, [n, T] or [n] per token.

    Where ``steps`` holds several texts, [N, C], and the tokens of all texts end to end, [t, T] or [t].
    """
    x = steps.words(model.words)
    if model.blanks_padding:
        x = steps.blanked(x)
    if model.trigram:
        x = steps.trigrams(x)
    if model.projection is not None:
        x = steps.linear(model.projection, x)
    x = steps.add(x, steps.positions(model.positions, model.segments, model.max_length))
    if model.embedding_norm is not None:
        x = steps.norm(model.embedding_norm, x)
    if model.late_projection is not None:
        x = steps.linear(model.late_projection, x)
    for layer in model.layers:
        parts = {"hidden": x}
        firsts: dict[str, Value] = {}

        def first(name: str, parts: dict[str, Value] = parts, firsts: dict[str, Value] = firsts) -> Value:
            if name not in firsts:
                firsts[name] = steps.first(parts[name])
            return firsts[name]

        only = set()
        for read in layer.reads:
            made = _multiplied(steps, read.linear, first(read.source) if read.first_only else parts[read.source])
            for (name, _), value in zip(read.parts, steps.split(made, [width for _, width in read.parts]), strict=True):
                value = _multiplied(steps, layer.part_linears[name], value) if name in layer.part_linears else value
                parts[name] = steps.norm(layer.part_norms[name], value) if name in layer.part_norms else value
                only |= {name} if read.first_only else set()
        stream = "inner" if layer.out is not None else "hidden"
        if layer.first_only:
            for name in sorted({"query", "hidden", stream} & set(parts) - only):  # a set has another order in every process, a file must not
                parts[name] = first(name)
        attended = steps.attention(parts["query"], parts["key"], parts["value"], layer.heads, layer.head_size) if layer.heads else None
        h = _residual(steps, layer.output, attended, parts[stream], layer.attention_norm)
        for ffn in layer.ffns:
            h = _residual(steps, ffn.down, None if ffn.up is None else _multiplied(steps, ffn.up, h), h, ffn.norm)
        x = h if layer.out is None else _residual(steps, layer.out, h, parts["hidden"], layer.out_norm)
    return _results(model, steps, x)


def _results(model: FoldedEncoder, steps: Steps, x: Value) -> dict[str, Value]:
    """What the heads make of the last feature map; of its first token if that is all there is."""
    read = {"first": x} if model.first_only else {"all": x}
    pooled: dict[tuple[str, str], Value] = {}
    results: dict[str, Value] = {}
    for head in model.heads:
        if head.tokens not in read:
            read[head.tokens] = steps.first(x) if head.tokens == "first" else steps.mean(x)
        value = read[head.tokens]
        if head.pooler is not None:
            key = (head.tokens, head.pooler.name)
            if key not in pooled:
                pooled[key] = steps.linear(head.pooler, value)
            value = pooled[key]
        if head.linear is not None:
            value = steps.linear(head.linear, value)
        if head.normalized:
            value = steps.unit(value)
        if head.activation is not None:
            value = steps.softmax(value) if head.activation == "softmax" else steps.sigmoid(value)
        values = [value] if len(head.outputs) == 1 else steps.unbind(value, len(head.outputs))
        results |= dict(zip(head.outputs, values, strict=True))
    return results


def _multiplied(steps: Steps, linear: Linear, x: Value) -> Value:
    if linear.inner is not None:
        x = steps.linear(linear.inner, x)
    return steps.quaternion(linear, x) if linear.quaternion else steps.linear(linear, x)


def _residual(steps: Steps, linear: Linear, x: Value | None, stream: Value, norm: Norm | None) -> Value:
    """``x`` None: the matrix has no columns."""
    total = steps.shift(linear, stream) if x is None else steps.add(_multiplied(steps, linear, x), stream)
    return total if norm is None else steps.norm(norm, total)


class NumpySteps:
    """Compute the steps in float32 for many texts at once, whose tokens lie end to end: values are [all tokens, width].

    Args:
        inputs: the texts; their token types count where the model has two segments.
        watch: is shown every matrix at work: its name, input [rows, in] and output [rows, out] after the activation, and
            the first row of each text.
    """

    def __init__(self, inputs: Sequence[Encoding], watch: Watch | None = None) -> None:
        self._lengths = np.array([len(encoding.ids) for encoding in inputs])
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._ids = np.concatenate([np.asarray(encoding.ids, np.int64) for encoding in inputs])
        self._types = np.concatenate([np.asarray(encoding.types, np.int64) for encoding in inputs])
        self._watch = watch

    def words(self, table: Table) -> np.ndarray:
        return table.rows[self._ids]

    def blanked(self, words: np.ndarray) -> np.ndarray:
        return words  # there is no padding here

    def trigrams(self, words: np.ndarray) -> np.ndarray:
        previous, following = np.roll(words, 1, axis=0), np.roll(words, -1, axis=0)
        previous[self._starts] = 0
        following[self._starts + self._lengths - 1] = 0
        return np.concatenate([previous, words, following], axis=1)

    def positions(self, table: Table, segments: int, max_length: int) -> np.ndarray:
        own = np.arange(len(self._ids)) - np.repeat(self._starts, self._lengths)
        return table.rows[own if segments == 1 else self._types * max_length + own]

    def linear(self, linear: Linear, x: np.ndarray) -> np.ndarray:
        return self._finished(linear, x, x @ linear.weight.T)

    def quaternion(self, linear: Linear, x: np.ndarray) -> np.ndarray:
        rows, quarter = len(linear.weight), linear.weight.shape[1]
        products = (x.reshape(-1, quarter) @ linear.weight.T).reshape(len(x), 16, rows // 4)
        return self._finished(linear, x, (QUATERNION_SIGNS @ products).reshape(len(x), rows))

    def shift(self, linear: Linear, x: np.ndarray) -> np.ndarray:
        return x + linear.bias

    def _finished(self, linear: Linear, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """``y`` with the bias and the activation of ``linear``, which read ``x``."""
        if linear.bias is not None:
            y = y + linear.bias
        if linear.activation is not None:
            y = ACTIVATIONS[linear.activation](y)
        if self._watch is not None:
            self._watch(linear.name, x, y, self._starts if len(x) == len(self._ids) else np.arange(len(x)))
        return y

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + b

    def norm(self, norm: Norm, x: np.ndarray) -> np.ndarray:
        if norm.kind == "layer_norm":
            x = x - x.mean(axis=-1, keepdims=True)
            x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(norm.eps))
        return x * norm.weight + norm.bias

    def split(self, x: np.ndarray, widths: Sequence[int]) -> list[np.ndarray]:
        return np.split(x, np.cumsum(widths)[:-1], axis=-1)

    def first(self, x: np.ndarray) -> np.ndarray:
        return x[self._starts]

    def attention(self, query: np.ndarray, key: np.ndarray, value: np.ndarray, heads: int, head_size: int) -> np.ndarray:
        q, k, v = (part.reshape(len(part), heads, head_size).transpose(1, 0, 2) for part in (query, key, value))
        result = np.empty_like(q)
        for number, (start, length) in enumerate(zip(self._starts, self._lengths, strict=True)):
            own = slice(start, start + length)
            asking = own if len(query) == len(self._ids) else slice(number, number + 1)
            scores = q[:, asking] @ k[:, own].transpose(0, 2, 1)
            result[:, asking] = self.softmax(scores) @ v[:, own]
        return result.transpose(1, 0, 2).reshape(len(query), heads * head_size)

    def softmax(self, logits: np.ndarray) -> np.ndarray:
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    def mean(self, x: np.ndarray) -> np.ndarray:
        return np.add.reduceat(x, self._starts, axis=0) / self._lengths[:, None].astype(np.float32)

    def unit(self, x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.sqrt((x * x).sum(axis=-1, keepdims=True)), np.float32(SMALLEST_LENGTH))

    def sigmoid(self, logits: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-logits))

    def unbind(self, x: np.ndarray, count: int) -> list[np.ndarray]:
        return list(x.T)


def _erf(x: np.ndarray) -> np.ndarray:
    """Error function to 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26), enough for float32."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.sign(x) * (1 - series * np.exp(-x * x))


def _tanh_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2))),
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "tanh": np.tanh,
}
"""By the name that transformers gives them; these a file can hold."""

"""An encoder as a list of steps: the matrices, tables and norms that a file holds, by name.

:mod:`exporters.folding` makes it of a torch module, :mod:`exporters.forward` walks it, writers write it.

Shapes as in the encoder: n tokens, H feature map, B width inside a layer, A heads of size d, C labels, T tags. Weights are float32
[out, in].

What this file does not do: decide what is folded into what, or compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

MASKED_SCORE = -1e4
"""Added to the scores of padding, as in the encoder."""
_HAMILTON = np.array([[1, -2, -3, -4], [2, 1, -4, 3], [3, 4, 1, -2], [4, -3, 2, 1]])
"""[c, a]: which of the blocks 1..4 (r, i, j, k) multiplies component a of x for component c of the Hamilton product, with its sign."""
QUATERNION_SIGNS = (np.sign(_HAMILTON)[:, :, None] * (np.abs(_HAMILTON)[:, :, None] == np.arange(1, 5))).reshape(4, 16).astype(np.float32)
"""[c, 4 a + b]: how much block b times component a of x counts in component c of the product."""


@dataclass(frozen=True)
class Linear:
    """W x + b, then ``activation``: ``weight`` [out, in], ``bias`` [out] or None.

    Args:
        inner: the thin matrix that runs first, where the map is a product of two; its ``in`` is that of the map.
        quaternion: ``weight`` [out, in/4] holds the four blocks of a quaternion matrix, one below the other.
    """

    name: str
    weight: np.ndarray
    bias: np.ndarray | None
    activation: str | None = None
    inner: Linear | None = None
    quaternion: bool = False

    @property
    def reader(self) -> Linear:
        """The matrix that reads the input."""
        return self if self.inner is None else self.inner

    @property
    def multiply_adds(self) -> int:
        """Of one token, without those of ``inner``."""
        return self.weight.size if not self.quaternion else 4 * self.weight.size + QUATERNION_SIGNS.size * len(self.weight) // 4

    def rows_scaled(self, scale: np.ndarray) -> Linear:
        """A writer: its output, before the activation, times ``scale`` [out]."""
        self._check_scale(scale)
        return replace(self, weight=self.weight * scale[:, None], bias=None if self.bias is None else self.bias * scale)

    def rows_divided(self, scale: np.ndarray) -> Linear:
        """A writer: its output, before the activation, divided by ``scale`` [out]."""
        self._check_scale(scale)
        return replace(self, weight=self.weight / scale[:, None], bias=None if self.bias is None else self.bias / scale)

    def columns_scaled(self, scale: np.ndarray) -> Linear:
        """A reader: its input times ``scale`` [in]."""
        if self.inner is not None:
            return replace(self, inner=self.inner.columns_scaled(scale))
        self._check_scale(scale)
        return replace(self, weight=self.weight * (scale[0] if self.quaternion else scale))

    def _check_scale(self, scale: np.ndarray) -> None:
        if self.quaternion and np.ptp(scale) != 0:
            raise ValueError(f"{self.name}: a scale per channel, which a quaternion matrix cannot hold")


@dataclass(frozen=True)
class Table:
    """Rows that are looked up, [rows, width]."""

    name: str
    rows: np.ndarray


@dataclass(frozen=True)
class Norm:
    """``layer_norm`` over the last axis with ``eps``, or ``affine``: weight * h + bias."""

    name: str
    kind: str
    weight: np.ndarray
    bias: np.ndarray
    eps: float = 0.0


@dataclass(frozen=True)
class FeedForward:
    """norm(down(up(h)) + h); the activation is part of ``up``. Without ``up`` the bias of ``down`` is all there is."""

    up: Linear | None
    down: Linear
    norm: Norm | None


@dataclass(frozen=True)
class Read:
    """A matrix that reads the part ``source`` and whose output consists of ``parts``, (name, width) side by side.

    ``first_only``: it runs on the first token alone. The layer's input is the part ``hidden``; the others are ``query``,
    ``key``, ``value`` [A d], or [rank] where the layer's ``part_linears`` make the part of it, ``inner`` [B] and ``shared``
    [B], the bottleneck that queries and keys have in common.
    """

    source: str
    first_only: bool
    linear: Linear
    parts: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Layer:
    """One layer.

    Args:
        first_only: only the first token's result is wanted.
        heads: of the attention; 0 for a layer without attention, of whose ``output`` the bias is left.
        reads: matrices in the order in which they run.
        part_linears: the second factor of parts whose matrix is a product of two.
        part_norms: norms of parts, where they could not be folded.
        output: from the attention's result to ``inner``.
        out: from ``inner`` back to H; None without a bottleneck, where ``inner`` is the layer's input itself.
    """

    heads: int
    head_size: int
    first_only: bool
    reads: tuple[Read, ...]
    part_linears: dict[str, Linear]
    part_norms: dict[str, Norm]
    output: Linear
    attention_norm: Norm | None
    ffns: tuple[FeedForward, ...]
    out: Linear | None
    out_norm: Norm | None


@dataclass(frozen=True)
class Head:
    """What reads the last feature map and gives a result, or several.

    Args:
        outputs: names of the results. Where there are several, each is one row of ``linear``.
        tokens: ``first``: the first token alone, one result a text; ``mean``: the mean over a text's tokens; ``all``: one result a token.
        pooler: a matrix with its activation before ``linear``; heads that read the same tokens share it.
        linear: None where the feature map itself is the result.
        normalized: the result is divided by its length.
        activation: ``softmax`` over the last axis, ``sigmoid``, or None.
    """

    outputs: tuple[str, ...]
    tokens: str
    pooler: Linear | None
    linear: Linear | None
    normalized: bool = False
    activation: str | None = None

    @property
    def per_token(self) -> bool:
        return self.tokens == "all"

    def with_reader(self, change: Callable[[Linear], Linear]) -> Head:
        """The same head with ``change`` made to the matrix that reads the feature map, if there is one."""
        if self.pooler is not None:
            return replace(self, pooler=change(self.pooler))
        return self if self.linear is None else replace(self, linear=change(self.linear))

    @property
    def reader(self) -> Linear | None:
        """The matrix that reads the feature map; None if nothing does and the feature map is given away as it is."""
        return self.linear if self.pooler is None else self.pooler


@dataclass(frozen=True)
class FoldedEncoder:
    """An encoder with its heads, ready to be written.

    Args:
        trigram: each token is looked up with both neighbours, as previous, this and next side by side.
        blanks_padding: the rows of padding are made zeros before that. Clients fill up with 0; where 0 is the number of a word, as with
            RoBERTa's tokenizers, the last token would have that word for its neighbour.
        projection: from the looked-up words to H; None where they are H wide already.
        positions: row ``type * max_length + position``.
        segments: 1: the file takes no token types, every text is one segment; 2: it takes them.
        embedding_norm: before ``late_projection``, which maps E to H after the norm (ALBERT, ELECTRA).
    """

    words: Table
    trigram: bool
    projection: Linear | None
    positions: Table
    segments: int
    max_length: int
    embedding_norm: Norm | None
    late_projection: Linear | None
    layers: tuple[Layer, ...]
    heads: tuple[Head, ...]
    blanks_padding: bool = False

    @property
    def first_only(self) -> bool:
        """Whether the last layer gives the first token alone."""
        return bool(self.layers) and self.layers[-1].first_only

    @property
    def width(self) -> int:
        """H, of the feature map."""
        return self.positions.rows.shape[1] if self.late_projection is None else len(self.late_projection.weight)

    @property
    def shares(self) -> bool:
        """Whether a matrix, or the bias that is left of one, is used more than once."""
        names = [linear.name for linear, _ in self.uses()]
        return len(set(names)) < len(names)

    def linears(self) -> Iterator[tuple[Linear, bool]]:
        """Every matrix in the order of use, with whether it runs once a text and not once a token; a shared one at each use."""
        return ((linear, once) for linear, once in self.uses() if linear.weight.size)

    def uses(self) -> Iterator[tuple[Linear, bool]]:
        """:meth:`linears`, and those of which only the bias is left."""
        for linear in (self.projection, self.late_projection):
            if linear is not None:
                yield linear, False
        for layer in self.layers:
            for read in layer.reads:
                yield read.linear, read.first_only
                yield from ((layer.part_linears[part], read.first_only) for part, _ in read.parts if part in layer.part_linears)
            rest = [layer.output, *(linear for ffn in layer.ffns for linear in (ffn.up, ffn.down)), layer.out]
            for linear in filter(None, rest):
                if linear.inner is not None:
                    yield linear.inner, layer.first_only
                yield linear, layer.first_only
        pooled = set()
        for head in self.heads:
            if head.pooler is not None and (head.tokens, head.pooler.name) not in pooled:
                pooled.add((head.tokens, head.pooler.name))
                yield head.pooler, not head.per_token
            if head.linear is not None:
                yield head.linear, not head.per_token

    def multiply_adds(self, tokens: int) -> int:
        """Multiplications with an addition that one text of ``tokens`` tokens takes, attention included."""
        total = sum(linear.multiply_adds * (1 if once else tokens) for linear, once in self.linears())
        return total + sum(2 * (1 if layer.first_only else tokens) * tokens * layer.heads * layer.head_size for layer in self.layers)

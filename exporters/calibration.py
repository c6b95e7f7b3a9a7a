"""What the task's own texts show of a model: ranges for static quantization, and scales that move outliers into weights.

Sources: Jacob et al. 2018, arXiv:1712.05877 §3 (ranges of activations from data); Xiao et al. 2022, SmoothQuant,
arXiv:2211.10438 eq. 3-4 (x diag(s)^-1 and diag(s) W with s_j = max|x_j|^a / max|W_j|^(1-a)).

SmoothQuant folds diag(s)^-1 into the layer norm before a matrix. BERT normalises after the addition, and what leaves the
norm is also added on, so nothing can be folded there. Here s is moved wherever it costs no operator, which is exact:

- from a ReLU's output into the rows before it (up -> down), as ReLU(z)/s = ReLU(z/s),
- from the attention's result into the rows of the values (value -> output),
- from the looked-up words into the columns of the table (words -> projection),
- along a whole stream of residual additions without norms (NoNorm models), whose scale is free unless a head gives the feature map away.

Nothing is moved where layers share matrices, or where these are of quaternions.

What this file does not do: choose precisions, or need anything but numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from exporters.forward import NumpySteps, forward
from exporters.graph import FoldedEncoder, Layer, Linear
from exporters.quant_plan import Range
from runtimes.errors import BadInput
from runtimes.text import Encoding

MIN_TEXTS = 8
TEXTS_AT_ONCE = 64
"""Enough for large matrix products, few enough to stay in memory."""


@dataclass
class _Seen:
    """Extremes of each text, and per input channel over all texts."""

    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    out_low: list[float] = field(default_factory=list)
    out_high: list[float] = field(default_factory=list)
    channels: np.ndarray | None = None


@dataclass(frozen=True)
class Calibration:
    """``ranges`` for static quantization and ``channels``, the largest |input| of every matrix by channel, by name."""

    ranges: dict[str, Range]
    channels: dict[str, np.ndarray]


def calibrate(model: FoldedEncoder, inputs: Sequence[Encoding], coverage: float = 1.0) -> Calibration:
    """Run texts through the float32 model and record what goes in and out of every matrix.

    Args:
        inputs: real texts of the task.
        coverage: share of the texts whose extremes a range must hold; 1.0 lets a single text stretch it.

    Raises:
        BadInput: too few texts, ids or token types that the model's tables do not have, or texts longer than the model takes.
    """
    if len(inputs) < MIN_TEXTS:
        raise BadInput(f"calibration: {len(inputs)} texts; at least {MIN_TEXTS} of the task's own are needed")
    if not 0.5 <= coverage <= 1.0:
        raise BadInput(f"calibration: coverage {coverage} must lie between 0.5 and 1")
    for number, encoding in enumerate(inputs, start=1):
        ids = encoding.ids
        if not ids or max(ids) >= len(model.words.rows) or min(ids) < 0:
            raise BadInput(f"calibration text {number}: token ids outside the vocabulary of {len(model.words.rows)}; was another tokenizer used?")
        if len(ids) > model.max_length:
            raise BadInput(f"calibration text {number}: {len(ids)} tokens, the model takes {model.max_length}")
        if model.segments > 1 and not set(encoding.types) <= set(range(model.segments)):
            raise BadInput(f"calibration text {number}: token types {sorted(set(encoding.types))}, the model has {model.segments}")
    seen: dict[str, _Seen] = {}

    def watch(name: str, x: np.ndarray, y: np.ndarray, starts: np.ndarray) -> None:
        entry = seen.setdefault(name, _Seen())
        for extremes, value, reduce in (
            (entry.low, x.min(axis=1), np.minimum), (entry.high, x.max(axis=1), np.maximum),
            (entry.out_low, y.min(axis=1), np.minimum), (entry.out_high, y.max(axis=1), np.maximum),
        ):  # fmt: skip
            extremes += reduce.reduceat(value, starts).tolist()
        peak = np.abs(x).max(axis=0)
        entry.channels = peak if entry.channels is None else np.maximum(entry.channels, peak)

    for start in range(0, len(inputs), TEXTS_AT_ONCE):
        forward(model, NumpySteps(inputs[start : start + TEXTS_AT_ONCE], watch))
    ranges = {
        name: Range(
            float(np.quantile(entry.low, 1 - coverage)), float(np.quantile(entry.high, coverage)),
            float(np.quantile(entry.out_low, 1 - coverage)), float(np.quantile(entry.out_high, coverage)),
        )
        for name, entry in seen.items()
    }  # fmt: skip
    return Calibration(ranges, {name: entry.channels for name, entry in seen.items()})


def smooth(model: FoldedEncoder, channels: dict[str, np.ndarray], strength: float) -> FoldedEncoder:
    """The same function with outliers of activations moved into weights.

    Args:
        channels: largest |input| of every matrix by channel, from :func:`calibrate` on this very model.
        strength: a in SmoothQuant's equation 4; 0 moves nothing of the activations' unevenness, 1 all of it.

    Raises:
        BadInput: a strength outside 0..1.
    """
    if not 0 <= strength <= 1:
        raise BadInput(f"smooth: {strength} must lie between 0 and 1")
    scaled = _Scales(channels, strength)
    if not model.shares and not any(linear.quaternion for linear, _ in model.linears()):
        model = replace(model, layers=tuple(_smooth_layer(layer, scaled) for layer in model.layers))
        model = _smooth_feature_map(model, scaled)
    if model.projection is not None:
        projection = model.projection
        window = scaled.of([projection])
        width = model.words.rows.shape[1]
        s = np.tile(window.reshape(-1, width).max(axis=0), len(window) // width)
        words = replace(model.words, rows=model.words.rows / s[:width])
        model = replace(model, words=words, projection=projection.columns_scaled(s))
    return model


class _Scales:
    def __init__(self, channels: dict[str, np.ndarray], strength: float) -> None:
        self._channels = channels
        self._strength = strength

    def of(self, readers: Sequence[Linear]) -> np.ndarray:
        """s [in] for the matrices that read one value; 1 where a channel is never used. Its geometric mean is 1."""
        readers = [linear.reader for linear in readers]
        seen = np.max([self._channels[linear.name] for linear in readers], axis=0).astype(np.float64)
        weights = np.max([np.abs(linear.weight).max(axis=0) for linear in readers], axis=0)
        used = (seen > 0) & (weights > 0)
        s = np.ones(len(seen))
        s[used] = seen[used] ** self._strength / weights[used] ** (1 - self._strength)
        if used.any():
            s[used] /= np.exp(np.log(s[used]).mean())
        return s.astype(np.float32)


def _smooth_layer(layer: Layer, scales: _Scales) -> Layer:
    """Within one layer: values, ReLUs, and the inner stream where it has no norms."""
    if layer.heads:
        s = scales.of([layer.output])
        layer = replace(_part_divided(layer, "value", s), output=layer.output.columns_scaled(s))
    ffns = []
    for ffn in layer.ffns:
        if ffn.up is not None and ffn.up.activation == "relu":
            s = scales.of([ffn.down])
            ffn = replace(ffn, up=ffn.up.rows_divided(s), down=ffn.down.columns_scaled(s))
        ffns.append(ffn)
    layer = replace(layer, ffns=tuple(ffns))
    if layer.out is None or layer.part_norms or layer.attention_norm or any(ffn.norm for ffn in layer.ffns):
        return layer
    inner_reads = [read.linear for read in layer.reads if read.source == "inner"]
    s = scales.of([*inner_reads, *(ffn.up for ffn in layer.ffns if ffn.up is not None), layer.out])
    layer = _source_multiplied(_part_divided(layer, "inner", s), "inner", s)
    ffns = tuple(replace(ffn, up=ffn.up and ffn.up.columns_scaled(s), down=ffn.down.rows_divided(s)) for ffn in layer.ffns)
    return replace(layer, output=layer.output.rows_divided(s), ffns=ffns, out=layer.out.columns_scaled(s))


def _smooth_feature_map(model: FoldedEncoder, scales: _Scales) -> FoldedEncoder:
    """Along the feature maps from the embeddings to the heads, where no norm interrupts them."""
    whole = all(layer.out is not None and layer.out_norm is None for layer in model.layers)
    if not whole or model.embedding_norm is not None or (model.projection is None and model.late_projection is None):
        return model
    readers = [head.reader for head in model.heads]
    if None in readers:  # the feature map itself is a result
        return model
    s = scales.of([*(read.linear for layer in model.layers for read in layer.reads if read.source == "hidden"), *readers])
    layers = tuple(replace(_source_multiplied(layer, "hidden", s), out=layer.out.rows_divided(s)) for layer in model.layers)
    model = replace(model, layers=layers, heads=tuple(head.with_reader(lambda reader: reader.columns_scaled(s)) for head in model.heads))
    if model.late_projection is not None:
        return replace(model, late_projection=model.late_projection.rows_divided(s))
    positions = replace(model.positions, rows=model.positions.rows / s)
    return replace(model, projection=model.projection.rows_divided(s), positions=positions)


def _part_divided(layer: Layer, part: str, s: np.ndarray) -> Layer:
    """``layer`` with the rows that make ``part`` divided by s."""
    if part in layer.part_linears:
        return replace(layer, part_linears=layer.part_linears | {part: layer.part_linears[part].rows_divided(s)})
    changed = []
    for read in layer.reads:
        factor, at = np.ones(len(read.linear.weight), np.float32), 0
        for name, width in read.parts:
            if name == part:
                factor[at : at + width] = s
            at += width
        changed.append(replace(read, linear=read.linear.rows_divided(factor)))
    return replace(layer, reads=tuple(changed))


def _source_multiplied(layer: Layer, source: str, s: np.ndarray) -> Layer:
    """``layer`` with the columns that read ``source`` multiplied by s."""
    reads = tuple(replace(r, linear=r.linear.columns_scaled(s)) if r.source == source else r for r in layer.reads)
    return replace(layer, reads=reads)

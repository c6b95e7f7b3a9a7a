"""Calibration sees what goes in and out of every matrix; smoothing moves outliers and leaves the function alone."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from exporters.calibration import TEXTS_AT_ONCE, calibrate, smooth
from exporters.folding import fold
from exporters.forward import NumpySteps, forward
from exporters.graph import FoldedEncoder
from exporters.onnx_writer import write_onnx
from exporters.quant_plan import INT8_STATIC, QuantPlan, Range
from exporters.tflite_writer import write_tflite
from runtimes.errors import BadInput
from runtimes.text import Encoding
from tests.exporters import encoders
from tests.exporters.results import file_logits, inputs, numpy_logits, torch_logits
from tests.exporters.small_models import KINDS, LONGEST, VOCABULARY, one_thread, small_encoder, texts  # noqa: F401 - a fixture

OUTLIER_WORD = 7


def results(model: FoldedEncoder, id_lists: list[list[int]]) -> np.ndarray:
    return np.concatenate([numpy_logits(model, [ids]) for ids in id_lists])


def assert_ranges(got: dict[str, Range], expected: dict[str, Range]) -> None:
    assert set(got) == set(expected)
    for name, seen in expected.items():
        for field in ("input_min", "input_max", "output_min", "output_max"):
            assert getattr(got[name], field) == pytest.approx(getattr(seen, field), rel=1e-4, abs=1e-5), (name, field)


def test_ranges_are_the_extremes_that_torch_sees():
    """Text by text through the module itself: what its matrices read and write, before anything was folded."""
    model = small_encoder("bert")
    id_lists = texts(TEXTS_AT_ONCE + 6)
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, x, y, name=name: seen[name].append((x[0].detach(), y.detach())))
    with torch.no_grad():
        for ids in id_lists:
            model(torch.tensor([ids]))
    root = 8**-0.5
    sources = {"pooler": [("pooler", torch.tanh)], "classifier": [("heads.classifier", None)]}
    for i in (0, 1):
        attention = f"layers.{i}.attention"
        query, key, value = (f"{attention}.query", lambda y: y * root), (f"{attention}.key", None), (f"{attention}.value", None)
        groups = {"query_key_value": [query, key, value]} if i == 0 else {"key_value": [key, value], "query": [query]}
        groups |= {"output": [(f"{attention}.output", None)], "ffns.0.up": [(f"layers.{i}.ffns.0.up", torch.nn.functional.gelu)]}
        groups["ffns.0.down"] = [(f"layers.{i}.ffns.0.down", None)]
        sources |= {f"layers.{i}.{name}": group for name, group in groups.items()}
    expected = {}
    for name, group in sources.items():
        read = torch.cat([x.flatten() for source, _ in group for x, _ in seen[source]])
        written = torch.cat([(y if change is None else change(y)).flatten() for source, change in group for _, y in seen[source]])
        expected[name] = Range(*(float(v) for v in (read.min(), read.max(), written.min(), written.max())))
    assert_ranges(calibrate(fold(model, LONGEST), inputs(id_lists)).ranges, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_many_texts_at_once_are_each_text_alone(kind):
    """Texts share a product, and none may read its neighbour: the trigrams at its ends, its attention, its positions."""
    model = fold(small_encoder(kind), LONGEST)
    id_lists = texts(TEXTS_AT_ONCE + 9)
    low, high, channels = {}, {}, {}

    def watch(name, x, y, starts):
        assert starts.tolist() == [0] or len(x) == 1
        low[name] = np.minimum(low.get(name, np.inf), [x.min(), y.min()])
        high[name] = np.maximum(high.get(name, -np.inf), [x.max(), y.max()])
        channels[name] = np.maximum(channels.get(name, 0), np.abs(x).max(axis=0))

    for ids in id_lists:
        forward(model, NumpySteps(inputs([ids]), watch))
    found = calibrate(model, inputs(id_lists))
    assert_ranges(found.ranges, {name: Range(low[name][0], high[name][0], low[name][1], high[name][1]) for name in low})
    assert set(found.channels) == set(channels)
    for name, peak in channels.items():
        np.testing.assert_allclose(found.channels[name], peak, rtol=1e-4, atol=1e-5)


def test_one_odd_text_stretches_every_range_unless_coverage_leaves_it_out():
    model = small_encoder("no-norm student")
    model.embeddings.word.weight.data[OUTLIER_WORD] *= 100
    folded = fold(model, LONGEST)
    usual = [ids for ids in texts(60) if OUTLIER_WORD not in ids][:39]
    id_lists = [*usual[:20], [*usual[0][:4], OUTLIER_WORD, *usual[0][4:8]], *usual[20:]]
    without = calibrate(folded, inputs(usual)).ranges
    whole, most = calibrate(folded, inputs(id_lists), coverage=1.0).ranges, calibrate(folded, inputs(id_lists), coverage=0.95).ranges
    for name in ("embeddings.projection", "layers.0.ffns.0.down", "layers.1.out"):
        assert whole[name].input_max > 4 * without[name].input_max, name
        assert 0.5 * without[name].input_max < most[name].input_max <= without[name].input_max, name
        assert without[name].output_min <= most[name].output_min < 0.5 * without[name].output_min, name
        assert without[name].output_max >= most[name].output_max > 0.5 * without[name].output_max, name
    assert whole["embeddings.projection"].input_min < 4 * without["embeddings.projection"].input_min


def test_texts_that_are_none_of_the_task_are_refused():
    model = fold(small_encoder("bert"), LONGEST)
    good = texts(8)
    calibrate(model, inputs(good))
    for count in (0, 7):
        with pytest.raises(BadInput, match=rf"^calibration: {count} texts; at least 8 of the task's own are needed"):
            calibrate(model, inputs(good[:count]))
    for ids in ([2, VOCABULARY], [2, -1], []):
        with pytest.raises(BadInput, match=rf"^calibration text 6: token ids outside the vocabulary of {VOCABULARY}; was another tokenizer used\?"):
            calibrate(model, inputs([*good[:5], ids, *good[5:]]))
    with pytest.raises(BadInput, match=rf"^calibration text 9: {LONGEST + 1} tokens, the model takes {LONGEST}"):
        calibrate(model, inputs([*good, [5] * (LONGEST + 1)]))
    two = fold(small_encoder("bert"), LONGEST, segments=2)
    with pytest.raises(BadInput, match=r"^calibration text 9: token types \[0, 2\], the model has 2"):
        calibrate(two, [*inputs(good, segments=2), Encoding([5, 6], [0, 2])])
    for coverage in (0.0, 0.49, 1.01, float("nan")):
        with pytest.raises(BadInput, match=r"coverage .* must lie between 0\.5 and 1"):
            calibrate(model, inputs(good), coverage)


def changed_matrices(before: FoldedEncoder, after: FoldedEncoder) -> set[str]:
    pairs = zip(before.linears(), after.linears(), strict=True)
    return {a.name for (a, _), (b, _) in pairs if not np.array_equal(a.weight, b.weight)}


INNER = {"ffns.0.up", "ffns.0.down", "ffns.1.up", "ffns.1.down", "output", "out"}
MOVES = {
    "bert": {"layers.0.query_key_value", "layers.0.output", "layers.1.key_value", "layers.1.output"},
    "albert": set(),
    "no-norm student": {"embeddings.projection", "classifier", *(f"layers.{i}.{name}" for i in (0, 1) for name in INNER)},
}
"""Where a scale is moved: everywhere that costs no operator, and nowhere where layers share weights."""


@pytest.mark.parametrize("strength", [0, 0.5, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_smoothing_changes_weights_and_not_the_function(kind, strength):
    encoder = small_encoder(kind)
    model = fold(encoder, LONGEST)
    id_lists = texts(24, seed=1)
    even = smooth(model, calibrate(model, inputs(texts(40))).channels, strength)
    expected = results(model, id_lists)
    assert np.abs(results(even, id_lists) - expected).max() < 1e-4
    with torch.no_grad():
        by_torch = torch.cat([encoder(torch.tensor([ids])).logits for ids in id_lists]).numpy()
    assert np.abs(results(even, id_lists) - by_torch).max() < 1e-4
    changed = changed_matrices(model, even)
    if kind == "relu bert":
        assert {"layers.0.ffns.0.up", "layers.0.ffns.0.down"} <= changed
    elif kind in ("bert", "albert"):
        assert changed == MOVES[kind]
    elif kind == "no-norm student":
        assert MOVES[kind] <= changed
    else:
        assert {"embeddings.projection", "layers.0.ffns.1.down", "layers.1.output"} <= changed
    if kind == "albert":
        assert even.layers == model.layers
    np.testing.assert_array_equal(results(model, id_lists), expected, "the model itself is as it was")


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("kind", [kind for kind in encoders.OWN if any(word in kind for word in ("low rank", "empty", "quaternion", "shared"))])
def test_smoothing_leaves_the_function_of_thin_empty_and_shared_matrices(kind, activation):
    encoder = encoders.encoder(kind, activation=activation)
    model = fold(encoder, encoders.LONGEST)
    seen = calibrate(model, inputs(encoders.texts(24)))
    assert set(seen.ranges) == {linear.name for linear, _ in model.linears()}
    even = smooth(model, seen.channels, 0.7)
    expected = torch_logits(encoder, encoders.texts(16, seed=5))
    assert np.abs(results(even, encoders.texts(16, seed=5)) - expected).max() < 1e-4 * max(1, np.abs(expected).max())
    changed = changed_matrices(model, even)
    if model.shares or "quaternion" in kind:
        assert even.layers == model.layers
    else:
        assert changed
    if kind == "low rank":
        # Into the inner factor goes what reads, into the outer one what writes
        assert {"layers.1.value", "layers.1.output.inner", "layers.0.query_key_value", "layers.0.output"} <= changed
        assert not {"layers.1.query_key_value", "layers.1.output"} & changed
        assert ({"layers.1.ffns.0.up", "layers.1.ffns.0.down.inner"} <= changed) == (activation == "relu")
        assert not {"layers.1.ffns.0.up.inner", "layers.1.ffns.0.down"} & changed


def unevenness(channels: np.ndarray) -> float:
    """Largest over middle: how much of 8 bits one channel takes from the others."""
    return float(channels.max() / np.median(channels))


def static_error(model: FoldedEncoder, path, id_lists: list[list[int]]) -> float:
    """Mean |error| of the int8-static file of ``model``, relative to its logits."""
    plan = QuantPlan(INT8_STATIC, ranges=calibrate(model, inputs(texts(60))).ranges)
    if path.suffix == ".onnx":
        write_onnx(model, path, plan)
    else:
        write_tflite(model, path, [LONGEST], plan)
    expected = results(model, id_lists)
    return float(np.abs(file_logits(path, id_lists) - expected).mean() / np.abs(expected).mean())


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
@pytest.mark.parametrize(("kind", "place"), [("no-norm student", "ffn"), ("relu bert", "ffn"), ("no-norm student", "words"), ("bert", "value")])
def test_smoothing_evens_out_a_channel_and_the_static_file_gains(tmp_path, kind, place, suffix):
    encoder = small_encoder(kind)
    with torch.no_grad():
        if place == "ffn":
            name = "layers.0.ffns.0.down"
            encoder.layers[0].ffns[0].up.weight[3] *= 200
            encoder.layers[0].ffns[0].up.bias[3] *= 200
            encoder.layers[0].ffns[0].down.weight[:, 3] /= 200
        elif place == "value":
            name = "layers.0.output"
            encoder.layers[0].attention.value.weight[3] *= 200
            encoder.layers[0].attention.value.bias[3] *= 200
            encoder.layers[0].attention.output.weight[:, 3] /= 200
        else:
            name = "embeddings.projection"
            encoder.embeddings.word.weight[:, 3] *= 200
            for third in range(3):
                encoder.embeddings.projection.weight[:, 3 + 16 * third] /= 200
    model = fold(encoder, LONGEST)
    before = calibrate(model, inputs(texts(60))).channels
    even = smooth(model, before, 0.5)
    after = calibrate(even, inputs(texts(60))).channels
    assert unevenness(before[name]) > 50
    assert unevenness(after[name]) < 0.2 * unevenness(before[name])
    id_lists = texts(40, seed=1)
    plain, smoothed = (static_error(m, tmp_path / f"{n}.{suffix}", id_lists) for n, m in (("plain", model), ("even", even)))
    assert smoothed < 0.6 * plain, (smoothed, plain)


def test_a_strength_outside_0_to_1_is_refused():
    model = fold(small_encoder("bert"), LONGEST)
    channels = calibrate(model, inputs(texts(8))).channels
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(BadInput, match=r"smooth: .* must lie between 0 and 1"):
            smooth(model, channels, strength)

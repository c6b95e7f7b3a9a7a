"""Proof that an exported file computes what the torch module computes, on real texts, with and without padding.

Where it does not, :func:`first_wrong_tensor` and :func:`first_wrong_fold` name the matrix at which it goes wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from exporters.folding import probability_name
from exporters.forward import NumpySteps, forward
from exporters.golden import SMALLEST_SCALE, Results, largest_value
from exporters.graph import FoldedEncoder, Linear
from exporters.onnx_writer import WATCHED, write_onnx
from exporters.tflite_writer import write_tflite
from runtimes.backends import SIGNATURE_PREFIX, OnnxModel, load_model
from runtimes.errors import GateFailed
from runtimes.text import Encoding

TOLERANCE = 1e-3
"""Largest |difference| of a value that a float32 file may show, relative to the largest |value| of its outputs."""
PADDED_BATCH = 8


@dataclass(frozen=True)
class Parity:
    """``worst`` |difference| over all outputs of ``texts`` texts, and the ``limit`` it was held against."""

    worst: float
    limit: float
    texts: int


@torch.no_grad()
def torch_results(model: nn.Module, inputs: Sequence[Encoding], activation: str | None = None) -> list[dict[str, np.ndarray]]:
    """Outputs of texts run one by one, unpadded: [C], or [n, T] and [n] where each token has a result.

    Args:
        activation: ``softmax`` or ``sigmoid`` where probabilities are wanted, under the names that a file gives them.
    """
    model.eval()
    results = []
    for encoding in inputs:
        outputs = {name: value[0].float() for name, value in model(*torch_inputs(model, encoding)).outputs.items()}
        if activation is not None:
            to_probabilities = torch.sigmoid if activation == "sigmoid" else partial(torch.softmax, dim=-1)
            outputs = {probability_name(name): to_probabilities(value) for name, value in outputs.items()}
        results.append({name: value.numpy() for name, value in outputs.items()})
    return results


def torch_inputs(model: nn.Module, encoding: Encoding) -> tuple[torch.Tensor | None, ...]:
    """Ids, no mask, and types [1, n]; no types for a model that has fewer than two."""
    types = torch.tensor([list(encoding.types)]) if model.config.type_vocab_size > 1 else None
    return torch.tensor([list(encoding.ids)]), None, types


def check_parity(expected: Sequence[Results], path: Path, inputs: Sequence[Encoding]) -> Parity:
    """Compare a file with what torch gives for the same texts.

    A TFLite file pads to its buckets by itself; an ONNX file runs every text alone, then in padded batches of
    unlike lengths.

    Args:
        expected: of each text, from :func:`torch_results`.

    Raises:
        GateFailed: naming the file, the worst text, its output and the difference.
    """
    model = load_model(path)
    limit = TOLERANCE * max(SMALLEST_SCALE, largest_value(expected))
    runs = {"alone": [model.run(encoding.ids, encoding.types) for encoding in inputs]}
    if isinstance(model, OnnxModel):
        parts = [inputs[i : i + PADDED_BATCH] for i in range(0, len(inputs), PADDED_BATCH)]
        runs["in padded batches"] = [result for part in parts for result in model.run_batch(part)]
    worst = 0.0
    for how, got in runs.items():
        differences = [_differences(path, own, wanted) for own, wanted in zip(got, expected, strict=True)]
        text = int(np.argmax([max(by_name.values()) for by_name in differences]))
        name = max(differences[text], key=differences[text].__getitem__)
        if not differences[text][name] <= limit:
            raise GateFailed(
                f"{path.name}: run {how}, text {text} of {len(inputs)} ({len(inputs[text].ids)} tokens) differs from the torch model "
                f"by {differences[text][name]:.3g} in {name}, at most {limit:.3g} is allowed; nothing is published"
            )
        worst = max(worst, differences[text][name])
    return Parity(worst, limit, len(inputs))


def _differences(path: Path, got: Results, expected: Results) -> dict[str, float]:
    """Largest |difference| of each output; infinite where it is no number."""
    if set(got) != set(expected):
        raise GateFailed(f"{path.name}: its outputs are {', '.join(sorted(got))}; those of the torch model are {', '.join(sorted(expected))}")
    found = {name: float(np.abs(got[name] - value).max()) for name, value in expected.items()}
    return {name: difference if difference == difference else float("inf") for name, difference in found.items()}


def first_wrong_tensor(model: FoldedEncoder, path: Path, encoding: Encoding, buckets: Sequence[int]) -> str | None:
    """Name the first matrix whose result in a file like ``path`` is not that of ``model``, on one text; None if all agree.

    A second file is written beside ``path``, with the result of every matrix as an output.
    """
    expected: dict[str, np.ndarray] = {}

    def watch(name: str, x: np.ndarray, y: np.ndarray, starts: np.ndarray) -> None:
        expected.pop(name, None)  # of a shared matrix the file shows the last result, which belongs where that arises
        expected[name] = y

    forward(model, NumpySteps([encoding], watch))
    watched = path.with_name(f"watched_{path.name}")
    if path.suffix == ".onnx":
        write_onnx(model, watched, watch=True)
        got = _onnx_results(watched, encoding)
    else:
        length = min(bucket for bucket in buckets if bucket >= len(encoding.ids))
        write_tflite(model, watched, [length], watch=True)
        got = _tflite_results(watched, encoding, length)
    for name, value in expected.items():
        found = got[name].reshape(-1, value.shape[-1])[: len(value)]
        if not np.abs(found - value).max() <= TOLERANCE * max(1.0, float(np.abs(value).max())):
            return name
    return None


def first_wrong_fold(module: nn.Module, model: FoldedEncoder, encoding: Encoding) -> str | None:
    """Name the first matrix of ``model`` whose result is not that of the torch module it was folded from, on one text.

    Compared is what folding leaves in its own scale: queries, keys, values, the way up of each FFN, the pooler and the heads.
    What lies between, a way down for example, shows in the next of them. None if all agree.
    """
    for name, expected, got in _comparable(module, model, encoding):
        rows = min(len(expected), len(got))  # the first token's alone, on one side or on both
        if not np.abs(got[:rows] - expected[:rows]).max() <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
            return name
    return None


@torch.no_grad()
def _comparable(module: nn.Module, model: FoldedEncoder, encoding: Encoding) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, result in torch, result in ``model``) in the order of use."""
    calls: dict[nn.Module, list[torch.Tensor]] = {}
    # Whatever a matrix is made of, its results count, and those of what runs first in it.
    hooks = [
        part.register_forward_hook(lambda part, _, y: calls.setdefault(part, []).append(y.flatten(0, -2).float()))
        for part in module.modules()
        if isinstance(part, nn.Linear) or hasattr(part, "inner") or hasattr(part, "blocks")
    ]
    try:
        module.eval()(*torch_inputs(module, encoding))
    finally:
        for hook in hooks:
            hook.remove()
    seen: dict[str, list[np.ndarray]] = {}
    forward(model, NumpySteps([encoding], lambda name, x, y, starts: seen.setdefault(name, []).append(y)))

    def both(linear: Linear, part: nn.Module, activation: Callable = torch.clone) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        if linear.inner is not None:
            yield linear.inner.name, calls[part.inner].pop(0).numpy(), seen[linear.inner.name].pop(0)
        yield linear.name, activation(calls[part].pop(0)).numpy(), seen[linear.name].pop(0)

    for index, layer in zip(module.order, model.layers, strict=True):
        own = module.layers[index]
        for read in layer.reads:
            parts = np.split(seen[read.linear.name].pop(0), np.cumsum([width for _, width in read.parts])[:-1], axis=1)
            for (part, _), got in zip(read.parts, parts, strict=True):
                if part not in ("query", "key", "value"):
                    continue
                name, matrix = read.linear.name, getattr(own.attention, part)
                if part in layer.part_linears:
                    yield name, calls[matrix.inner].pop(0).numpy(), got
                    name = layer.part_linears[part].name
                    got = seen[name].pop(0)
                yield name, calls[matrix].pop(0).numpy() * (layer.head_size**-0.5 if part == "query" else 1.0), got
        for folded, ffn in zip(layer.ffns, own.ffns, strict=True):
            if folded.up is not None:
                yield from both(folded.up, ffn.up, ffn.activation)
    pooled = set()
    for head, shape in zip(model.heads, module.config.heads, strict=True):
        if head.pooler is not None:
            # torch runs the pooler for each head anew
            calls_of_pooler = calls[module.pooler].pop(0)
            if head.tokens not in pooled:
                pooled.add(head.tokens)
                yield head.pooler.name, module.pooler_activation(calls_of_pooler).numpy(), seen[head.pooler.name].pop(0)
        if head.linear is not None:
            yield from both(head.linear, module.heads[shape["name"]])


def _onnx_results(path: Path, encoding: Encoding) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    row = np.asarray([encoding.ids], np.int64)
    fill = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.asarray([encoding.types], np.int64)}
    names = [item.name for item in session.get_outputs()]
    results = session.run(names, {item.name: fill[item.name] for item in session.get_inputs()})
    return {name.removesuffix(WATCHED): value for name, value in zip(names, results, strict=True)}


def _tflite_results(path: Path, encoding: Encoding, length: int) -> dict[str, np.ndarray]:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_path=str(path)).get_signature_runner(f"{SIGNATURE_PREFIX}{length}")
    own = {"input_ids": encoding.ids, "attention_mask": [1] * len(encoding.ids), "token_type_ids": encoding.types}
    fill = {name: np.zeros((1, length), np.int32) for name in own}
    for name, values in own.items():
        fill[name][0, : len(values)] = values
    return runner(**{name: fill[name] for name in runner.get_input_details()})

"""Proof that an exported file computes what the torch module computes, on real texts, with and without padding.

Where it does not, :func:`first_wrong_tensor` and :func:`first_wrong_fold` name the matrix at which it goes wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from exporters.folding import FoldedEncoder, Linear
from exporters.forward import NumpySteps, forward
from exporters.onnx_writer import WATCHED, write_onnx
from exporters.tflite_writer import write_tflite
from runtimes.backends import SIGNATURE_PREFIX, OnnxModel, load_model
from runtimes.errors import GateFailed

MIN_TEXTS = 100
TOLERANCE = 1e-3
"""Largest |difference| of a logit that a float32 file may show, relative to the largest |logit| where that exceeds 1."""
PADDED_BATCH = 8


@dataclass(frozen=True)
class Parity:
    """``worst`` |logit difference| over ``texts`` texts, and the ``limit`` it was held against."""

    worst: float
    limit: float
    texts: int


@torch.no_grad()
def torch_results(model: nn.Module, id_lists: Sequence[Sequence[int]], probabilities: bool = False) -> np.ndarray:
    """Logits (or probabilities) [N, C] of texts run one by one, unpadded."""
    model.eval()
    logits = torch.cat([model(torch.tensor([list(ids)])).logits.float() for ids in id_lists])
    return (torch.softmax(logits, dim=-1) if probabilities else logits).numpy()


def check_parity(expected: np.ndarray, path: Path, id_lists: Sequence[Sequence[int]]) -> Parity:
    """Compare a file with the torch logits of the same texts.

    A TFLite file pads to its buckets by itself; an ONNX file runs every text alone, then in padded batches of
    unlike lengths.

    Args:
        expected: [N, C] from :func:`torch_results`.
        id_lists: the N texts as token ids.

    Raises:
        GateFailed: naming the file, the worst text and its difference.
    """
    model = load_model(path)
    limit = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    runs = {"alone": np.stack([model.logits(list(ids)) for ids in id_lists])}
    if isinstance(model, OnnxModel):
        parts = [id_lists[i : i + PADDED_BATCH] for i in range(0, len(id_lists), PADDED_BATCH)]
        runs["in padded batches"] = np.concatenate([model.batch_logits(part) for part in parts])
    worst = 0.0
    for how, got in runs.items():
        differences = np.abs(got - expected).max(axis=1)
        text = int(differences.argmax())
        if not differences[text] <= limit:
            raise GateFailed(
                f"{path.name}: run {how}, text {text} of {len(id_lists)} ({len(id_lists[text])} tokens) differs from the torch model "
                f"by {differences[text]:.3g}, at most {limit:.3g} is allowed; nothing is published"
            )
        worst = max(worst, float(differences[text]))
    return Parity(worst, limit, len(id_lists))


def first_wrong_tensor(model: FoldedEncoder, path: Path, ids: Sequence[int], buckets: Sequence[int]) -> str | None:
    """Name the first matrix whose result in a file like ``path`` is not that of ``model``, on one text; None if all agree.

    A second file is written beside ``path``, with the result of every matrix as an output.
    """
    expected: dict[str, np.ndarray] = {}

    def watch(name: str, x: np.ndarray, y: np.ndarray, starts: np.ndarray) -> None:
        expected.pop(name, None)  # of a shared matrix the file shows the last result, which belongs where that arises
        expected[name] = y

    forward(model, NumpySteps([ids], watch))
    watched = path.with_name(f"watched_{path.name}")
    if path.suffix == ".onnx":
        write_onnx(model, watched, watch=True)
        got = _onnx_results(watched, ids)
    else:
        length = min(bucket for bucket in buckets if bucket >= len(ids))
        write_tflite(model, watched, [length], watch=True)
        got = _tflite_results(watched, ids, length)
    for name, value in expected.items():
        found = got[name].reshape(-1, value.shape[-1])[: len(value)]
        if not np.abs(found - value).max() <= TOLERANCE * max(1.0, float(np.abs(value).max())):
            return name
    return None


def first_wrong_fold(module: nn.Module, model: FoldedEncoder, ids: Sequence[int]) -> str | None:
    """Name the first matrix of ``model`` whose result is not that of the torch module it was folded from, on one text.

    Compared is what folding leaves in its own scale: queries, keys, values, the way up of each FFN, pooler and classifier.
    What lies between, a way down for example, shows in the next of them. None if all agree.
    """
    for name, expected, got in _comparable(module, model, ids):
        rows = min(len(expected), len(got))  # the first token's alone, on one side or on both
        if not np.abs(got[:rows] - expected[:rows]).max() <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
            return name
    return None


@torch.no_grad()
def _comparable(module: nn.Module, model: FoldedEncoder, ids: Sequence[int]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, result in torch, result in ``model``) in the order of use."""
    calls: dict[nn.Module, list[torch.Tensor]] = {}
    # Whatever a matrix is made of, its results count, and those of what runs first in it.
    hooks = [
        part.register_forward_hook(lambda part, _, y: calls.setdefault(part, []).append(y.flatten(0, -2).float()))
        for part in module.modules()
        if isinstance(part, nn.Linear) or hasattr(part, "inner") or hasattr(part, "blocks")
    ]
    try:
        module.eval()(torch.tensor([list(ids)]))
    finally:
        for hook in hooks:
            hook.remove()
    seen: dict[str, list[np.ndarray]] = {}
    forward(model, NumpySteps([ids], lambda name, x, y, starts: seen.setdefault(name, []).append(y)))

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
    if model.pooler is not None:
        yield from both(model.pooler, module.pooler, module.pooler_activation)
    yield from both(model.classifier, module.classifier)


def _onnx_results(path: Path, ids: Sequence[int]) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    row = np.asarray([ids], np.int64)
    fill = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
    names = [item.name for item in session.get_outputs()]
    results = session.run(names, {item.name: fill[item.name] for item in session.get_inputs()})
    return {name.removesuffix(WATCHED): value for name, value in zip(names, results, strict=True)}


def _tflite_results(path: Path, ids: Sequence[int], length: int) -> dict[str, np.ndarray]:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_path=str(path)).get_signature_runner(f"{SIGNATURE_PREFIX}{length}")
    row = np.zeros((1, length), np.int32)
    fill = {"input_ids": row.copy(), "attention_mask": row.copy(), "token_type_ids": row}
    fill["input_ids"][0, : len(ids)], fill["attention_mask"][0, : len(ids)] = ids, 1
    return runner(**{name: fill[name] for name in runner.get_input_details()})

"""What the scripts of all peers share: the job, the clock, the answer. Runs in the peer's own environment.

::

    python PEER.py build JOB.json      convert the weights: one variant, one JSON document on stdout
    python PEER.py run JOB.json        load what was built and time it, or collect its logits

A peer's script describes its variants (:class:`Variant`) and calls :func:`serve`. Of pocketbert it knows one file, which
needs nothing but numpy: ``device_bench/agent/agent.py``, whose path is in the job. Its rules of warm-up and timing are
used as they are, so that every row of the table is timed by the same lines of code.

The job of ``build``: ``{"variant": name, "model": folder that transformers reads, "folder": where files go, "buckets":
[int], "default_length": int, "calibration": inputs file | null, "agent": path}``. The answer: ``{"versions", "settings",
"files", "size_bytes", "seconds"}``.
The job of ``run``: ``{"variant", "files", "model", "buckets", "default_length", "agent", "inputs": inputs file, "mode":
"latency" | "logits"}``; latency also has the agent's ``warmup``, ``min_inferences``, ``min_seconds`` and is answered with
a case of the agent; logits has ``output``, an .npz that gets ``logits`` float32 [N, C].
Either may be answered ``{"error": text}``, with exit code 1.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_QUOTED_CHARACTERS = 600


class Model(Protocol):
    """What the agent times: ``run`` alone is between the two readings of the clock."""

    def computed_length(self, length: int) -> int:
        """Tokens that are computed for an input of ``length`` tokens."""

    def feed(self, ids: np.ndarray, types: np.ndarray) -> Any:
        """What :meth:`run` takes for one input, ids and token types int [n]."""

    def run(self, feed: Any) -> Any:
        """Logits [1, C], as an array or what numpy can make one of; of the agent's own models, all outputs of the file."""


@dataclass(frozen=True)
class Variant:
    """One way to use the peer.

    Args:
        settings: for the reader of the table.
        build: writes files into ``job["folder"]`` and returns them; every one is counted in the size.
        load: the files, and the job, to a model that runs on one thread.
    """

    settings: str
    build: Callable[[dict[str, Any]], list[Path]]
    load: Callable[[list[str], dict[str, Any]], Model]


def serve(packages: tuple[str, ...], variants: dict[str, Variant]) -> int:
    """Answer one job; ``packages`` are those whose versions belong into the table."""
    answer_fd = os.dup(1)  # kept for the answer alone: converters print to fd 1 whenever they like
    os.dup2(2, 1)
    code = 0
    try:
        verb, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
        variant = variants[job["variant"]]
        answer = {"build": build, "run": run}[verb](job, variant, packages)
    except Exception as error:  # whatever a converter raises is a result: the table says that it failed, and how
        traceback.print_exc()
        answer, code = {"error": f"{type(error).__name__}: {error}"[:_QUOTED_CHARACTERS]}, 1
    with os.fdopen(answer_fd, "w", encoding="ascii") as stream:
        stream.write(json.dumps(answer, allow_nan=False) + "\n")
    return code


def build(job: dict[str, Any], variant: Variant, packages: tuple[str, ...]) -> dict[str, Any]:
    started = time.monotonic()
    files = variant.build(job)
    return {
        "versions": {name: version(name) for name in packages}, "settings": variant.settings, "files": [str(path) for path in files],
        "size_bytes": sum(path.stat().st_size for path in files), "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def run(job: dict[str, Any], variant: Variant, packages: tuple[str, ...]) -> dict[str, Any]:
    agent = agent_module(job)
    inputs = agent.read_inputs(job["inputs"])[0]
    model = variant.load(job["files"], job)
    if job["mode"] == "logits":
        np.savez(job["output"], logits=np.stack([logits_of(model, ids, types) for ids, types in inputs]))
        return {"texts": len(inputs)}
    return agent.measure_case(job, model, {"case": "texts"}, inputs)


def logits_of(model: Model, ids: np.ndarray, types: np.ndarray) -> np.ndarray:
    """Float32 [C]."""
    feed = model.feed(ids, types)
    result = model.run(feed)
    if hasattr(model, "outputs"):  # one of the agent's
        return model.outputs(feed, result, len(ids))["logits"]
    return np.array(result, dtype=np.float32)[0]


def agent_module(job: dict[str, Any]) -> ModuleType:
    """The agent by its path: the project is not installed here."""
    name = "pocketbert_agent"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, job["agent"])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def input_names(job: dict[str, Any]) -> list[str]:
    """Inputs of the model: DistilBERT and its like have no token types."""
    config = json.loads((Path(job["model"]) / "config.json").read_text(encoding="utf-8"))
    return list(INPUTS[: 3 if config.get("type_vocab_size") else 2])


def load_torch(job: dict[str, Any]):
    """The weights in transformers, in evaluation mode; attention is spelt out, which every tracer follows."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(job["model"], attn_implementation="eager").eval()


def torch_logits(model):
    """``model`` as a module of positional tensors that returns the logits alone."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, token_type_ids=None):
            extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **extra).logits

    return Logits().eval()


def sample(job: dict[str, Any], length: int, dtype: str = "int64") -> tuple:
    """Example inputs [1, length] as torch tensors, a third of them padding."""
    import torch

    kind = getattr(torch, dtype)
    ids, mask, types = torch.full((1, length), 7, dtype=kind), torch.ones(1, length, dtype=kind), torch.zeros(1, length, dtype=kind)
    mask[0, length - length // 3 :] = 0
    return (ids, mask, types)[: len(input_names(job))]


def calibration_feeds(job: dict[str, Any], limit: int) -> list[dict[str, np.ndarray]]:
    """Tensors int64 [1, n] of up to ``limit`` training texts, each at its own length."""
    agent, names = agent_module(job), input_names(job)
    if job["calibration"] is None:
        raise ValueError("no calibration texts were given for this case, and this variant needs them")
    return [agent.make_feed(names, ids, types, len(ids), "int64") for ids, types in agent.read_inputs(job["calibration"])[0][:limit]]


def smallest(buckets: list[int], length: int) -> int:
    """The smallest bucket that holds ``length`` tokens."""
    for bucket in sorted(buckets):
        if bucket >= length:
            return bucket
    raise ValueError(f"{length} tokens do not fit the largest length that was built, {max(buckets)}")

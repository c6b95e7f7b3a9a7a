"""What a checkpoint was trained for, as its files tell: the kind of task, and the names of its classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.models.config import EncoderConfig
from pipeline.models.hub import HEADS
from pipeline.models.hub_fields import architectures, class_names, read_config, read_encoder_config
from pipeline.models.json_files import CURE, read_table
from runtimes.errors import BadInput

POOLING = "1_Pooling/config.json"
"""Where sentence-transformers keeps how a vector is made."""


def own_task(folder: Path) -> dict[str, Any]:
    """Keys of the ``[task]`` table that the checkpoint in ``folder`` decides.

    Raises:
        BadInput: it has no head, or one of no known task.
    """
    raw = read_config(folder)
    architecture = architectures(raw, folder / "config.json") or "no architecture"
    if (folder / POOLING).is_file():
        return {"kind": "sentence-embedding", "pooling": _pooling(folder / POOLING)}
    if raw["model_type"] == EncoderConfig.model_type:
        return _own_form(raw, folder)
    for end, (head, tokens) in HEADS.items():
        if architecture.endswith(end):
            if head == "span":
                return {"kind": "question-answering"}
            return {"kind": "token-classification"} if tokens == "all" else _classifier(raw, len(class_names(raw)))
    raise BadInput(
        f"model {folder}: {architecture} has no head for a task, so there is nothing to convert; fine-tune it first with a recipe "
        f"(pocketbert init), or name --task sentence-embedding for its vectors. Heads that are read: {', '.join(HEADS)}"
    )


def own_labels(folder: Path) -> dict[str, list[str]]:
    """Names of classes by output, in the order of the checkpoint's head; {} where it has no head with classes."""
    raw = read_config(folder)
    try:
        kind = own_task(folder)["kind"]
    except BadInput:
        return {}
    return {"logits": class_names(raw)} if kind in ("text-classification", "token-classification", "intent-and-slots") else {}


def longest_input(folder: Path) -> int:
    """Tokens that the checkpoint can read, or was trained to read, whichever is less."""
    config = read_encoder_config(folder)
    limits = [config.max_position_embeddings - config.position_offset]
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        if (folder / name).is_file():
            told = read_table(folder / name).get(key)
            if told is not None and (type(told) not in (int, float) or not told >= 2):
                raise BadInput(f"model {folder / name}: {key} is {str(told)[:40]}, not a number of tokens; {CURE}")
            limits.append(limits[0] if told is None else told)
    return int(min(limits))


def _own_form(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    heads = {head["name"]: head for head in raw.get("heads") or []}
    if "embedding" in heads:
        return {"kind": "sentence-embedding", "pooling": heads["embedding"]["tokens"], "size": heads["embedding"]["size"]}
    if "span" in heads:
        return {"kind": "question-answering"}
    if "slots" in heads:
        return {"kind": "intent-and-slots"}
    if "classifier" not in heads:
        raise BadInput(f"model {folder}: no head for a task, so there is nothing to convert; fine-tune it first with a recipe (pocketbert init)")
    if heads["classifier"]["tokens"] == "all":
        return {"kind": "token-classification"}
    pooling = {} if heads["classifier"]["tokens"] == "first" else {"pooling": heads["classifier"]["tokens"]}
    return _classifier(raw, heads["classifier"]["size"]) | pooling


def _classifier(raw: dict[str, Any], classes: int) -> dict[str, Any]:
    problem = raw.get("problem_type")
    if problem == "regression" or (problem is None and classes == 1):
        return {"kind": "text-regression"}
    several = {"multi_label": True} if problem == "multi_label_classification" else {}
    return {"kind": "text-classification"} | several


def _pooling(path: Path) -> str:
    modes = read_table(path)
    chosen = [name for name, key in (("mean", "pooling_mode_mean_tokens"), ("first", "pooling_mode_cls_token")) if modes.get(key)]
    if len(chosen) != 1:
        raise BadInput(f"model {path}: vectors that are neither the mean of all tokens nor the first token cannot be exported")
    return chosen[0]

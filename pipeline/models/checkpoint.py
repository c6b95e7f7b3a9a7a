"""A model folder: the encoder and its tokenizer together, as every PyTorch stage reads and leaves it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.models.encoder import Encoder
from pipeline.models.hub import load_encoder, save_encoder
from runtimes.errors import BadInput

TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
SPECIAL_ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token")


@dataclass
class Checkpoint:
    """``model`` in evaluation mode, and its tokenizer as the text of ``tokenizer.json``."""

    model: Encoder
    tokenizer_json: str
    tokenizer_config: dict[str, Any]

    @classmethod
    def load(cls, folder: Path, heads: list[dict[str, Any]] | None = None, labels: list[str] | None = None) -> Checkpoint:
        """Read a model folder; ``heads`` and ``labels`` as for :func:`~pipeline.models.hub.load_encoder`."""
        model = load_encoder(folder, heads, labels)
        text, config = read_tokenizer(folder)
        return cls(model, text, config)

    def with_model(self, model: Encoder) -> Checkpoint:
        """Another model with the same tokenizer."""
        return Checkpoint(model, self.tokenizer_json, self.tokenizer_config)

    def save(self, folder: Path, max_length: int) -> None:
        """Write the folder; its tokenizer cuts at ``max_length`` and never pads, whoever loads it."""
        save_encoder(self.model, folder)
        write_tokenizer(folder, self.tokenizer_json, self.tokenizer_config, max_length)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.tokenizer_json)

    def special_id(self, role: str) -> int | None:
        """Id of ``pad_token``, ``mask_token``, ...; None where the tokenizer has none."""
        token = self.tokenizer_config.get(role)
        content = token.get("content") if isinstance(token, dict) else token
        return None if content is None else self.tokenizer.token_to_id(content)

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i in map(self.special_id, SPECIAL_ROLES) if i is not None)


def read_tokenizer(folder: Path) -> tuple[str, dict[str, Any]]:
    """``tokenizer.json`` as text and ``tokenizer_config.json`` with the special tokens; BadInput if there is none."""
    if not (folder / TOKENIZER).is_file():
        if not any((folder / name).is_file() for name in ("vocab.txt", "vocab.json", "spiece.model")):
            raise BadInput(f"model {folder}: no tokenizer; {TOKENIZER} or vocab.txt is needed")
        from transformers import AutoTokenizer  # a checkpoint from before tokenizer.json

        made = AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True)
        return made.backend_tokenizer.to_str(), {k: v for k, v in made.init_kwargs.items() if k in SPECIAL_ROLES} | {
            "tokenizer_class": type(made).__name__.removesuffix("Fast")
        }
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= json.loads((folder / name).read_text(encoding="utf-8"))
    return (folder / TOKENIZER).read_text(encoding="utf-8"), config


def write_tokenizer(folder: Path, tokenizer_json: str, config: dict[str, Any], max_length: int) -> None:
    """Write the four files that tokenizers, transformers and transformers.js read, the same bytes every time."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
    special = {role: config[role] for role in SPECIAL_ROLES if config.get(role) is not None}
    keep = ("do_lower_case", "strip_accents", "tokenize_chinese_chars", "tokenizer_class")
    settings = special | {k: config[k] for k in keep if k in config} | {"model_max_length": max_length}
    for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] == "WordPiece":
        pieces = sorted(model["vocab"], key=model["vocab"].get)
        (folder / "vocab.txt").write_text("".join(piece + "\n" for piece in pieces), encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)

"""A model folder: the encoder and its tokenizer together, as every PyTorch stage reads and leaves it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.models.encoder import Encoder
from pipeline.models.hub import load_encoder, save_encoder
from pipeline.models.tokenizer_files import SPECIAL_ROLES, read_tokenizer, write_tokenizer
from runtimes.errors import BadInput


@dataclass
class Checkpoint:
    """``model`` in evaluation mode, and its tokenizer as the text of ``tokenizer.json``."""

    model: Encoder
    tokenizer_json: str
    tokenizer_config: dict[str, Any]

    @classmethod
    def load(cls, folder: Path, heads: list[dict[str, Any]] | None = None, labels: list[str] | None = None) -> Checkpoint:
        """Read a model folder; ``heads`` and ``labels`` as for :func:`~pipeline.models.hub.load_encoder`.

        Raises:
            BadInput: a damaged file, or a tokenizer with tokens that the model has no row for.
        """
        model = load_encoder(folder, heads, labels)
        text, config = read_tokenizer(folder, model.config.family)
        made = cls(model, text, config)
        largest, rows = max(made.tokenizer.get_vocab().values()), model.config.vocab_size
        if largest >= rows:
            raise BadInput(
                f"model {folder}: the tokenizer's token {made.tokenizer.id_to_token(largest)!r} is number {largest}, the model's word table has "
                f"{rows} rows; give the tokenizer that belongs to the model, or add rows (resize_token_embeddings) and train them"
            )
        return made

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
        content = self.tokenizer_config.get(role)
        return None if content is None else self.tokenizer.token_to_id(content)

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i in map(self.special_id, SPECIAL_ROLES) if i is not None)

"""torch module -> TFLite file with one signature per length bucket, all on the same weights.

A signature ``serving_N`` takes int32 ``input_ids``, ``attention_mask`` [1, N] (and ``token_type_ids`` where the model
has token types) and returns ``logits`` [1, C]. Short texts use a short bucket, so nobody pays for padding.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from exporters.tflite_compact import compact
from runtimes.backends import SIGNATURE_PREFIX


def signature_name(length: int) -> str:
    return f"{SIGNATURE_PREFIX}{length}"


class _Named(nn.Module):
    """The model with outputs by name, as signatures want them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.model(input_ids, attention_mask, token_type_ids).logits}


def export_tflite(model: nn.Module, path: Path, buckets: list[int]) -> None:
    """Write ``model`` as TFLite with one signature for each length in ``buckets``."""
    import litert_torch  # pulls jax: seconds to import, and nothing else here needs it

    named = _Named(model).eval()
    converter = litert_torch
    for length in buckets:
        sample = {"input_ids": torch.ones(1, length, dtype=torch.int32), "attention_mask": torch.ones(1, length, dtype=torch.int32)}
        if model.config.type_vocab_size:
            sample["token_type_ids"] = torch.zeros(1, length, dtype=torch.int32)
        converter = converter.signature(signature_name(length), named, sample_kwargs=sample)
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.WARNING)
    try:
        # The converter tells every pass it runs; errors come as exceptions.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            converter.convert().export(str(path))
    finally:
        logging.disable(logging.NOTSET)
    compact(path)

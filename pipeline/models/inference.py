"""Run a model over tokenized inputs, and what every such run shares."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.models.encoder import Encoder
from pipeline.tasks.batches import EncodedTexts, flat_ranges, in_order

EVALUATION_BATCH = 256
EVALUATION_TOKENS = 16_384
"""Tokens of a batch, padding included: long texts run in smaller batches."""


def half_precision(precision: str = "auto", device: str = "cpu") -> torch.autocast:
    """Context in which matrices are multiplied in bfloat16: always (``bf16``), never (``fp32``), where ``device`` is fast at it (``auto``)."""
    if device == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = device == "mps" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16" or (precision == "auto" and fast))


def evaluation_batch(texts: EncodedTexts) -> int:
    """Inputs per batch, so that the longest of ``texts`` fit."""
    longest = int(texts.lengths.max()) if len(texts) else 1
    return max(1, min(EVALUATION_BATCH, EVALUATION_TOKENS // longest))


@torch.no_grad()
def predict(model: Encoder, texts: EncodedTexts, **options: object) -> dict[str, Tensor]:
    """Outputs by name in float32, in the order of ``texts``: [N, ...] per input, [T, ...] per token.

    The model is put into evaluation mode.

    Args:
        options: for the forward pass, such as layers to ``skip``.
    """
    model.eval()
    found: dict[str, Tensor] = {}
    per_token = model.config.per_token_outputs
    for batch in in_order(texts, evaluation_batch(texts)):
        for name, value in model.outputs(batch, **options).items():
            value = value.float()
            if name not in found:
                found[name] = value.new_empty(len(texts.ids) if name in per_token else len(texts), *value.shape[1:])
            place = flat_ranges(texts.offsets[batch.rows], texts.lengths[batch.rows]) if name in per_token else batch.rows
            found[name][torch.from_numpy(place)] = value
    return found

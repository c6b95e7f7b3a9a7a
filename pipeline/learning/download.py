"""How large weights are when they are sent: compressed, as stores and web servers do."""

from __future__ import annotations

import zstandard

from exporters.quant_plan import rows_to_int8
from pipeline.models.encoder import Encoder

LEVEL = 19
"""zstd -19, the strongest that needs no option."""


def compressed_bytes(content: bytes) -> int:
    """Bytes of ``content`` after ``zstd -19``."""
    return len(zstandard.ZstdCompressor(level=LEVEL, threads=-1).compress(content))


def download_bytes(model: Encoder) -> int:
    """Bytes of the model's matrices as int8 codes after ``zstd -19``; what is shared counts once, norms and biases do not count."""
    matrices = {p.data_ptr(): p for p in model.parameters() if p.ndim == 2 and p.numel()}
    return compressed_bytes(b"".join(rows_to_int8(p.detach().float().numpy())[0].tobytes() for p in matrices.values()))

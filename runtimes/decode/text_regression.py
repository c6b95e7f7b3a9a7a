"""A number for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from runtimes.decode.base import Answer, Decoder, Outputs, output
from runtimes.errors import IntegrityError

if TYPE_CHECKING:
    from runtimes.text import Encoding


class TextRegression(Decoder):
    """``{"value"}``: the only number that the file gives."""

    kind = "text-regression"

    def answer(self, example: Mapping[str, str], encodings: Sequence[Encoding], outputs: Sequence[Outputs]) -> Answer:
        values = output(outputs[0], ("logits",))
        if np.shape(values) != (1,):
            raise IntegrityError(f"logits: the file gives numbers {list(np.shape(values))}; {self.kind} reads one")
        return {"value": float(values[0])}

    def line(self, answer: Answer) -> str:
        return f"{answer['value']:.6g}"

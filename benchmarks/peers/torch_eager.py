"""torch: the model as transformers runs it, in fp32, and with linears quantized by torch.ao as the model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from peer import Variant, agent_module, input_names, load_torch, serve


class TorchModel:
    """A text runs at its own length; the inputs are tensors before the clock starts."""

    def __init__(self, model, job: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(1)
        self._model, self._names, self._agent, self._torch = model, input_names(job), agent_module(job), torch

    def computed_length(self, length: int) -> int:
        return length

    def feed(self, ids, types):
        arrays = self._agent.make_feed(self._names, ids, types, len(ids), "int64")
        return {name: self._torch.from_numpy(array) for name, array in arrays.items()}

    def run(self, feed):
        with self._torch.inference_mode():
            return self._model(**feed).logits


def quantized(job: dict[str, Any]):
    import torch

    return torch.ao.quantization.quantize_dynamic(load_torch(job), {torch.nn.Linear}, dtype=torch.qint8)


def build_int8(job: dict[str, Any]) -> list[Path]:
    """The state dict, for its size alone: reading it back would unpickle; :func:`quantized` makes the same model again."""
    import torch

    path = Path(job["folder"]) / "state_int8.pt"
    torch.save(quantized(job).state_dict(), path)
    return [path]


def load_fp32(files: list[str], job: dict[str, Any]) -> TorchModel:
    import transformers

    # The attention that transformers chooses by itself, torch's fused one: 5 % faster here than the spelt-out form.
    return TorchModel(transformers.AutoModelForSequenceClassification.from_pretrained(job["model"]).eval(), job)


VARIANTS = {
    "torch_fp32": Variant("fp32, eager, own length", lambda job: [Path(job["model"]) / "model.safetensors"], load_fp32),
    "torch_int8": Variant("torch.ao quantize_dynamic of Linear, own length", build_int8, lambda files, job: TorchModel(quantized(job), job)),
}

if __name__ == "__main__":
    sys.exit(serve(("torch", "transformers"), VARIANTS))

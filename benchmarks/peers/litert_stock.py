"""LiteRT: litert-torch's converter and ai-edge-quantizer's dynamic int8, run by the LiteRT interpreter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from peer import Variant, agent_module, input_names, load_torch, sample, serve, torch_logits


def build(job: dict[str, Any], lengths: list[int]) -> list[Path]:
    """One signature per length, on the same weights. Only the names of the signatures are the agent's, not the converter's own."""
    import litert_torch
    import torch
    from ai_edge_quantizer import quantizer, recipe

    logits = torch_logits(load_torch(job))

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = logits

        def forward(self, input_ids, attention_mask, token_type_ids=None):
            return {"logits": self.logits(input_ids, attention_mask, token_type_ids)}

    converter, names = litert_torch, input_names(job)
    for length in lengths:
        arguments = dict(zip(names, sample(job, length, "int32"), strict=True))
        converter = converter.signature(f"serving_{length}", Named().eval(), sample_kwargs=arguments)
    folder = Path(job["folder"])
    converter.convert().export(str(folder / "model.tflite"))
    work = quantizer.Quantizer(str(folder / "model.tflite"))
    work.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    target = folder / "model_int8.tflite"
    work.quantize().export_model(str(target), overwrite=True)
    return [target]


def load(files: list[str], job: dict[str, Any]):
    """The agent's own TFLite model: the very lines that time pocketbert's files."""
    from ai_edge_litert.interpreter import Interpreter

    return agent_module(job).TfliteModel(files[0], 1, Interpreter)


VARIANTS = {
    "litert_default": Variant("dynamic_wi8_afp32, one signature, padded", lambda job: build(job, [job["default_length"]]), load),
    "litert_bucketed": Variant(
        "dynamic_wi8_afp32, bucketed by hand", lambda job: build(job, sorted({*job["buckets"], job["default_length"]})), load
    ),
}

if __name__ == "__main__":
    sys.exit(serve(("litert-torch", "ai-edge-quantizer", "ai-edge-litert", "transformers", "torch"), VARIANTS))

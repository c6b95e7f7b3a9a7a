"""OpenVINO: its converter, NNCF's post-training quantization of weights and activations, run on one thread.

One request per length bucket halves the time of a request of free length (1.2 ms against 2.5), so it is a row of its own.
Tried beside them, and the same within noise: INFERENCE_PRECISION_HINT f32; weights alone compressed to int8 with dynamic
quantization of activations.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from peer import Variant, agent_module, calibration_feeds, input_names, load_torch, sample, serve, smallest, torch_logits

CALIBRATION_TEXTS = 300


def build(job: dict[str, Any]) -> list[Path]:
    """Convert with a free length, calibrate on training texts at their own lengths, quantize as NNCF does transformers."""
    import nncf
    import openvino

    names = input_names(job)
    model = openvino.convert_model(torch_logits(load_torch(job)), example_input=sample(job, 16), input=[(name, [1, -1]) for name in names])
    model.outputs[0].get_tensor().set_names({"logits"})
    dataset = nncf.Dataset(calibration_feeds(job, limit=CALIBRATION_TEXTS))
    quantized = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION_TEXTS)
    path = Path(job["folder"]) / "model_int8.xml"
    openvino.save_model(quantized, path)
    return [path, path.with_suffix(".bin")]


class OpenvinoModel:
    """One request per length where lengths are fixed, else one for all; the inputs are shared, not copied."""

    def __init__(self, files: list[str], job: dict[str, Any], lengths: list[int] | None) -> None:
        import openvino

        core = openvino.Core()
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
        self._names, self._agent, self._lengths, self._requests = input_names(job), agent_module(job), lengths, {}
        for length in lengths or [None]:
            model = core.read_model(files[0])
            if length is not None:
                model.reshape({name: [1, length] for name in self._names})
            self._requests[length] = core.compile_model(model, "CPU", settings).create_infer_request()

    def computed_length(self, length: int) -> int:
        return length if self._lengths is None else smallest(self._lengths, length)

    def feed(self, ids, types):
        length = self.computed_length(len(ids))
        request = self._requests[None if self._lengths is None else length]
        return request, self._agent.make_feed(self._names, ids, types, length, "int64")

    def run(self, feed):
        request, arrays = feed
        return request.infer(arrays, share_inputs=True, share_outputs=True)[0]


VARIANTS = {
    "openvino_nncf": Variant("NNCF TRANSFORMER, own length", build, lambda files, job: OpenvinoModel(files, job, None)),
    "openvino_nncf_bucketed": Variant(
        "NNCF TRANSFORMER, compiled for each length bucket", build, lambda files, job: OpenvinoModel(files, job, job["buckets"])
    ),
}

if __name__ == "__main__":
    sys.exit(serve(("openvino", "nncf", "transformers", "torch"), VARIANTS))

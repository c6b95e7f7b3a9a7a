"""ExecuTorch: torch.export, PT2E quantization of linears (dynamic int8, per channel), lowered to XNNPACK.

A method has one length. Two variants: a program with a method for each of several lengths, chosen by text, and the
program of a single length that an export makes by default.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from peer import Variant, agent_module, input_names, load_torch, sample, serve, smallest, torch_logits

METHOD = "forward_"


def build(job: dict[str, Any], lengths: list[int]) -> list[Path]:
    """One file: a method per length on the same weights, which takes a third of the bytes of a file per length.

    Attention leaves copies that change nothing (``expand`` to the size that a tensor has), which ExecuTorch would run by
    portable kernels. Without them a text of 16 tokens takes 0.77 ms instead of 0.93. Two partitioners in a row, linears
    first, or attention as torch fuses it gave nothing (0.80 and 1.3 ms). The word table stays fp32, as everywhere in
    ExecuTorch's own recipes for XNNPACK: it costs bytes, not time.
    """
    from executorch.backends.xnnpack._passes.remove_noop_expand_copy_pass import RemoveNoopExpandCopyPass
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    methods = {f"{METHOD}{length}": quantized(job, length) for length in lengths}
    partitioners = {name: [XnnpackPartitioner()] for name in methods}
    lowered = to_edge_transform_and_lower(methods, transform_passes=[RemoveNoopExpandCopyPass()], partitioner=partitioners)
    return [write(lowered, Path(job["folder"]) / "model_int8.pte")]


def build_default(job: dict[str, Any], length: int) -> list[Path]:
    """The steps of ExecuTorch's documentation as they stand there."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower({f"{METHOD}{length}": quantized(job, length)}, partitioner=[XnnpackPartitioner()])
    return [write(lowered, Path(job["folder"]) / "model_int8.pte")]


def quantized(job: dict[str, Any], length: int):
    """The exported program of one length, its linears quantized."""
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    inputs = sample(job, length)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(torch_logits(load_torch(job)), inputs).module(), quantizer)
        prepared(*inputs)
        return torch.export.export(convert_pt2e(prepared), inputs)


def write(lowered, path: Path) -> Path:
    with path.open("wb") as stream:
        lowered.to_executorch().write_to_file(stream)
    return path


class PteModel:
    """A text runs in the method of the smallest length that holds it, padded with zeros; inputs are tensors before the clock starts."""

    def __init__(self, files: list[str], job: dict[str, Any]) -> None:
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        portable_lib._unsafe_reset_threadpool(1)  # the only way to one thread that the Python binding has
        if portable_lib._threadpool_get_thread_count() != 1:
            raise RuntimeError(f"ExecuTorch kept {portable_lib._threadpool_get_thread_count()} threads, 1 was asked for")
        self._program = Runtime.get().load_program(files[0])
        self._methods = {int(name.removeprefix(METHOD)): self._program.load_method(name) for name in self._program.method_names}
        self._names, self._agent = input_names(job), agent_module(job)

    def computed_length(self, length: int) -> int:
        return smallest(list(self._methods), length)

    def feed(self, ids, types):
        import torch

        length = self.computed_length(len(ids))
        arrays = self._agent.make_feed(self._names, ids, types, length, "int64")
        return self._methods[length], [torch.from_numpy(arrays[name]) for name in self._names]

    def run(self, feed):
        method, tensors = feed
        return method.execute(tensors)[0]


VARIANTS = {
    "executorch": Variant("XNNPACK dynamic int8, per channel; a method per length", lambda job: build(job, job["buckets"]), PteModel),
    "executorch_default": Variant(
        "XNNPACK dynamic int8, per channel; one length, padded", lambda job: build_default(job, job["default_length"]), PteModel
    ),
}

if __name__ == "__main__":
    sys.exit(serve(("executorch", "torchao", "transformers", "torch"), VARIANTS))

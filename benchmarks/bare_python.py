"""What a runtime takes in Python without an agent: load a file, run one text once, print the peak of the process in bytes.

    python benchmarks/bare_python.py MODEL ID,ID,...

It imports numpy and the runtime, and nothing of the project.
"""

import os
import sys

import numpy as np


def run_onnx(model: str, ids: list[int]) -> None:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # as the agent; its uploader takes 2 MB
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, {item.name: row(item.name, ids, len(ids), np.int64) for item in session.get_inputs()})


def run_tflite(model: str, ids: list[int]) -> None:
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.hardware_accelerator import HardwareAccelerator
    from ai_edge_litert.options import CpuOptions, Options

    cpu = CpuOptions(num_threads=1, xnnpack_weight_cache_path=":memory")
    compiled = CompiledModel.from_file(model, options=Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=cpu))
    length, name = min((length, name) for name in compiled.get_signature_list() if (length := int(name.rpartition("_")[2])) >= len(ids))
    signature = compiled.get_signature_list()[name]
    inputs = [compiled.create_input_buffer_by_name(name, item) for item in signature["inputs"]]
    outputs = [compiled.create_output_buffer_by_name(name, item) for item in signature["outputs"]]
    for item, buffer in zip(signature["inputs"], inputs, strict=True):
        buffer.write(row(item, ids, length, np.int32))
    compiled.run_by_index(compiled.get_signature_index(name), inputs, outputs)


def row(name: str, ids: list[int], length: int, dtype: type) -> np.ndarray:
    values = np.zeros((1, length), dtype)
    values[0, : len(ids)] = {"input_ids": ids, "attention_mask": 1}.get(name, 0)
    return values


def main() -> None:
    model, ids = sys.argv[1], [int(number) for number in sys.argv[2].split(",")]
    (run_onnx if model.endswith(".onnx") else run_tflite)(model, ids)
    with open("/proc/self/status", encoding="ascii") as status:
        print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))


if __name__ == "__main__":
    main()

"""What a runtime takes in Python without an agent: load a file, run one input once, print the peak of the process in bytes.

    python benchmarks/bare_python.py MODEL ID,ID,... TYPE,TYPE,...

It imports numpy and the runtime, and nothing of the project.
"""

import os
import sys

import numpy as np


def run_onnx(model: str, given: dict[str, list[int]]) -> None:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # as the agent; its uploader takes 2 MB
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, {item.name: np.array([given[item.name]], np.int64) for item in session.get_inputs()})


def run_tflite(model: str, given: dict[str, list[int]]) -> None:
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.hardware_accelerator import HardwareAccelerator
    from ai_edge_litert.options import CpuOptions, Options

    cpu = CpuOptions(num_threads=1, xnnpack_weight_cache_path=":memory")
    compiled = CompiledModel.from_file(model, options=Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=cpu))
    tokens = len(given["input_ids"])
    length, name = min((length, name) for name in compiled.get_signature_list() if (length := int(name.rpartition("_")[2])) >= tokens)
    signature = compiled.get_signature_list()[name]
    inputs = [compiled.create_input_buffer_by_name(name, item) for item in signature["inputs"]]
    outputs = [compiled.create_output_buffer_by_name(name, item) for item in signature["outputs"]]
    for item, buffer in zip(signature["inputs"], inputs, strict=True):
        buffer.write(np.array([[*given[item], *[0] * (length - tokens)]], np.int32))
    compiled.run_by_index(compiled.get_signature_index(name), inputs, outputs)


def main() -> None:
    model, ids, types = sys.argv[1], *([int(number) for number in argument.split(",")] for argument in sys.argv[2:4])
    given = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": types}
    (run_onnx if model.endswith(".onnx") else run_tflite)(model, given)
    with open("/proc/self/status", encoding="ascii") as status:
        print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))


if __name__ == "__main__":
    main()

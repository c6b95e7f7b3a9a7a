"""Model files made operator by operator, whose outputs can be computed by hand.

A per-token output is a row of a table for each token, plus a row of another table for its type. A per-input output is the sum over tokens of a row of
a table, plus the sum of the mask: a padded token that counted would show. Row 0 of every table, the pad token's, is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PIECES = 12


@dataclass(frozen=True)
class Tables:
    """By output: the table [pieces, ...] and, per token, that of types [2, ...]; ``types`` says whether the file takes token types."""

    inputs: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]
    of_types: Mapping[str, np.ndarray]
    types: bool

    def expected(self, ids: Sequence[int], types: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """What a file gives for one input."""
        kinds = np.zeros(len(ids), int) if types is None or not self.types else np.asarray(types)
        found = {name: table[np.asarray(ids)].sum(axis=0) + len(ids) for name, table in self.inputs.items()}
        return found | {name: table[np.asarray(ids)] + self.of_types[name][kinds] for name, table in self.tokens.items()}


def random_tables(inputs: Mapping[str, int], tokens: Mapping[str, int | None], types: bool = True, pieces: int = PIECES) -> Tables:
    """Tables for outputs by name with so many classes; None: one number a token."""
    random = np.random.default_rng(0)

    def table(rows: int, width: int | None) -> np.ndarray:
        made = random.normal(size=(rows, width) if width else rows).astype(np.float32)
        made[0] = 0
        return made

    return Tables(
        {name: table(pieces, width) for name, width in inputs.items()}, {name: table(pieces, width) for name, width in tokens.items()},
        {name: table(2, width) for name, width in tokens.items()}, types,
    )  # fmt: skip


def write_onnx(path: Path, tables: Tables) -> Path:
    from onnx import TensorProto, checker, helper, numpy_helper, save

    nodes, constants, outputs = [], [], []
    constants.append(numpy_helper.from_array(np.array([1], np.int64), "token_axis"))
    nodes.append(helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT))
    nodes.append(helper.make_node("ReduceSum", ["mask", "token_axis"], ["length"], keepdims=1))
    for name, table in tables.inputs.items():
        constants.append(numpy_helper.from_array(table, f"{name}.table"))
        nodes.append(helper.make_node("Gather", [f"{name}.table", "input_ids"], [f"{name}.rows"]))
        nodes.append(helper.make_node("ReduceSum", [f"{name}.rows", "token_axis"], [f"{name}.sum"], keepdims=0))
        nodes.append(helper.make_node("Add", [f"{name}.sum", "length"], [name]))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch_size", table.shape[1]]))
    for name, table in tables.tokens.items():
        constants.append(numpy_helper.from_array(table, f"{name}.table"))
        nodes.append(helper.make_node("Gather", [f"{name}.table", "input_ids"], [f"{name}.words" if tables.types else name]))
        if tables.types:
            constants.append(numpy_helper.from_array(tables.of_types[name], f"{name}.of_types"))
            nodes.append(helper.make_node("Gather", [f"{name}.of_types", "token_type_ids"], [f"{name}.types"]))
            nodes.append(helper.make_node("Add", [f"{name}.words", f"{name}.types"], [name]))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch_size", "sequence_length", *table.shape[1:]]))
    takes = ["attention_mask", "input_ids"] + (["token_type_ids"] if tables.types else [])
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch_size", "sequence_length"]) for name in takes]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(model, path)
    return path


def write_tflite(path: Path, tables: Tables, buckets: Sequence[int], prefix: str = "serving_") -> Path:
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT()
    model.version, model.operatorCodes, model.subgraphs, model.signatureDefs = 3, [], [], []
    model.buffers = [schema.BufferT()]
    for bucket in buckets:
        _Signature(schema, model, bucket).write(tables, f"{prefix}{bucket}")
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(builder.Output()))
    return path


class _Signature:
    def __init__(self, schema, model, bucket: int) -> None:
        self.schema, self.model, self.bucket = schema, model, bucket
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []

    def write(self, tables: Tables, key: str) -> None:
        schema, kind, operator = self.schema, self.schema.TensorType, self.schema.BuiltinOperator
        takes = ["attention_mask", "input_ids"] + (["token_type_ids"] if tables.types else [])
        inputs = {name: self.tensor(name, (1, self.bucket), kind.INT32) for name in takes}
        mask = self.node(operator.CAST, [inputs["attention_mask"]], (1, self.bucket), *self.cast())
        axis = self.constant(np.array([1], np.int32))
        length = self.node(operator.SUM, [mask, axis], (1, 1), *self.keep(True))
        outputs = {}
        for name, table in tables.inputs.items():
            rows = self.gather(table, inputs["input_ids"])
            total = self.node(operator.SUM, [rows, axis], (1, table.shape[1]), *self.keep(False))
            outputs[name] = self.node(operator.ADD, [total, length], (1, table.shape[1]), *self.options("AddOptions"))
        for name, table in tables.tokens.items():
            outputs[name] = self.gather(table, inputs["input_ids"])
            if tables.types:
                kinds = self.gather(tables.of_types[name], inputs["token_type_ids"])
                outputs[name] = self.node(operator.ADD, [outputs[name], kinds], (1, self.bucket, *table.shape[1:]), *self.options("AddOptions"))
        self.graph.inputs, self.graph.outputs = list(inputs.values()), list(outputs.values())
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = key, len(self.model.subgraphs)
        signature.inputs, signature.outputs = self.maps(inputs), self.maps(outputs)
        self.model.subgraphs.append(self.graph)
        self.model.signatureDefs.append(signature)

    def maps(self, tensors: Mapping[str, int]) -> list:
        made = []
        for name, number in tensors.items():
            one = self.schema.TensorMapT()
            one.name, one.tensorIndex = name, number
            made.append(one)
        return made

    def tensor(self, name: str, shape: Sequence[int], kind: int, buffer: int = 0) -> int:
        made = self.schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name, list(shape), kind, buffer
        self.graph.tensors.append(made)
        return len(self.graph.tensors) - 1

    def constant(self, values: np.ndarray) -> int:
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
        self.model.buffers.append(buffer)
        kind = self.schema.TensorType.INT32 if values.dtype == np.int32 else self.schema.TensorType.FLOAT32
        return self.tensor(f"constant{len(self.graph.tensors)}", values.shape, kind, len(self.model.buffers) - 1)

    def gather(self, table: np.ndarray, numbers: int) -> int:
        shape = (1, self.bucket, *table.shape[1:])
        return self.node(self.schema.BuiltinOperator.GATHER, [self.constant(table), numbers], shape, *self.options("GatherOptions"))

    def node(self, operator: int, inputs: Sequence[int], shape: Sequence[int], kind: int, options) -> int:
        code = self.schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = operator
        code.version = 1
        self.model.operatorCodes.append(code)
        node = self.schema.OperatorT()
        node.opcodeIndex, node.inputs = len(self.model.operatorCodes) - 1, list(inputs)
        node.builtinOptionsType, node.builtinOptions = kind, options
        result = self.tensor(f"result{len(self.graph.tensors)}", shape, self.schema.TensorType.FLOAT32)
        node.outputs = [result]
        self.graph.operators.append(node)
        return result

    def options(self, name: str) -> tuple[int, object]:
        return getattr(self.schema.BuiltinOptions, name), getattr(self.schema, f"{name}T")()

    def cast(self) -> tuple[int, object]:
        kind, options = self.options("CastOptions")
        options.inDataType, options.outDataType = self.schema.TensorType.INT32, self.schema.TensorType.FLOAT32
        return kind, options

    def keep(self, dimensions: bool) -> tuple[int, object]:
        kind, options = self.options("ReducerOptions")
        options.keepDims = dimensions
        return kind, options

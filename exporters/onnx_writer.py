"""Write a folded encoder as an ONNX file, operator by operator.

Inputs are int64 ``attention_mask`` and ``input_ids`` [batch_size, sequence_length] (and ``token_type_ids`` for two segments), outputs those of
the heads, both in the order of their names: [batch_size, C] where a text has one result, [batch_size, sequence_length, T] or
[batch_size, sequence_length] where each token has. Names are the hub's; batch and length are free.
What outputs hold at padding means nothing. Opset 17 and IR 9, which onnxruntime 1.17 and onnxruntime-web read.

A float32 file has standard operators only. A quantized file takes those of ONNX Runtime (domain com.microsoft) that do
several steps at once, because a small model pays more for the number of operators than for its arithmetic:
DynamicQuantizeMatMul (quantize, multiply, scale, add the bias), QAttention (the product of queries, keys and values, and
the attention), MatMulIntegerToFloat, MatMulNBits, MultiHeadAttention and Gelu. ``benchmarks/files.py`` compares them with the alternatives;
SkipLayerNormalization is not among them, which takes longer than the addition and the norm that it replaces.

An 8-bit table has a scale for each row, looked up beside it.

Every constant is stored once under its name, so a shared matrix is shared in the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporters.forward import SMALLEST_LENGTH, forward, input_names
from exporters.graph import MASKED_SCORE, QUATERNION_SIGNS, FoldedEncoder, Head, Linear, Norm, Table
from exporters.quant_plan import FLOAT32, FLOAT_PLAN, INT4, INT8, INT8_STATIC, QuantPlan, rows_to_int8
from runtimes.errors import BadInput

OPSET = 17
"""The first with LayerNormalization as one operator."""
IR_VERSION = 9
"""The newest that onnxruntime 1.17 reads."""
FUSED = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
BLOCK = 32
"""Weights along a row that share a scale in 4 bits."""
WATCHED = ".result"
"""Ends the name of a matrix' result; the name itself is that of its weights."""
SMALLEST_EPS = 1e-12
_SQRT_HALF, _TANH_GELU = np.float32(np.sqrt(0.5)), (np.float32(np.sqrt(2 / np.pi)), np.float32(0.044715))


@dataclass(frozen=True)
class Tensor:
    """The name of a value. ``rectify``: a ReLU is still to be taken; quantizing to codes from 0 up takes it for nothing."""

    name: str
    rectify: bool = False


@dataclass(frozen=True)
class Product:
    """Columns ``start`` to ``start + width`` of a product that no node computes yet: how it is computed depends on its readers.

    ``widths`` are those of all parts of the whole product.
    """

    linear: Linear
    x: Tensor
    start: int
    widths: tuple[int, ...]
    width: int


def write_onnx(model: FoldedEncoder, path: Path, plan: QuantPlan = FLOAT_PLAN, watch: bool = False) -> None:
    """Write ``model`` in the precisions of ``plan``.

    Args:
        watch: the result of every matrix is an output too, under the matrix' name and ``WATCHED``, to find where a file goes wrong.

    Raises:
        BadInput: a precision that ONNX Runtime has no operator for, or a static one without its range.
    """
    quantized = any(plan.precision(linear.name) != FLOAT32 for linear, _ in model.linears())
    uses = Counter(linear.name for linear, _ in model.linears())
    steps = OnnxSteps(plan, model.segments, fused=quantized, watch=watch, shared={name for name, count in uses.items() if count > 1})
    results = forward(model, steps)
    steps.finish(model.heads, results)
    outputs = sorted((_declared(head, name, model.width) for head in model.heads for name in head.outputs), key=lambda output: output.name)
    if watch:
        outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in steps.show_results()]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch_size", "sequence_length"]) for name in steps.inputs]
    graph = helper.make_graph(steps.nodes, "encoder", inputs, outputs, list(steps.constants.values()))
    opsets = [helper.make_opsetid("", OPSET)] + ([helper.make_opsetid(FUSED, 1)] if quantized else [])
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="pocketbert")
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, path)


def _declared(head: Head, name: str, hidden: int) -> onnx.ValueInfoProto:
    """The output ``name`` of ``head``, with its shape; a head without a matrix gives the feature map, ``hidden`` wide."""
    width = hidden if head.linear is None else len(head.linear.weight)
    shape = ["batch_size"] + (["sequence_length"] if head.per_token else [])
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape + ([width] if len(head.outputs) == 1 else []))


class OnnxSteps:
    """The operations of :class:`exporters.forward.Steps` as ONNX nodes. Values are [batch, sequence, width].

    Args:
        fused: whether ONNX Runtime's own operators may be used.
        watch: whether every product must be there by itself.
        shared: matrices that several layers use.
    """

    def __init__(self, plan: QuantPlan, segments: int, fused: bool, watch: bool, shared: set[str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.inputs = input_names(segments)
        self._plan = plan
        self._fused = fused
        self._watch = watch
        self._shared = shared
        self._made: dict[tuple[Any, ...], Any] = {}
        self._results: dict[str, Tensor] = {}

    def finish(self, heads: Sequence[Head], results: Mapping[str, Tensor | Product]) -> None:
        """Name the outputs; those of a text lose their axis of tokens: [batch, C]."""
        for head in heads:
            kind, more = ("Identity", []) if head.per_token else ("Squeeze", [self._integers(1)])
            for name in head.outputs:
                self.nodes.append(helper.make_node(kind, [self._plain(results[name]), *more], [name], name=f"{name}.output"))

    def show_results(self) -> list[str]:
        """Make the result of every matrix an output; returns their names."""
        names = {name + WATCHED: tensor for name, tensor in self._results.items()}
        for name, tensor in names.items():
            self.nodes.append(helper.make_node("Identity", [self._plain(tensor)], [name], name=f"{name}.output"))
        return list(names)

    # --- operations -----------------------------------------------------------------------------------------------

    def words(self, table: Table) -> Tensor:
        if self._plan.table_precision(table.name) == FLOAT32:
            return Tensor(self._node("Gather", [self._constant(table.name, table.rows), "input_ids"]))
        # Rows are dequantized after the look-up: a DequantizeLinear before it would compute the whole table for every text.
        codes, scales = rows_to_int8(table.rows)
        rows = self._node("Cast", [self._node("Gather", [self._constant(table.name, codes), "input_ids"])], to=TensorProto.FLOAT)
        return Tensor(self._node("Mul", [rows, self._node("Gather", [self._constant(f"{table.name}.scales", scales[:, None]), "input_ids"])]))

    def blanked(self, words: Tensor) -> Tensor:
        real = self._once("Unsqueeze", [self._once("Cast", ["attention_mask"], to=TensorProto.BOOL), self._integers(2)])
        return Tensor(self._node("Where", [real, words.name, self._constant("zero", np.float32(0))]))

    def trigrams(self, words: Tensor) -> Tensor:
        padded = self._node("Pad", [words.name, self._constant("pads", np.array([0, 1, 0, 0, 1, 0]))])
        window = [
            self._node("Slice", [padded, self._integers(begin), self._integers(end), self._integers(1)])
            for begin, end in ((0, -2), (1, -1), (2, np.iinfo(np.int64).max))
        ]
        return Tensor(self._node("Concat", window, axis=-1))

    def positions(self, table: Table, segments: int, max_length: int) -> Tensor:
        rows = self._constant(table.name, table.rows)
        length = self._node("Shape", ["input_ids"], start=1, end=2)
        if segments == 1:
            return Tensor(self._node("Slice", [rows, self._integers(0), length]))
        own = self._node("Slice", [self._constant("position_ids", np.arange(max_length)), self._integers(0), length])
        block = self._node("Mul", ["token_type_ids", self._constant("positions_per_type", np.int64(max_length))])
        return Tensor(self._node("Gather", [rows, self._node("Add", [block, own])]))

    def linear(self, linear: Linear, x: Tensor | Product) -> Tensor | Product:
        x = self._settled(x)
        precision = self._plan.precision(linear.name)
        if self._fused and not self._watch and linear.activation is None and precision in (INT8, INT8_STATIC):
            return Product(linear, x, 0, (len(linear.weight),), len(linear.weight))
        return self._activated(linear, self._product(linear, x))

    def quaternion(self, linear: Linear, x: Tensor | Product) -> Tensor:
        """In every precision, with ranges of x where that is static; the signs are float32."""
        x = self._settled(x)
        rows, quarter = linear.weight.shape
        apart = replace(x, name=self._once("Reshape", [x.name, self._integers(0, -1, quarter)]))
        products = self._product(replace(linear, bias=None), apart)  # [batch, 4 n, out], at each token by component and block
        signs = self._constant("quaternion_signs", QUATERNION_SIGNS)
        sums = self._node("MatMul", [signs, self._node("Reshape", [products, self._integers(0, -1, 16, rows // 4)])])
        y = self._node("Add", [self._node("Reshape", [sums, self._integers(0, 0, rows)]), *self._bias(linear)])
        return self._activated(linear, y)

    def shift(self, linear: Linear, x: Tensor | Product) -> Tensor:
        return Tensor(self._node("Add", [self._plain(x), *self._bias(linear)]))

    def add(self, a: Tensor | Product, b: Tensor | Product) -> Tensor:
        return Tensor(self._node("Add", [self._plain(a), self._plain(b)]))

    def norm(self, norm: Norm, x: Tensor | Product) -> Tensor:
        weight, bias = self._constant(norm.name, norm.weight), self._constant(f"{norm.name}.bias", norm.bias)
        if norm.kind == "layer_norm":
            return Tensor(self._node("LayerNormalization", [self._plain(x), weight, bias], axis=-1, epsilon=max(norm.eps, SMALLEST_EPS)))
        return Tensor(self._node("Add", [self._node("Mul", [self._plain(x), weight]), bias]))

    def split(self, x: Tensor | Product, widths: Sequence[int]) -> list[Tensor | Product]:
        if len(widths) == 1:
            return [x]
        if isinstance(x, Product):
            starts = np.cumsum([0, *widths[:-1]]).tolist()
            return [replace(x, start=start, width=width, widths=tuple(widths)) for start, width in zip(starts, widths, strict=True)]
        return [Tensor(name) for name in self._nodes("Split", [x.name, self._integers(*widths)], len(widths), axis=-1)]

    def first(self, x: Tensor | Product) -> Tensor:
        x = self._settled(x)
        return replace(x, name=self._node("Slice", [x.name, self._integers(0), self._integers(1), self._integers(1)]))

    def attention(self, query: Any, key: Any, value: Any, heads: int, head_size: int) -> Tensor:
        if self._fused and self._from_one_product(query, key, value):
            return self._quantized_attention(query, heads, head_size)
        query, key, value = self._settled(query), self._settled(key), self._settled(value)
        if self._fused:
            mask = self._once("Cast", ["attention_mask"], to=TensorProto.INT32)
            inputs = [query.name, key.name, value.name, "", mask]
            options = {"num_heads": heads, "scale": 1.0, "mask_filter_value": MASKED_SCORE}
            return Tensor(self._node("MultiHeadAttention", inputs, domain=FUSED, **options))
        apart = self._integers(0, 0, heads, head_size)
        q, k, v = (
            self._node("Transpose", [self._node("Reshape", [part.name, apart])], perm=order)
            for part, order in ((query, [0, 2, 1, 3]), (key, [0, 2, 3, 1]), (value, [0, 2, 1, 3]))
        )
        # A table of two scores, for mask 0 and 1, saves three operators on the mask.
        by_mask = self._constant("scores_by_mask", np.array([MASKED_SCORE, 0], np.float32))
        mask = self._once("Unsqueeze", [self._once("Gather", [by_mask, "attention_mask"]), self._integers(1, 2)])
        weights = self._node("Softmax", [self._node("Add", [self._node("MatMul", [q, k]), mask])], axis=-1)
        joined = self._node("Transpose", [self._node("MatMul", [weights, v])], perm=[0, 2, 1, 3])
        return Tensor(self._node("Reshape", [joined, self._integers(0, 0, heads * head_size)]))

    def mean(self, x: Tensor | Product) -> Tensor:
        mask = self._once("Unsqueeze", [self._once("Cast", ["attention_mask"], to=TensorProto.FLOAT), self._integers(1)])  # [batch, 1, sequence]
        count = self._once("ReduceSum", [mask, self._integers(2)], keepdims=1)
        return Tensor(self._node("Div", [self._node("MatMul", [mask, self._plain(x)]), count]))

    def unit(self, x: Tensor | Product) -> Tensor:
        length = self._node("ReduceL2", [self._plain(x)], axes=[-1], keepdims=1)
        least = self._constant("smallest_length", np.float32(SMALLEST_LENGTH))
        return Tensor(self._node("Div", [self._plain(x), self._node("Max", [length, least])]))

    def softmax(self, logits: Tensor | Product) -> Tensor:
        return Tensor(self._node("Softmax", [self._plain(logits)], axis=-1))

    def sigmoid(self, logits: Tensor | Product) -> Tensor:
        return Tensor(self._node("Sigmoid", [self._plain(logits)]))

    def unbind(self, x: Tensor | Product, count: int) -> list[Tensor]:
        parts = self._nodes("Split", [self._plain(x), self._integers(*[1] * count)], count, axis=-1)
        return [Tensor(self._node("Squeeze", [part, self._integers(2)])) for part in parts]

    def _from_one_product(self, query: Any, key: Any, value: Any) -> bool:
        """Whether the three are the first parts, alike in width, of one product that is not computed yet."""
        parts = (query, key, value)
        if not all(isinstance(part, Product) and part.linear is query.linear and part.x is query.x for part in parts):
            return False
        if query.linear.name in self._shared and 3 * query.width < len(query.linear.weight):
            return False  # another layer may need the matrix in one piece, and it is to be stored once
        return [part.start for part in parts] == [0, query.width, 2 * query.width] and ("parts", query.linear.name, query.x.name) not in self._made

    def _quantized_attention(self, query: Product, heads: int, head_size: int) -> Tensor:
        """The product of queries, keys and values and the attention as one operator. What else the product holds comes by itself."""
        linear, width = query.linear, 3 * query.width
        codes, scale, zero = self._codes(linear, query.x)
        self._made["attended", linear.name, query.x.name] = codes
        own = replace(linear, name=linear.name if len(linear.weight) == width else f"{linear.name}.0", weight=linear.weight[:width])
        weight, scales = self._int8(own)
        bias = self._constant(f"{own.name}.bias", linear.bias[:width])
        mask = self._once("Cast", ["attention_mask"], to=TensorProto.INT32)
        zeros = self._constant(f"zeros_{width}", np.zeros(width, np.int8))
        options = {"num_heads": heads, "scale": 1.0, "mask_filter_value": MASKED_SCORE}
        return Tensor(self._node("QAttention", [codes, weight, bias, scale, scales, mask, zero, zeros], domain=FUSED, **options))

    # --- matrices -------------------------------------------------------------------------------------------------

    def _settled(self, x: Tensor | Product) -> Tensor:
        """``x`` as a value that a node has computed."""
        if isinstance(x, Tensor):
            return x
        linear, end = x.linear, x.start + x.width
        if ("attended", linear.name, x.x.name) in self._made:
            rest = Linear(f"{linear.name}.{x.start}", linear.weight[x.start : end], linear.bias[x.start : end])
            codes, scale, zero = self._codes(linear, x.x)
            return Tensor(self._integer_product(rest, codes, scale, zero, *self._int8(rest)))
        key = ("parts", linear.name, x.x.name)
        if key not in self._made:
            whole = self._product(linear, x.x)
            names = [whole] if len(x.widths) == 1 else self._nodes("Split", [whole, self._integers(*x.widths)], len(x.widths), axis=-1)
            self._made[key] = names
        at = np.cumsum([0, *x.widths[:-1]]).tolist().index(x.start)
        return Tensor(self._made[key][at])

    def _activated(self, linear: Linear, y: str) -> Tensor:
        """The result of ``linear``, of which the activation is missing in ``y``."""
        if linear.activation == "relu" and self._fused and not self._watch:
            return Tensor(y, rectify=True)
        self._results[linear.name] = Tensor(y if linear.activation is None else self._activation(linear, y))
        return self._results[linear.name]

    def _product(self, linear: Linear, x: Tensor) -> str:
        precision = self._plan.precision(linear.name)
        if x.rectify and precision != INT8_STATIC:
            x = Tensor(self._plain(x))
        return {FLOAT32: self._float, INT8: self._dynamic, INT8_STATIC: self._static, INT4: self._four_bits}[precision](linear, x)

    def _codes(self, linear: Linear, x: Tensor) -> tuple[str, str, str]:
        """8-bit codes of ``x`` as ``linear`` reads it, and the names of their scale and zero point."""
        if self._plan.precision(linear.name) == INT8:
            key = ("codes", x.name)
            if key not in self._made:
                self._made[key] = tuple(self._nodes("DynamicQuantizeLinear", [x.name], 3))
            return self._made[key]
        seen = self._plan.range(linear.name)
        low, high = 0.0 if x.rectify else min(seen.input_min, 0.0), max(seen.input_max, 0.0)
        step = (high - low) / 255 or 1.0
        scale = self._constant(f"{linear.name}.input_scale", np.float32(step))
        zero = self._constant(f"{linear.name}.input_zero", np.uint8(round(-low / step)))
        return self._once("QuantizeLinear", [x.name, scale, zero]), scale, zero

    def _float(self, linear: Linear, x: Tensor) -> str:
        y = self._node("MatMul", [self._plain(x), self._constant(linear.name, linear.weight.T)])
        return y if linear.bias is None else self._node("Add", [y, *self._bias(linear)])

    def _dynamic(self, linear: Linear, x: Tensor) -> str:
        weight, scales = self._int8(linear)
        return self._node("DynamicQuantizeMatMul", [x.name, weight, scales, "", *self._bias(linear)], domain=FUSED)

    def _static(self, linear: Linear, x: Tensor) -> str:
        weight, scales = self._int8(linear)
        return self._integer_product(linear, *self._codes(linear, x), weight, scales)

    def _integer_product(self, linear: Linear, codes: str, scale: str, zero: str, weight: str, scales: str) -> str:
        return self._node("MatMulIntegerToFloat", [codes, weight, scale, scales, zero, "", *self._bias(linear)], domain=FUSED)

    def _four_bits(self, linear: Linear, x: Tensor) -> str:
        rows, columns = linear.weight.shape
        blocks = -(-columns // BLOCK)
        padded = np.zeros((rows, blocks * BLOCK), np.float32)
        padded[:, :columns] = linear.weight
        codes, scales = rows_to_int8(padded.reshape(rows * blocks, BLOCK), bits=4)
        unsigned = (codes + 8).astype(np.uint8)
        packed = (unsigned[:, 0::2] | unsigned[:, 1::2] << 4).reshape(rows, blocks, BLOCK // 2)
        inputs = [self._plain(x), self._constant(linear.name, packed), self._constant(f"{linear.name}.scales", scales), "", ""]
        # Accuracy level 4: activations in 8 bits per block, sums in integers.
        options = {"K": columns, "N": rows, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        return self._node("MatMulNBits", [*inputs, *self._bias(linear)], domain=FUSED, **options)

    def _int8(self, linear: Linear) -> tuple[str, str]:
        codes, scales = rows_to_int8(linear.weight)
        return self._constant(linear.name, codes.T), self._constant(f"{linear.name}.scales", scales)

    def _bias(self, linear: Linear) -> list[str]:
        return [] if linear.bias is None else [self._constant(f"{linear.name}.bias", linear.bias)]

    def _activation(self, linear: Linear, y: str) -> str:
        kind = linear.activation
        if kind in ("relu", "tanh"):
            return self._node(kind.capitalize(), [y])
        if kind == "gelu" and self._fused:
            return self._node("Gelu", [y], domain=FUSED)
        if kind == "gelu":  # x/2 (1 + erf(x / sqrt 2)), which onnxruntime makes one operator of
            error = self._node("Erf", [self._node("Mul", [y, self._constant("sqrt_half", _SQRT_HALF)])])
            return self._half_of(y, error)
        if kind in ("gelu_new", "gelu_pytorch_tanh"):
            root, cubic = (self._constant(f"tanh_gelu_{i}", value) for i, value in enumerate(_TANH_GELU))
            cube = self._node("Mul", [self._node("Mul", [self._node("Mul", [y, y]), y]), cubic])
            return self._half_of(y, self._node("Tanh", [self._node("Mul", [self._node("Add", [y, cube]), root])]))
        raise BadInput(f"{linear.name}: no ONNX operators are known here for the activation {kind!r}")

    def _half_of(self, y: str, x: str) -> str:
        """y/2 (1 + x)."""
        one, half = self._constant("one", np.float32(1)), self._constant("half", np.float32(0.5))
        return self._node("Mul", [self._node("Mul", [y, self._node("Add", [x, one])]), half])

    # --- nodes and constants --------------------------------------------------------------------------------------

    def _plain(self, x: Tensor | Product) -> str:
        """``x`` in float32."""
        x = self._settled(x)
        if x.rectify:
            return self._once("Relu", [x.name])
        return x.name

    def _integers(self, *values: int) -> str:
        return self._constant("int_" + "_".join(str(v) for v in values), np.array(values, np.int64))

    def _constant(self, name: str, value: np.ndarray | np.generic) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name)
        return name

    def _once(self, kind: str, inputs: list[str], **options: Any) -> str:
        """The output of a node that is made for the first caller only."""
        key = (kind, *inputs, *sorted(options.items()))
        if key not in self._made:
            self._made[key] = self._node(kind, inputs, **options)
        return self._made[key]

    def _node(self, kind: str, inputs: list[str], **options: Any) -> str:
        return self._nodes(kind, inputs, 1, **options)[0]

    def _nodes(self, kind: str, inputs: list[str], outputs: int, domain: str = "", **options: Any) -> list[str]:
        name = f"{kind}_{len(self.nodes)}"
        names = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, domain=domain, **options))
        return names

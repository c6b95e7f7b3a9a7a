"""Write a folded encoder as a TFLite file, operator by operator: one signature per length bucket, one set of weights.

A signature ``serving_N`` takes int32 ``attention_mask`` and ``input_ids`` [1, N] (and ``token_type_ids`` for two segments)
and returns the outputs of the heads, both in the order of their names: [1, C] where a text has one result,
[1, N, T] or [1, N] where each token has; what these hold at
padding means nothing. Inside, a text is a matrix [N, width].

An 8-bit table stores its row scales beside it and is looked up with the scale 1: 8 bytes per row smaller than scales with
their zero points, and every runtime computes it. tflite-runtime 2.14 and older know one scale per weight tensor: of scales
per channel they make 0 and return wrong logits without an error. A file for LiteRT therefore claims the operator versions
that it needs, so that they refuse it. ``old_runtimes`` writes a file for them: FULLY_CONNECTED with the scale 1, then a
multiplication by the scales, act(s * (W x + b / s)).

What this file does not do: choose buckets (:mod:`exporters.buckets`) or precisions (:mod:`exporters.quant_plan`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from exporters.forward import SMALLEST_LENGTH, forward, input_names
from exporters.graph import MASKED_SCORE, QUATERNION_SIGNS, FoldedEncoder, Head, Linear, Norm, Table
from exporters.quant_plan import FLOAT32, FLOAT_PLAN, INT4, INT8, INT8_STATIC, QuantPlan, rows_to_int8
from exporters.tflite_file import Operator, TfliteFile, affine, mapped, packed, quantization
from exporters.tflite_pack import pack
from runtimes.backends import SIGNATURE_PREFIX
from runtimes.errors import BadInput

Activation, Kind = schema.ActivationFunctionType, schema.TensorType
NO_TENSOR = -1
SMALLEST_EPS = 1e-12
KINDS = {np.dtype(np.float32): Kind.FLOAT32, np.dtype(np.int32): Kind.INT32, np.dtype(np.int8): Kind.INT8, np.dtype(np.uint8): Kind.INT4}
"""Tensor type by array; uint8 holds two 4-bit weights a byte."""
PER_CHANNEL = 12
"""Version of FULLY_CONNECTED from which runtimes know scales per channel."""
OPERATOR_NAMES = {number: name for name, number in vars(Operator).items() if isinstance(number, int)}


@dataclass(frozen=True)
class Tensor:
    """A value in a graph: tensor ``number`` of ``shape``; ``start`` and ``width`` where it is some columns of that tensor.

    ``quantization``: the tensor holds int8 codes. They become float32 only for a reader that needs it.
    """

    number: int
    shape: tuple[int, ...]
    start: int = 0
    width: int | None = None
    quantization: schema.QuantizationParametersT | None = None


def write_tflite(
    model: FoldedEncoder, path: Path, buckets: Sequence[int], plan: QuantPlan = FLOAT_PLAN, old_runtimes: bool = False, watch: bool = False
) -> None:
    """Write ``model`` in the precisions of ``plan`` with one signature for each length in ``buckets``.

    Args:
        watch: the result of every matrix is an output too, under the matrix' name, to find where a file goes wrong.

    Raises:
        BadInput: a precision that the runtime has no operator for, or a static one without its range.
    """
    file = TfliteFile()
    for length in sorted(buckets):
        steps = TfliteSteps(file, length, model.segments, plan, old_runtimes)
        steps.finish(model.heads, forward(model, steps), watch)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack(file.model))


class TfliteSteps:
    """The operations of :class:`exporters.forward.Steps` in one graph, for texts of ``length`` tokens."""

    def __init__(self, file: TfliteFile, length: int, segments: int, plan: QuantPlan, old_runtimes: bool) -> None:
        self._file = file
        self._length = length
        self._plan = plan
        self._old = old_runtimes
        self._graph = schema.SubGraphT()
        self._graph.name = f"{SIGNATURE_PREFIX}{length}".encode()
        self._graph.tensors, self._graph.operators = [], []
        self._constants: dict[str, Tensor] = {}
        self._made: dict[tuple[Any, ...], Tensor] = {}
        self._results: dict[str, Tensor] = {}
        self._inputs = {name: self._tensor(name, (1, length), Kind.INT32) for name in input_names(segments)}

    def finish(self, heads: Sequence[Head], results: Mapping[str, Tensor], watch: bool) -> None:
        """Close the graph and give it its signature; with the result of every matrix if ``watch``."""
        outputs = {}
        for head in heads:
            for name in head.outputs:
                result = self._columns(results[name])
                matrix = head.per_token and len(head.outputs) == 1
                outputs[name] = self._reshape(result, (1, *result.shape)) if matrix else result
        if watch:
            outputs |= {name: self._columns(tensor) for name, tensor in self._results.items()}
        outputs = dict(sorted(outputs.items()))
        self._graph.inputs = [tensor.number for tensor in self._inputs.values()]
        self._graph.outputs = [tensor.number for tensor in outputs.values()]
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = self._graph.name, len(self._file.model.subgraphs)
        signature.inputs = [mapped(name, tensor.number) for name, tensor in self._inputs.items()]
        signature.outputs = [mapped(name, tensor.number) for name, tensor in outputs.items()]
        self._file.model.subgraphs.append(self._graph)
        self._file.model.signatureDefs.append(signature)

    # --- operations -----------------------------------------------------------------------------------------------

    def words(self, table: Table) -> Tensor:
        ids = self._reshape(self._inputs["input_ids"], (self._length,), Kind.INT32)
        if self._plan.table_precision(table.name) == FLOAT32:
            return self._lookup(ids, self._constant(table.name, table.rows))
        codes, scales = rows_to_int8(table.rows)
        words = self._lookup(ids, self._constant(table.name, codes, quantization(np.ones(1, np.float32))))
        return self._binary(Operator.MUL, words, self._lookup(ids, self._constant(f"{table.name}.scales", scales[:, None])))

    def blanked(self, words: Tensor) -> Tensor:
        return self._binary(Operator.MUL, words, self._real_tokens())

    def trigrams(self, words: Tensor) -> Tensor:
        count, width = words.shape
        pads = self._constant("pads", np.array([[1, 1], [0, 0]], np.int32))
        padded = self._node(Operator.PAD, [words, pads], (count + 2, width), schema.PadOptionsT())
        options = schema.ConcatenationOptionsT()
        options.axis = 1
        window = [self._slice(padded, (start, 0), (count, width)) for start in range(3)]
        return self._node(Operator.CONCATENATION, window, (count, 3 * width), options)

    def positions(self, table: Table, segments: int, max_length: int) -> Tensor:
        if segments == 1:
            return self._constant(f"{table.name}.{self._length}", table.rows[: self._length])
        block = self._constant("positions_per_type", np.array([max_length], np.int32))
        types = self._reshape(self._inputs["token_type_ids"], (self._length,), Kind.INT32)
        start = self._binary(Operator.MUL, types, block, kind=Kind.INT32)
        own = self._constant(f"position_ids.{self._length}", np.arange(self._length, dtype=np.int32))
        return self._lookup(self._binary(Operator.ADD, start, own, kind=Kind.INT32), self._constant(table.name, table.rows))

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        precision = self._plan.precision(linear.name)
        codes = precision == INT8_STATIC and x.quantization is not None and x.width is None
        y = self._product(linear, x if codes else self._columns(x))
        self._results[linear.name] = y
        return y

    def quaternion(self, linear: Linear, x: Tensor) -> Tensor:
        """int8-static is computed as int8: the products before the sums are none that calibration sees."""
        x = self._columns(x)
        count, (rows, quarter) = x.shape[0], linear.weight.shape
        key = ("components", x.number)
        if key not in self._made:
            self._made[key] = self._reshape(x, (4 * count, quarter))
        products = self._product(replace(linear, bias=None, activation=None), self._made[key])
        signs = self._constant("quaternion_signs", QUATERNION_SIGNS[None])
        sums = self._batch_matmul(signs, self._reshape(products, (count, 16, rows // 4)))
        relu = linear.activation == "relu"
        bias = self._bias(linear, linear.bias)
        y = self._binary(Operator.ADD, self._reshape(sums, (count, rows)), bias, Activation.RELU if relu else Activation.NONE)
        self._results[linear.name] = y if relu else self._activation(linear, y)
        return self._results[linear.name]

    def shift(self, linear: Linear, x: Tensor) -> Tensor:
        return self._binary(Operator.ADD, self._columns(x), self._bias(linear, linear.bias))

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._binary(Operator.ADD, self._columns(a), self._columns(b))

    def norm(self, norm: Norm, x: Tensor) -> Tensor:
        x = self._columns(x)
        if norm.kind == "layer_norm":
            centred = self._binary(Operator.SUB, x, self._mean(x))
            variance = self._mean(self._binary(Operator.MUL, centred, centred))
            eps = self._constant("eps", np.array([max(norm.eps, SMALLEST_EPS)], np.float32))
            root = self._node(Operator.RSQRT, [self._binary(Operator.ADD, variance, eps)], variance.shape)
            x = self._binary(Operator.MUL, centred, root)
        scaled = self._binary(Operator.MUL, x, self._constant(norm.name, norm.weight))
        return self._binary(Operator.ADD, scaled, self._constant(f"{norm.name}.bias", norm.bias))

    def split(self, x: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """Cuts nothing yet: whoever uses a part may cut it more cheaply, as :meth:`attention` does."""
        if len(widths) == 1:
            return [x]
        starts = np.cumsum([0, *widths[:-1]])
        return [Tensor(x.number, x.shape, int(start), width, x.quantization) for start, width in zip(starts, widths, strict=True)]

    def first(self, x: Tensor) -> Tensor:
        x = self._columns(x)
        return self._slice(x, (0, 0), (1, x.shape[1]))

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int, head_size: int) -> Tensor:
        q, k, v = (self._heads(part, heads, head_size) for part in (query, key, value))
        scores = self._binary(Operator.ADD, self._batch_matmul(q, k, turn_second=True), self._mask())
        joined = self._batch_matmul(self.softmax(scores), v)
        if joined.shape[1] > 1:
            joined = self._transpose(joined, (1, 0, 2))
        return self._reshape(joined, (query.shape[0], heads * head_size))

    def softmax(self, logits: Tensor) -> Tensor:
        options = schema.SoftmaxOptionsT()
        options.beta = 1.0
        x = self._columns(logits)
        return self._node(Operator.SOFTMAX, [x], x.shape, options)

    def sigmoid(self, logits: Tensor) -> Tensor:
        x = self._columns(logits)
        return self._node(Operator.LOGISTIC, [x], x.shape)

    def mean(self, x: Tensor) -> Tensor:
        """The sum of the tokens, each times its share of 1."""
        real = self._real_tokens()
        shares = self._node(Operator.DIV, [real, self._sum(real, 0)], real.shape, schema.DivOptionsT())
        return self._sum(self._binary(Operator.MUL, self._columns(x), shares), 0)

    def _real_tokens(self) -> Tensor:
        """1.0 for every token of the text and 0.0 for padding, [N, 1]."""
        return self._cast(self._reshape(self._inputs["attention_mask"], (self._length, 1), Kind.INT32))

    def unit(self, x: Tensor) -> Tensor:
        """In operators of which every runtime makes the same; L2_NORMALIZATION has another least length in each."""
        x = self._columns(x)
        squares = self._sum(self._binary(Operator.MUL, x, x), 1)
        least = self._constant("smallest_square", np.array([SMALLEST_LENGTH**2], np.float32))
        kept = self._node(Operator.MAXIMUM, [squares, least], squares.shape, schema.MaximumMinimumOptionsT())
        return self._binary(Operator.MUL, x, self._node(Operator.RSQRT, [kept], kept.shape))

    def unbind(self, x: Tensor, count: int) -> list[Tensor]:
        """[1, n] each, as a file returns them."""
        x = self._columns(x)
        return [self._reshape(self._slice(x, (0, number), (x.shape[0], 1)), (1, x.shape[0])) for number in range(count)]

    # --- matrices -------------------------------------------------------------------------------------------------

    def _product(self, linear: Linear, x: Tensor) -> Tensor:
        product = {FLOAT32: self._float, INT8: self._dynamic, INT8_STATIC: self._static, INT4: self._dynamic}
        return product[self._plan.precision(linear.name)](linear, x)

    def _float(self, linear: Linear, x: Tensor) -> Tensor:
        return self._fully_connected(linear, x, self._constant(linear.name, linear.weight), self._bias(linear, linear.bias), 1)

    def _dynamic(self, linear: Linear, x: Tensor) -> Tensor:
        """int8 or int4 weights; the runtime quantizes the input row by row."""
        bits = 4 if self._plan.precision(linear.name) == INT4 else 8
        codes, scales = rows_to_int8(linear.weight, bits)
        stored = packed(codes) if bits == 4 else codes
        if not self._old:
            weight = self._constant(linear.name, stored, quantization(scales), codes.shape)
            return self._fully_connected(linear, x, weight, self._bias(linear, linear.bias), PER_CHANNEL)
        weight = self._constant(linear.name, stored, quantization(np.ones(1, np.float32)), codes.shape)
        bias = self._bias(linear, None if linear.bias is None else linear.bias / scales)
        plain = Linear(linear.name, linear.weight, linear.bias)
        product = self._fully_connected(plain, x, weight, bias, 1)
        activation = Activation.RELU if linear.activation == "relu" else Activation.NONE
        scaled = self._binary(Operator.MUL, product, self._constant(f"{linear.name}.scales", scales), activation)
        return scaled if linear.activation == "relu" else self._activation(linear, scaled)

    def _static(self, linear: Linear, x: Tensor) -> Tensor:
        """FULLY_CONNECTED from int8 codes to int8 codes; two in a row pass them on as they are."""
        if self._old:
            raise BadInput(f"{linear.name}: old TFLite runtimes have no {INT8_STATIC} with scales per channel; use {INT8} or {FLOAT32}")
        seen = self._plan.range(linear.name)
        # What calibration saw is the result after its activation, a float32 operator, or after the sums of a quaternion matrix.
        if linear.activation not in (None, "relu") or linear.quaternion:
            return self._dynamic(linear, self._columns(x))
        if x.quantization is None:
            source = affine(seen.input_min, seen.input_max)
            x = self._node(Operator.QUANTIZE, [x], x.shape, schema.QuantizeOptionsT(), kind=Kind.INT8, quantization=source)
        codes, scales = rows_to_int8(linear.weight)
        bias_scales = scales.astype(np.float64) * x.quantization.scale[0]
        bias = np.zeros(len(scales)) if linear.bias is None else linear.bias / bias_scales
        limits = np.iinfo(np.int32)
        held = np.clip(np.round(bias), limits.min, limits.max).astype(np.int32)
        options = schema.FullyConnectedOptionsT()
        options.fusedActivationFunction = Activation.RELU if linear.activation == "relu" else Activation.NONE
        weight = self._constant(linear.name, codes, quantization(scales))
        # A shared matrix may read codes of several scales, and its bias is in units of them: one for each.
        name = f"{linear.name}.bias.{x.quantization.scale[0]:.9g}"
        inputs = [x, weight, self._constant(name, held, quantization(bias_scales))]
        result = affine(seen.output_min, seen.output_max)
        shape = (x.shape[0], len(scales))
        return self._node(Operator.FULLY_CONNECTED, inputs, shape, options, version=PER_CHANNEL, kind=Kind.INT8, quantization=result)

    def _fully_connected(self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, version: int) -> Tensor:
        options = schema.FullyConnectedOptionsT()
        options.fusedActivationFunction = Activation.RELU if linear.activation == "relu" else Activation.NONE
        inputs = [x, weight, bias]
        y = self._node(Operator.FULLY_CONNECTED, inputs, (x.shape[0], len(linear.weight)), options, version=version)
        return y if linear.activation in (None, "relu") else self._activation(linear, y)

    def _bias(self, linear: Linear, bias: np.ndarray | None) -> Tensor | None:
        return None if bias is None else self._constant(f"{linear.name}.bias", bias)

    def _activation(self, linear: Linear, y: Tensor) -> Tensor:
        kind = linear.activation
        if kind is None:
            return y
        if kind == "tanh":
            return self._node(Operator.TANH, [y], y.shape)
        if kind in ("gelu", "gelu_new", "gelu_pytorch_tanh"):
            options = schema.GeluOptionsT()
            options.approximate = kind != "gelu"
            return self._node(Operator.GELU, [y], y.shape, options)
        raise BadInput(f"{linear.name}: no TFLite operator is known here for the activation {kind!r}")

    # --- small steps ----------------------------------------------------------------------------------------------

    def _heads(self, part: Tensor, heads: int, head_size: int) -> Tensor:
        """[n, A d] -> [A, n, d]. Parts of one tensor are turned together and then cut, where each cut is one piece of memory."""
        count, width = part.shape
        if part.width is None or width % head_size or part.start % head_size or count == 1:
            x = self._columns(part)
            if count == 1:
                return self._reshape(x, (heads, 1, head_size))
            return self._transpose(self._reshape(x, (count, heads, head_size)), (1, 0, 2))
        key = ("heads", part.number)
        if key not in self._made:
            whole = self._reshape(self._float32(replace(part, start=0, width=None)), (count, width // head_size, head_size))
            self._made[key] = self._transpose(whole, (1, 0, 2))
        return self._slice(self._made[key], (part.start // head_size, 0, 0), (heads, count, head_size))

    def _mask(self) -> Tensor:
        """[1, 1, n] to add to the scores."""
        if ("mask",) not in self._made:
            mask = self._reshape(self._inputs["attention_mask"], (1, 1, self._length), Kind.INT32)
            hidden = self._binary(Operator.SUB, self._cast(mask), self._constant("one", np.ones(1, np.float32)))
            self._made["mask",] = self._binary(Operator.MUL, hidden, self._constant("masked", np.array([-MASKED_SCORE], np.float32)))
        return self._made["mask",]

    def _columns(self, x: Tensor) -> Tensor:
        """``x`` as a tensor of its own, in float32."""
        whole = self._float32(replace(x, start=0, width=None))
        if x.width is None:
            return whole
        key = ("columns", x.number, x.start, x.width)
        if key not in self._made:
            self._made[key] = self._slice(whole, (0, x.start), (x.shape[0], x.width))
        return self._made[key]

    def _float32(self, x: Tensor) -> Tensor:
        if x.quantization is None:
            return x
        key = ("float32", x.number)
        if key not in self._made:
            self._made[key] = self._node(Operator.DEQUANTIZE, [x], x.shape, schema.DequantizeOptionsT(), version=2)
        return self._made[key]

    def _lookup(self, ids: Tensor, rows: Tensor) -> Tensor:
        return self._node(Operator.EMBEDDING_LOOKUP, [ids, rows], (ids.shape[0], rows.shape[1]))

    def _cast(self, x: Tensor) -> Tensor:
        """int32 -> float32."""
        options = schema.CastOptionsT()
        options.inDataType, options.outDataType = Kind.INT32, Kind.FLOAT32
        return self._node(Operator.CAST, [x], x.shape, options)

    def _mean(self, x: Tensor) -> Tensor:
        return self._reduced(Operator.MEAN, x, 1)

    def _sum(self, x: Tensor, axis: int) -> Tensor:
        return self._reduced(Operator.SUM, x, axis)

    def _reduced(self, operator: int, x: Tensor, axis: int) -> Tensor:
        """[n, width] with one of its axes 1 long."""
        options = schema.ReducerOptionsT()
        options.keepDims = True
        shape = (1, x.shape[1]) if axis == 0 else (x.shape[0], 1)
        return self._node(operator, [x, self._integers(axis)], shape, options)

    def _binary(self, operator: int, a: Tensor, b: Tensor, activation: int = Activation.NONE, kind: int = Kind.FLOAT32) -> Tensor:
        options = {Operator.ADD: schema.AddOptionsT, Operator.SUB: schema.SubOptionsT, Operator.MUL: schema.MulOptionsT}[operator]()
        options.fusedActivationFunction = activation
        return self._node(operator, [a, b], tuple(np.broadcast_shapes(a.shape, b.shape)), options, kind=kind)

    def _batch_matmul(self, a: Tensor, b: Tensor, turn_second: bool = False) -> Tensor:
        options = schema.BatchMatMulOptionsT()
        options.adjY = turn_second
        return self._node(Operator.BATCH_MATMUL, [a, b], (max(a.shape[0], b.shape[0]), a.shape[1], b.shape[1 if turn_second else 2]), options)

    def _reshape(self, x: Tensor, shape: tuple[int, ...], kind: int = Kind.FLOAT32) -> Tensor:
        options = schema.ReshapeOptionsT()
        options.newShape = list(shape)
        return self._node(Operator.RESHAPE, [x, self._integers(*shape)], shape, options, kind=kind)

    def _transpose(self, x: Tensor, order: tuple[int, ...]) -> Tensor:
        return self._node(Operator.TRANSPOSE, [x, self._integers(*order)], tuple(x.shape[i] for i in order), schema.TransposeOptionsT())

    def _slice(self, x: Tensor, begin: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        return self._node(Operator.SLICE, [x, self._integers(*begin), self._integers(*size)], size, schema.SliceOptionsT())

    # --- tensors and operators ------------------------------------------------------------------------------------

    def _integers(self, *values: int) -> Tensor:
        return self._constant("int_" + "_".join(map(str, values)), np.array(values, np.int32))

    def _constant(self, name: str, value: np.ndarray, quantization: Any = None, shape: tuple[int, ...] | None = None) -> Tensor:
        if name not in self._constants:
            array = np.ascontiguousarray(value)
            number = self._file.buffer(array)
            self._constants[name] = self._tensor(name, shape or array.shape, KINDS[array.dtype], number, quantization)
        return self._constants[name]

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, buffer: int = 0, quantization: Any = None) -> Tensor:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type = name.encode(), [int(size) for size in shape], kind
        tensor.buffer, tensor.quantization, tensor.hasRank = buffer, quantization, True
        self._graph.tensors.append(tensor)
        return Tensor(len(self._graph.tensors) - 1, tuple(int(size) for size in shape))

    def _node(
        self, operator: int, inputs: Sequence[Tensor | None], shape: tuple[int, ...], options: Any = None, version: int = 1,
        kind: int = Kind.FLOAT32, quantization: Any = None,
    ) -> Tensor:  # fmt: skip
        name = f"{OPERATOR_NAMES[operator].lower()}_{len(self._graph.operators)}"
        output = self._tensor(name, shape, kind, quantization=quantization)
        node = schema.OperatorT()
        node.opcodeIndex = self._file.code(operator, version)
        node.inputs = [NO_TENSOR if tensor is None else tensor.number for tensor in inputs]
        node.outputs = [output.number]
        if options is not None:
            node.builtinOptions = options
            node.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        self._graph.operators.append(node)
        return replace(output, quantization=quantization)

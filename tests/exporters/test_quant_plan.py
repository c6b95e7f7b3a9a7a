"""The plan: which rule decides, what a wrong one is told, and what rounding to 8 and 4 bits costs."""

from __future__ import annotations

import numpy as np
import pytest

from exporters.folding import fold
from exporters.onnx_writer import write_onnx
from exporters.quant_plan import FLOAT32, INT4, INT8, INT8_STATIC, QuantPlan, Range, rows_to_int8, tensor_bytes, tensor_names
from exporters.tflite_writer import write_tflite
from pipeline.models.config import layer_shape
from runtimes.errors import BadInput
from tests.exporters.small_models import LONGEST, small_encoder

RANGE = Range(-1.0, 2.0, -3.0, 4.0)


def test_the_first_rule_that_matches_the_whole_name_decides():
    plan = QuantPlan(INT8, ((r"layers\.0\..*", FLOAT32), (r"layers\..*\.up", INT4), (r"layers\.0\.output", INT4), ("class", FLOAT32)))
    assert plan.precision("layers.0.ffns.0.up") == FLOAT32, "the first rule, though the second matches too"
    assert plan.precision("layers.0.output") == FLOAT32, "the third rule never decides"
    assert plan.precision("layers.1.ffns.0.up") == INT4
    assert plan.precision("classifier") == INT8, "a part of a name is no match"
    assert plan.precision("my.layers.0.output") == INT8, "nor is its end"
    assert QuantPlan().precision("layers.0.output") == INT8
    assert QuantPlan(INT4).precision("layers.0.output") == INT4


def test_a_dot_in_a_kept_name_is_a_dot():
    plan = QuantPlan(INT8).keeping(["layers.1.ffns.0.up"])
    assert plan.precision("layers.1.ffns.0.up") == FLOAT32
    assert plan.precision("layers.1xffns.0.up") == INT8
    assert plan.precision("layers.11.ffns.0.up") == INT8


def test_keeping_comes_before_every_rule_and_changes_nothing_else():
    plan = QuantPlan(INT4, (("layers.*", INT8_STATIC),), {"layers.0.output": RANGE})
    kept = plan.keeping(["layers.0.output", "classifier"])
    assert [kept.precision(name) for name in ("layers.0.output", "classifier")] == [FLOAT32, FLOAT32]
    assert kept.precision("layers.1.output") == INT8_STATIC
    assert kept.precision("pooler") == INT4
    assert kept.range("layers.0.output") is RANGE
    assert kept.keeping(["pooler"]).precision("classifier") == FLOAT32, "what is kept stays kept"
    assert plan.precision("classifier") == INT4, "the plan itself is as it was"


@pytest.mark.parametrize(("name", "expected"), [("layers.0.output", INT8_STATIC), ("classifier", INT8), ("pooler", FLOAT32)])
def test_only_leaves_one_tensor_as_it_was_and_everything_else_in_float32(name, expected):
    plan = QuantPlan(INT8, (("layers.*", INT8_STATIC), ("pooler", FLOAT32)), {"layers.0.output": RANGE})
    alone = plan.only(name)
    others = {"layers.0.output", "layers.1.output", "classifier", "embeddings.words"} - {name}
    assert alone.precision(name) == expected
    assert {alone.precision(other) for other in others} == {FLOAT32}
    assert alone.range("layers.0.output") is RANGE


@pytest.mark.parametrize(
    ("default", "rules", "expected"),
    [
        (INT8, (), INT8), (INT8_STATIC, (), INT8), (INT4, (), INT8), (FLOAT32, (), FLOAT32), (INT4, ((".*", INT4),), INT8),
        (INT4, (("embeddings.words", FLOAT32),), FLOAT32), (FLOAT32, (("embeddings.words", INT4),), INT8),
    ],
)  # fmt: skip
def test_a_table_has_8_bits_or_is_as_trained(default, rules, expected):
    assert QuantPlan(default, rules).table_precision("embeddings.words") == expected


def test_old_runtimes_get_8_bits_with_ranges_of_the_moment_or_float32():
    plan = QuantPlan(INT8_STATIC, (("pooler", FLOAT32), ("layers.*", INT4)), {"x": RANGE}).for_old_runtimes()
    assert plan == QuantPlan(INT8, (("pooler", FLOAT32), ("layers.*", INT8)))
    assert QuantPlan(FLOAT32, (("x", INT4),)).for_old_runtimes() == QuantPlan(FLOAT32, (("x", INT8),))


def test_faults_of_a_rule_name_the_rule():
    with pytest.raises(BadInput, match=r"rule 'layers\.0': unknown precision 'int7'; known are float32, int8, int8-static, int4"):
        QuantPlan(INT8, (("pooler", INT8), ("layers.0", "int7")))
    with pytest.raises(BadInput, match=r"rule 'the default': unknown precision 'fp16'"):
        QuantPlan("fp16")
    with pytest.raises(BadInput, match=r"rule 'layers\.\(0': not a regular expression: missing \)") as error:
        QuantPlan(INT8, (("layers.(0", FLOAT32),))
    assert error.value.exit_code == 2


def test_a_rule_that_matches_nothing_is_told_with_the_names_near_it():
    names = tensor_names(fold(small_encoder("bert"), LONGEST))
    plan = QuantPlan(INT8, ((r"layers\.0\.ffn\.0\.up", FLOAT32), (r"layers\..*", FLOAT32), ("xyz", FLOAT32), ("classifie", FLOAT32)))
    first, second, third = plan.unmatched(names)
    assert first.startswith(r"quantization rule 'layers\\.0\\.ffn\\.0\\.up' matches no tensor; near it are layers.0.ffns.0.up, ")
    assert second == f"quantization rule 'xyz' matches no tensor; names are like {', '.join(names[:3])}"
    assert "'classifie' matches no tensor; near it are classifier" in third, "a beginning of a name is no match"
    assert QuantPlan(INT8, (("classifier", FLOAT32),)).unmatched(names) == []


def test_every_tensor_has_a_name_that_a_rule_can_match_and_its_bytes():
    model = fold(small_encoder("albert"), LONGEST)
    names = tensor_names(model)
    assert names[:2] == ["embeddings.words", "embeddings.projection"]
    assert names[-2:] == ["pooler", "classifier"]
    assert len(names) == len(set(names)), "a shared matrix has one name"
    assert [name for name in names if name.startswith("layers")] == [
        "layers.0.query_key_value", "layers.0.output", "layers.0.ffns.0.up", "layers.0.ffns.0.down"
    ]  # fmt: skip
    sizes = tensor_bytes(model)
    assert list(sizes) == names
    assert sizes["embeddings.words"] == 4 * 90 * 16
    assert sizes["layers.0.query_key_value"] == 4 * 96 * 32, "counted once, though two layers use it"


def test_each_factor_of_a_product_is_a_tensor_with_its_own_bytes():
    model = fold(small_encoder("bert", layers=[layer_shape(4, 8, [64], {"attention.output": 4, "attention.query": 6})]), LONGEST)
    sizes = tensor_bytes(model)
    assert list(sizes) == tensor_names(model)
    assert sizes["layers.0.query.inner"] == 4 * 6 * 32 and sizes["layers.0.query"] == 4 * 32 * 6
    assert sizes["layers.0.output.inner"] == 4 * 4 * 32 and sizes["layers.0.output"] == 4 * 32 * 4


def test_parts_without_matrices_are_no_tensors():
    model = fold(small_encoder("bert", layers=[layer_shape(0, 8, [64]), layer_shape(4, 8, [0])]), LONGEST)
    layers = [name for name in tensor_names(model) if name.startswith("layers")]
    assert layers == ["layers.0.ffns.0.up", "layers.0.ffns.0.down", "layers.1.key_value", "layers.1.query", "layers.1.output"]
    assert all(tensor_bytes(model).values())


def test_a_quaternion_matrix_takes_a_quarter():
    sizes, dense = (tensor_bytes(fold(small_encoder("bert", quaternion=quaternion), LONGEST)) for quaternion in (True, False))
    assert sizes["layers.0.output"] == dense["layers.0.output"] / 4


@pytest.mark.parametrize("write", [write_onnx, lambda *a: write_tflite(a[0], a[1], [LONGEST], a[2])], ids=["onnx", "tflite"])
def test_a_static_matrix_without_a_range_is_named_and_nothing_is_written(tmp_path, write):
    model = fold(small_encoder("bert"), LONGEST)
    path = tmp_path / ("m.onnx" if write is write_onnx else "m.tflite")
    with pytest.raises(BadInput, match=r"^layers\.0\.ffns\.0\.down: int8-static needs a range, .* calibrate, or choose int8$"):
        write(model, path, QuantPlan(INT8, ((r"layers\.0\.ffns\.0\.down", INT8_STATIC),), {"layers.0.output": RANGE}))
    assert not path.exists()


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_rows_are_rounded_to_the_nearest_code_of_their_own_scale(bits, largest):
    generator = np.random.default_rng(0)
    weight = (generator.normal(size=(40, 33)) * 10.0 ** generator.integers(-6, 6, (40, 1))).astype(np.float32)
    codes, scales = rows_to_int8(weight, bits)
    assert codes.dtype == np.int8 and scales.dtype == np.float32 and codes.shape == weight.shape and scales.shape == (40,)
    assert (np.abs(codes).max(axis=1) == largest).all(), "each row uses its whole range"
    found = codes * scales[:, None].astype(np.float64)
    assert (np.abs(found - weight) <= scales[:, None] * (0.5 + 1e-4)).all()
    again, same = rows_to_int8(found.astype(np.float32), bits)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_allclose(same, scales, rtol=1e-6)


def test_a_row_keeps_its_sign_and_a_row_of_zeros_stays_zero():
    codes, scales = rows_to_int8(np.array([[0, 0, 0], [-2, 1, 0.5], [3, -3, 0]], np.float32))
    assert codes.tolist() == [[0, 0, 0], [-127, 64, 32], [127, -127, 0]]
    assert scales[0] == 1 and np.isfinite(scales).all()

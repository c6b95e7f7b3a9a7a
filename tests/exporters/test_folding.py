"""Folding changes the steps and not the function: logits before and after, on random encoders of every family and on a real one."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch

from exporters import folding
from exporters.folding import MAX_SPREAD, fold
from exporters.forward import NumpySteps, forward
from exporters.graph import QUATERNION_SIGNS, FoldedEncoder, Norm
from exporters.parity import torch_results
from pipeline.models.encoder import Encoder, NoNorm
from pipeline.models.linear import HAMILTON, LowRank, Quaternion
from tests.exporters.encoders import (
    HUB,
    KINDS,
    LABELS,
    LONGEST,
    NO_NORM_STUDENTS,
    SHARED,
    SHARED_PARTS,
    encoder,
    last_attention_is_shared,
    texts,
)  # fmt: skip
from tests.exporters.results import inputs, numpy_logits, torch_logits

LISTS = texts(24)


def difference(model: Encoder, folded: FoldedEncoder, lists: list) -> float:
    """Largest |difference| from the torch module in float64, relative to the logit where that exceeds 1."""
    expected = torch_logits(copy.deepcopy(model).double(), lists)
    return float((np.abs(numpy_logits(folded, lists) - expected) / np.maximum(1, np.abs(expected))).max())


def norms(model: FoldedEncoder) -> list[Norm]:
    """Every norm that is left in the file."""
    found = [model.embedding_norm]
    for layer in model.layers:
        found += [*layer.part_norms.values(), layer.attention_norm, *(ffn.norm for ffn in layer.ffns), layer.out_norm]
    return [norm for norm in found if norm is not None]


# --- the same function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_torch_module(kind):
    model = encoder(kind)
    folded = fold(model, LONGEST)
    assert difference(model, folded, LISTS) < 1e-4
    for ids in LISTS[:4]:  # alone, where every index starts at 0
        assert difference(model, folded, [ids]) < 1e-4
    expected = torch_logits(model, LISTS)
    assert expected.std(axis=0).min() > 0.01, "the texts must differ in their logits, or this test sees nothing"


@pytest.mark.parametrize("kind", ["bert", "mobilebert"])
def test_probabilities_are_the_softmax_of_the_logits(kind):
    model = encoder(kind)
    got = forward(fold(model, LONGEST, activation="softmax"), NumpySteps(inputs(LISTS)))
    assert list(got) == ["probabilities"]
    expected = [result["probabilities"] for result in torch_results(model, inputs(LISTS), "softmax")]
    assert np.abs(got["probabilities"] - np.stack(expected)).max() < 1e-5
    assert np.abs(got["probabilities"].sum(axis=1) - 1).max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_module_stays_as_it_was(kind):
    model = encoder(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = fold(model, LONGEST)
    for array in (folded.words.rows, folded.positions.rows, *(linear.weight for linear, _ in folded.linears())):
        array += 1  # nor does it share memory
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


NO_NORM_KINDS = [kind for kind in KINDS if encoder(kind).config.norm == "no_norm"]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", NO_NORM_KINDS)
def test_gammas_of_any_size_break_the_chain_and_stay_right(kind, seed):
    """Scales from 1e-4 to 1e3, which no int8 row could hold, and one of exactly 0, by which nothing can be divided."""
    model = encoder(kind, seed)
    generator = torch.Generator().manual_seed(seed)
    spread = []
    for name, module in model.named_modules():
        if isinstance(module, NoNorm):
            module.weight.data = 10 ** (torch.rand(len(module.weight), generator=generator) * 7 - 4)
            module.weight.data /= module.weight.data.square().mean().sqrt()  # so that the stream as a whole stays in bounds
            module.weight.data[int(torch.randint(len(module.weight), (), generator=generator))] = 0
            spread.append(name)
    folded = fold(model, LONGEST)
    assert difference(model, folded, LISTS) < 1e-4
    assert all(np.isfinite(linear.weight).all() for linear, _ in folded.linears())
    streams = [name for name in spread if name.endswith(("attention_norm", "out_norm")) or ".ffns." in name]
    # A shared layer is used, and its norm found, more than once.
    assert len({norm.name for norm in norms(folded)}) == len(streams), "none of these may be folded"


@pytest.mark.parametrize("kind", NO_NORM_STUDENTS)
def test_one_wide_norm_breaks_the_chain_there_alone(kind):
    model = encoder(kind)
    wide = model.layers[1].out_norm
    wide.weight.data[3] = 200
    folded = fold(model, LONGEST)
    assert [norm.name for norm in norms(folded)] == ["layers.1.out_norm"]
    assert difference(model, folded, LISTS) < 1e-4
    wide.weight.data[3] = 0
    folded = fold(model, LONGEST)
    assert [norm.name for norm in norms(folded)] == ["layers.1.out_norm"]
    assert difference(model, folded, LISTS) < 1e-4


@pytest.mark.parametrize("kind", ["mobilebert", "mobilebert without bottleneck", "unequal student"])
def test_small_spreads_that_multiply_to_a_large_one_break_the_chain(kind):
    """Each norm alone would do; the product along the stream would not."""
    model = encoder(kind)
    for module in model.modules():
        if isinstance(module, NoNorm):
            module.weight.data = torch.where(torch.arange(len(module.weight)) % 2 == 0, 0.2, 1.9)
    folded = fold(model, LONGEST)
    kept = {norm.name for norm in norms(folded)}
    assert 1.9 / 0.2 < MAX_SPREAD < (1.9 / 0.2) ** 2
    if model.config.bottleneck_size is None:
        stream = [f"layers.{i}.{n}" for i, layer in enumerate(model.layers) for n in _inner_names(layer)]
        assert kept == set(stream[1::2]), "every second norm of the stream stays"
    else:
        streams = [[f"layers.{i}.out_norm" for i in range(len(model.layers))]]
        streams += [[f"layers.{i}.{n}" for n in _inner_names(layer)] for i, layer in enumerate(model.layers)]
        assert kept == {name for stream in streams for name in stream[1::2]}
    assert difference(model, folded, LISTS) < 1e-4


def _inner_names(layer) -> list[str]:
    return ["attention_norm", *(f"ffns.{f}.norm" for f in range(len(layer.ffns)))]


def test_a_pretrained_model_on_real_texts(minilm):
    model, lists = minilm
    folded = fold(model, 32)
    assert len(set(map(len, lists))) > 5
    assert difference(model, folded, lists) < 1e-4
    assert len(set(numpy_logits(folded, lists).argmax(axis=1).tolist())) > 3, "texts that are all decided alike prove little"
    assert folded.positions.rows.shape == (32, 384)


# --- the structure -----------------------------------------------------------------------------------------------------


def test_queries_keys_and_values_are_rows_of_one_matrix():
    model = encoder("bert")
    folded = fold(model, LONGEST)
    for number, (layer, own) in enumerate(zip(folded.layers[:-1], model.layers, strict=False)):
        (read,) = layer.reads
        assert (read.source, read.first_only, read.linear.name) == ("hidden", False, f"layers.{number}.query_key_value")
        assert read.parts == (("query", 32), ("key", 32), ("value", 32))
        attention = own.attention
        scaled = [attention.query.weight / np.sqrt(8), attention.key.weight, attention.value.weight]
        assert np.allclose(read.linear.weight, torch.cat(scaled).detach(), atol=1e-6)
        biases = [attention.query.bias / np.sqrt(8), attention.key.bias, attention.value.bias]
        assert np.allclose(read.linear.bias, torch.cat(biases).detach(), atol=1e-6)
    names = [linear.name for linear, _ in folded.linears()]
    assert names[:4] == ["layers.0.query_key_value", "layers.0.output", "layers.0.ffns.0.up", "layers.0.ffns.0.down"]
    assert names[-2:] == ["pooler", "classifier"]


def test_heads_of_another_size_have_their_own_scale():
    model = encoder("unequal layers")
    folded = fold(model, LONGEST)
    for layer, own, size in zip(folded.layers, model.layers, (8, 4, 8), strict=True):
        query = next(read for read in layer.reads if read.parts[0][0] == "query" or read.linear.name.endswith("query"))
        rows = len(own.attention.query.weight)
        assert np.allclose(query.linear.weight[:rows] * np.sqrt(size), own.attention.query.weight.detach(), atol=1e-6)


@pytest.mark.parametrize("kind", NO_NORM_STUDENTS)
def test_no_norm_is_left_in_a_student_without_statistics(kind):
    model = encoder(kind)
    for module in model.modules():
        if isinstance(module, NoNorm):
            module.weight.data = module.weight.data.clamp(0.7, 1.3)  # so that their product does not spread too far to fold
    folded = fold(model, LONGEST)
    assert norms(folded) == []
    assert difference(model, folded, LISTS) < 1e-4


def test_statistics_stay():
    """Layer norms cannot be folded: as many as the module has, with their own weights."""
    for kind in ("bert", "mobilebert, layer norm", "electra"):
        model = encoder(kind)
        left = norms(fold(model, LONGEST))
        assert {norm.kind for norm in left} == {"layer_norm"}
        assert len(left) == sum(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
        assert {norm.eps for norm in left} == {model.config.layer_norm_eps}


@pytest.mark.parametrize("max_length", [7, LONGEST])
def test_positions_and_types_are_one_table_as_long_as_needed(max_length):
    model = encoder("bert")
    part = model.embeddings
    one, two = fold(model, max_length), fold(model, max_length, segments=2)
    assert (one.segments, two.segments) == (1, 2)
    position, types = part.position.weight.detach().numpy()[:max_length], part.token_type.weight.detach().numpy()
    assert np.allclose(one.positions.rows, position + types[0], atol=1e-6)
    assert np.allclose(two.positions.rows, np.concatenate([position + types[0], position + types[1]]), atol=1e-6)
    short = [ids[:max_length] for ids in LISTS]
    assert difference(model, one, short) < 1e-4


def test_positions_start_where_the_family_starts():
    model = encoder("roberta")
    folded = fold(model, LONGEST, segments=2)
    assert folded.segments == 1, "one type only: there is nothing to tell apart"
    part = model.embeddings
    assert np.allclose(folded.positions.rows, (part.position.weight[2 : 2 + LONGEST] + part.token_type.weight[0]).detach(), atol=1e-6)
    fold(model, 22)
    with pytest.raises(ValueError, match="max_length is 23, the model has 22 positions"):
        fold(model, 23)


def test_what_the_file_holds_is_float32():
    for kind in KINDS:
        folded = fold(encoder(kind), LONGEST)
        arrays = [folded.words.rows, folded.positions.rows]
        arrays += [array for linear, _ in folded.linears() for array in (linear.weight, linear.bias) if array is not None]
        arrays += [array for norm in norms(folded) for array in (norm.weight, norm.bias)]
        assert {array.dtype for array in arrays} == {np.dtype(np.float32)}, kind


def work(module: torch.nn.Module) -> int:
    """Multiplications that one token takes in a matrix of the torch module."""
    if isinstance(module, LowRank):
        return module.inner.weight.numel() + module.outer.weight.numel()
    if isinstance(module, Quaternion):  # each block reads each component; then 4 sums of 16
        return 4 * module.blocks.numel() + 16 * len(module.blocks)
    return module.weight.numel()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not last_attention_is_shared(kind)])
def test_the_last_layer_computes_the_first_token_alone(kind):
    """Of the last layer only what keys and values need runs on all tokens; counted here from the module's own shapes."""
    model = encoder(kind)
    folded = fold(model, LONGEST)
    last, own = folded.layers[-1], model.layers[-1]
    assert [layer.first_only for layer in folded.layers] == [False] * (len(folded.layers) - 1) + [True]
    everywhere = [name for read in last.reads if not read.first_only for name, _ in read.parts]
    once = [name for read in last.reads if read.first_only for name, _ in read.parts]
    hidden, inner, width = model.config.hidden_size, model.config.inner_size, own.attention.heads * own.attention.head_size
    reads = {}
    if width:
        assert {"key", "value"} <= set(everywhere) and "query" in once
        reads = {part: work(getattr(own.attention, part)) for part in ("query", "key", "value")}
    if own.has_bottleneck:
        reads["inner"] = inner * hidden
        if own.reads == "all":
            assert "inner" in (everywhere if width else once), "keys and values are read from it"
        elif own.reads == "query_key":
            assert "inner" in once
            if "shared" in everywhere:
                reads["shared"] = inner * hidden
            elif width:
                reads |= {"query": width * hidden, "key": width * hidden}  # multiplied out
    assert {*everywhere, *once} == set(reads)
    rest = work(own.attention.output) + sum(work(ffn.up) + work(ffn.down) for ffn in own.ffns if ffn.up is not None)
    rest += inner * hidden if own.has_bottleneck else 0
    for tokens in (1, 9, LONGEST):
        alone = folded.multiply_adds(tokens)
        before = FoldedEncoder(**{**vars(folded), "layers": folded.layers[:-1]}).multiply_adds(tokens)
        expected = sum(reads[name] * tokens for name in everywhere) + sum(reads[name] for name in once) + rest + 2 * tokens * width
        assert alone - before == expected


def test_multiply_adds_of_a_whole_bert():
    folded = fold(encoder("bert"), LONGEST)
    layer, tokens = 4 * 32 * 32 + 2 * 32 * 40, 11
    full = layer * tokens + 2 * tokens * tokens * 32
    last = (2 * tokens + 2) * 32 * 32 + 2 * 32 * 40 + 2 * tokens * 32
    assert folded.multiply_adds(tokens) == 2 * full + last + 32 * 32 + 32 * LABELS


@pytest.mark.parametrize(("bottleneck", "head_size", "multiplied_out"), [(16, 4, True), (20, 4, True), (8, 4, False), (16, 8, False), (12, 2, True)])
def test_a_bottleneck_is_multiplied_out_only_where_that_is_no_larger(bottleneck, head_size, multiplied_out):
    shapes = [{"heads": 4, "head_size": head_size, "ffn_sizes": [24]}] * 2
    model = encoder("mobilebert", bottleneck_size=bottleneck, layers=shapes)
    folded = fold(model, LONGEST)
    parts = [name for name, _ in folded.layers[0].reads[0].parts]
    assert ("shared" not in parts) == multiplied_out
    width = 4 * head_size
    apart = bottleneck * 32 + 2 * width * bottleneck
    read = sum(read.linear.weight.size for read in folded.layers[0].reads) - (width + bottleneck) * 32  # without values and inner
    assert read == min(apart, 2 * width * 32)
    assert (2 * width * 32 <= apart) == multiplied_out
    assert difference(model, folded, LISTS) < 1e-4


def test_a_bottleneck_with_statistics_is_not_multiplied_out():
    folded = fold(encoder("mobilebert, layer norm"), LONGEST)
    for number, layer in enumerate(folded.layers):
        assert {name: norm.name for name, norm in layer.part_norms.items()} == {
            "inner": f"layers.{number}.inner_norm", "shared": f"layers.{number}.shared_norm"
        }  # fmt: skip


@pytest.mark.parametrize("kind", SHARED)
def test_shared_layers_keep_one_set_of_weights(kind):
    model = encoder(kind)
    folded = fold(model, LONGEST)
    linears = [linear for linear, _ in folded.linears()]
    by_name: dict[str, list] = {}
    for linear in linears:
        by_name.setdefault(linear.name, []).append(linear)
    for name, uses in by_name.items():
        for other in uses[1:]:
            assert np.array_equal(uses[0].weight, other.weight) and np.array_equal(uses[0].bias, other.bias), name
    own = len(model.layers)
    layers = {name.split(".")[1] for name in by_name if name.startswith("layers.")}
    assert layers == {str(i) for i in range(own)}
    used = Counter(linear.name.split(".")[1] for linear in linears if linear.name.endswith(".output"))
    assert used == Counter(str(i) for i in model.order)
    # No layer has matrices that the others of its kind have not, not even the last.
    reads = {layer.output.name.split(".")[1]: [read.linear.name for read in layer.reads] for layer in folded.layers}
    for layer in folded.layers:
        assert [read.linear.name for read in layer.reads] == reads[layer.output.name.split(".")[1]]
        assert not any(read.first_only for read in layer.reads)
    # Norms too: one name, one content.
    contents: dict[str, Norm] = {}
    for norm in norms(folded):
        first = contents.setdefault(norm.name, norm)
        assert np.array_equal(first.weight, norm.weight) and np.array_equal(first.bias, norm.bias), norm.name


def test_names_are_unique_where_nothing_is_shared():
    for kind in KINDS:
        names = [linear.name for linear, _ in fold(encoder(kind), LONGEST).linears()]
        assert kind in (*SHARED, *SHARED_PARTS) or len(set(names)) == len(names), kind


# --- matrices with fewer weights ---------------------------------------------------------------------------------------


def test_the_thin_matrices_that_read_the_feature_map_are_rows_of_one():
    model = encoder("low rank")
    first, second, last = fold(model, LONGEST).layers
    (read,) = first.reads
    assert (read.linear.name, read.parts) == ("layers.0.query_key_value", (("query", 6), ("key", 32), ("value", 32)))
    attention = model.layers[0].attention
    rows = torch.cat([attention.query.inner.weight, attention.key.weight, attention.value.weight]).detach()
    assert np.array_equal(read.linear.weight, rows)
    assert not read.linear.bias[:6].any() and np.array_equal(read.linear.bias[6:38], attention.key.bias.detach())
    (query,) = first.part_linears.values()
    assert query.name == "layers.0.query" and query.inner is None
    assert np.allclose(query.weight, attention.query.outer.weight.detach() / np.sqrt(8), atol=1e-6), "1/sqrt(d) goes where the bias is"
    assert np.allclose(query.bias, attention.query.outer.bias.detach() / np.sqrt(8), atol=1e-6)
    (read,) = second.reads
    assert read.linear.bias is None and read.linear.weight.shape == (8 + 5 + 7, 32), "nothing is added between two factors"
    assert (second.output.inner.name, second.output.inner.weight.shape, second.output.weight.shape) == ("layers.1.output.inner", (9, 32), (32, 9))
    assert second.ffns[0].up.inner.activation is None and second.ffns[0].up.activation == "gelu"
    assert [(read.linear.name, read.first_only) for read in last.reads] == [("layers.2.key_value", False), ("layers.2.query.inner", True)]


def test_factors_stand_in_the_order_of_use():
    names = [(linear.name, once) for linear, once in fold(encoder("low rank"), LONGEST).linears()]
    assert [name for name, _ in names if name.startswith("layers.1.")] == [
        "layers.1.query_key_value", "layers.1.query", "layers.1.key", "layers.1.value", "layers.1.output.inner", "layers.1.output",
        "layers.1.ffns.0.up.inner", "layers.1.ffns.0.up", "layers.1.ffns.0.down.inner", "layers.1.ffns.0.down",
    ]  # fmt: skip
    assert [name for name, once in names if not once][-2:] == ["layers.2.key_value", "layers.2.value"]


@pytest.mark.parametrize("kind", ["low rank student", "quaternion student", "shared attention student"])
def test_such_queries_are_not_multiplied_out(kind):
    for layer in fold(encoder(kind), LONGEST).layers[::2]:
        sources = {part: read.source for read in layer.reads for part, _ in read.parts}
        assert sources == {"query": "shared", "key": "shared", "value": "hidden", "inner": "hidden", "shared": "hidden"}


@pytest.mark.parametrize("kind", ["empty parts", "empty student", "empty student, all", "nothing but norms"])
def test_of_an_empty_part_the_bias_is_left(kind):
    model = encoder(kind)
    folded = fold(model, LONGEST)
    for layer, own in zip(folded.layers, model.layers, strict=True):
        parts = {part for read in layer.reads for part, _ in read.parts}
        assert parts == (({"query", "key", "value"} if own.attention.heads else set()) | ({"inner"} if own.has_bottleneck else set()))
        assert layer.output.weight.shape == (model.config.inner_size, own.attention.heads * own.attention.head_size)
        for ffn, own_ffn in zip(layer.ffns, own.ffns, strict=True):
            assert (ffn.up is None) == (own_ffn.up is None) and ffn.down.weight.shape == own_ffn.down.weight.shape
    assert all(linear.weight.size for linear, _ in folded.linears())


def test_a_quaternion_matrix_is_its_blocks():
    model = encoder("quaternion")
    folded = fold(model, LONGEST)
    own, layer = model.layers[0], folded.layers[0]
    assert [read.linear.name for read in layer.reads] == ["layers.0.query", "layers.0.key", "layers.0.value"]
    assert np.array_equal(layer.reads[2].linear.weight, own.attention.value.blocks.detach())
    assert layer.ffns[0].up.weight.shape == (40, 8) and layer.ffns[0].down.weight.shape == (32, 10)


def test_the_signs_are_those_of_the_hamilton_product():
    assert np.array_equal(QUATERNION_SIGNS.reshape(4, 4, 4), HAMILTON.numpy())
    assert np.array_equal(np.abs(QUATERNION_SIGNS).sum(axis=1), [4, 4, 4, 4]) and np.abs(QUATERNION_SIGNS).sum(axis=0).max() == 1


def test_no_channel_of_a_quaternion_matrix_is_scaled():
    linear = fold(encoder("quaternion"), LONGEST).layers[0].output
    uneven = np.linspace(1, 2, 32, dtype=np.float32)
    for change in (linear.rows_scaled, linear.rows_divided, linear.columns_scaled):
        change(np.full(32, 2, np.float32))
        with pytest.raises(ValueError, match=r"^layers\.0\.output: a scale per channel"):
            change(uneven)


# --- shared parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHARED_PARTS)
def test_shared_parts_keep_one_set_of_weights(kind):
    model = encoder(kind)
    folded = fold(model, LONGEST)
    assert folded.shares
    attention = [model.config.shared_attention[i] for i in range(len(model.layers))]
    for i, (layer, owner, ffn_owner) in enumerate(zip(folded.layers, attention, model.config.shared_ffn, strict=True)):
        assert layer.output.name == f"layers.{owner}.output"
        for k, ffn in enumerate(layer.ffns):
            assert ffn.down.name == f"layers.{ffn_owner}.ffns.{k}.down"
            assert ffn.up is None or ffn.up.name == f"layers.{ffn_owner}.ffns.{k}.up"
            assert ffn.norm.name == f"layers.{i}.ffns.{k}.norm", "norms stay apart"
        for read in layer.reads:
            heads = {"query", "key", "value"} & {part for part, _ in read.parts}
            if attention.count(owner) > 1:
                assert not read.first_only and len(heads) in (0, len(read.parts)), "own rows in a shared matrix"
            assert read.linear.name.startswith(f"layers.{owner if heads else i}.")
    stored: dict[str, np.ndarray] = {}
    for linear, _ in folded.linears():
        assert np.array_equal(stored.setdefault(linear.name, linear.weight), linear.weight), linear.name
    unique = sum(array.size for array in stored.values())
    matrices = [module for layer in model.layers for module in layer.modules() if isinstance(module, (torch.nn.Linear, Quaternion))]
    expected = sum((m.blocks if isinstance(m, Quaternion) else m.weight).numel() for m in dict.fromkeys(matrices))
    head = model.heads["classifier"].weight.numel() + (0 if model.pooler is None else model.pooler.weight.numel())
    assert unique <= expected + head


@pytest.mark.parametrize("kind", ["shared student", "shared ffn student", "shared empty parts"])
def test_two_contents_under_one_name_are_refused(kind, monkeypatch):
    """A scale that one of the layers gets and the other does not."""
    plain = folding._Chain.write
    calls = []

    def write(self, k, linear):
        calls.append(linear.name)
        linear, norm = plain(self, k, linear)
        return (linear.rows_scaled(np.float32([1.5] * len(linear.weight))) if len(calls) == 2 else linear), norm

    model = encoder(kind)
    fold(model, LONGEST)
    monkeypatch.setattr(folding._Chain, "write", write)
    with pytest.raises(ValueError, match=r"^layers\.0\.ffns\.0\.down: two different matrices of this name"):
        fold(model, LONGEST)


def test_every_family_is_here():
    from pipeline.models.tensor_names import TENSOR_NAMES

    here = [TENSOR_NAMES[config.model_type] for config in HUB.values()]
    assert all(table in here for table in TENSOR_NAMES.values())

"""What is cut out computes what is masked out, whatever the encoder looks like and in whatever order things go."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.models.config import EncoderConfig, layer_shape
from pipeline.models.encoder import Encoder, count_unique_parameters
from pipeline.models.gated import gated
from pipeline.models.hub import WEIGHTS, load_encoder, save_encoder
from pipeline.models.inference import predict
from pipeline.models.linear import LowRank
from pipeline.models.surgery import (
    TOLERANCE,
    break_even_rank,
    encoder_parameters,
    factor,
    keep_ffn_units,
    keep_head_dimensions,
    keep_heads,
    keep_hidden,
    keep_layers,
    layer_matrices,
    multiply_out,
    probe_texts,
    require_same,
)
from pipeline.tasks.batches import EncodedTexts, make_batch
from runtimes.errors import BadInput, GateFailed
from tests.exporters.encoders import LABELS, LONGEST, OWN, SHARED, SHARED_PARTS, encoder, texts
from tests.pipeline.labelled import from_id_lists

CLOSE = 1e-5
STUDENTS = ["mobilebert", "mobilebert, all", "mobilebert, none, layer norm", "unequal student"]
APART = [
    "bert", "distilbert", "electra", "one layer", "unequal layers", "factorized", "low rank", "low rank student", "empty parts", "empty student",
    *STUDENTS,
]  # fmt: skip
"""Encoders whose layers share nothing."""
WITH_A_HIDDEN_CUT = ["bert", "roberta", "distilbert", "one layer", "unequal layers", "factorized", "low rank", "empty parts"]
BATCH = make_batch(from_id_lists([np.asarray(ids) for ids in texts(9)], np.zeros(9, dtype=np.int64), 0), np.arange(9))


def encoded(count: int = 40) -> EncodedTexts:
    return from_id_lists([np.asarray(ids) for ids in texts(count)], np.arange(count) % LABELS, 0)


@torch.no_grad()
def logits(model: Encoder, **options) -> Tensor:
    return model(BATCH.input_ids, BATCH.attention_mask, **options).logits


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


def some(count: int, keep: int) -> list[int]:
    """``keep`` of ``count`` at random, in order; all where there are fewer."""
    return sorted(torch.randperm(count)[:keep].tolist())


def mask(count: int, kept: Sequence[int]) -> Tensor:
    return torch.zeros(count).index_fill(0, torch.tensor(kept, dtype=torch.long), 1.0)


def half_of_heads(model: Encoder) -> list[list[int]]:
    """At random, and of another number in each layer; the first layer loses all."""
    return [[] if i == 0 and len(model.config.layers) > 1 else some(s["heads"], max(1, s["heads"] - i)) for i, s in enumerate(model.config.layers)]


def half_of_units(model: Encoder) -> list[list[list[int]]]:
    return [[some(size, size // 2 + i) for size in s["ffn_sizes"]] for i, s in enumerate(model.config.layers)]


def some_dimensions(model: Encoder, share: float) -> list[list[list[int]]]:
    return [[some(s["head_size"], int(share * s["head_size"])) for _ in range(s["heads"])] for s in model.config.layers]


def dimension_masks(model: Encoder, kept: list[list[list[int]]]) -> list[Tensor]:
    sizes = [s["head_size"] for s in model.config.layers]
    return [torch.cat([torch.zeros(0), *(mask(d, dims) for dims in heads)]) for d, heads in zip(sizes, kept, strict=True)]


def unit_masks(model: Encoder, kept: list[list[list[int]]]) -> list[list[Tensor]]:
    return [[mask(size, units) for size, units in zip(s["ffn_sizes"], k, strict=True)] for s, k in zip(model.config.layers, kept, strict=True)]


def head_masks(model: Encoder, kept: list[list[int]]) -> list[Tensor]:
    return [mask(s["heads"], heads) for s, heads in zip(model.config.layers, kept, strict=True)]


def whole(model: Encoder) -> list[list[int]]:
    return [list(range(s["heads"])) for s in model.config.layers]


# --- masked is cut ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", APART)
def test_heads_masked_are_heads_cut(kind):
    model = encoder(kind)
    kept = half_of_heads(model)
    with gated(model, heads=head_masks(model, kept)):
        masked = logits(model)
    cut = keep_heads(model, kept)
    assert [s["heads"] for s in cut.config.layers] == [len(heads) for heads in kept]
    assert difference(logits(cut), masked) < CLOSE
    assert kept == whole(model) or difference(logits(model), masked) > 1e-2  # what went was felt


@pytest.mark.parametrize("kind", APART)
def test_a_model_may_lose_all_heads_and_all_units(kind):
    model = encoder(kind)
    none = [[] for _ in model.config.layers]
    no_units = [[[] for _ in s["ffn_sizes"]] for s in model.config.layers]
    with gated(model, heads=head_masks(model, none), units=unit_masks(model, no_units)):
        masked = logits(model)
    cut = keep_ffn_units(keep_heads(model, none), no_units)
    assert difference(logits(cut), masked) < CLOSE
    assert not layer_matrices(cut)
    assert not any("ranks" in s for s in cut.config.layers)


@pytest.mark.parametrize("kind", APART)
def test_units_masked_are_units_cut(kind):
    model = encoder(kind)
    kept = half_of_units(model)
    kept[0][0] = []
    with gated(model, units=unit_masks(model, kept)):
        masked = logits(model)
    cut = keep_ffn_units(model, kept)
    assert [s["ffn_sizes"] for s in cut.config.layers] == [[len(units) for units in layer] for layer in kept]
    assert difference(logits(cut), masked) < CLOSE
    assert difference(logits(model), masked) > 1e-2


@pytest.mark.parametrize("kind", APART)
def test_head_dimensions_masked_are_head_dimensions_cut(kind):
    """The scores keep the scale they were trained with, though there are fewer dimensions to divide by."""
    model = encoder(kind)
    query_key, value = some_dimensions(model, 0.5), some_dimensions(model, 0.5)
    assert query_key != value
    with gated(model, query_key=dimension_masks(model, query_key), value=dimension_masks(model, value)):
        masked = logits(model)
    cut = keep_head_dimensions(model, query_key, value)
    assert all(b["head_size"] == a["head_size"] // 2 for a, b in zip(model.config.layers, cut.config.layers, strict=True) if a["heads"])
    assert difference(logits(cut), masked) < CLOSE
    assert difference(logits(model), masked) > 1e-2


def test_dimensions_of_some_heads_alone():
    """Heads and dimensions that go in one cut are those that go in two."""
    model = encoder("unequal layers")
    heads = half_of_heads(model)
    query_key, value = some_dimensions(model, 0.75), some_dimensions(model, 0.75)
    query_key, value = ([[layer[h] for h in own] for layer, own in zip(dims, heads, strict=True)] for dims in (query_key, value))
    at_once = keep_head_dimensions(model, query_key, value, heads)
    one_by_one = keep_head_dimensions(keep_heads(model, heads), query_key, value)
    assert difference(logits(at_once), logits(one_by_one)) == 0


@pytest.mark.parametrize("kind", WITH_A_HIDDEN_CUT)
def test_channels_masked_are_channels_cut(kind):
    model = encoder(kind)
    kept = some(model.config.hidden_size, 20)
    with gated(model, hidden=mask(model.config.hidden_size, kept)):
        masked = logits(model)
    cut = keep_hidden(model, kept)
    assert cut.config.hidden_size == 20
    assert cut.embeddings.position.weight.shape[1] == 20
    assert difference(logits(cut), masked) < CLOSE
    assert difference(logits(model), masked) > 1e-2


@pytest.mark.parametrize("kind", [*APART, *SHARED, *SHARED_PARTS, "quaternion student"])
def test_layers_skipped_are_layers_cut_bit_for_bit(kind):
    model = encoder(kind)
    count = len(model.config.layers)
    assert difference(logits(model), logits(model, skip=range(count))) > 1e-2
    for kept in itertools.chain.from_iterable(itertools.combinations(range(count), n) for n in range(1, count)):
        gone = [position for position in range(count) if position not in kept]
        cut = keep_layers(model, kept)
        assert len(cut.config.layers) == len(kept)
        assert torch.equal(logits(cut), logits(model, skip=gone)), kept


@pytest.mark.parametrize("kind", [*APART, *SHARED, *SHARED_PARTS, "quaternion student"])
def test_keeping_everything_changes_no_bit(kind):
    model = encoder(kind)
    made = [keep_layers(model, range(len(model.config.layers)))]
    if not model.config.quaternion:
        made += [keep_heads(model, whole(model)), keep_ffn_units(model, [[list(range(n)) for n in s["ffn_sizes"]] for s in model.config.layers])]
    for same in made:
        assert torch.equal(logits(same), logits(model))
        assert same.config.to_dict() == model.config.to_dict()
        assert count_unique_parameters(same) == count_unique_parameters(model)


@pytest.mark.parametrize("kind", ["bert", "unequal layers", "factorized", "low rank"])
def test_cuts_after_each_other_are_all_masks_at_once(kind):
    model = encoder(kind)
    count = len(model.config.layers)
    heads, units, channels = half_of_heads(model), half_of_units(model), some(model.config.hidden_size, 24)
    query_key, value = some_dimensions(model, 0.5), some_dimensions(model, 0.5)
    masks = {"heads": head_masks(model, heads), "units": unit_masks(model, units), "hidden": mask(model.config.hidden_size, channels)}
    with gated(model, **masks, query_key=dimension_masks(model, query_key), value=dimension_masks(model, value)):
        masked = logits(model, skip=[0])
    left = [[layer[h] for h in own] for layer, own in zip(query_key, heads, strict=True)]
    left_values = [[layer[h] for h in own] for layer, own in zip(value, heads, strict=True)]

    def on(positions: Sequence[int], what: list) -> list:
        return [what[position] for position in positions]

    everything, later = range(count), range(1, count)
    cut = keep_heads(model, heads)
    cut = keep_head_dimensions(cut, left, left_values)
    cut = keep_hidden(keep_ffn_units(cut, on(everything, units)), channels)
    assert difference(logits(keep_layers(cut, later)), masked) < CLOSE
    cut = keep_ffn_units(keep_layers(keep_hidden(model, channels), later), on(later, units))
    cut = keep_head_dimensions(cut, on(later, query_key), on(later, value))
    assert difference(logits(keep_heads(cut, on(later, heads))), masked) < CLOSE


def test_gates_per_text_and_per_token_are_those_of_the_heads():
    model = encoder("unequal layers")
    gates = [torch.rand(s["heads"]) for s in model.config.layers]
    batch, tokens = BATCH.input_ids.shape
    made = []
    for shape in ((), (batch,), (batch, tokens)):
        with gated(model, heads=[g.expand(*shape, -1) for g in gates]):
            made.append(logits(model))
    assert difference(made[0], made[1]) == 0
    assert difference(made[0], made[2]) == 0
    assert difference(made[0], logits(model)) > 1e-2


def test_a_cut_leaves_the_model_it_was_cut_from_alone():
    model = encoder("low rank")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cuts = [
        keep_heads(model, half_of_heads(model)), keep_ffn_units(model, half_of_units(model)), keep_hidden(model, range(16)),
        keep_layers(model, [0, 2]), multiply_out(model, layer_matrices(model)),
    ]  # fmt: skip
    with torch.no_grad():
        for cut in cuts:
            for parameter in cut.parameters():
                parameter.fill_(7.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "low rank", "low rank student", "mobilebert", "albert", "empty parts"])
def test_products_multiplied_out_give_the_same_logits(kind):
    model = encoder(kind)
    names = layer_matrices(model)
    torch.manual_seed(0)
    factors = {}
    for name in names[::2]:
        out, into = model.get_submodule(name).weight.shape
        factors[name] = torch.randn(out, 5) * into**-0.5, torch.randn(5, into) * 5**-0.5
    thin = factor(model, factors)
    assert all(isinstance(thin.get_submodule(name), LowRank) for name in factors)
    assert layer_matrices(thin) == names
    dense = multiply_out(thin, names)
    assert not any(isinstance(module, LowRank) for module in dense.modules())
    assert not any("ranks" in s for s in dense.config.layers)
    assert difference(logits(thin), logits(dense)) < CLOSE
    for name, (outer, inner) in factors.items():
        assert difference(dense.get_submodule(name).weight, outer @ inner) < 1e-6
    assert difference(logits(thin), logits(model)) > 1e-2


@pytest.mark.parametrize("kind", ["bert", "low rank", "mobilebert", "albert"])
def test_full_rank_products_change_nothing(kind):
    model = encoder(kind)
    factors = {}
    for name in layer_matrices(model):
        u, s, v = torch.linalg.svd(model.get_submodule(name).weight.detach(), full_matrices=False)
        factors[name] = u * s, v
    assert difference(logits(factor(model, factors)), logits(model)) < CLOSE


def test_products_that_are_cut_stay_products():
    model = encoder("low rank")
    cut = keep_ffn_units(keep_heads(model, [[0, 1, 2]] * 3), [[list(range(20)) for _ in s["ffn_sizes"]] for s in model.config.layers])
    assert [s["ranks"] for s in cut.config.layers] == [s["ranks"] for s in model.config.layers]
    assert cut.layers[1].attention.query.outer.weight.shape == (24, 8)
    assert cut.layers[1].ffns[0].down.inner.weight.shape == (10, 20)


@pytest.mark.parametrize("shape", [(768, 768), (768, 3072), (384, 1536), (3, 3), (1, 5)])
def test_at_the_break_even_rank_two_matrices_are_smaller_and_one_above_they_are_not(shape):
    rank, total = break_even_rank(*shape), shape[0] * shape[1]
    assert rank * sum(shape) < total <= (rank + 1) * sum(shape)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_a_head_of_bert_base_holds_196800_parameters():
    model = Encoder(EncoderConfig(vocab_size=7, hidden_size=768, layers=[layer_shape(12, 64, [3072])], max_position_embeddings=8))
    before = encoder_parameters(model)
    for kept in ([*range(11)], [0, 5, 7], [3], []):
        cut = keep_heads(model, [kept])
        assert before - encoder_parameters(cut) == (12 - len(kept)) * 196_800
    assert cut.layers[0].attention.output.bias.shape == (768,)
    assert before - encoder_parameters(keep_ffn_units(model, [[range(3072 - 16)]])) == 16 * (2 * 768 + 1)


# --- shared weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in (*SHARED, *SHARED_PARTS) if "quaternion" not in kind])
def test_layers_that_share_are_cut_alike_and_go_on_sharing(kind):
    model = encoder(kind)
    heads = [list(range(max(0, s["heads"] - 1))) for s in model.config.layers]
    units = [[list(range(0, size, 2)) for size in s["ffn_sizes"]] for s in model.config.layers]
    gates = {
        "heads": [torch.tensor([1.0] * (layer.attention.heads - 1) + [0.0])[: layer.attention.heads] for layer in model.layers],
        "units": [[mask(n, u) for n, u in zip(s["ffn_sizes"], k, strict=True)] for s, k in zip(model.config.layers, units, strict=True)],
    }
    gates["units"] = [gates["units"][model.order.index(own)] for own in range(len(model.layers))]
    with gated(model, **gates):
        masked = logits(model)
    cut = keep_ffn_units(keep_heads(model, heads), units)
    assert difference(logits(cut), masked) < CLOSE
    for name in ("shared_with", "shared_attention", "shared_ffn"):
        assert getattr(cut.config, name) == getattr(model.config, name)
    assert len(cut.layers) == len(model.layers)
    assert cut.order == model.order
    for index, layer in enumerate(cut.layers):
        if len(cut.layers) == len(cut.config.layers):
            assert layer.attention is cut.layers[cut.config.shared_attention[index]].attention
            assert layer.ffns[0].down is cut.layers[cut.config.shared_ffn[index]].ffns[0].down


@pytest.mark.parametrize("kind", ["albert", "shared student", "shared attention", "shared attention student", "shared low rank"])
def test_unequal_head_cuts_of_shared_layers_are_refused(kind):
    model = encoder(kind)
    kept = whole(model)
    kept[0] = kept[0][:-1]
    with pytest.raises(BadInput, match="layers that share weights must be cut alike"):
        keep_heads(model, kept)


@pytest.mark.parametrize("kind", ["albert", "shared student", "shared attention", "shared attention student", "shared low rank"])
def test_equally_many_but_other_heads_of_shared_layers_are_refused(kind):
    """The shapes would fit, and one layer would silently get the other's heads."""
    model = encoder(kind)
    kept = [heads[1:] for heads in whole(model)]
    kept[0] = whole(model)[0][:-1]
    with pytest.raises(BadInput, match="must be cut alike"):
        keep_heads(model, kept)


def sharing_layer(model: Encoder) -> int:
    """A layer whose FFNs are another's."""
    config = model.config
    return next(i for i in range(len(config.layers)) if config.shared_with[i] != i or config.shared_ffn[i] != i)


@pytest.mark.parametrize("kind", ["albert", "shared student", "shared ffn", "shared ffn student", "shared low rank"])
def test_unequal_unit_cuts_of_shared_layers_are_refused(kind):
    model = encoder(kind)
    kept = [[list(range(n)) for n in s["ffn_sizes"]] for s in model.config.layers]
    sharing = sharing_layer(model)
    kept[sharing] = [units[:-8] for units in kept[sharing]]
    with pytest.raises(BadInput, match="layers that share weights must be cut alike"):
        keep_ffn_units(model, kept)


@pytest.mark.parametrize("kind", ["albert", "shared student", "shared ffn", "shared ffn student", "shared low rank"])
def test_equally_many_but_other_units_of_shared_layers_are_refused(kind):
    model = encoder(kind)
    kept = [[list(range(8, n)) for n in s["ffn_sizes"]] for s in model.config.layers]
    kept[sharing_layer(model)] = [list(range(n - 8)) for n in model.config.layers[-1]["ffn_sizes"]]
    with pytest.raises(BadInput, match="must be cut alike"):
        keep_ffn_units(model, kept)


def test_channels_of_layers_that_share_go_too():
    for kind in ("shared attention", "shared ffn", "shared attention at first"):
        model = encoder(kind)
        kept = some(32, 20)
        with gated(model, hidden=mask(32, kept)):
            masked = logits(model)
        cut = keep_hidden(model, kept)
        assert difference(logits(cut), masked) < CLOSE
        assert count_unique_parameters(cut) < count_unique_parameters(keep_hidden(untied(model), kept))


def untied(model: Encoder) -> Encoder:
    own = list(range(len(model.config.layers)))
    made = Encoder(EncoderConfig(**model.config.to_dict() | {"shared_attention": own, "shared_ffn": own}))
    made.load_state_dict(model.state_dict())
    return made.eval()


@pytest.mark.parametrize("kind", [*SHARED, *SHARED_PARTS])
def test_what_layers_share_is_stored_once_and_read_back(kind, tmp_path):
    model = encoder(kind)
    save_encoder(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert sum(tensor.numel() for tensor in stored.values()) == count_unique_parameters(model)
    read = load_encoder(tmp_path)
    assert torch.equal(logits(read), logits(model))
    assert count_unique_parameters(read) == count_unique_parameters(model)


@pytest.mark.parametrize("kind", SHARED_PARTS)
def test_norms_of_layers_that_share_parts_stay_their_own(kind):
    model = encoder(kind)
    for name in ("attention_norm", "ffns.0.norm"):
        norms = [layer.get_submodule(name) for layer in model.layers]
        assert len({norm.weight.data_ptr() for norm in norms}) == len(norms) == len(model.config.layers)


def test_a_kept_layer_whose_owner_goes_keeps_its_weights():
    model = encoder("shared attention student")  # layers 0 and 2 share their attention
    cut = keep_layers(model, [1, 2])
    assert cut.config.shared_attention == [0, 1]
    assert torch.equal(cut.layers[1].attention.query.weight, model.layers[0].attention.query.weight)
    assert keep_layers(model, [0, 2]).config.shared_attention == [0, 0]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in OWN if "quaternion" in kind])
def test_nothing_is_cut_out_of_quaternion_matrices(kind):
    model = encoder(kind)
    units = [[list(range(n)) for n in s["ffn_sizes"]] for s in model.config.layers]
    dims = [[list(range(s["head_size"]))] * s["heads"] for s in model.config.layers]
    name = layer_matrices(model)[0]
    cuts = [
        lambda: keep_heads(model, whole(model)), lambda: keep_head_dimensions(model, dims, dims), lambda: keep_ffn_units(model, units),
        lambda: keep_hidden(model, range(16)), lambda: factor(model, {name: (torch.zeros(16, 2), torch.zeros(2, 16))}),
    ]  # fmt: skip
    refusals = "cannot be cut out of quaternion matrices|hidden width can be cut in BERT-like|shares the attention or the FFNs alone"
    for cut in cuts:
        with pytest.raises(BadInput, match=refusals):
            cut()


@pytest.mark.parametrize("kind", ["electra", "albert", "mobilebert", "mobilebert, layer norm", "unequal student", "shared, no norm, no bottleneck"])
def test_a_feature_map_that_is_not_berts_keeps_its_channels(kind):
    model = encoder(kind)
    with pytest.raises(BadInput, match="BERT-like"):
        keep_hidden(model, range(16))
    with pytest.raises(BadInput, match="BERT-like"), gated(model, hidden=torch.ones(model.config.hidden_size)):
        logits(model)


@pytest.mark.parametrize("wrong", [[0, 0], [4], [-1], [0, 1, 2, 3, 4]])
def test_heads_that_are_not_there_are_refused(wrong):
    with pytest.raises(BadInput, match=r"layer 1: heads.* distinct and lie between 0 and 3"):
        keep_heads(encoder("bert"), [[0], wrong, [0]])


@pytest.mark.parametrize("wrong", [[0, 0], [40], [-1]])
def test_units_that_are_not_there_are_refused(wrong):
    with pytest.raises(BadInput, match=r"layer 2: FFN units.* distinct and lie between 0 and 39"):
        keep_ffn_units(encoder("bert"), [[[0]], [[1]], [wrong]])


@pytest.mark.parametrize("wrong", [[0, 0], [32], [-1]])
def test_channels_that_are_not_there_are_refused(wrong):
    with pytest.raises(BadInput, match=r"hidden channels.* distinct and lie between 0 and 31"):
        keep_hidden(encoder("bert"), wrong)


@pytest.mark.parametrize("wrong", [[0, 0], [3], [-1], [1, 0]])
def test_layers_that_are_not_there_or_out_of_order_are_refused(wrong):
    with pytest.raises(BadInput, match="layers"):
        keep_layers(encoder("bert"), wrong)


def test_heads_of_a_layer_keep_equally_many_dimensions():
    model = encoder("bert")
    same = [[[0, 1]] * 4] * 3
    odd = [same[0], [[0, 1]] * 3 + [[0, 1, 2]], same[2]]
    for query_key, value in ((odd, same), (same, odd), (same, [[[0]] * 4] * 3)):
        with pytest.raises(BadInput, match="every head must keep equally many dimensions"):
            keep_head_dimensions(model, query_key, value)


@pytest.mark.parametrize("wrong", [[0, 0], [0, 8], [-1, 0]])
@pytest.mark.parametrize("head", [0, 1, 3])
def test_dimensions_that_are_not_there_are_refused(wrong, head):
    """Head 0 has no dimension 8: that row is the next head's first."""
    model = encoder("bert")
    good = [[[0, 1]] * 4 for _ in range(3)]
    bad = [[list(dims) for dims in layer] for layer in good]
    bad[1][head] = wrong
    for query_key, value in ((bad, good), (good, bad)):
        with pytest.raises(BadInput, match="distinct and lie between 0 and 7"):
            keep_head_dimensions(model, query_key, value)


@pytest.mark.parametrize("kind", ["shared attention", "shared ffn student", "shared low rank"])
def test_parts_that_layers_share_alone_are_not_factorized(kind):
    model = encoder(kind)
    name = layer_matrices(model)[0]
    out, into = model.get_submodule(name).weight.shape
    with pytest.raises(BadInput, match="factorize before share-layers"):
        factor(model, {name: (torch.zeros(out, 2), torch.zeros(2, into))})


# --- the check on real texts ------------------------------------------------------------------------------------------


def test_the_check_passes_what_is_the_same_and_tells_how_far_off_it_is():
    model, given = encoder("bert"), encoded()
    expected = predict(model, given)
    assert require_same(expected, model, given, "cut") == 0
    assert require_same({"logits": expected["logits"] + 0.5 * TOLERANCE}, model, given, "cut") == pytest.approx(0.5 * TOLERANCE, rel=0.02)


@pytest.mark.parametrize("wrong", [2 * TOLERANCE, float("nan"), float("inf")])
def test_the_check_stops_at_one_logit_that_differs(wrong):
    model, given = encoder("bert"), encoded()
    expected = predict(model, given)
    expected["logits"][7, 3] += wrong
    with pytest.raises(GateFailed, match=r"^heads: the cut model differs from the masked one by"):
        require_same(expected, model, given, "heads")


def test_the_check_finds_a_head_too_many():
    model, given = encoder("bert"), encoded()
    with gated(model, heads=head_masks(model, [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3]])):
        expected = predict(model, given)
    require_same(expected, keep_heads(model, [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]), given, "heads")
    with pytest.raises(GateFailed):
        require_same(expected, keep_heads(model, [[0, 2], [0, 1, 2, 3], [0, 1, 2, 3]]), given, "heads")


def test_probes_are_of_every_length():
    given = encoded(200)
    probes = probe_texts(given, 16)
    assert len(probes) == 16
    assert probes.lengths.min() == given.lengths.min() == 1
    assert probes.lengths.max() == given.lengths.max() == LONGEST
    assert len(probe_texts(given.take(range(5)), 16)) == 5
    assert len({tuple(probe_texts(given, 200).text(i)) for i in range(200)}) == len({tuple(given.text(i)) for i in range(200)})

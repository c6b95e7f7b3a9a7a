"""Neurons are judged by what real tokens make of them, the least go in rounds, and scores keep the scale they were trained with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.methods.prune.neurons import PruneNeurons, mean_activations, neuron_scores, ones_at, top
from pipeline.models.encoder import Encoder, count_unique_parameters
from pipeline.models.gated import gated
from pipeline.models.surgery import keep_head_dimensions
from pipeline.tasks.batches import EncodedTexts, make_batch
from runtimes.errors import BadInput
from tests.exporters.encoders import FIRST_ID, LABELS, VOCABULARY, encoder, texts
from tests.pipeline.labelled import from_id_lists, predict_logits

KINDS = ["bert", "mobilebert", "unequal layers", "low rank", "low rank student", "empty parts"]
STAGE = 'use = "prune-neurons"\nmultiple_of = 4\nheal.batch_size = 8\n'


def encoded(count: int = 40, longest: int = 20) -> EncodedTexts:
    lengths = (1, 2, longest) if longest > 1 else (1,)
    return from_id_lists([np.asarray(ids) for ids in texts(count, lengths, longest)], np.arange(count) % LABELS, 0)


@torch.no_grad()
def seen(model: Encoder, given: EncodedTexts, first_alone: bool) -> dict[str, torch.Tensor]:
    """Mean |activation| by name over the texts one at a time, so that there is no padding; over all tokens or the first alone."""
    values: dict[str, list[torch.Tensor]] = {}
    handles = []
    for index, layer in enumerate(model.layers):
        if layer.attention.heads:
            for part in ("query", "key"):
                name = f"{index}.{part}"
                handles.append(getattr(layer.attention, part).register_forward_hook(lambda _, x, y, n=name: values.setdefault(n, []).append(y[0])))
            name = f"{index}.context"
            handles.append(layer.attention.output.register_forward_pre_hook(lambda _, x, n=name: values.setdefault(n, []).append(x[0][0])))
        for number, ffn in enumerate(layer.ffns):
            if ffn.up is not None:
                name = f"{index}.ffn.{number}"
                handles.append(ffn.down.register_forward_pre_hook(lambda _, x, n=name: values.setdefault(n, []).append(x[0][0])))
    for row in range(len(given)):
        model(torch.from_numpy(given.text(row)[None].astype(np.int64)), output_hidden_states=True)  # so that all tokens are computed
    for handle in handles:
        handle.remove()
    return {name: torch.cat([v[:1] if first_alone else v for v in parts]).abs().mean(0) for name, parts in values.items()}


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-6)


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_by_activation_is_the_mean_over_real_tokens(kind):
    """Up to the last layer, where the first token alone may be computed."""
    model, given = encoder(kind), encoded()
    expected, of_first = seen(model, given, first_alone=False), seen(model, given, first_alone=True)
    scores = neuron_scores(model, given, "activation")
    last = len(model.layers) - 1
    for index, layer in enumerate(model.layers):
        choices = (expected, of_first) if index == last else (expected,)
        for number, ffn in enumerate(layer.ffns):
            if ffn.up is not None:
                assert any(alike(scores.units[index][number], means[f"{index}.ffn.{number}"]) for means in choices)
        if layer.attention.heads:
            shape = (layer.attention.heads, -1)
            assert any(alike(scores.value[index], means[f"{index}.context"].view(shape)) for means in choices)
            keys = expected[f"{index}.key"]
            assert any(alike(scores.query_key[index], (means[f"{index}.query"] * keys).view(shape)) for means in choices)


def test_layers_compete_on_one_scale():
    """Two layers that see and do the same: neither's units may score more because more of its tokens are computed."""
    model = encoder("bert", layers=[{"heads": 4, "head_size": 8, "ffn_sizes": [40]}] * 2)
    with torch.no_grad():
        for layer in model.layers:
            for module in (layer.attention.output, layer.ffns[0].down):
                module.weight.zero_(), module.bias.zero_()
            for norm in (layer.attention_norm, layer.ffns[0].norm):
                norm.weight.fill_(1.0), norm.bias.zero_()
        model.layers[1].load_state_dict(model.layers[0].state_dict())
        model.embeddings.norm.weight.fill_(1.0), model.embeddings.norm.bias.zero_()
    given = encoded(60)
    units = neuron_scores(model, given, "activation").units
    assert 0.7 < (units[1][0] / units[0][0]).median() < 1.4


def test_the_score_is_no_matter_of_how_many_texts_there_are():
    model, given = encoder("bert"), encoded()
    once, twice = (neuron_scores(model, texts_, "activation") for texts_ in (given, given.joined(given)))
    for a, b in zip([*once.query_key, *once.value, *(u for layer in once.units for u in layer)],
                    [*twice.query_key, *twice.value, *(u for layer in twice.units for u in layer)], strict=True):  # fmt: skip
        assert alike(a, b)


def test_padding_counts_nothing():
    """Short texts beside a long one, and alone: what is seen is the sum of both."""
    model = encoder("bert")
    generator = np.random.default_rng(0)
    short = from_id_lists([generator.integers(FIRST_ID, VOCABULARY, 3) for _ in range(10)], np.zeros(10, np.int64), 0)
    long = from_id_lists([generator.integers(FIRST_ID, VOCABULARY, 20)], np.zeros(1, np.int64), 0)
    expected = seen(model, short.joined(long), first_alone=False)
    assert alike(neuron_scores(model, short.joined(long), "activation").units[0][0], expected["0.ffn.0"])
    wide = make_batch(short.joined(long), np.arange(11))
    assert (wide.attention_mask == 0).sum() == 10 * 17  # there was padding to leave out


def test_the_score_by_magnitude_is_the_norms_of_what_makes_a_neuron_and_what_reads_it():
    for kind in ("bert", "low rank", "mobilebert"):
        model = encoder(kind)
        scores = neuron_scores(model, encoded(8), "magnitude")
        for index, layer in enumerate(model.layers):
            attention = layer.attention
            for number, ffn in enumerate(layer.ffns):
                for unit in (0, 7):
                    expected = ffn.up.weight[unit].norm() * ffn.down.weight[:, unit].norm()
                    assert scores.units[index][number][unit].item() == pytest.approx(expected.item(), rel=1e-4)
            size = attention.head_size
            for head, dim in ((0, 0), (2, 3)):
                row = head * size + dim
                expected = attention.query.weight[row].norm() * attention.key.weight[row].norm()
                assert scores.query_key[index][head, dim].item() == pytest.approx(expected.item(), rel=1e-4)
                expected = attention.value.weight[row].norm() * attention.output.weight[:, row].norm()
                assert scores.value[index][head, dim].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("score", ["activation", "magnitude"])
def test_a_neuron_that_does_nothing_scores_0(score):
    model = encoder("bert")
    with torch.no_grad():
        for module, row in ((model.layers[1].ffns[0].up, 5), (model.layers[0].attention.value, 9), (model.layers[2].attention.key, 30)):
            module.weight[row] = 0
            module.bias[row] = 0
    scores = neuron_scores(model, encoded(), score)
    assert [(t == 0).nonzero().tolist() for t in (u[0] for u in scores.units)] == [[], [[5]], []]
    assert [(t == 0).nonzero().tolist() for t in scores.value] == [[[1, 1]], [], []]
    assert [(t == 0).nonzero().tolist() for t in scores.query_key] == [[], [], [[3, 6]]]


def test_looking_leaves_no_hooks_behind():
    model, given = encoder("bert"), encoded(8)
    mean_activations(model, given)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_highest_stay_in_their_old_order():
    assert top(torch.tensor([3.0, 9.0, 1.0, 5.0]), 2) == [1, 3]
    assert top(torch.tensor([1.0, 1.0, 1.0]), 2) == [0, 1]
    assert top(torch.tensor([1.0, 2.0]), 5) == [0, 1]


# --- cutting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["activation", "magnitude"])
def test_the_cut_is_the_masked_model(kind, score):
    model, given = encoder(kind), encoded()
    stage = PruneNeurons(ffn=0.5, attention=0.5, multiple_of=4)
    sizes = [[list(layer["ffn_sizes"]), layer["head_size"]] for layer in model.config.layers]
    scores = neuron_scores(model, given, score)
    cut = stage._cut(model, scores, sizes, 1.0, given)  # raises where they differ
    for before, after in zip(model.config.layers, cut.config.layers, strict=True):
        assert not before["heads"] or after["head_size"] == before["head_size"] // 2
        assert all(size % 4 == 0 for size in after["ffn_sizes"])
    total = sum(size for layer in model.config.layers for size in layer["ffn_sizes"])
    assert abs(sum(size for layer in cut.config.layers for size in layer["ffn_sizes"]) - total / 2) <= 2 * len(scores.units) * 2


def test_dimensions_that_do_nothing_go_without_a_trace():
    """Half of each head's queries, and the other half of its values, are zero: what is left computes what was there."""
    model, given = encoder("bert"), encoded()
    with torch.no_grad():
        for layer in model.layers:
            for name, rows in (("query", [0, 2, 4, 6]), ("value", [1, 3, 5, 7])):
                module = getattr(layer.attention, name)
                at = [head * 8 + row for head in range(4) for row in rows]
                module.weight[at] = 0
                module.bias[at] = 0
    scores = neuron_scores(model, given, "activation")
    query_key, value = ([[top(head, 4) for head in layer] for layer in kind] for kind in (scores.query_key, scores.value))
    assert query_key == [[[1, 3, 5, 7]] * 4] * 3
    assert value == [[[0, 2, 4, 6]] * 4] * 3
    cut = keep_head_dimensions(model, query_key, value)
    assert (predict_logits(cut, given) - predict_logits(model, given)).abs().max() < 1e-5
    with gated(model, query_key=ones_at(model, query_key), value=ones_at(model, value)):
        assert (predict_logits(cut, given) - predict_logits(model, given)).abs().max() < 1e-5


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("epochs", [0, 1])
def test_rounds_end_at_the_target(run_stages, rounds, epochs):
    ledger, made = run_stages(STAGE + f"ffn = 0.5\nattention = 0.25\nrounds = {rounds}\nheal.epochs = {epochs}")
    layers = made.model.config.layers
    widths = [layer["ffn_sizes"][0] for layer in layers]
    assert [layer["head_size"] for layer in layers] == [6, 6, 6, 6]
    assert all(width % 4 == 0 for width in widths)
    assert abs(sum(widths) - 128) <= 4 * 2
    assert ledger.records[-1]["subjects"][0]["name"] == "50% of FFN units, 25% of head dimensions pruned"
    assert ledger.records[-1]["subjects"][0]["unique_params"] == count_unique_parameters(made.model)


def test_either_alone_leaves_the_other_as_it_is(run_stages):
    made = run_stages(STAGE + "ffn = 0.0\nattention = 0.5\nrounds = 2\nheal.epochs = 0")[1]
    assert [(layer["ffn_sizes"], layer["head_size"]) for layer in made.model.config.layers] == [([64], 4)] * 4
    made = run_stages(STAGE + "ffn = 0.5\nattention = 0.0\nrounds = 2\nheal.epochs = 0")[1]
    assert [layer["head_size"] for layer in made.model.config.layers] == [8] * 4


def test_healing_between_rounds_brings_accuracy_back(run_stages):
    ledger = run_stages(STAGE + "ffn = 0.75\nattention = 0.5\nrounds = 3\nheal.epochs = 6\nheal.learning_rate = 1e-3")[0]
    assert ledger.records[-1]["subjects"][0]["metrics"]["validation"]["accuracy"] > 90


@pytest.mark.parametrize("options", ['heal.learn_from = "labels"', 'heal.learn_from = "teacher"', "heal.texts.copies = 1"])
def test_rounds_learn_from_whom_the_recipe_says(run_stages, options):
    made = run_stages(STAGE + "rounds = 2\nheal.epochs = 1\n" + options)[1]
    assert abs(sum(layer["ffn_sizes"][0] for layer in made.model.config.layers) - 128) <= 8


@pytest.mark.parametrize(
    "options, message",
    [
        ("ffn = 0.0", "ffn and attention are both 0, so nothing would go"),
        ("ffn = 1.0", "ffn"),
        ("attention = -0.1", "attention"),
        ("rounds = 0", "rounds"),
        ('score = "gradient"', "score"),
        ('heal.learn_from = "labels"\nheal.texts.copies = 1', "altered copies have no labels"),
    ],
)
def test_options_that_do_nothing_or_contradict_are_refused(run_stages, options, message):
    with pytest.raises(BadInput, match=message):
        run_stages(STAGE + options)

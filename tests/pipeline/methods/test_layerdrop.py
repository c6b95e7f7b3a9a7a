"""Layers that are left out are layers that were skipped; which go is a rule, a search, or what the recipe says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.methods.prune import layerdrop
from pipeline.methods.prune.layerdrop import drawn_layers, every_other, search
from pipeline.models.config import layer_shape
from pipeline.models.encoder import Encoder, count_unique_parameters
from pipeline.models.inference import predict
from pipeline.models.surgery import keep_layers
from pipeline.tasks.batches import EncodedTexts
from runtimes.errors import BadInput
from tests.exporters.encoders import LABELS, encoder, texts
from tests.pipeline.labelled import accuracy, from_id_lists, predict_logits

STAGE = 'use = "layerdrop"\nheal.batch_size = 8\n'
KINDS = ["bert", "mobilebert", "unequal layers", "low rank student", "empty parts", "quaternion"]


def encoded(count: int = 40, labels: np.ndarray | None = None) -> EncodedTexts:
    return from_id_lists([np.asarray(ids) for ids in texts(count)], np.arange(count) % LABELS if labels is None else labels, 0)


def same_weights(a: Encoder, b: Encoder) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- dropping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_that_skips_all_its_layers_is_its_embeddings_and_head(kind):
    model, ids = encoder(kind), torch.tensor([texts(4)[3]])
    with torch.no_grad():
        expected = model.answers(model.embeddings(ids, None), torch.ones_like(ids))["logits"]
        assert torch.equal(model(ids, skip=range(len(model.config.layers))).logits, expected)
        assert torch.equal(model(ids, skip=[]).logits, model(ids).logits)
        assert torch.equal(model(ids, skip=drawn_layers(len(model.config.layers), 0.0)).logits, model(ids).logits)


def test_what_is_skipped_is_not_rescaled_in_training_either():
    model, ids = encoder("bert", hidden_dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0), torch.tensor([texts(4)[3]])
    with torch.no_grad():
        quiet = model.eval()(ids, skip=[1]).logits
        assert torch.equal(model.train()(ids, skip=[1]).logits, quiet)


def test_skipped_layers_learn_nothing():
    model, ids = encoder("bert"), torch.tensor([texts(4)[3]])
    model(ids, skip=[1]).logits.sum().backward()
    assert all(parameter.grad is None for parameter in model.layers[1].parameters())
    assert all(parameter.grad is not None for layer in (0, 2) for parameter in model.layers[layer].parameters())


@pytest.mark.parametrize("probability", [0.1, 0.2, 0.5, 0.9])
def test_layers_are_dropped_as_often_as_asked_each_on_its_own(probability):
    torch.manual_seed(0)
    steps, count = 20_000, 6
    drops = torch.zeros(steps, count)
    for step in range(steps):
        drops[step, drawn_layers(count, probability)] = 1.0
    spread = 4 * math.sqrt(probability * (1 - probability) / steps)
    assert (drops.mean(0) - probability).abs().max() < spread
    together = drops.T @ drops / steps
    apart = together - torch.diag(together.diagonal())
    assert (apart[apart > 0] - probability**2).abs().max() < 4 / math.sqrt(steps) * probability
    if probability == 0.5:
        assert (drops.sum(1).min(), drops.sum(1).max()) == (0, count)  # none, or all, may go in a step


def test_none_are_dropped_at_probability_0_and_all_at_1():
    assert all(drawn_layers(12, 0.0) == [] for _ in range(100))
    assert all(drawn_layers(12, 1.0) == list(range(12)) for _ in range(100))


# --- which stay -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, stay, kept",
    [
        (6, 3, [1, 3, 5]),
        (12, 6, [1, 3, 5, 7, 9, 11]),
        (12, 9, [1, 2, 3, 5, 6, 7, 9, 10, 11]),
        (6, 4, [1, 2, 4, 5]),
        (12, 8, [1, 2, 4, 5, 7, 8, 10, 11]),
        (4, 2, [1, 3]),
        (24, 12, list(range(1, 24, 2))),
        (12, 12, list(range(12))),
        (1, 1, [0]),
        (6, 1, [5]),
    ],
)
def test_every_other_layer_goes_from_the_first_on(count, stay, kept):
    assert every_other(count, stay) == kept


def test_the_rule_holds_wherever_it_gives_the_asked_number():
    """In whole numbers, because 1 / (1 - 4/6) is a little less than 3."""
    for count in range(1, 49):
        for stay in range(1, count):
            gone = count - stay
            if count % gone == 0:
                assert every_other(count, stay) == [d for d in range(count) if d % (count // gone)], (count, stay)


def test_else_layers_are_spaced_evenly_and_the_last_stays():
    for count in range(1, 25):
        for stay in range(1, count + 1):
            kept = every_other(count, stay)
            assert len(kept) == stay
            assert kept == sorted(set(kept))
            assert kept[0] >= 0
            assert kept[-1] == count - 1
            gaps = np.diff([-1, *kept])
            assert gaps.max() - gaps.min() <= 1, (count, stay)


def flattened(model: Encoder, layers: list[int]) -> Encoder:
    """Every one of ``layers`` forgets what came in and always gives the same."""
    with torch.no_grad():
        for layer in layers:
            model.layers[layer].ffns[-1].norm.weight.zero_()
    return model


def own_answers(model: Encoder, kept: list[int]) -> EncodedTexts:
    """Texts labelled by the layers ``kept`` of ``model``, whose classifier is levelled so that the answers vary."""
    given = encoded(200)
    with torch.no_grad():
        model.heads["classifier"].bias -= predict_logits(keep_layers(model, kept), given).mean(0)
    labelled = encoded(200, predict_logits(keep_layers(model, kept), given).argmax(-1).numpy())
    assert np.bincount(labelled.targets["labels"]).max() < 120  # constant answers are wrong ones
    return labelled


def layers_of(count: int) -> Encoder:
    return encoder("unequal layers", layers=[layer_shape(4, 8, [40])] * count)


@pytest.mark.parametrize("good", [[0, 2], [1, 2], [0, 3], [2, 3]])
def test_the_search_finds_the_layers_that_serve(good):
    model = flattened(layers_of(4), [layer for layer in range(4) if layer not in good])
    given = own_answers(model, good)
    scores = search(model, 2, lambda cut: accuracy(cut, given))
    assert len(scores) == math.comb(4, 2)
    assert max(scores, key=scores.get) == tuple(good)
    assert scores[tuple(good)] == 100
    assert all(score < 80 for kept, score in scores.items() if kept != tuple(good))
    for kept, score in scores.items():
        assert score == accuracy(keep_layers(model, kept), given)


@pytest.mark.parametrize("bad, idle", [(0, [1, 2]), (3, [0, 7]), (7, [3, 6])])
def test_where_choices_are_many_layers_go_one_by_one(bad, idle):
    """One layer forgets everything, two do nothing: those three go."""
    model = layers_of(8)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1.0), module.bias.zero_()
        for layer in idle:
            for module in (model.layers[layer].attention.output, model.layers[layer].ffns[0].down):
                module.weight.zero_(), module.bias.zero_()
    flattened(model, [bad])
    good = [layer for layer in range(8) if layer not in (bad, *idle)]
    given = own_answers(model, good)
    assert math.comb(8, 5) > layerdrop.MOST_CHOICES
    scores = search(model, 5, lambda cut: accuracy(cut, given))
    assert len(scores) == 6  # those of the last step
    assert all(len(kept) == 5 and bad not in kept for kept in scores)
    assert max(scores, key=scores.get) == tuple(good)
    assert scores[tuple(good)] == 100


def test_keeping_all_is_no_choice():
    model = layers_of(8)
    assert list(search(model, 8, lambda cut: accuracy(cut, encoded()))) == [tuple(range(8))]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_with_layers_skipped_are_those_of_the_model_cut(kind):
    model, given = encoder(kind), encoded()
    later = range(1, len(model.config.layers))
    assert torch.equal(predict(model, given, skip=[0])["logits"], predict_logits(keep_layers(model, later), given))
    assert torch.equal(predict(model, given, skip=[])["logits"], predict_logits(model, given))


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["drop_probability = 0.0\ndrop_epochs = 2", "drop_probability = 0.5\ndrop_epochs = 0"])
@pytest.mark.parametrize("choose", ["search", "every-other"])
def test_without_dropping_and_with_all_layers_nothing_changes(run_stages, trained, options, choose):
    made = run_stages(STAGE + f'layers = 4\nheal.epochs = 0\nchoose = "{choose}"\n{options}')[1]
    assert same_weights(made.model, trained.model)


def test_every_other_layer_of_the_model_is_what_stays(run_stages, trained):
    ledger, made = run_stages(STAGE + 'layers = 2\nheal.epochs = 0\ndrop_epochs = 0\nchoose = "every-other"')
    assert same_weights(made.model, keep_layers(trained.model, [1, 3]))
    assert ledger.records[-1]["subjects"][0]["name"] == "2 of 4 layers kept"
    per_layer = 4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32
    assert count_unique_parameters(trained.model) - count_unique_parameters(made.model) == 2 * per_layer


def test_the_layers_of_the_recipe_are_what_stays(run_stages, trained):
    ledger, made = run_stages(STAGE + 'layers = 2\nheal.epochs = 0\ndrop_epochs = 0\nchoose = "given"\nkept = [3, 0]')
    assert same_weights(made.model, keep_layers(trained.model, [0, 3]))
    assert "layers kept: 0, 3 of 0 to 3" in ledger.records[-1]["notes"]


def test_the_search_takes_no_worse_than_every_other(run_stages):
    accuracies = {}
    for choose in ("search", "every-other"):
        record = run_stages(STAGE + f'layers = 2\nheal.epochs = 0\ndrop_epochs = 0\nchoose = "{choose}"')[0].records[-1]
        accuracies[choose] = record["subjects"][0]["metrics"]["validation"]["accuracy"]
    assert accuracies["search"] >= accuracies["every-other"]
    note = next(n for n in run_stages(STAGE + "layers = 2\nheal.epochs = 0\ndrop_epochs = 0")[0].records[-1]["notes"] if "choices" in n)
    assert note.startswith("6 choices tried on 15 validation inputs")
    assert f"every other (1, 3): {accuracies['every-other']:.2f} %" in note
    assert f"best accuracy {accuracies['search']:.2f} %" in note


def test_training_with_layers_dropped_changes_the_weights_and_healing_restores_accuracy(run_stages, trained):
    dropped = run_stages(STAGE + 'layers = 4\nheal.epochs = 0\ndrop_epochs = 1\nchoose = "every-other"')[1].model
    assert not same_weights(dropped, trained.model)
    ledger, made = run_stages(STAGE + "layers = 2\ndrop_epochs = 2\nheal.epochs = 4\nheal.learning_rate = 1e-3")
    assert len(made.model.config.layers) == 2
    assert ledger.records[-1]["subjects"][0]["metrics"]["validation"]["accuracy"] > 90


def test_layers_are_really_dropped_in_training(run_stages):
    """At a chance of next to nothing the same numbers are drawn, but no layer goes."""
    options = STAGE + 'layers = 4\nheal.epochs = 0\ndrop_epochs = 1\nchoose = "every-other"\ndrop_probability = '
    never, often = (run_stages(options + chance)[1].model for chance in ("1e-30", "0.5"))
    assert not same_weights(never, often)


@pytest.mark.parametrize(
    "options, message",
    [
        ("layers = 5", "layers: 5, but the model has 4"),
        ("layers = 0", "layers"),
        ("drop_probability = 1.0", "drop_probability"),
        ('choose = "best"', "choose"),
        ('layers = 2\nchoose = "given"', "kept: the list of layers goes with choose = 'given'"),
        ("layers = 2\nkept = [0, 1]", "kept: the list of layers goes with choose = 'given'"),
        ('layers = 3\nchoose = "given"\nkept = [0, 1]', "kept: names 2 layers, layers is 3"),
        ('layers = 2\nchoose = "given"\nkept = [0, 4]', "between 0 and 3"),
        ('layers = 2\nchoose = "given"\nkept = [-1, 0]', "between 0 and 3"),
        ('layers = 2\nchoose = "given"\nkept = [1, 1]', "distinct"),
    ],
)
def test_options_that_contradict_are_refused(run_stages, options, message):
    with pytest.raises(BadInput, match=message):
        run_stages(STAGE + "heal.epochs = 0\ndrop_epochs = 0\n" + options)


def test_it_cannot_follow_layers_that_share(run_stages):
    with pytest.raises(BadInput, match="cannot follow"):
        run_stages('use = "share-layers"\ngroups = 2', STAGE + "layers = 2")

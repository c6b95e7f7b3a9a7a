"""A head's importance is the gradient of its gate; the least important of all layers go, and what stays is the masked model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.flow.cache import Cache
from pipeline.flow.engine import run
from pipeline.flow.progress import Progress
from pipeline.flow.recipe import load_recipe
from pipeline.methods.prune.heads import cut_heads, head_importance, heads_to_keep
from pipeline.models.encoder import Encoder, count_unique_parameters
from pipeline.models.surgery import keep_heads
from pipeline.tasks.batches import EncodedTexts
from runtimes.errors import BadInput, GateFailed
from tests.conftest import RECIPE_HEAD, ROWS
from tests.exporters.encoders import LABELS, encoder, texts
from tests.pipeline.labelled import TASK, encode, from_id_lists, predict_logits

KINDS = ["bert", "mobilebert", "unequal layers", "low rank", "empty parts", "unequal student"]
ALONE = 'use = "prune-heads"\nheal.epochs = 0\n'
NO_SCORES = [torch.zeros(4)] * 4


def encoded(count: int) -> EncodedTexts:
    return from_id_lists([np.asarray(ids) for ids in texts(count)], np.arange(count) % LABELS, 0)


def task_texts(checkpoint) -> EncodedTexts:
    index = {label: i for i, label in checkpoint.model.config.id2label.items()}
    pairs = [(text, index[label]) for label, rows in ROWS.items() for text in rows]
    return encode(checkpoint.tokenizer, [text for text, _ in pairs], [label for _, label in pairs], 16, 0)


def heads(model: Encoder) -> list[int]:
    return [layer["heads"] for layer in model.config.layers]


def explicit_importance(model: Encoder, given: EncodedTexts) -> tuple[list[Tensor], list[Tensor]]:
    """E |sum over tokens of grad . context| and E sum over tokens of |grad . context|, one text at a time, without any gate."""
    layers = [layer for layer in model.layers if layer.attention.heads]
    per_text, per_token = [torch.zeros(n) for n in heads(model)], [torch.zeros(n) for n in heads(model)]
    for row in range(len(given)):
        contexts: list[Tensor] = []
        handles = [layer.attention.output.register_forward_pre_hook(lambda _, x, seen=contexts: seen.append(x[0])) for layer in layers]
        logits = model(torch.from_numpy(given.text(row)[None].astype(np.int64))).logits
        for handle in handles:
            handle.remove()
        gradients = iter(torch.autograd.grad(functional.cross_entropy(logits, torch.tensor(given.targets["labels"][row : row + 1])), contexts))
        found = iter(contexts)
        for index, layer in enumerate(model.layers):
            if layer.attention.heads:
                product = (next(gradients) * next(found).detach())[0].unflatten(-1, (layer.attention.heads, -1)).sum(-1)
                per_text[index] += product.sum(0).abs() / len(given)
                per_token[index] += product.abs().sum(0) / len(given)
    return per_text, per_token


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_gate_is_that_of_its_context_summed_over_tokens(kind):
    model, given = encoder(kind), encoded(80)  # more than a batch, of many lengths
    per_text, per_token = explicit_importance(model, given)
    by_text, by_token = (head_importance(model, given, TASK.loss, per_token=each) for each in (False, True))
    for expected, found in ((per_text, by_text), (per_token, by_token)):
        assert [len(scores) for scores in found] == heads(model)
        for a, b in zip(expected, found, strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_importance_by_token_is_never_below_that_by_text(kind):
    model, given = encoder(kind), encoded(40)
    by_text, by_token = torch.cat(head_importance(model, given, TASK.loss)), torch.cat(head_importance(model, given, TASK.loss, per_token=True))
    assert (by_token >= by_text - 1e-6).all()
    assert (by_token > by_text * 1.01).any()


def test_importance_is_a_mean_without_dropout():
    model, given = encoder("bert").train(), encoded(30)
    once = head_importance(model, given, TASK.loss)
    for a, b in zip(once, head_importance(model.train(), given.joined(given), TASK.loss), strict=True):
        assert torch.allclose(a, b, rtol=1e-4)


@pytest.mark.parametrize("per_token", [False, True])
def test_a_head_that_nobody_reads_counts_nothing_and_may_go(per_token):
    model, given = encoder("bert"), encoded(40)
    with torch.no_grad():
        model.layers[1].attention.output.weight[:, 16:24] = 0  # head 2
    scores = head_importance(model, given, TASK.loss, per_token)
    assert scores[1][2] == 0
    assert (torch.cat(scores) == 0).sum() == 1
    kept = heads_to_keep(scores, 1)
    assert kept == [[0, 1, 2, 3], [0, 1, 3], [0, 1, 2, 3]]
    assert torch.allclose(predict_logits(cut_heads(model, kept, given, "test"), given), predict_logits(model, given), atol=1e-6)


# --- which go ---------------------------------------------------------------------------------------------------------


def test_all_layers_compete_after_each_was_divided_by_its_norm():
    scores = [torch.tensor([4.0, 1.0, 2.0, 3.0]), torch.tensor([100.0, 200.0, 450.0, 300.0])]
    assert heads_to_keep(scores, 2) == [[0, 2, 3], [1, 2, 3]]  # without the norms, two of layer 0
    # over its norm: .73 .18 .37 .55 and .17 .34 .78 .52
    assert heads_to_keep(scores, 1) == [[0, 1, 2, 3], [1, 2, 3]]
    assert heads_to_keep(scores, 3) == [[0, 2, 3], [2, 3]]
    assert heads_to_keep(scores, 5) == [[0, 3], [2]]
    assert heads_to_keep(scores, 0) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert heads_to_keep(scores, 8) == [[], []]


def test_the_norm_is_the_square_root_of_the_sum_of_squares():
    """Divided by sums, head 1 of layer 0 would be .33 and stay; by squares it is .45, below .71, and goes before layer 1's."""
    scores = [torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])]
    assert heads_to_keep(scores, 3) == [[0], [0, 1, 4, 5]]
    assert heads_to_keep([torch.tensor([4.0, 3.0]), torch.tensor([1.0] * 3)], 3) == [[0, 1], []]  # .8 .6 and .58


def test_a_layer_may_lose_all_its_heads_unless_it_must_keep_some():
    scores = [torch.tensor([1e-3, 1e-3, 1e-3, 1.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])]
    flat = [torch.zeros(4), torch.ones(4)]
    assert heads_to_keep(flat, 4) == [[], [0, 1, 2, 3]]
    assert heads_to_keep(flat, 4, 1) == [[3], [1, 2, 3]]
    assert heads_to_keep(scores, 4, 2) == [[2, 3], [2, 3]]
    assert heads_to_keep(scores, 8, 2) == [[2, 3], [2, 3]]


def test_scores_of_nothing_are_no_division_by_zero():
    kept = heads_to_keep(NO_SCORES, 6)
    assert sum(map(len, kept)) == 10
    assert heads_to_keep([torch.zeros(0), torch.tensor([2.0, 1.0])], 1) == [[], [0]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_is_held_against_the_closed_gates(kind):
    model, given = encoder(kind), encoded(40)
    count = sum(heads(model)) // 2
    kept = heads_to_keep(head_importance(model, given, TASK.loss), count)
    cut = cut_heads(model, kept, given, "test")  # raises where they differ
    assert sum(heads(cut)) == sum(heads(model)) - count
    assert heads(cut) == [len(layer) for layer in kept]


# --- the stage --------------------------------------------------------------------------------------------------------


def test_half_of_all_heads_go_and_layers_may_differ(run_stages, trained):
    ledger, made = run_stages(ALONE + "fraction = 0.5")
    scores = head_importance(trained.model, task_texts(trained), TASK.loss)
    kept = heads_to_keep(scores, 8)
    assert heads(made.model) == [len(layer) for layer in kept]
    assert sum(heads(made.model)) == 8
    assert torch.equal(predict_logits(made.model, task_texts(trained)), predict_logits(keep_heads(trained.model, kept), task_texts(trained)))
    per_head = 4 * 8 * 32 + 3 * 8
    assert count_unique_parameters(trained.model) - count_unique_parameters(made.model) == 8 * per_head
    subject = ledger.records[-1]["subjects"][0]
    assert subject["name"] == "8 of 16 heads pruned"
    assert subject["unique_params"] == count_unique_parameters(made.model)
    assert any(", ".join(map(str, heads(made.model))) in note for note in ledger.records[-1]["notes"])


def test_importance_by_token_is_what_the_option_says(run_stages, trained):
    kept = heads_to_keep(head_importance(trained.model, task_texts(trained), TASK.loss, per_token=True), 8)
    made = run_stages(ALONE + 'importance = "token"')[1]
    assert torch.equal(predict_logits(made.model, task_texts(trained)), predict_logits(keep_heads(trained.model, kept), task_texts(trained)))


@pytest.mark.parametrize("rounds, fraction", [(3, 0.5), (16, 0.3), (2, 0.9)])
def test_rounds_end_at_the_same_number(run_stages, trained, rounds, fraction):
    """Each round sees the importance of what the last one left."""
    made = run_stages(ALONE + f"fraction = {fraction}\nrounds = {rounds}")[1].model
    assert sum(heads(made)) == 16 - round(16 * fraction)
    expected, given, gone = trained.model, task_texts(trained), 0
    for number in range(1, rounds + 1):
        now = round(round(16 * fraction) * number / rounds)
        expected = keep_heads(expected, heads_to_keep(head_importance(expected, given, TASK.loss), now - gone))
        gone = now
    assert torch.allclose(predict_logits(made, given), predict_logits(expected, given), atol=1e-5)


def test_every_layer_keeps_its_least_number(run_stages):
    made = run_stages(ALONE + "fraction = 0.75\nmin_heads_per_layer = 1")[1].model
    assert heads(made) == [1, 1, 1, 1]


def test_all_heads_of_all_layers_may_go(run_stages):
    assert heads(run_stages(ALONE + "fraction = 0.99")[1].model) == [0, 0, 0, 0]


def test_healing_brings_back_what_the_cut_lost(run_stages):
    ledger, made = run_stages('use = "prune-heads"\nfraction = 0.75\nheal.epochs = 4\nheal.batch_size = 8\nheal.learning_rate = 1e-3')
    notes = ledger.records[-1]["notes"]
    before = float(next(note for note in notes if note.startswith("before healing")).split()[3])
    after = ledger.records[-1]["subjects"][0]["metrics"]["validation"]["accuracy"]
    assert sum(heads(made.model)) == 4
    assert after >= before
    assert after > 90


@pytest.mark.parametrize(
    "options, message",
    [
        ("fraction = 1.0", "fraction"),
        ("fraction = -0.1", "fraction"),
        ("rounds = 0", "rounds"),
        ('importance = "head"', "importance"),
        ("min_heads_per_layer = 5", "min_heads_per_layer: 5, but a layer has 4 heads"),
    ],
)
def test_options_that_contradict_are_refused(run_stages, options, message):
    with pytest.raises(BadInput, match=message):
        run_stages(ALONE + options)


def test_a_number_that_the_least_per_layer_does_not_let_go_is_refused(run_stages):
    with pytest.raises(GateFailed, match="8 of 16 heads are to go, but min_heads_per_layer lets only 4 go"):
        run_stages(ALONE + "fraction = 0.5\nmin_heads_per_layer = 3")


@pytest.mark.parametrize("before", ['use = "share-layers"\ngroups = 2', 'use = "quaternion"'])
def test_it_cannot_follow_stages_that_share_weights_or_make_quaternions(run_stages, before):
    with pytest.raises(BadInput, match="cannot follow"):
        run_stages(before, ALONE)


@pytest.mark.parametrize("use", ["prune-heads", "prune-gates", "prune-neurons"])
def test_a_source_whose_layers_share_their_weights_is_refused_with_a_message(use, tmp_path, tiny_model, tiny_data):
    """An ALBERT needs no stage before it to share its layers."""
    from transformers import AlbertConfig, AlbertModel

    vocabulary = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 16, "embedding_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    AlbertModel(AlbertConfig(vocab_size=vocabulary, max_position_embeddings=32, pad_token_id=0, **sizes)).save_pretrained(tmp_path / "albert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "albert" / name).write_bytes((tiny_model / name).read_bytes())
    recipe = tmp_path / "recipe.toml"
    select = 'select = "gain"' if use == "prune-gates" else ""
    stages = f'[[stage]]\nuse = "finetune"\nepochs = 0.1\n[[stage]]\nuse = "{use}"\nheal.epochs = 0\n{select}'
    recipe.write_text(f'name = "albert"\n{RECIPE_HEAD}{stages}')
    with pytest.raises(BadInput, match="share"):
        made = load_recipe(str(recipe), model=str(tmp_path / "albert"), data=str(tiny_data))
        run(made, tmp_path / "out", Cache(tmp_path / "cache"), Progress(quiet=True), lambda *_: None)

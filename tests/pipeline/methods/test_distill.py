"""Distillation: losses are zero where they must be, teacher outputs come from disk, phases train what they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.flow.cache import Cache
from pipeline.flow.progress import Progress
from pipeline.flow.stage import Context
from pipeline.learning.knowledge_transfer import layer_map
from pipeline.learning.losses import attention_loss, feature_map_loss
from pipeline.learning.teacher import collect, group_heads, valid_pairs
from pipeline.learning.transfer_texts import altered_copies, nearest_words
from pipeline.methods.distill.mobilebert import DistillMobilebert, make_student, principal_embeddings
from pipeline.models.checkpoint import Checkpoint
from pipeline.tasks.batches import IGNORED, make_batch
from pipeline.tasks.heads import head_shape
from pipeline.tasks.losses import softened_divergence
from pipeline.tasks.text_classification import TextClassification
from tests.pipeline.labelled import encode

TEXTS = ["turn on the light", "play some music please now", "lights off", "switch the lamp on in the kitchen now please"]

HEADS = [head_shape("classifier", ["logits"], "first", 3, pooler=True)]


TASK = TextClassification(data="none", max_length=16)


@pytest.fixture(scope="module")
def teacher(tiny_model) -> Checkpoint:
    return Checkpoint.load(tiny_model, HEADS, ["on", "off", "music"])


@pytest.fixture(scope="module")
def texts(teacher):
    return encode(teacher.tokenizer, TEXTS, [0, 2, 1, 0], 16, 0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logit_loss_is_zero_for_equal_logits_and_positive_otherwise(temperature):
    logits = torch.randn(5, 7)
    assert softened_divergence(logits, logits, temperature).abs() < 1e-6
    assert softened_divergence(logits + torch.randn(5, 7), logits, temperature) > 0.01


def test_logit_loss_gradient_does_not_depend_on_a_large_temperature():
    teacher, student = torch.randn(3, 6), torch.randn(3, 6)
    gradients = []
    for temperature in (30.0, 60.0):
        s = student.clone().requires_grad_()
        softened_divergence(s, teacher, temperature).backward()
        gradients.append(s.grad)
    assert torch.allclose(*gradients, rtol=0.05, atol=5e-3)


def test_feature_map_loss_is_zero_for_the_teacher_itself_whatever_the_scale():
    features = torch.randn(11, 16)
    assert feature_map_loss(features, features) == 0
    assert feature_map_loss(3 * features + 2, features) < 1e-6
    assert feature_map_loss(torch.randn(11, 16), features) > 0.5


def test_transfer_losses_are_zero_for_student_equal_teacher(teacher, texts, tmp_path):
    outputs = collect(teacher.model, texts, tmp_path / "cache", Progress(quiet=True), layers=(1, 2), heads=4)
    batch = make_batch(texts, np.array([2, 0, 3]))
    with torch.no_grad():
        out = teacher.model(batch.input_ids, batch.attention_mask, output_hidden_states=True, output_attention_scores=True)
    wanted = outputs.features(batch)
    real, pairs = batch.attention_mask.bool(), valid_pairs(batch.attention_mask)
    for index, layer in enumerate((1, 2)):
        assert feature_map_loss(out.hidden_states[layer][real], wanted.hidden[:, index]) < 1e-3  # the cache is float16
        scores = functional.log_softmax(out.attention_scores[layer - 1], -1).permute(0, 2, 3, 1)[pairs]
        assert attention_loss(scores, wanted.attention[:, index], real.sum()).abs() < 1e-3
        other = functional.log_softmax(out.attention_scores[layer - 1] * 3 + 2 * torch.randn_like(out.attention_scores[layer - 1]), -1)
        assert attention_loss(other.permute(0, 2, 3, 1)[pairs], wanted.attention[:, index], real.sum()) > 0.05


def test_cached_logits_are_those_of_each_text(teacher, texts, tmp_path):
    outputs = collect(teacher.model, texts, tmp_path / "cache", Progress(quiet=True))
    with torch.no_grad():
        alone = torch.cat([teacher.model(make_batch(texts, np.array([row])).input_ids).logits for row in range(len(texts))])
    cached = outputs.outputs(make_batch(texts, np.arange(len(texts))))["logits"]
    assert (cached - alone).abs().max() < 0.02  # collected in bfloat16 where the processor has it
    assert torch.equal(cached.argmax(-1), alone.argmax(-1))


def test_the_teacher_runs_once(teacher, texts, tmp_path, monkeypatch):
    collect(teacher.model, texts, tmp_path / "cache", Progress(quiet=True))
    monkeypatch.setattr(type(teacher.model), "forward", lambda *a, **k: pytest.fail("the teacher ran again"))
    collect(teacher.model, texts, tmp_path / "cache", Progress(quiet=True))


def test_group_heads_keeps_distributions():
    weights = torch.softmax(torch.randn(2, 12, 5, 5), -1)
    for heads in (12, 4, 1, 5):
        grouped = group_heads(weights, heads)
        assert grouped.shape == (2, heads, 5, 5)
        assert torch.allclose(grouped.sum(-1), torch.ones(2, heads, 5), atol=1e-5)
    assert torch.equal(group_heads(weights, 4)[:, 1], weights[:, 3:6].mean(1))


def test_layer_map_is_even_and_ends_at_the_last():
    assert layer_map(12, 4) == (3, 6, 9, 12)
    assert layer_map(12, 6) == (2, 4, 6, 8, 10, 12)
    assert layer_map(6, 4) == (2, 3, 5, 6)
    assert layer_map(6, 6) == (1, 2, 3, 4, 5, 6)


def test_nearest_words_are_the_nearest_and_never_specials_or_the_word_itself():
    table = torch.eye(12)
    table[7] += 0.5 * table[5]
    table[9] += 0.3 * table[5]
    table[1] = table[5]
    assert nearest_words(table, np.array([5]), frozenset({0, 1, 2}), 2).tolist() == [[7, 9]]


def test_altered_copies_touch_neither_specials_nor_lengths(teacher, texts):
    table, specials = teacher.model.embeddings.word.weight, frozenset({0, 1, 2, 3, 4})
    copies = altered_copies(texts, 50, 0.3, 0.2, table, 5, specials, 4, seed=0)
    assert len(copies) == 50 * len(texts)
    assert (copies.targets["labels"] == IGNORED).all()
    originals = np.tile(texts.ids, 50)
    assert (copies.ids[np.isin(originals, [2, 3])] == originals[np.isin(originals, [2, 3])]).all()
    free = ~np.isin(originals, [0, 1, 2, 3, 4])
    assert abs((copies.ids[free] == 4).mean() - 0.3) < 0.05
    exchanged = free & (copies.ids != originals) & (copies.ids != 4)
    assert abs(exchanged[free].mean() - 0.2) < 0.05
    near = nearest_words(table, originals[exchanged], specials, 5)
    assert (near == copies.ids[exchanged][:, None]).any(axis=1).all(), "only near words are put in"
    untouched = altered_copies(texts, 1, 0.0, 0.0, table, 5, specials, 4, seed=0)
    assert (untouched.ids == texts.ids).all()
    again = altered_copies(texts, 50, 0.3, 0.2, table, 5, specials, 4, seed=0)
    assert (again.ids == copies.ids).all()


def test_padding_changes_no_logit_of_a_trigram_student(teacher, texts):
    options = DistillMobilebert(layers=2, hidden_size=32, bottleneck_size=16, heads=2, ffn_size=32, embedding_size=16)
    student = make_student(options, teacher.model, TASK).eval()
    short = make_batch(texts, np.array([2]))
    padded = make_batch(texts, np.array([2, 3]))
    with torch.no_grad():
        alone, together = (student(b.input_ids, b.attention_mask).logits[0] for b in (short, padded))
    assert (alone - together).abs().max() < 1e-5


def test_asking_for_logits_only_reads_the_first_token_and_changes_nothing(teacher, texts):
    options = DistillMobilebert(layers=2, hidden_size=32, bottleneck_size=16, heads=2, ffn_size=32, embedding_size=16)
    batch = make_batch(texts, np.arange(4))
    for model in (teacher.model, make_student(options, teacher.model, TASK).eval()):
        with torch.no_grad():
            whole = model(batch.input_ids, batch.attention_mask, output_hidden_states=True)
            assert (whole.logits - model(batch.input_ids, batch.attention_mask).logits).abs().max() < 1e-5


def test_progressive_transfer_trains_one_layer_after_another(teacher, texts, tmp_path, monkeypatch):
    """In the first phase the upper layer stands still; in the last it moves and the lower one moves less."""
    from pipeline.learning import knowledge_transfer as transfer
    from pipeline.learning.training import train

    options = DistillMobilebert(
        layers=2, hidden_size=32, bottleneck_size=16, heads=2, ffn_size=32, embedding_size=16,
        transfer={"epochs": 4, "batch_size": 4, "learning_rate": 1e-2},
    )  # fmt: skip
    torch.manual_seed(0)
    student = make_student(options, teacher.model, TASK)
    outputs = collect(teacher.model, texts, tmp_path / "cache", Progress(quiet=True), layers=(1, 2), heads=2)
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, ("on", "music", "off", "on"), strict=True)]
    data = TASK.make(dict.fromkeys(("train", "validation", "test"), rows), "rows")
    context = Context("name", 0, TASK, data, "source", "", {}, tmp_path, tmp_path, Progress(quiet=True), [], Cache(tmp_path / "c"))
    seen = []

    def watch(job):
        for step, rate in ((0, 1.0), (3, 1.0)):
            assert job.plan.rate_rule(step, str(step // 2)) == rate
        assert job.plan.rate_rule(0, "1") == 0.0
        assert job.plan.rate_rule(3, "0") == transfer.PAST_RATE
        batch = make_batch(texts, np.arange(4))
        for step, layer in ((0, 0), (3, 1)):
            job.module.zero_grad()
            job.loss(job.module, batch, step)[0].backward()
            moved = [any(p.grad is not None and p.grad.abs().max() > 0 for p in student.layers[i].parameters()) for i in (0, 1)]
            seen.append((layer, moved))
        return train(job)

    monkeypatch.setattr(transfer, "train", watch)
    monkeypatch.setattr(transfer, "teacher_outputs", lambda *_: outputs)
    before = [p.detach().clone() for p in student.heads["classifier"].parameters()]
    options.transfer.transfer(context, student, teacher, "distill")
    assert seen[0] == (0, [True, False])
    assert seen[1][1][1] is True
    assert all(torch.equal(a, b) for a, b in zip(before, student.heads["classifier"].parameters(), strict=True)), "the head is not trained yet"


def test_principal_embeddings_keep_the_geometry_of_the_table():
    torch.manual_seed(0)
    table = torch.randn(60, 8) @ torch.randn(8, 24)
    reduced = principal_embeddings(table, 8)
    full, small = torch.cdist(table, table), torch.cdist(reduced, reduced)
    assert torch.corrcoef(torch.stack([full.flatten(), small.flatten()]))[0, 1] > 0.999
    assert principal_embeddings(table, 40).shape == (60, 40)

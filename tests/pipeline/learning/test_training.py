"""The training loop: it learns, it is the same every time, and a killed run ends with the bytes of one that was not."""

from __future__ import annotations

import pytest
import torch

from pipeline.flow.progress import Progress
from pipeline.learning import training
from pipeline.learning.training import TrainingJob, TrainingPlan, train
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.inference import predict
from pipeline.tasks.batches import shuffled_rows
from pipeline.tasks.heads import head_shape
from pipeline.tasks.text_classification import TextClassification
from runtimes.errors import GateFailed
from tests.conftest import ROWS
from tests.pipeline.labelled import encode

LABELS = sorted(ROWS)


def loss(model, batch, step):
    return TextClassification(data="none").loss(model.outputs(batch), batch), {}


def accuracy(model, texts) -> float:
    return 100.0 * float((predict(model, texts)["logits"].argmax(-1).numpy() == texts.targets["labels"]).mean())


@pytest.fixture
def job(tiny_model, tmp_path):
    def make(**changes):
        torch.manual_seed(0)
        checkpoint = Checkpoint.load(tiny_model, [head_shape("classifier", ["logits"], "first", len(LABELS), pooler=True)], LABELS)
        pairs = [(text, LABELS.index(label)) for label, texts in ROWS.items() for text in texts] * 4
        texts = encode(checkpoint.tokenizer, [t for t, _ in pairs], [i for _, i in pairs], 16, 0)
        plan = TrainingPlan(**{"epochs": 5, "batch_size": 8, "learning_rate": 3e-3, "seed": 0} | changes)
        return TrainingJob(checkpoint.model, texts, loss, plan, tmp_path / "checkpoint", Progress(quiet=True), "test")

    return make


def weights(job):
    return {name: tensor.clone() for name, tensor in job.module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns(job):
    made = job(epochs=10)
    before = accuracy(made.module, made.texts)
    history = train(made)
    assert accuracy(made.module, made.texts) > max(90.0, before)
    assert len(history) == 10
    assert history[-1]["loss"] < history[0]["loss"] / 2


def test_same_seed_same_weights_other_seed_other_weights(job):
    results = []
    for seed in (0, 0, 1):
        made = job(seed=seed)
        train(made)
        results.append(weights(made))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop may catch it."""


@pytest.mark.parametrize("kill_at", [1, 9, 17, 38])
def test_killed_and_resumed_equals_straight_through(job, kill_at, monkeypatch):
    straight = job()
    history = train(straight)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    broken = job()
    plain_loss = broken.loss

    def dying(model, batch, step):
        if step == kill_at:
            raise Killed
        return plain_loss(model, batch, step)

    broken.loss = dying
    with pytest.raises(Killed):
        train(broken)
    resumed = job()
    for parameter in resumed.module.parameters():
        parameter.data.add_(1.0)  # everything must come from the checkpoint
    assert train(resumed) == history
    assert same(weights(straight), weights(resumed))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(job, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    made = job()
    plain_loss = made.loss
    made.loss = lambda model, batch, step: (plain_loss(model, batch, step)[0] * (float("nan") if step == 6 else 1.0), {})
    with pytest.raises(GateFailed, match="became nan at step 7 of 40"):
        train(made)
    assert training._metadata(made.checkpoint)["step"] == "6"


def test_every_text_is_in_one_batch_of_an_epoch_and_epochs_differ(job):
    texts = job().texts
    first, second = (shuffled_rows(texts, 8, 0, epoch) for epoch in (0, 1))
    assert sorted(row for rows in first for row in rows) == list(range(len(texts)))
    assert [rows.tolist() for rows in first] != [rows.tolist() for rows in second]
    assert [rows.tolist() for rows in first] == [rows.tolist() for rows in shuffled_rows(texts, 8, 0, 0)]

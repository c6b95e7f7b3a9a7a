"""The training loop: it learns, it is the same every time, and a killed run ends with the bytes of one that was not."""

from __future__ import annotations

import math
import time

import pytest
import torch

from pipeline.flow.progress import Progress
from pipeline.learning import training
from pipeline.learning.training import TrainingJob, TrainingPlan, train
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.inference import half_precision, predict
from pipeline.tasks.batches import make_batch, shuffled_rows
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


def at_every_step(monkeypatch):
    """Checkpoints, whatever they cost."""
    for name, value in {"CHECKPOINT_SECONDS": 0.0, "CHECKPOINT_SHARE": math.inf}.items():
        monkeypatch.setattr(training, name, value)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop may catch it."""


@pytest.mark.parametrize("kill_at", [1, 9, 17, 38])
def test_killed_and_resumed_equals_straight_through(job, kill_at, monkeypatch):
    straight = job()
    history = train(straight)
    at_every_step(monkeypatch)
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
    at_every_step(monkeypatch)
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


def test_on_a_cpu_a_training_gives_the_bytes_of_the_plain_loop(job):
    """What there is for GPUs, long texts and several processes changes nothing where none of it is asked for."""
    made, plain = job(epochs=3), job(epochs=3)
    train(made)
    torch.manual_seed(0)
    module, plan = plain.module.train(), plain.plan
    matrices, others = ([p for p in module.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, fused=True)
    batches = [rows for epoch in range(3) for rows in shuffled_rows(plain.texts, plan.batch_size, plan.seed, epoch)]
    warmup = max(1, round(len(batches) * plan.warmup_fraction))
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * min((step + 1) / warmup, (len(batches) - step) / (len(batches) - warmup))
        with half_precision():
            value = plain.loss(module, make_batch(plain.texts, rows), step)[0]
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), plan.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    assert same(weights(made), weights(plain))


def test_checkpoints_take_their_share_of_the_time_at_most(job, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training, "CHECKPOINT_SHARE", 0.1)
    spent = []

    def slow_save(*_):
        spent.append(0.03)
        time.sleep(0.03)

    monkeypatch.setattr(training, "_save", slow_save)
    started = time.monotonic()
    train(job(epochs=40))
    total = time.monotonic() - started
    assert spent, "a run of seconds leaves checkpoints"
    assert sum(spent[1:]) <= 0.1 * total


def test_a_large_checkpoint_is_not_written_before_it_is_worth_it(job, monkeypatch):
    """The first one is judged by its size: there is no measurement yet."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training, "WRITTEN_PER_SECOND", 1e4)
    monkeypatch.setattr(training, "_save", lambda *_: pytest.fail("a checkpoint of many seconds in a run of a few"))
    train(job(epochs=1))


def test_the_progress_line_and_its_record_tell_inputs_per_second(job, capsys):
    made = job(epochs=2)
    made.progress = Progress(live=False)
    train(made)
    (record,) = made.progress.taken()
    assert record["title"] == "test"
    assert record["inputs"] == 2 * len(made.texts)
    assert record["inputs_per_second"] == pytest.approx(record["inputs"] / record["seconds"], rel=0.05)
    assert "inputs/s" in capsys.readouterr().err
    assert made.progress.taken() == []

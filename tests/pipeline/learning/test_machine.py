"""The [train] section: less memory, a teacher that does not fit on the disk, a GPU. What is learned stays the same."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from pipeline.flow.cache import Cache
from pipeline.flow.progress import Progress
from pipeline.flow.recipe import load_recipe, lock_text
from pipeline.flow.stage import Context
from pipeline.flow.train_section import TrainSection
from pipeline.learning import knowledge_transfer
from pipeline.learning.distillation import teacher_outputs
from pipeline.learning.knowledge_transfer import KnowledgeTransfer
from pipeline.learning.teacher import LiveTeacher, TeacherOutputs, cached_bytes, collect
from pipeline.learning.training import TrainingPlan, train
from pipeline.models import device
from pipeline.models.checkpoint import Checkpoint
from pipeline.tasks import load_data
from pipeline.tasks.batches import make_batch
from runtimes.errors import BadInput
from tests.pipeline.learning.test_training import job, weights  # noqa: F401
from tests.pipeline.small_tasks import TASKS, run_task, task_table, write_data

CPU = TrainSection(device="cpu")


@pytest.fixture
def setting(tiny_model, tmp_path):
    """(task, checkpoint without dropout, training inputs, context) of a kind of task."""

    def make(name, **train_keys):
        data_folder = write_data(name, tmp_path / "data", copies=1) if not (tmp_path / "data").is_dir() else tmp_path / "data"
        path = tmp_path / "recipe.toml"
        path.write_text(f'name = "x"\n[model]\nsource = "unset"\n{task_table(name)}[[stage]]\nuse = "finetune"\n')
        task = load_recipe(str(path), (), str(tiny_model), str(data_folder)).task
        data = load_data(task, None)
        torch.manual_seed(0)
        checkpoint = Checkpoint.load(tiny_model, task.heads(data), data.labels.get("logits"))
        without_dropout(checkpoint.model)
        artifact = type("Given", (), {"sha256": "given"})()
        context = Context(
            "x", 0, task, data, "source", "", {"teacher": artifact}, tmp_path / "out", tmp_path, Progress(quiet=True), [], Cache(tmp_path / "cache"),
            TrainSection(**{"device": "cpu"} | train_keys),
        )  # fmt: skip
        return task, checkpoint, task.trainable(context.encode(checkpoint, "train")), context

    return make


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def gradients(model, loss):
    model.zero_grad()
    value = loss()
    value.backward()
    return float(value.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(one, other):
    assert one.keys() == other.keys()
    scale = max(float(g.abs().max()) for g in one.values())
    return all((one[name] - other[name]).abs().max() < 1e-5 * scale for name in one)


@pytest.mark.parametrize("name", TASKS)
def test_a_step_in_parts_is_the_step_of_the_whole_batch(setting, name, monkeypatch):
    """For every task's losses, means over inputs, words or pairs alike; and never more inputs at once than were allowed."""
    task, checkpoint, texts, _ = setting(name)
    model, size = checkpoint.model, 3
    batch = make_batch(texts, np.arange(10))
    teacher = {k: v.detach() + 0.1 * torch.randn_like(v) for k, v in model.eval().outputs(batch).items()}
    model.train()
    seen, forward = [], type(model).forward

    def counting(self, input_ids, *args, **kwargs):
        seen.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counting)
    for loss in (lambda: task.loss(model.outputs(batch), batch), lambda: task.soft_loss(model.outputs(batch), teacher, batch, 2.0)):
        model.micro_batch = None
        whole = gradients(model, loss)
        seen.clear()
        model.micro_batch = size
        parts = gradients(model, loss)
        assert max(seen) == size
        assert parts[0] == pytest.approx(whole[0], rel=1e-5)
        assert close(whole[1], parts[1])


def test_training_in_parts_ends_where_training_at_once_does(job, monkeypatch):  # noqa: F811
    ends = []
    for machine in (CPU, TrainSection(device="cpu", micro_batch=3, activation_checkpointing=True)):
        made = job(epochs=2, precision="fp32", machine=machine)
        without_dropout(made.module)
        start = weights(made)
        history = train(made)
        ends.append((history[-1]["loss"], weights(made)))
        assert made.module.micro_batch is None
        assert not made.module.activation_checkpointing
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-3)
    moved = max(float((ends[0][1][n] - start[n]).abs().max()) for n in start)
    assert max(float((ends[0][1][n] - ends[1][1][n]).abs().max()) for n in start) < 0.02 * moved


@pytest.mark.parametrize("order", ["joint", "progressive"])
def test_transfer_in_parts_has_the_gradients_of_the_whole_batch(setting, order, monkeypatch):
    found = []
    for size in (None, 4):
        _, teacher, _, context = setting("text-classification", micro_batch=size)
        torch.manual_seed(1)
        student = Checkpoint.load(context_model(context, teacher), teacher.model.config.heads, None).model.train()
        without_dropout(student)

        def look(asked, student=student):
            batch = make_batch(asked.texts, np.arange(11))
            for step in (0, 10_000):
                found.append(gradients(asked.module, lambda step=step: asked.loss(asked.module, batch, step)[0]))

        monkeypatch.setattr(knowledge_transfer, "train", look)
        with torch.no_grad():
            for p in student.layers.parameters():
                p.add_(0.05 * torch.randn_like(p))
        KnowledgeTransfer(order=order, epochs=1).transfer(context, student, teacher, "t")
    for whole, parts in ((found[0], found[2]), (found[1], found[3])):
        assert parts[0] == pytest.approx(whole[0], rel=1e-5)
        assert close(whole[1], parts[1])


def context_model(context, teacher):
    """A folder with the teacher's weights."""
    folder = context.work / "student"
    if not folder.is_dir():
        teacher.save(folder, 16)
    return folder


def test_activation_checkpointing_changes_no_gradient_and_holds_less(setting):
    """With dropout, which must be drawn again as it was."""
    task, checkpoint, texts, _ = setting("text-classification")
    model, batch = checkpoint.model.train(), make_batch(texts, np.arange(12))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    found, held = [], []
    for wanted in (False, True):
        model.activation_checkpointing = wanted
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        def loss(pack=pack):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return task.loss(model.outputs(batch), batch)

        torch.manual_seed(5)
        found.append(gradients(model, loss))
        held.append(sum(sizes))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
    assert held[1] < held[0] / 2


def test_scores_are_held_only_where_they_are_asked_for(setting):
    _, checkpoint, texts, _ = setting("token-classification")
    model, batch = checkpoint.model.eval(), make_batch(texts, np.arange(4))
    references, alive = [], []

    def watch(module, inputs, output):
        gc.collect()
        alive.append(sum(reference() is not None for reference in references))
        references.append(weakref.ref(output[1]))

    for layer in model.layers:
        layer.attention.register_forward_hook(watch)
    with torch.no_grad():
        model(**batch.inputs)
        assert alive == [0, 0]
        references.clear()
        out = model(**batch.inputs, output_attention_scores=True)
    assert len(out.attention_scores) == 2
    assert alive[2:] == [0, 1]


@pytest.mark.parametrize("name", TASKS)
def test_the_size_of_the_cache_is_known_before_it_is_written(setting, name, tmp_path):
    _, teacher, texts, _ = setting(name)
    for layers in ((), (1, 2)):
        folder = tmp_path / f"cache{len(layers)}"
        collect(teacher.model, texts, folder, Progress(quiet=True), layers, 2)
        files = list(folder.iterdir())
        assert cached_bytes(teacher.model, texts, layers, 2) == sum(p.stat().st_size for p in files) - 128 * len(files)


@pytest.mark.parametrize("name", ["text-classification", "token-classification", "question-answering", "sentence-embedding"])
def test_beyond_its_bound_the_teacher_runs_and_says_the_same(setting, name, monkeypatch):
    task, teacher, texts, _ = setting(name)
    rows = np.arange(len(texts))[::-1][: 6 * texts.group].copy()
    given = {}
    for limit, kind in ((1.0, TeacherOutputs), (0.0, LiveTeacher)):
        context = setting(name, cache_gb=limit)[3]
        known = teacher_outputs(context, teacher, texts, (1, 2), 2)
        assert isinstance(known, kind)
        assert bool(context.notes) == (limit == 0)
        batch = make_batch(texts, rows)
        given[limit] = known.outputs(batch), known.features(batch)
    student = {k: v + 0.5 * torch.randn(v.shape, generator=torch.Generator().manual_seed(0)) for k, v in given[1.0][0].items()}
    losses = [float(task.soft_loss(student, given[limit][0], batch, 2.0)) for limit in (1.0, 0.0)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    for one, other in zip((given[1.0][1].hidden, given[1.0][1].attention), (given[0.0][1].hidden, given[0.0][1].attention), strict=True):
        assert one.dtype == other.dtype == torch.float16
        assert (one.float() - other.float()).abs().max() < 0.05


def test_a_live_teacher_stays_as_it_is_and_learns_nothing(setting):
    _, teacher, texts, context = setting("text-classification", cache_gb=0)
    known = teacher_outputs(context, teacher, texts)
    with torch.enable_grad():
        assert not known.outputs(make_batch(texts, np.arange(3)))["logits"].requires_grad
    assert not teacher.model.training


STAGES = """
[train]
micro_batch = 4
activation_checkpointing = true
cache_gb = 0
[[stage]]
use = "finetune"
epochs = 2
batch_size = 8
[[stage]]
use = "distill-mobilebert"
layers = 2
hidden_size = 16
bottleneck_size = 8
heads = 2
ffn_size = 16
embedding_size = 8
transfer = { epochs = 1, batch_size = 8 }
logits = { epochs = 1, batch_size = 8, texts = { copies = 0 } }
"""


def test_a_recipe_with_every_option_runs_and_its_ledger_tells_how_fast(tiny_model, tmp_path):
    ledger = run_task("token-classification", STAGES, tmp_path, tiny_model, tmp_path / "cache")
    assert any("the teacher runs at every step" in note for note in ledger.records[1]["notes"])
    assert [r["title"] for r in ledger.records[1]["training"]] == ["distill-mobilebert: progressive", "distill-mobilebert: outputs"]
    assert all(r["inputs_per_second"] > 0 for record in ledger.records for r in record["training"])
    assert "micro_batch = 4" in lock_text(ledger.recipe)
    assert not list((tmp_path / "cache").glob("shared/*/features.npy"))


def test_a_lock_says_nothing_of_the_machine_where_the_recipe_does_not():
    assert "[train]" not in lock_text(load_recipe("demo"))
    changed = load_recipe("demo", ["train.micro_batch=16"])
    assert "[train]\nmicro_batch = 16" in lock_text(changed)
    with pytest.raises(BadInput, match=r"train\.micro_batch"):
        load_recipe("demo", ["train.micro_batch=0"])
    with pytest.raises(BadInput, match=r"train.device: unknown 'gpu'"):
        load_recipe("demo", ["train.device=gpu"])


@pytest.mark.parametrize(
    ("cuda", "mps", "name", "processes", "chosen"),
    [
        (False, False, "auto", 1, "cpu"), (True, False, "auto", 1, "cuda"), (False, True, "auto", 1, "mps"), (True, True, "auto", 1, "cuda"),
        (True, True, "mps", 1, "mps"), (True, True, "cpu", 1, "cpu"), (True, True, "auto", 2, "cpu"),
        (False, True, "cuda", 1, None), (True, False, "mps", 1, None), (True, False, "cuda", 2, None),
    ],
)  # fmt: skip
def test_which_device_trains(cuda, mps, name, processes, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    if chosen is None:
        with pytest.raises(BadInput, match=f"train.device: '{name}'"):
            device.choose(name, processes)
    else:
        assert device.choose(name, processes).type == chosen


def test_the_kind_of_a_gpu_counts_and_that_of_a_cpu_does_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA X")
    assert device.hardware(torch.device("cpu")) is None
    assert device.hardware(torch.device("cuda")) == "cuda NVIDIA X"
    assert device.hardware(torch.device("mps")) == "mps"


def test_the_default_plan_trains_on_the_cpu():
    assert TrainingPlan(1, 1, 1.0, 0).machine.device == "cpu"


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("text-") or name == "sentence-embedding"])
def test_model_and_loss_stay_on_the_device_of_their_batch(setting, name):
    """On the device ``meta``, which computes shapes alone, in place of a GPU: every tensor that is made on the way must be there too.

    Outputs per token are left out: how many there are is a value, which it does not have.
    """
    task, checkpoint, texts, _ = setting(name)
    model, batch = checkpoint.model.to("meta"), make_batch(texts, np.arange(6)).to(torch.device("meta"))
    out = model(**batch.inputs, output_hidden_states=True, output_attention_scores=True)
    made = (*out.outputs.values(), *out.hidden_states, *out.attention_scores, task.loss(out.outputs, batch))
    assert all(value.device.type == "meta" for value in made)
    if name != "text-regression":  # it looks for the rows of known scale, whose number is a value
        teacher = {key: value.detach() for key, value in out.outputs.items()}
        assert task.soft_loss(out.outputs, teacher, batch, 2.0).device.type == "meta"
    assert list(batch.targets) == list(make_batch(texts, np.arange(6)).targets)

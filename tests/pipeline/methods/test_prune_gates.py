"""Gates close in exactly the asked number, in the order that was learned, and cutting what they close changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.learning.hard_concrete import SizeConstraint, decided
from pipeline.methods.prune.gates import Gates, cut_closed, gains, rounded
from pipeline.methods.prune.heads import head_importance
from pipeline.models.encoder import Encoder, count_unique_parameters
from pipeline.models.gated import gated
from pipeline.tasks.batches import EncodedTexts, in_order
from runtimes.errors import BadInput
from tests.exporters.encoders import LABELS, encoder, texts
from tests.pipeline.labelled import TASK, from_id_lists, predict_logits

KINDS = ["bert", "mobilebert", "unequal layers", "low rank", "low rank student", "empty parts", "unequal student"]
WITH_A_HIDDEN_CUT = ["bert", "unequal layers", "low rank", "factorized", "empty parts"]
STAGE = 'use = "prune-gates"\nmultiple_of = 8\nheal.batch_size = 8\n'
ALL_KINDS = "heads = 0.5\nffn = 0.5\nhidden = 0.25\n"


def encoded(count: int = 40) -> EncodedTexts:
    return from_id_lists([np.asarray(ids) for ids in texts(count)], np.arange(count) % LABELS, 0)


def scored(model: Encoder, hidden: bool = False, seed: int = 0) -> Gates:
    """Gates with random scores, about half of them above 0."""
    gates = Gates(model, True, True, hidden)
    torch.manual_seed(seed)
    gates.set([2 * torch.randn_like(gate) for gate in gates.log_alphas])
    return gates


def closed_share(gates: list[torch.Tensor]) -> float:
    return (torch.cat(gates) == 0).float().mean().item()


def flat(units: list) -> list[torch.Tensor]:
    return [gates for layer in units for gates in layer]


# --- which close ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "survivors, multiple_of, left", [(10, 8, 8), (13, 8, 16), (1, 8, 8), (0, 8, 0), (40, 8, 40), (39, 16, 32), (40, 16, 32), (36, 1, 36), (3, 64, 40)]
)
def test_a_width_is_rounded_to_the_nearest_multiple_that_fits(survivors, multiple_of, left):
    torch.manual_seed(0)
    scores = torch.randn(40)
    stays = scores >= scores.sort(descending=True).values[survivors - 1] if survivors else torch.zeros(40, dtype=torch.bool)
    made = rounded(stays, scores, multiple_of)
    assert made.dtype == torch.bool
    assert int(made.sum()) == left
    assert left in (0, 40) or scores[made].min() > scores[~made].max()


@pytest.mark.parametrize("kind", ["bert", "unequal layers", "empty parts"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("soft", [False, True])
def test_exactly_the_asked_share_closes_over_all_layers(kind, share, soft):
    model = encoder(kind)
    closed = scored(model, hidden=True).close(share, share, share, 1, soft)
    for gates in (closed["heads"], flat(closed["units"]), [closed["hidden"]]):
        total = sum(map(len, gates))
        assert closed_share(gates) * total == pytest.approx(round(share * total), abs=1e-3)
    if share in (0.25, 0.5):
        assert len({(gates == 0).float().mean().item() for gates in flat(closed["units"])}) > 1  # and not the same share in each


@pytest.mark.parametrize("soft", [False, True])
def test_what_closes_is_what_scores_least_in_all_layers_together(soft):
    gates = scored(encoder("unequal layers"), hidden=True)
    closed = gates.close(0.5, 0.25, 0.75, 1, soft)
    for kind, values in (("heads", closed["heads"]), ("units", flat(closed["units"])), ("hidden", [closed["hidden"]])):
        learned = torch.cat([gate for gate, k in zip(gates.log_alphas, gates.kinds, strict=True) if k == kind]).detach()
        values = torch.cat(values)
        assert learned[values == 0].max() < learned[values > 0].min()


def test_a_gate_that_stays_is_what_it_learned_to_be_or_1():
    model = encoder("bert")
    gates = scored(model, hidden=True)
    hard, soft = (gates.close(0.5, 0.5, 0.5, 1, soft) for soft in (False, True))
    for name, learned in (("heads", gates.log_alphas[0]), ("units", gates.log_alphas[1])):
        first_hard, first_soft = hard[name][0], soft[name][0]
        if name == "units":
            first_hard, first_soft = first_hard[0], first_soft[0]
        stays = first_hard > 0
        assert torch.equal(first_hard[stays], torch.ones(int(stays.sum())))
        assert torch.equal(first_soft[stays], decided(learned.detach())[stays].clamp(min=0.05))
        assert torch.equal(first_soft > 0, stays)
    assert set(soft["hidden"].tolist()) == {0.0, 1.0}  # norms have no matrix behind them to fold a number into


def test_a_gate_that_was_learned_shut_but_stays_is_not_0():
    gates = scored(encoder("bert"))
    gates.set([torch.full_like(gate, -9.0) for gate in gates.log_alphas])
    closed = gates.close(0.5, 0.5, 0.0, 1, soft=True)
    assert closed_share(closed["heads"]) == 0.5
    assert torch.cat(closed["heads"]).max().item() == pytest.approx(0.05)


def test_widths_are_multiples_in_every_layer():
    model = encoder("bert")  # 40 units in each layer
    closed = scored(model, hidden=True).close(0.0, 0.6, 0.4, 8, soft=True)
    for gates in (*flat(closed["units"]), closed["hidden"]):
        assert int((gates > 0).sum()) % 8 == 0
        assert (gates > 0).any()
    assert all((gates > 0).all() for gates in closed["heads"])


def test_gates_there_are_none_of_stay_open():
    model = encoder("bert")
    gates = Gates(model, heads=False, units=True, hidden=False)
    assert gates.expected_sparsity("heads") is None
    assert gates.expected_sparsity("hidden") is None
    closed = gates.close(0.0, 0.5, 0.0, 1, soft=True)
    assert closed["hidden"] is None
    assert all(torch.equal(g, torch.ones(4)) for g in closed["heads"])


# --- cutting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("soft", [False, True])
def test_closed_gates_are_cut_and_soft_ones_folded_with_the_same_logits(kind, soft):
    model, given = encoder(kind), encoded()
    closed = scored(model).close(0.4, 0.5, 0.0, 1, soft)
    with gated(model, **closed):
        expected = predict_logits(model, given)
    cut = cut_closed(model, closed, given, "test")
    assert (predict_logits(cut, given) - expected).abs().max() < 2e-5
    assert (predict_logits(model, given) - expected).abs().max() > 1e-2
    assert [layer["heads"] for layer in cut.config.layers] == [int((gates > 0).sum()) for gates in closed["heads"]]
    assert [layer["ffn_sizes"] for layer in cut.config.layers] == [[int((gates > 0).sum()) for gates in layer] for layer in closed["units"]]


@pytest.mark.parametrize("kind", WITH_A_HIDDEN_CUT)
def test_channels_are_cut_with_heads_and_units(kind):
    model, given = encoder(kind), encoded()
    closed = scored(model, hidden=True).close(0.4, 0.5, 0.25, 8, soft=True)
    with gated(model, **closed):
        expected = predict_logits(model, given)
    cut = cut_closed(model, closed, given, "test")
    assert cut.config.hidden_size == 24
    assert (predict_logits(cut, given) - expected).abs().max() < 2e-5


def test_folding_leaves_the_model_itself_alone():
    model, given = encoder("bert"), encoded()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cut_closed(model, scored(model).close(0.5, 0.5, 0.0, 1, soft=True), given, "test")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["electra", "mobilebert", "unequal student"])
def test_channels_of_a_model_that_is_not_berts_are_refused(kind):
    model = encoder(kind)
    gates = Gates(model, heads=False, units=False, hidden=True)
    with pytest.raises(BadInput, match="BERT-like"):
        cut_closed(model, gates.close(0.0, 0.0, 0.5, 8, soft=False), encoded(), "test")
    with pytest.raises(BadInput, match="BERT-like"):
        gains(model, gates, encoded(), TASK.loss)


# --- learning and ranking ---------------------------------------------------------------------------------------------


def test_fresh_gates_are_nearly_open():
    gates = Gates(encoder("bert"), True, True, True)
    for kind in ("heads", "units", "hidden"):
        assert 0.0 < gates.expected_sparsity(kind).item() < 0.05
    assert len(gates.log_alphas) == 3 + 3 + 1


@pytest.mark.parametrize("kind", ["bert", "mobilebert", "unequal layers"])
def test_the_gain_of_heads_is_their_importance(kind):
    model, given = encoder(kind), encoded(80)
    gates = Gates(model, heads=True, units=False, hidden=False)
    for a, b in zip(gains(model, gates, given, TASK.loss), head_importance(model, given, TASK.loss), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("what, step", [("units", 1e-5), ("hidden", 3e-3)])
@pytest.mark.parametrize("kind", ["bert", "low rank"])
def test_the_gain_of_a_unit_and_of_a_channel_is_the_slope_of_the_loss(kind, what, step):
    """Against differences of the loss of each text when a gate is moved a little; norms under gates compute in float32."""
    model, given = encoder(kind).double(), encoded(12)
    gates = Gates(model, heads=False, units=what == "units", hidden=what == "hidden").double()
    found = gains(model, gates, given, TASK.loss)
    for place in range(len(found)):
        losses = []
        for sign in (1, -1):
            ones = [torch.ones_like(gate) for gate in gates.log_alphas]
            ones[place][5] += sign * step
            with torch.no_grad(), gated(model, **gates.arranged(ones)):
                logits = torch.cat([model(b.input_ids, b.attention_mask).logits for b in in_order(given, 64)])
            labels = torch.cat([b.targets["labels"] for b in in_order(given, 64)])
            losses.append(functional.cross_entropy(logits, labels, reduction="none"))
        slopes = (losses[0] - losses[1]) / (2 * step)
        assert found[place][5].item() == pytest.approx(slopes.abs().mean().item(), rel=1e-4 if what == "units" else 2e-2)


def test_what_nobody_reads_gains_nothing():
    model = encoder("bert")
    with torch.no_grad():
        model.layers[0].ffns[0].down.weight[:, 7] = 0
        model.layers[2].ffns[0].up.weight[11] = 0
        model.layers[2].ffns[0].up.bias[11] = 0  # gelu(0) = 0
    gates = Gates(model, heads=False, units=True, hidden=False)
    found = torch.cat(gains(model, gates, encoded(), TASK.loss))
    assert (found == 0).nonzero().flatten().tolist() == [7, 91]
    gates.set(gains(model, gates, encoded(), TASK.loss))
    closed = flat(gates.close(0.0, 2 / 120, 0.0, 1, soft=False)["units"])
    assert closed[0][7] == closed[2][11] == 0
    assert closed_share(closed) == pytest.approx(2 / 120)


def learned(model: Encoder, gates: Gates, target: float | None, penalty: float = 0.0, steps: int = 250) -> None:
    """Learn gates to keep the model's own answers; the size is held at ``target``, or costs ``penalty``."""
    given = encoded()
    batch = next(iter(in_order(given, 64)))
    with torch.no_grad():
        answers = model(batch.input_ids, batch.attention_mask).logits.softmax(-1)
    constraint = SizeConstraint()
    optimizer = torch.optim.Adam([*gates.parameters(), *constraint.parameters()], lr=0.05)
    torch.manual_seed(0)
    for _ in range(steps):
        with gates.drawn(model):
            loss = functional.cross_entropy(model(batch.input_ids, batch.attention_mask).logits, answers)
        sparsity = gates.expected_sparsity("heads")
        loss = loss + (constraint(sparsity, target) if target is not None else penalty * (1 - sparsity))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_learned_gates_close_the_heads_that_do_nothing_first():
    model = encoder("bert").requires_grad_(False)
    idle = [(0, 1), (1, 0), (1, 3), (2, 2)]
    for layer, head in idle:
        model.layers[layer].attention.output.weight[:, head * 8 : head * 8 + 8] = 0
    gates = Gates(model, heads=True, units=False, hidden=False)
    learned(model, gates, target=len(idle) / 12)
    closed = gates.close(len(idle) / 12, 0.0, 0.0, 1, soft=True)["heads"]
    assert [(layer, head) for layer in range(3) for head in range(4) if closed[layer][head] == 0] == idle


def test_a_large_penalty_closes_every_gate_and_none_leaves_them_open():
    model = encoder("bert").requires_grad_(False)
    sparsity = []
    for penalty in (0.0, 1e4):
        gates = Gates(model, heads=True, units=False, hidden=False)
        learned(model, gates, target=None, penalty=penalty, steps=150)
        sparsity.append(gates.expected_sparsity("heads").item())
    assert sparsity[0] < 0.1
    assert sparsity[1] > 0.9


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["l0", "gain", "random"])
def test_the_asked_shares_are_gone(run_stages, trained, select):
    ledger, made = run_stages(STAGE + ALL_KINDS + f'select = "{select}"\nheal.epochs = 1\nheal.learning_rate = 1e-3')
    layers = made.model.config.layers
    assert sum(layer["heads"] for layer in layers) == 8
    widths = [layer["ffn_sizes"][0] for layer in layers]
    assert all(width % 8 == 0 for width in widths)
    assert abs(sum(widths) - 128) <= 4 * 4
    assert made.model.config.hidden_size == 24
    record = ledger.records[-1]
    assert record["subjects"][0]["name"] == f"gates by {select}: 50% heads, 50% FFN, 25% channels pruned"
    assert record["subjects"][0]["unique_params"] == count_unique_parameters(made.model) < count_unique_parameters(trained.model) / 1.4
    assert any(", ".join(map(str, widths)) in note for note in record["notes"])


def test_gates_learn_towards_the_target(run_stages):
    ledger = run_stages(STAGE + "heads = 0.5\nffn = 0.5\ngate_epochs = 20\ngate_learning_rate = 0.1\nheal.epochs = 0")[0]
    note = next(note for note in ledger.records[-1]["notes"] if note.startswith("expected to be closed"))
    heads, units = (float(part.rstrip("%,")) for part in note.split() if part.rstrip(",").endswith("%"))
    assert 35 < heads < 65
    assert 35 < units < 65


def test_learned_gates_lose_less_than_random_ones(run_stages):
    """Before healing, which is where the choice shows."""
    options = STAGE + "ffn = 0.75\ngate_epochs = 10\ngate_learning_rate = 0.1\nheal.epochs = 0.1\n"
    before = {}
    for select in ("l0", "random"):
        notes = run_stages(options + f'select = "{select}"')[0].records[-1]["notes"]
        before[select] = float(next(note for note in notes if note.startswith("before healing")).split()[3])
    assert before["l0"] >= before["random"]


def test_the_same_seed_closes_the_same_gates(run_stages, trained):
    made = [run_stages(STAGE + f'ffn = 0.5\nselect = "random"\nheal.epochs = 0\ngain_texts = {n}')[1].model for n in (1, 2)]
    for a, b in zip(made[0].state_dict().values(), made[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("learn_from", ["labels", "teacher", "unpruned"])
def test_it_learns_from_whom_the_recipe_says(run_stages, learn_from):
    made = run_stages(STAGE + f'heads = 0.25\nffn = 0.25\ngate_epochs = 0.5\nheal.epochs = 1\nheal.learn_from = "{learn_from}"')[1]
    assert sum(layer["heads"] for layer in made.model.config.layers) == 12


@pytest.mark.parametrize(
    "options, message",
    [
        ("ffn = 0.0", "heads, ffn and hidden are all 0, so nothing would go"),
        ("ffn = 1.0", "ffn"),
        ("heads = -0.5", "heads"),
        ('select = "best"', "select"),
        ("multiple_of = 0", "multiple_of"),
        ("gate_epochs = 0", "gate_epochs"),
        ('heal.learn_from = "labels"\nheal.texts.copies = 2', "altered copies have no labels"),
        ("ffn = 0.0\nhidden = 0.99", "hidden"),
    ],
)
def test_options_that_leave_nothing_or_do_nothing_are_refused(run_stages, options, message):
    with pytest.raises(BadInput, match=message):
        run_stages('use = "prune-gates"\nheal.epochs = 0\n' + options)

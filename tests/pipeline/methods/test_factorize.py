"""Low rank: nearest products for the task's inputs, learned ranks under a size constraint, dense where dense is smaller."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.learning.hard_concrete import probability_open
from pipeline.methods.factorize.flop import Factored
from pipeline.methods.factorize.svd import Components, input_moments, ranks_for
from pipeline.models.linear import LowRank
from pipeline.models.surgery import break_even_rank, factor, layer_matrices
from pipeline.tasks.batches import make_batch
from runtimes.errors import BadInput, GateFailed
from tests.pipeline.labelled import from_id_lists, predict_logits

SMALL = "heal.epochs = 1\nheal.batch_size = 8"


@pytest.fixture(scope="module")
def texts(trained):
    rng = torch.Generator().manual_seed(0)
    ids = [[2, *torch.randint(6, 60, (5,), generator=rng).tolist(), 3] for _ in range(40)]
    return from_id_lists(ids, torch.zeros(40).numpy(), 0)


@pytest.fixture(scope="module")
def moments(trained, texts):
    return input_moments(trained.model, texts)


def test_full_rank_reproduces_the_matrix(trained, moments):
    for name in layer_matrices(trained.model)[:6]:
        weight = trained.model.get_submodule(name).weight.detach()
        outer, inner = Components(weight, moments[name]).cut(min(weight.shape))
        assert (outer @ inner - weight).abs().max() < 1e-5, name


def test_error_on_the_inputs_is_that_of_the_components_left_out_and_below_plain_svd():
    torch.manual_seed(0)
    weight = torch.randn(24, 16)
    inputs = torch.randn(500, 16) * torch.linspace(0.05, 3, 16)
    moments = (inputs.T @ inputs / 500).double()
    parts = Components(weight, moments)
    outer, inner = parts.cut(6)
    error = ((inputs @ (weight - outer @ inner).T) ** 2).sum(1).mean()
    assert error == pytest.approx(float((parts.singular[6:] ** 2).sum()), rel=0.05)
    left, singular, right = torch.linalg.svd(weight)
    plain = left[:, :6] * singular[:6] @ right[:6]
    assert error < 0.8 * ((inputs @ (weight - plain).T) ** 2).sum(1).mean()


def test_moments_are_those_of_real_tokens_only(trained):
    """A text padded beside a longer one counts as alone."""
    short, long = [2, 7, 8, 3], [2, 7, 8, 9, 10, 11, 12, 3]
    name = "layers.0.attention.query"
    together = input_moments(trained.model, from_id_lists([short, long], torch.zeros(2).numpy(), 0))[name] * 12
    alone = sum(input_moments(trained.model, from_id_lists([ids], torch.zeros(1).numpy(), 0))[name] * len(ids) for ids in (short, long))
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("removed", [0.2, 0.5, 0.8])
def test_ranks_remove_the_asked_share_and_none_is_above_break_even(trained, moments, removed):
    parts = {name: Components(trained.model.get_submodule(name).weight.detach(), moments[name]) for name in moments}
    ranks = ranks_for(parts, removed)
    total = sum(p.shape[0] * p.shape[1] for p in parts.values())
    left = sum(ranks[n] * sum(p.shape) if n in ranks else p.shape[0] * p.shape[1] for n, p in parts.items())
    assert removed <= 1 - left / total < removed + 0.1
    assert all(rank <= parts[name].break_even for name, rank in ranks.items())


def test_break_even_is_where_two_thin_matrices_stop_being_smaller():
    assert break_even_rank(384, 384) == 191
    assert 307 * (384 + 1536) < 384 * 1536
    assert break_even_rank(384, 1536) == 307
    assert 308 * (384 + 1536) > 384 * 1536


def test_share_that_no_rank_reaches_is_refused_with_the_one_that_is(trained, moments):
    parts = {name: Components(trained.model.get_submodule(name).weight.detach(), moments[name]) for name in moments}
    with pytest.raises(GateFailed, match=r"rank 1 everywhere would remove 9\d\.\d%, 99\.0% is asked for"):
        ranks_for(parts, 0.99)


def test_rank_above_break_even_stays_dense_and_it_is_said(run_stages):
    ledger, made = run_stages(f'use = "factorize-svd"\nrank = 18\n{SMALL}')
    ranks = [layer["ranks"] for layer in made.model.config.layers]
    assert all(set(layer) == {"ffns.0.up", "ffns.0.down"} for layer in ranks), "break-even is 15 for 32 x 32 and 21 for 32 x 64"
    assert any("16 stay dense" in note for note in ledger.records[-1]["notes"])
    with pytest.raises(BadInput, match="every matrix would stay dense"):
        run_stages('use = "factorize-svd"\nrank = 40')


def test_stage_leaves_thin_matrices_of_the_asked_size(run_stages, trained):
    _, made = run_stages(f'use = "factorize-svd"\nremoved = 0.5\n{SMALL}')
    left = sum(p.numel() for n, p in made.model.named_parameters() if n.startswith("layers.") and p.ndim == 2)
    whole = sum(p.numel() for n, p in trained.model.named_parameters() if n.startswith("layers.") and p.ndim == 2)
    assert 0.4 * whole < left <= 0.5 * whole
    assert any(isinstance(m, LowRank) for m in made.model.modules())


# --- FLOP -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def factored(trained, moments):
    torch.manual_seed(0)
    return Factored(trained.model, moments)


def test_as_many_components_as_a_dense_matrix_has_parameters_for(factored):
    assert [len(a) for a in factored.log_alphas[:6]] == [16, 16, 16, 16, 21, 21]


def test_cut_is_the_gated_model_and_zeros_are_as_many_as_expected(factored, texts):
    with torch.no_grad():
        for log_alpha in factored.log_alphas:
            log_alpha.copy_(torch.randn_like(log_alpha) * 4)
    gates = factored.final_gates()
    for gate, log_alpha in zip(gates, (a.detach() for a in factored.log_alphas), strict=True):
        zeros = round(len(gate) - float(probability_open(log_alpha, 1.0).sum()))
        assert int((gate == 0).sum()) == min(zeros, len(gate) - 1)
        assert log_alpha[gate == 0].max() <= log_alpha[gate > 0].min()
        assert torch.allclose(gate[gate > 0], torch.sigmoid(0.8 * log_alpha[gate > 0])), "the others keep their soft value"
    with factored.under(gates):
        expected = predict_logits(factored.model, texts)
    cut, ranks, dense = factored.cut(gates)
    assert (predict_logits(cut, texts) - expected).abs().max() < 1e-5
    for name, rank in ranks.items():
        module = cut.get_submodule(name)
        if name in dense:
            assert isinstance(module, torch.nn.Linear)
        else:
            assert module.inner.weight.shape[0] == rank
    assert len(dense) < len(ranks)


def test_closed_gates_come_back_until_no_more_than_the_target_is_removed(factored):
    with torch.no_grad():
        for log_alpha in factored.log_alphas:
            log_alpha.copy_(torch.randn_like(log_alpha) * 4)
    both = (factored.final_gates(), factored.final_gates(0.2))
    ranks = [{n: int((g > 0).sum()) for n, g in zip(factored.names, gates, strict=True)} for gates in both]
    assert factored.removed_by(ranks[0]) > 0.25
    assert 0.18 < factored.removed_by(ranks[1]) <= 0.2


def test_matrix_that_keeps_too_many_components_is_dense_again(factored):
    with torch.no_grad():
        for log_alpha in factored.log_alphas:
            log_alpha.fill_(9.0)
    cut, _, dense = factored.cut(factored.final_gates())
    assert dense == {name for name in factored.names if "attention" in name}
    assert factored.removed_by({n: len(a) for n, a in zip(factored.names, factored.log_alphas, strict=True)}) < 0.03
    assert not any(isinstance(cut.get_submodule(n), LowRank) for n in dense)


def test_constraint_brings_the_share_to_its_target(factored):
    """Without a loss beside it, to within 0.01."""
    optimizer = torch.optim.Adam([*factored.log_alphas, *factored.constraint.parameters()], lr=0.05)
    multipliers = []
    for _ in range(600):
        optimizer.zero_grad()
        removed = factored.expected_removed()
        factored.constraint(removed, 0.5).backward()
        optimizer.step()
        multipliers.append(factored.constraint.multipliers[0].item())
    assert factored.expected_removed().item() == pytest.approx(0.5, abs=0.01)
    assert multipliers[20] < 0, "below the target the linear multiplier falls, which rewards sparsity"


def test_gated_forward_is_the_mean_of_its_draws(factored, texts):
    """Open gates give the plain product."""
    with torch.no_grad():
        for log_alpha in factored.log_alphas:
            log_alpha.fill_(30.0)
    batch = make_batch(texts, np.array([0]))
    assert torch.allclose(factored(batch)["logits"], factored.model.outputs(batch)["logits"], atol=1e-6)


def test_stage_reaches_its_target_and_says_so_when_it_cannot(run_stages, trained):
    _, made = run_stages(f'use = "factorize-flop"\nremoved = 0.35\ngate_epochs = 6\ngate_learning_rate = 0.3\n{SMALL}')
    left = sum(p.numel() for n, p in made.model.named_parameters() if n.startswith("layers.") and p.ndim == 2)
    whole = sum(p.numel() for n, p in trained.model.named_parameters() if n.startswith("layers.") and p.ndim == 2)
    assert left <= 0.67 * whole
    with pytest.raises(GateFailed, match=r"% of the parameters went, 90.0% were asked for"):
        run_stages('use = "factorize-flop"\nremoved = 0.9\ngate_epochs = 0.2\nheal.batch_size = 8')


def test_factoring_twice_is_refused_before_anything_trains(run_stages):
    with pytest.raises(BadInput, match="cannot follow factorize-svd, which leaves matrices that are products"):
        run_stages('use = "factorize-svd"', 'use = "factorize-flop"')


def test_factors_of_part_sharing_models_are_refused(run_stages):
    _, shared = run_stages('use = "share-layers"\nshare = "ffn"\ngroups = 2\ntransfer.order = "none"\nheal.epochs = 0')
    with pytest.raises(BadInput, match="factorize before share-layers"):
        factor(shared.model, {"layers.0.attention.query": (torch.zeros(32, 2), torch.zeros(2, 32))})

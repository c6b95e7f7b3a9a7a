"""Hard-concrete gates are open as often as the formula says, and a constraint drives their number to where it is asked."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.learning.hard_concrete import SizeConstraint, decided, probability_open, sample

DRAWS = 200_000
STEPS = 2500


@pytest.mark.parametrize("beta", [1 / 3, 2 / 3, 1.0])
@pytest.mark.parametrize("log_alpha", [-4.0, -1.5, 0.0, 0.7, 3.0])
def test_gates_are_open_as_often_as_the_formula_says(log_alpha, beta):
    torch.manual_seed(0)
    drawn = sample(torch.full((DRAWS,), log_alpha), beta)
    expected = probability_open(torch.tensor(log_alpha), beta).item()
    assert (drawn > 0).float().mean().item() == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / DRAWS) + 1e-6)


@pytest.mark.parametrize("beta", [1 / 3, 2 / 3])
@pytest.mark.parametrize("log_alpha", [-1.0, 0.0, 2.0])
def test_gates_follow_their_distribution_between_the_ends_too(log_alpha, beta):
    """P(z <= x) = sigmoid(beta logit((x + 0.1) / 1.2) - log_alpha), which is the formula for P(z > 0) at other places."""
    torch.manual_seed(1)
    drawn = sample(torch.full((DRAWS,), log_alpha), beta)
    for x in (0.0, 0.2, 0.5, 0.9, 0.999):
        s = (x + 0.1) / 1.2
        expected = 1 / (1 + math.exp(log_alpha - beta * math.log(s / (1 - s))))
        assert (drawn <= x).float().mean().item() == pytest.approx(expected, abs=0.005)


def test_an_even_gate_is_open_five_times_in_six():
    assert probability_open(torch.zeros(()), 2 / 3).item() == pytest.approx(0.832, abs=5e-4)


def test_gates_lie_between_0_and_1_with_mass_on_both_ends():
    torch.manual_seed(2)
    drawn = sample(torch.zeros(DRAWS), 2 / 3)
    assert drawn.min() == 0
    assert drawn.max() == 1
    for end in (0.0, 1.0):
        assert (drawn == end).float().mean().item() == pytest.approx(0.168, abs=0.005)
    assert ((drawn > 0) & (drawn < 1)).float().mean() > 0.6
    for log_alpha in (-60.0, 60.0):
        assert torch.isfinite(sample(torch.full((1000,), log_alpha), 2 / 3)).all()


def test_a_gate_without_chance_opens_with_log_alpha_from_0_to_1():
    gates = decided(torch.linspace(-6, 6, 100))
    assert gates[0] == 0
    assert gates[-1] == 1
    assert (gates.diff() >= 0).all()
    assert decided(torch.zeros(1)).item() == pytest.approx(0.5)


def test_draws_pull_on_log_alpha_where_gates_are_neither_open_nor_closed():
    torch.manual_seed(3)
    log_alpha = torch.zeros(1000, requires_grad=True)
    drawn = sample(log_alpha, 2 / 3)
    drawn.sum().backward()
    between = (drawn > 0) & (drawn < 1)
    assert (log_alpha.grad[between] > 0).all()
    assert (log_alpha.grad[~between] == 0).all()


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("start", [-2.0, 2.0])
def test_the_constraint_drives_the_expected_sparsity_to_its_target_from_either_side(start, target):
    """Against a loss that wants all gates open, or all closed."""
    for pull in (-0.3, 0.3):
        torch.manual_seed(4)
        log_alpha = torch.nn.Parameter(start + 0.1 * torch.randn(64))
        constraint = SizeConstraint()
        optimizer = torch.optim.Adam([log_alpha, *constraint.parameters()], lr=0.05)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
        for _ in range(STEPS):
            sparsity = 1 - probability_open(log_alpha, 2 / 3).mean()
            optimizer.zero_grad()
            (constraint(sparsity, target) + pull * sparsity).backward()
            optimizer.step()
            schedule.step()
        assert sparsity.item() == pytest.approx(target, abs=0.01)


def test_the_constraint_costs_nothing_at_first_and_nothing_at_its_target():
    constraint = SizeConstraint()
    assert constraint(torch.tensor(0.9), 0.2) == 0
    constraint.multipliers.data = torch.tensor([2.0, 3.0])
    assert constraint(torch.tensor(0.5), 0.5) == 0
    assert constraint(torch.tensor(0.7), 0.5).item() == pytest.approx(2 * 0.2 + 3 * 0.04)


def test_multipliers_are_maximised_while_sparsity_is_minimised():
    constraint = SizeConstraint()
    constraint.multipliers.data = torch.tensor([2.0, 3.0])
    sparsity = torch.tensor(0.7, requires_grad=True)
    constraint(sparsity, 0.5).backward()
    assert torch.allclose(constraint.multipliers.grad, -torch.tensor([0.2, 0.04]))
    assert sparsity.grad.item() == pytest.approx(2 + 2 * 3 * 0.2)

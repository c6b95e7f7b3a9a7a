"""Reweighted proximal pruning: the proximal point, exact zeros, groups that shrink shapes."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise

import pytest
import torch

from pipeline.methods.prune.proximal import EPS, Family, Shrinking, shrunk
from pipeline.models.encoder import count_unique_parameters
from runtimes.errors import BadInput, GateFailed

SMALL = "reweight_steps = 5\nprox_epochs = 4\nheal.epochs = 1\nheal.batch_size = 8"


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.7])
def test_proximal_point_is_the_minimum(threshold):
    """argmin_x (x - w)^2/2 + tau |x|, against a fine grid."""
    grid = torch.linspace(-2, 2, 400_001, dtype=torch.float64)
    for w in (-1.3, -0.1, 0.0, 0.05, 0.7, 1.9):
        best = grid[((grid - w) ** 2 / 2 + threshold * grid.abs()).argmin()]
        found = torch.sign(torch.tensor(w)) * shrunk(torch.tensor(abs(w)), torch.tensor(threshold))
        assert found == pytest.approx(float(best), abs=2e-5)


def test_larger_weights_get_smaller_thresholds(trained):
    shrinking = Shrinking(trained.model, "weights")
    shrinking.start(1e-6)
    shrinking.reweight()
    magnitudes, alpha = shrinking.families[0].magnitudes(), shrinking.get_buffer("alpha_0")
    order = magnitudes.argsort()
    assert (alpha[order].diff() <= 0).all()
    assert torch.allclose(alpha, 1 / (magnitudes + EPS))


def test_constant_alpha_is_plain_soft_thresholding():
    weight = torch.nn.Parameter(torch.tensor([[0.5, -0.2], [0.05, -1.0]]))
    family = Family([(weight, lambda w: w)], 1)
    magnitudes = family.magnitudes()
    family.scale(shrunk(magnitudes, torch.full_like(magnitudes, 0.1)) / magnitudes)
    assert torch.allclose(weight.data, torch.tensor([[0.4, -0.1], [0.0, -0.9]]))


def test_reweighting_lowers_the_log_penalty_objective_on_a_quadratic():
    """Majorise-minimise: (x - a)^T D (x - a)/2 + gamma sum log(|x| + eps) never rises with step 1/L."""
    torch.manual_seed(0)
    a, d = torch.randn(50, dtype=torch.float64), torch.rand(50, dtype=torch.float64) + 0.1
    x, gamma, eps, step = a.clone(), 0.05, 1e-3, 1 / 1.1

    def objective(x):
        return float((d * (x - a) ** 2).sum() / 2 + gamma * (x.abs() + eps).log().sum())

    values = [objective(x)]
    for _ in range(100):
        alpha = 1 / (x.abs() + eps)
        moved = x - step * d * (x - a)
        x = torch.sign(moved) * shrunk(moved.abs(), step * gamma * alpha)
        values.append(objective(x))
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values))
    assert 0 < int((x == 0).sum()) < 50


def test_no_penalty_is_exactly_adamw(run_stages, trained):
    """gamma = 0 leaves no zero and trains as healing alone does."""
    options = "sparsity = 0.0\ngamma = 0.0\nprox_epochs = 1\nheal.epochs = 0\nheal.batch_size = 8"
    ledger, made = run_stages('use = "prune-proximal"\nform = "weights"\n' + options)
    assert not any((p == 0).any() for name, p in made.model.named_parameters() if name.startswith("layers.") and p.ndim == 2)
    assert "0.0%" in ledger.records[-1]["notes"][0]


def test_given_penalty_is_taken_as_it_is(run_stages):
    """Without a sparsity, more gamma gives more zeros."""
    shares = []
    for gamma in (1e-6, 1e-4):
        _, made = run_stages(f'use = "prune-proximal"\nform = "weights"\nsparsity = 0.0\ngamma = {gamma}\n{SMALL}')
        matrices = [p for name, p in made.model.named_parameters() if name.startswith("layers.") and p.ndim == 2]
        shares.append(sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices))
    assert 0 < shares[0] < shares[1] < 1


@pytest.mark.parametrize("metric", ["plain", "adam"])
def test_single_weights_become_exactly_zero_and_stay_so_while_healing(run_stages, metric):
    _, made = run_stages(f'use = "prune-proximal"\nform = "weights"\nsparsity = 0.5\nmetric = "{metric}"\n{SMALL}')
    matrices = [p for name, p in made.model.named_parameters() if name.startswith("layers.") and p.ndim == 2]
    share = sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)
    assert 0.49 <= share < 0.7
    assert (made.model.embeddings.word.weight[1:] != 0).all(), "embeddings stay dense"
    assert not any((p == 0).all() for name, p in made.model.named_parameters() if "norm" in name)


def test_blocks_of_four_are_zero_as_a_whole(run_stages):
    _, made = run_stages(f'use = "prune-proximal"\nform = "blocks"\nsparsity = 0.5\n{SMALL}')
    for name, p in made.model.named_parameters():
        if name.startswith("layers.") and p.ndim == 2:
            runs = (p.view(-1, 4) == 0)
            assert (runs.all(-1) | ~runs.any(-1)).all(), name


def test_structures_shrink_shapes(run_stages, trained):
    _, made = run_stages(f'use = "prune-proximal"\nsparsity = 0.4\n{SMALL}')
    before, after = trained.model.config.layers, made.model.config.layers
    assert sum(sum(layer["ffn_sizes"]) for layer in after) < sum(sum(layer["ffn_sizes"]) for layer in before)
    assert count_unique_parameters(made.model.layers) < 0.65 * count_unique_parameters(trained.model.layers)


def test_head_and_unit_groups_cover_the_layers_matrices_once(trained):
    shrinking = Shrinking(deepcopy(trained.model), "structures")
    covered = sum(len(f.magnitudes()) * f.size for f in shrinking.families)
    matrices = [p for name, p in trained.model.named_parameters() if name.startswith("layers.") and p.ndim == 2]
    assert covered == sum(p.numel() for p in matrices)
    for family in shrinking.families:
        family.scale(torch.zeros(len(family.magnitudes())))
    assert all((p == 0).all() for name, p in shrinking.model.named_parameters() if name.startswith("layers.") and p.ndim == 2)


def test_unreachable_target_stops_with_what_was_reached(run_stages):
    with pytest.raises(GateFailed, match=r"% of the weights became zero, 99.0% were asked for"):
        run_stages('use = "prune-proximal"\nform = "weights"\nsparsity = 0.99\nreweight_steps = 100\nprox_epochs = 0.1\nheal.batch_size = 8')


def test_adams_metric_belongs_to_single_weights(run_stages):
    with pytest.raises(BadInput, match="metric"):
        run_stages('use = "prune-proximal"\nmetric = "adam"')

"""Magnitude pruning: exact shares of zeros, nested masks, the schedule, and what it does not claim."""

from __future__ import annotations

import pytest
import torch

from pipeline.learning.download import compressed_bytes, download_bytes
from pipeline.methods.prune.magnitude import Masked, cubic, prunable, smallest
from pipeline.models.encoder import Encoder
from runtimes.errors import BadInput

TRAINED = "heal.epochs = 2\nheal.batch_size = 8"


def weights(model: Encoder) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if prunable(name, p, embeddings=True)}


def test_schedule_starts_at_nothing_has_seven_eighths_in_the_middle_and_ends_exactly():
    assert cubic(0, 100, 0.8) == 0
    assert cubic(50, 100, 0.8) == pytest.approx(0.8 * 7 / 8)
    assert cubic(100, 100, 0.8) == 0.8
    assert cubic(170, 100, 0.8) == 0.8
    rising = [cubic(step, 100, 0.8) for step in range(101)]
    assert rising == sorted(rising)


@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.5, 0.99])
def test_mask_takes_exactly_the_smallest(sparsity):
    weight = torch.randn(17, 13)
    mask = smallest(weight, sparsity)
    gone = int(sparsity * weight.numel())
    assert int((~mask).sum()) == gone
    if gone > 0:
        assert weight[~mask].abs().max() <= weight[mask].abs().min()


def test_equal_weights_are_pruned_to_the_exact_number():
    assert int((~smallest(torch.ones(8, 8), 0.5)).sum()) == 32


def test_blocks_go_whole_and_by_their_sum():
    weight = torch.randn(6, 8)
    mask = smallest(weight, 0.5, (1, 4))
    runs = mask.view(6, 2, 4)
    assert ((runs.all(-1)) | (~runs).all(-1)).all()
    sums = weight.abs().view(6, 2, 4).sum(-1)
    assert sums[~runs.all(-1)].max() <= sums[runs.all(-1)].min()


@pytest.mark.parametrize("schedule", ["gradual", "one-shot", "random"])
def test_every_matrix_has_its_share_and_the_rest_is_spared(run_stages, trained, schedule):
    _, pruned = run_stages(f'use = "prune-magnitude"\nsparsity = 0.6\nschedule = "{schedule}"\n{TRAINED}')
    for name, weight in weights(pruned.model).items():
        assert int((weight == 0).sum()) == int(0.6 * weight.numel()), name
    for name in ("embeddings.position.weight", "heads.classifier.weight", "layers.0.attention_norm.weight", "layers.0.attention.query.bias"):
        assert (pruned.model.get_parameter(name) != 0).any()
        assert (pruned.model.get_parameter(name) == 0).float().mean() <= (trained.model.get_parameter(name) == 0).float().mean()


def test_table_is_pruned_only_if_asked_for(run_stages):
    _, pruned = run_stages(f'use = "prune-magnitude"\nsparsity = 0.5\nembeddings = false\n{TRAINED}')
    assert (pruned.model.embeddings.word.weight[1:] != 0).all()
    assert int((pruned.model.pooler.weight == 0).sum()) == pruned.model.pooler.weight.numel() // 2


def test_masks_are_nested_when_sparsity_rises(trained):
    masked = Masked(trained.model, True, (1, 1))
    earlier = None
    for sparsity in (0.1, 0.4, 0.7):
        masked.update(sparsity)
        now = {name: mask.clone() for name, mask in masked.named_masks().items()}
        if earlier is not None:
            assert all((mask <= earlier[name]).all() for name, mask in now.items())
        earlier = now


def test_random_masks_lose_more_than_magnitudes(run_stages):
    scores = {}
    for schedule in ("one-shot", "random"):
        ledger, _ = run_stages(f'use = "prune-magnitude"\nsparsity = 0.7\nschedule = "{schedule}"\nheal.epochs = 0')
        scores[schedule] = ledger.records[-1]["subjects"][0]["metrics"]["test"]["accuracy"]
    assert scores["random"] < scores["one-shot"]


def test_later_training_keeps_every_zero(run_stages):
    magnitude = f'use = "prune-magnitude"\nsparsity = 0.6\n{TRAINED}'
    gates = 'use = "prune-gates"\nffn = 0.25\nselect = "gain"\nmultiple_of = 1\nheal.epochs = 1\nheal.batch_size = 8'
    _, before = run_stages(magnitude)
    _, after = run_stages(magnitude, gates)
    for part in ("query", "key", "value", "output"):
        name = f"layers.1.attention.{part}.weight"
        old, new = before.model.get_parameter(name), after.model.get_parameter(name)
        assert ((old == 0) <= (new == 0)).all()
        assert not torch.equal(old, new), "the others learned"


def test_zeros_make_the_download_smaller_and_nothing_else(run_stages, trained):
    ledger, pruned = run_stages(f'use = "prune-magnitude"\nsparsity = 0.6\n{TRAINED}')
    assert download_bytes(pruned.model) < 0.8 * download_bytes(trained.model)
    subject = ledger.records[-1]["subjects"][0]
    assert subject["unique_params"] == sum(p.numel() for p in trained.model.parameters())
    assert any("zstd -19" in note and "speed are as before" in note for note in ledger.records[-1]["notes"])
    assert compressed_bytes(bytes(100_000)) < 200


@pytest.mark.parametrize("options", ["sparsity = 1.0", "sparsity = -0.1", 'schedule = "cubic"'])
def test_bad_options_are_refused(run_stages, options):
    with pytest.raises(BadInput, match="prune-magnitude"):
        run_stages(f'use = "prune-magnitude"\n{options}')

"""Sharing: one set of weights in several layers or places, stored once, with the gradients of all uses."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from pipeline.methods.share.layers import group_owners, share_layers, untied
from pipeline.methods.share.quaternion import energy_kept, nearest_blocks, to_dense, to_quaternions
from pipeline.models.encoder import count_unique_parameters
from pipeline.models.hub import save_encoder
from pipeline.models.surgery import layer_matrices
from runtimes.errors import BadInput

QUICK = "transfer.epochs = 1\nheal.epochs = 1\nheal.batch_size = 8"
PARTS = {"all": 4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32, "attention": 4 * (32 * 32 + 32), "ffn": 2 * 32 * 64 + 64 + 32}
"""Parameters of a layer that are shared."""


def test_group_of_a_layer_is_alberts():
    assert group_owners(6, 1) == [0] * 6
    assert group_owners(6, 2) == [0, 0, 0, 3, 3, 3]
    assert group_owners(6, 4) == [0, 0, 2, 3, 3, 5]
    assert group_owners(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("share", PARTS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_unique_parameters_fall_by_what_is_shared(trained, share, groups):
    shared = share_layers(trained.model, share, groups, "first")
    assert count_unique_parameters(trained.model) - count_unique_parameters(shared) == (4 - groups) * PARTS[share]


@pytest.mark.parametrize("share", PARTS)
@pytest.mark.parametrize("start", ["first", "last", "mean"])
def test_a_group_starts_as_it_is_told(trained, share, start):
    shared = share_layers(trained.model, share, 2, start)
    own = untied(shared)
    name = {"all": "attention.query", "attention": "attention.query", "ffn": "ffns.0.up"}[share]
    old = [trained.model.get_parameter(f"layers.{i}.{name}.weight") for i in range(4)]
    expected = {"first": old[0], "last": old[1], "mean": (old[0] + old[1]) / 2}[start]
    for layer in (0, 1):
        assert torch.equal(own.get_parameter(f"layers.{layer}.{name}.weight"), expected)
    norm = [trained.model.get_parameter(f"layers.{i}.ffns.0.norm.weight") for i in range(4)]
    if share != "all":
        assert all(torch.equal(own.get_parameter(f"layers.{i}.ffns.0.norm.weight"), norm[i]) for i in range(4)), "norms stay each layer's own"


def test_as_many_groups_as_layers_changes_nothing(trained):
    ids = torch.tensor([[2, 40, 41, 3]])
    for share in PARTS:
        assert torch.equal(share_layers(trained.model, share, 4, "first")(ids).logits, trained.model(ids).logits)


@pytest.mark.parametrize("share", PARTS)
def test_gradient_of_a_shared_tensor_is_the_sum_over_its_uses(trained, share):
    shared = share_layers(trained.model, share, 1, "first")
    apart = untied(shared)
    ids = torch.tensor([[2, 40, 41, 42, 3]])
    for model in (shared, apart):
        functional.cross_entropy(model(ids).logits, torch.tensor([1])).backward()
    name = "ffns.0.down.weight" if share == "ffn" else "attention.value.weight"
    total = sum(apart.get_parameter(f"layers.{i}.{name}").grad for i in range(4))
    assert torch.allclose(shared.get_parameter(f"layers.0.{name}").grad, total, atol=1e-6)


@pytest.mark.parametrize("share", PARTS)
def test_stage_shares_heals_and_stores_once(run_stages, trained, share, tmp_path):
    _, made = run_stages(f'use = "share-layers"\nshare = "{share}"\ngroups = 2\n{QUICK}')
    model = made.model
    assert model.config.shares
    save_encoder(model, tmp_path)
    stored = sum(t.numel() for t in load_file(tmp_path / "model.safetensors").values())
    assert stored == count_unique_parameters(model) == count_unique_parameters(trained.model) - 2 * PARTS[share]
    name = "layers.0.attention.query.weight"
    assert not torch.equal(untied(model).get_parameter(name), trained.model.get_parameter(name)), "it learned"


def test_embeddings_may_be_factorized_too(run_stages, trained):
    _, made = run_stages(f'use = "share-layers"\nembedding_rank = 8\n{QUICK}')
    assert made.model.embeddings.word.weight.shape == (trained.model.config.vocab_size, 8)
    assert len(made.model.layers) == 1


def test_more_groups_than_layers_and_unequal_layers_are_refused(run_stages):
    with pytest.raises(BadInput, match="groups: 5, but the model has 4 layers"):
        run_stages('use = "share-layers"\ngroups = 5')
    with pytest.raises(BadInput, match="cannot follow prune-heads, which leaves layers of unequal shape"):
        run_stages('use = "prune-heads"', 'use = "share-layers"')


# --- quaternions ------------------------------------------------------------------------------------------------------


def test_layers_have_a_quarter_of_the_weights(trained):
    made = to_quaternions(trained.model)
    for name in layer_matrices(trained.model):
        assert made.get_submodule(name).blocks.numel() * 4 == trained.model.get_submodule(name).weight.numel()
        assert torch.equal(made.get_submodule(name).bias, trained.model.get_submodule(name).bias)


def test_model_of_quaternions_is_its_dense_form(trained):
    made = to_quaternions(trained.model)
    ids = torch.tensor([[2, 40, 41, 42, 3]])
    assert (made(ids).logits - to_dense(made)(ids).logits).abs().max() < 1e-5


def test_quaternion_model_starts_at_the_nearest_and_survives_the_trip(trained):
    made = to_quaternions(trained.model)
    again = to_quaternions(to_dense(made))
    for name in layer_matrices(made):
        assert torch.allclose(again.get_submodule(name).blocks, made.get_submodule(name).blocks, atol=1e-6)
        weight = trained.model.get_submodule(name).weight.detach()
        assert 0.1 < energy_kept(weight, made.get_submodule(name).weight.detach()) < 0.5
        worse = made.get_submodule(name).weight.detach() + 0.01 * to_dense(again).get_submodule(name).weight.detach()
        assert (weight - made.get_submodule(name).weight).norm() < (weight - worse).norm()


def test_quaternion_stage_learns(run_stages):
    ledger, made = run_stages('use = "quaternion"\ntransfer.epochs = 4\nheal.epochs = 4\nheal.batch_size = 8\nheal.learning_rate = 3e-3')
    assert made.model.config.quaternion
    record = ledger.records[-1]
    before = next(float(n.split()[3]) for n in record["notes"] if n.startswith("before healing"))
    assert record["subjects"][0]["metrics"]["test"]["accuracy"] > 60
    assert record["subjects"][0]["metrics"]["validation"]["accuracy"] >= before


def test_width_that_is_no_multiple_of_four_is_refused(run_stages):
    with pytest.raises(BadInput, match="multiples of 4"):
        run_stages('use = "prune-neurons"\nffn = 0.4\nmultiple_of = 5\nrounds = 1\nheal.epochs = 0', 'use = "quaternion"')


BREAKING = ("prune-heads", "prune-gates", "prune-neurons", "prune-magnitude", "prune-proximal", "factorize-svd", "factorize-flop")


@pytest.mark.parametrize("stage", BREAKING)
def test_what_would_break_the_pattern_is_refused_before_training(run_stages, stage):
    with pytest.raises(BadInput, match=rf"{stage}: cannot follow quaternion"):
        run_stages('use = "quaternion"', f'use = "{stage}"')


def test_blocks_of_a_quaternion_matrix_are_found_again():
    torch.manual_seed(0)
    blocks = torch.randn(8, 3)
    from pipeline.models.linear import Quaternion

    module = Quaternion(12, 8)
    module.blocks.data.copy_(blocks)
    assert torch.allclose(nearest_blocks(module.weight.detach()), blocks, atol=1e-6)

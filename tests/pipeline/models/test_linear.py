"""A quaternion matrix multiplies quaternions, its nearest one is a projection, and thin matrices are their product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.methods.share.quaternion import energy_kept, nearest_blocks
from pipeline.models.config import EncoderConfig, layer_shape
from pipeline.models.encoder import Encoder
from pipeline.models.linear import BiasOnly, LowRank, Quaternion, make_linear

ONE, I_, J_, K_ = torch.eye(4, dtype=torch.float64)
SHAPES = [(4, 4), (8, 4), (4, 12), (16, 24)]


def product(a: Tensor, b: Tensor) -> Tensor:
    """Of two numbers a + b i + c j + d k, term by term from i i = j j = k k = i j k = -1."""
    (ar, ai, aj, ak), (br, bi, bj, bk) = a.tolist(), b.tolist()
    return torch.tensor(
        [
            ar * br - ai * bi - aj * bj - ak * bk,
            ar * bi + ai * br + aj * bk - ak * bj,
            ar * bj - ai * bk + aj * br + ak * bi,
            ar * bk + ai * bj - aj * bi + ak * br,
        ],
        dtype=torch.float64,
    )


def number(w: Tensor) -> Quaternion:
    """The map x -> w x of one quaternion."""
    made = Quaternion(4, 4, bias=False).double()
    made.blocks.data = w.reshape(4, 1).clone()
    return made


def random_quaternion_matrix(out: int, into: int) -> Tensor:
    torch.manual_seed(0)
    return Quaternion(into, out, bias=False).double().weight.detach()


def test_the_tables_of_i_j_and_k():
    for w, x, result in (
        (I_, I_, -ONE),
        (J_, J_, -ONE),
        (K_, K_, -ONE),
        (I_, J_, K_),
        (J_, K_, I_),
        (K_, I_, J_),
        (J_, I_, -K_),
        (K_, J_, -I_),
        (I_, K_, -J_),
    ):
        assert torch.equal(number(w)(x), result)
    for x in (ONE, I_, J_, K_):
        assert torch.equal(number(ONE)(x), x)
        assert torch.equal(number(x)(ONE), x)


def test_numbers_are_multiplied_as_quaternions_and_lengths_with_them():
    torch.manual_seed(0)
    for w, x in torch.randn(20, 2, 4, dtype=torch.float64):
        made = number(w)(x)
        assert torch.allclose(made, product(w, x), atol=1e-12)
        assert torch.allclose(made.norm(), w.norm() * x.norm())


@pytest.mark.parametrize("out, into", SHAPES)
def test_a_matrix_multiplies_quaternions_by_quaternions_and_adds_them_up(out, into):
    """Each feature quaternion lies spread over four quarters of the features, and so does each row of weights."""
    torch.manual_seed(1)
    layer = Quaternion(into, out, bias=False).double()
    x = torch.randn(into, dtype=torch.float64)
    w, features = layer.blocks.detach().reshape(4, out // 4, into // 4), x.reshape(4, into // 4)
    expected = torch.zeros(4, out // 4, dtype=torch.float64)
    for o in range(out // 4):
        for i in range(into // 4):
            expected[:, o] += product(w[:, o, i], features[:, i])
    assert torch.allclose(layer.weight @ x, expected.flatten(), atol=1e-12)
    assert torch.allclose(layer(x), expected.flatten(), atol=1e-12)


def test_products_associate():
    torch.manual_seed(2)
    a, b, x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.allclose(number(a)(number(b)(x)), number(number(a)(b).detach())(x), atol=1e-12)


@pytest.mark.parametrize("out, into", SHAPES)
def test_a_quarter_of_the_weights(out, into):
    layer = Quaternion(into, out, bias=False)
    assert 4 * sum(p.numel() for p in layer.parameters()) == nn.Linear(into, out, bias=False).weight.numel()
    assert layer.weight.shape == (out, into)
    assert sum(p.numel() for p in Quaternion(into, out).parameters()) == out * into // 4 + out


def test_every_weight_serves_in_four_places():
    layer = Quaternion(8, 8)
    torch.manual_seed(8)
    pull = torch.randn(8, 8)
    (layer.weight * pull).sum().backward()
    parts = pull.reshape(4, 2, 4, 2)  # [component of the result, o, component of x, i]
    real = sum(parts[c, :, c] for c in range(4))
    of_i = parts[1, :, 0] - parts[0, :, 1] + parts[3, :, 2] - parts[2, :, 3]  # i 1 = i, i i = -1, i j = k, i k = -j
    assert torch.allclose(layer.blocks.grad.reshape(4, 2, 2)[:2], torch.stack([real, of_i]), atol=1e-6)


def test_the_bias_is_added():
    layer = Quaternion(8, 4)
    nn.init.normal_(layer.bias)
    x = torch.randn(3, 5, 8)
    assert torch.allclose(layer(x), x @ layer.weight.T + layer.bias, atol=1e-6)


@pytest.mark.parametrize("out, into", [(6, 8), (8, 6), (2, 2)])
def test_widths_that_are_no_quaternions_are_refused(out, into):
    with pytest.raises(ValueError, match="multiples of 4"):
        Quaternion(into, out)


# --- the nearest quaternion matrix ------------------------------------------------------------------------------------


def nearest(weight: Tensor) -> Tensor:
    out, into = weight.shape
    made = Quaternion(into, out, bias=False).to(weight.dtype)
    made.blocks.data = nearest_blocks(weight)
    return made.weight.detach()


@pytest.mark.parametrize("out, into", SHAPES)
def test_what_the_projection_loses_is_orthogonal_to_every_quaternion_matrix(out, into):
    torch.manual_seed(3)
    weight = torch.randn(out, into, dtype=torch.float64)
    lost = weight - nearest(weight)
    layer = Quaternion(into, out, bias=False).double()
    for position in range(layer.blocks.numel()):
        layer.blocks.data = torch.zeros(out * into // 4, dtype=torch.float64).index_fill(0, torch.tensor(position), 1.0).reshape(out, into // 4)
        assert abs((lost * layer.weight.detach()).sum()) < 1e-12
    assert lost.norm() > 0.1 * weight.norm()


@pytest.mark.parametrize("out, into", SHAPES)
def test_projecting_twice_is_projecting_once(out, into):
    torch.manual_seed(4)
    once = nearest(torch.randn(out, into, dtype=torch.float64))
    assert torch.allclose(nearest(once), once, atol=1e-14)
    own = random_quaternion_matrix(out, into)
    assert torch.allclose(nearest(own), own, atol=1e-14)
    assert energy_kept(own, nearest(own)) == pytest.approx(1.0)


def test_a_random_matrix_keeps_a_quarter_of_its_energy():
    torch.manual_seed(5)
    weight = torch.randn(256, 192)
    assert energy_kept(weight, nearest(weight)) == pytest.approx(0.25, abs=0.01)


# --- thin matrices, and none ------------------------------------------------------------------------------------------


def test_two_thin_matrices_act_as_their_product():
    torch.manual_seed(6)
    layer = LowRank(12, 20, 3)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, 12)
    assert layer.weight.shape == (20, 12)
    assert torch.linalg.matrix_rank(layer.weight.detach()) == 3
    assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
    assert sum(p.numel() for p in layer.parameters()) == 3 * (12 + 20) + 20
    assert LowRank(12, 20, 3, bias=False).bias is None


def test_a_map_that_reads_nothing_gives_its_bias():
    layer = BiasOnly(6)
    assert torch.equal(layer.bias, torch.zeros(6))
    nn.init.normal_(layer.bias)
    assert torch.equal(layer(torch.zeros(2, 3, 0)), layer.bias.expand(2, 3, 6))
    assert sum(p.numel() for p in layer.parameters()) == 6
    layer(torch.zeros(2, 3, 0)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((6,), 6.0))


@pytest.mark.parametrize(
    "options, kind",
    [
        ((8, 4), nn.Linear), ((8, 4, 2), LowRank), ((8, 4, None, True), Quaternion), ((0, 4), BiasOnly), ((0, 4, 2), BiasOnly),
        ((0, 4, None, True), BiasOnly),
    ],
)  # fmt: skip
def test_whichever_is_asked_for_is_made(options, kind):
    made = make_linear(*options)
    assert type(made) is kind
    assert made(torch.zeros(3, options[0])).shape == (3, 4)
    assert made.bias.shape == (4,)


def test_products_of_quaternions_are_refused():
    with pytest.raises(ValueError, match="leave ranks out"):
        EncoderConfig(layers=[layer_shape(4, 8, [32], {"ffns.0.up": 4})], quaternion=True)


def test_a_fresh_encoder_of_quaternions_starts_with_the_asked_spread():
    torch.manual_seed(7)
    model = Encoder(EncoderConfig(vocab_size=9, hidden_size=64, layers=[layer_shape(4, 16, [256])], quaternion=True, initializer_range=0.05))
    for name in ("attention.query", "ffns.0.up", "ffns.0.down"):
        assert model.layers[0].get_submodule(name).weight.std().item() == pytest.approx(0.05, rel=0.05)

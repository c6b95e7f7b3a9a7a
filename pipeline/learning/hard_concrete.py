"""Gates that can close: the hard-concrete distribution and a constraint on how many stay open.

Source: Louizos, Welling, Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization", arXiv:1712.01312
(eq. 10-12); the augmented Lagrangian on the size is that of Wang, Wohlwend, Lei 2020 (FLOP), arXiv:1910.04732 §3.2.

A gate is a random number in [0, 1] with probability mass on both ends::

    u ~ U(0, 1)
    s = sigmoid((log u - log(1 - u) + log_alpha) / beta)
    z = min(1, max(0, s (zeta - gamma) + gamma))          gamma = -0.1, zeta = 1.1
    P(z > 0) = sigmoid(log_alpha - beta log(-gamma / zeta))

Sums of P(z > 0) are differentiable, so the number of open gates can be driven to a target by gradient descent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

GAMMA, ZETA = -0.1, 1.1
"""How far the distribution is stretched beyond 0 and 1."""
_CLIP = 1e-6


def sample(log_alpha: Tensor, beta: float) -> Tensor:
    """A random gate for each log_alpha."""
    u = torch.rand_like(log_alpha).clamp(_CLIP, 1 - _CLIP)
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / beta)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def probability_open(log_alpha: Tensor, beta: float) -> Tensor:
    """P(z > 0)."""
    return torch.sigmoid(log_alpha - beta * math.log(-GAMMA / ZETA))


def decided(log_alpha: Tensor) -> Tensor:
    """The gate without chance: min(1, max(0, sigmoid(log_alpha) (zeta - gamma) + gamma))."""
    return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient has the other sign."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient


class SizeConstraint(nn.Module):
    """lambda_1 (s - t) + lambda_2 (s - t)^2 for a sparsity s and its target t: added to a loss that is minimised, while both
    multipliers, which start at 0, are maximised. Their gradients are reversed, so that one optimizer does both."""

    def __init__(self) -> None:
        super().__init__()
        self.multipliers = nn.Parameter(torch.zeros(2))

    def forward(self, sparsity: Tensor, target: float) -> Tensor:
        linear, square = _Reversed.apply(self.multipliers)
        distance = sparsity - target
        return linear * distance + square * distance.square()

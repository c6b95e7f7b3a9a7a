"""Linear maps with fewer weights than a dense matrix has, and one function that makes whichever is asked for.

Shapes: x [..., in] -> [..., out].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

HAMILTON = torch.zeros(4, 4, 4)
"""[c, a, b]: how much W_b x_a counts in component c of w (x) x, with components r, i, j, k."""
for c, row in enumerate(
    [
        [(0, 0, 1), (1, 1, -1), (2, 2, -1), (3, 3, -1)],  # r = Wr xr - Wi xi - Wj xj - Wk xk
        [(0, 1, 1), (1, 0, 1), (2, 3, 1), (3, 2, -1)],  # i = Wr xi + Wi xr + Wj xk - Wk xj
        [(0, 2, 1), (1, 3, -1), (2, 0, 1), (3, 1, 1)],  # j = Wr xj - Wi xk + Wj xr + Wk xi
        [(0, 3, 1), (1, 2, 1), (2, 1, -1), (3, 0, 1)],  # k = Wr xk + Wi xj - Wj xi + Wk xr
    ]
):
    for b, a, sign in row:
        HAMILTON[c, a, b] = sign


class LowRank(nn.Module):
    """outer(inner x): a matrix [out, in] of rank r as [out, r] times [r, in]."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(in_features, rank, bias=False)
        self.outer = nn.Linear(rank, out_features, bias=bias)

    @property
    def weight(self) -> Tensor:
        """The product [out, in]."""
        return self.outer.weight @ self.inner.weight

    @property
    def bias(self) -> Tensor | None:
        return self.outer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))


class Quaternion(nn.Module):
    """The Hamilton product of a matrix of quaternions with x, whose features are quaternions too.

    Source: Tay et al. 2019, arXiv:1906.04393 eq. 4-5. ``blocks`` [out, in/4] holds W_r, W_i, W_j, W_k [out/4, in/4] one
    below the other; x holds its components side by side.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        if in_features % 4 or out_features % 4:
            raise ValueError(f"a quaternion matrix of {out_features} x {in_features}: both must be multiples of 4")
        self.blocks = nn.Parameter(torch.empty(out_features, in_features // 4))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.normal_(self.blocks, std=1 / math.sqrt(in_features))

    @property
    def weight(self) -> Tensor:
        """The real matrix [out, in] that does the same."""
        out, quarter = self.blocks.shape
        expanded = torch.einsum("cab,boi->coai", HAMILTON.to(self.blocks), self.blocks.reshape(4, out // 4, quarter))
        return expanded.reshape(out, 4 * quarter)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class BiasOnly(nn.Linear):
    """A map that reads nothing, [..., 0] -> [..., out]: what a layer without heads, or an FFN without units, still adds."""

    def __init__(self, out_features: int) -> None:
        super().__init__(0, out_features)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)


def make_linear(in_features: int, out_features: int, rank: int | None = None, quaternion: bool = False) -> nn.Module:
    """A dense map with bias, one of rank ``rank``, or a quaternion one; with ``in_features`` 0 the bias is all there is."""
    if in_features == 0:
        return BiasOnly(out_features)
    if rank is not None:
        return LowRank(in_features, out_features, rank)
    return Quaternion(in_features, out_features) if quaternion else nn.Linear(in_features, out_features)
